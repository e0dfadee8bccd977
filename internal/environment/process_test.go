package environment

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"pyro/internal/vm"
)

// racer is a child that waits for a line before it prepares the environment.
type racer struct {
	*exec.Cmd
	start io.WriteCloser
	out   *bufio.Reader
}

func startRacer(t *testing.T, h tree, cacheDir string) racer {
	cmd := childCommand(t, "racer", h.root, cacheDir)
	cmd.Stderr = os.Stderr
	start, err := cmd.StdinPipe()
	check(t, err)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	r := racer{cmd, start, bufio.NewReader(out)}
	if line, err := r.out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("the child said %q, %v", line, err)
	}
	return r
}

func TestManyProcessesAtOnce(t *testing.T) {
	h, cacheDir := newTree(t).debian(), filepath.Join(t.TempDir(), "cache")
	for i := range 50 { // so that making it takes a while
		h.file(fmt.Sprintf("etc/fonts/%d", i), "x", 0o644)
	}
	racers := make([]racer, 4)
	for i := range racers {
		racers[i] = startRacer(t, h, cacheDir)
	}
	for _, r := range racers {
		check(t, r.start.Close())
	}
	for _, r := range racers {
		dir, err := r.out.ReadString('\n')
		check(t, errors.Join(err, r.Wait()))
		if want := (cache{dir: cacheDir}).published(h.key()) + "\n"; dir != want {
			t.Errorf("a child got %q, want %q", dir, want)
		}
	}
	entries, err := os.ReadDir(cacheDir)
	check(t, err)
	if len(entries) != 2 {
		t.Errorf("the cache holds %v", entries)
	}
}

func TestManyCallsAtOnceWhileTheHostChanges(t *testing.T) {
	h, cacheDir := newTree(t).debian(), t.TempDir()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10 {
				r, err := h.host().prepare(t.Context(), cacheDir)
				if err != nil {
					t.Error(err)
				} else if _, err := os.Stat(filepath.Join(r.Dir, "etc/passwd")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 10 {
		h.file(fmt.Sprintf("etc/fonts/%d", i), "x", 0o644)
		check(t, Collect(cacheDir, func(string) bool { return true }))
	}
	wg.Wait()
	_, err := os.Stat(filepath.Join(cacheDir, stagingName))
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something is staged: %v", err)
	}
}

// TestKilledWhileStaging kills a process that holds the lock and has half of a
// root staged: nothing but the staging directory may be left of it, and the
// next call must not be held up or misled by that.
func TestKilledWhileStaging(t *testing.T) {
	h, cacheDir := newTree(t).debian(), t.TempDir()
	cmd := childCommand(t, "stuck", h.root, cacheDir)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if line != "staging\n" {
		t.Fatalf("the child said %q, %v", line, err)
	}
	if _, err := (cache{dir: cacheDir}).tryLock(); !errors.Is(err, errLocked) {
		t.Fatalf("the child holds no lock: %v", err)
	}
	check(t, cmd.Process.Kill())
	cmd.Wait() // it was killed: that is its error
	before := listing(t, cacheDir)
	if !strings.Contains(before, stagingName+"/etc/alternatives") || strings.Contains(before, publishedPrefix) {
		t.Fatalf("the child left\n%s", before)
	}
	r, err := h.host().prepare(t.Context(), cacheDir)
	check(t, err)
	same(t, listing(t, r.Dir), always, debianFiles)
	if after := listing(t, cacheDir); strings.Contains(after, stagingName) {
		t.Errorf("what the child staged is still there:\n%s", after)
	}
}

// TestDisks prepares on disks that are too small or cannot be written, in
// mount namespaces of children.
func TestDisks(t *testing.T) {
	for role, cause := range map[string]error{
		"small disk":     syscall.ENOSPC,
		"read-only disk": syscall.EROFS,
	} {
		t.Run(role, func(t *testing.T) {
			h, cacheDir := newTree(t).debian(), t.TempDir()
			h.file("etc/services", strings.Repeat("x", 1<<20), 0o644)
			cmd := childCommand(t, role, h.root, cacheDir)
			cmd.SysProcAttr = &syscall.SysProcAttr{
				Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
				UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
				GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
			}
			var out bytes.Buffer
			cmd.Stdout = &out
			var exit *exec.ExitError
			if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Skipf("this machine allows no mounts in a user namespace: %v, %s", err, &out)
			}
			var e vm.Error
			check(t, json.Unmarshal(out.Bytes(), &e))
			if e.Code != vm.CodeStateUnavailable || e.Hint == "" || !strings.Contains(e.Message, cause.Error()) {
				t.Errorf("error %+v", e)
			}
		})
	}
}
