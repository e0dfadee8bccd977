package gvisor

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pyro/internal/backend"
	"pyro/internal/backend/backendtest"
	"pyro/internal/environment"
	"pyro/internal/need"
	"pyro/internal/nocgo"
	"pyro/internal/vm"
)

func TestMain(m *testing.M) {
	nocgo.Test()
	// The test's own program is the runsc of the sandboxes that it makes.
	Role(os.Args)
	os.Exit(m.Run())
}

// unlimited is a backend.Limiter that limits nothing.
type unlimited struct{}

func (unlimited) Confine(context.Context) error { return nil }

// TestConformance runs the suite in a process that is what the driver's real
// home is, a shim: process 1 of its namespace, with a /proc of its own.
func TestConformance(t *testing.T) {
	if os.Getpid() != 1 {
		asProcessOne(t)
		return
	}
	enterNamespaces(t)
	cache := t.TempDir()
	root, err := environment.Host(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	driver := New()
	backendtest.Run(t, func(*testing.T) backendtest.Harness {
		return backendtest.Harness{
			Driver:      driver,
			NewSpec:     func(t testing.TB) backend.Spec { return newSpec(t, root) },
			Isolated:    true,
			KillsOthers: true,
		}
	})
}

func newSpec(t testing.TB, root environment.Root) backend.Spec {
	return backend.Spec{
		ID:        vm.NewID(),
		Resources: vm.Resources{VCPUCount: 1, MemMiB: 256, TTLSeconds: 600},
		Dir:       t.TempDir(),
		Scratch:   t.TempDir(),
		Root:      root,
		Limits:    unlimited{},
	}
}

// asProcessOne runs the test again in namespaces of its own and passes on what
// it says.
func asProcessOne(t *testing.T, args ...string) {
	t.Helper()
	args = append([]string{"-test.run=^" + t.Name() + "$", "-test.v"}, args...)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.SysProcAttr = need.Namespaces(t)
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Fatalf("as process 1: %v\n%s", err, out)
	}
}

// enterNamespaces completes the namespaces that this process was born in.
func enterNamespaces(t *testing.T) {
	t.Helper()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		t.Fatal(err)
	}
}

// TestInit runs process 1 of the sandboxes on this machine's own kernel: it
// must be a valid program, and stay.
func TestInit(t *testing.T) {
	f, err := idleFile()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	path := filepath.Join(t.TempDir(), "init")
	if err := os.WriteFile(path, idleELF(), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// It sleeps in its own system call once it has set itself up.
	want := map[string]string{"amd64": "34 ", "arm64": "73 "}[runtime.GOARCH]
	waitFor(t, func() bool {
		now, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(cmd.Process.Pid), "syscall"))
		return err == nil && bytes.HasPrefix(now, []byte(want))
	})
	if ignored := ignoredSignals(t, cmd.Process.Pid); ignored&(1<<(unix.SIGCHLD-1)) == 0 {
		t.Error("SIGCHLD is not ignored: orphans would stay as zombies")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
}

// waitFor waits until done, and fails if that takes too long.
func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain")
		}
		time.Sleep(time.Millisecond)
	}
}

// ignoredSignals returns the set of signals that a process ignores.
func ignoredSignals(t *testing.T, pid int) uint64 {
	t.Helper()
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "SigIgn:\t")
	line, _, _ := strings.Cut(rest, "\n")
	set, err := strconv.ParseUint(line, 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return set
}
