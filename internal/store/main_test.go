package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pyro/internal/need"
	"pyro/internal/vm"
)

// The variables that make this test binary another process of a test: see
// processes and inNamespace.
const (
	roleVar      = "STORE_TEST_ROLE"
	namespaceVar = "STORE_TEST_NAMESPACE"
)

// roles are what another process can be told to do with the database at path.
// It prints what the test wants to know.
var roles = map[string]func(ctx context.Context, path string) error{
	"open":   roleOpen,
	"insert": roleInsert,
	"update": roleUpdate,
	"hang":   roleHang,
	"locks":  roleLocks,
}

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVar); role != "" {
		// Wait for the word to start, so that all processes do at once.
		_, err := io.ReadAll(os.Stdin)
		if err == nil {
			err = roles[role](context.Background(), os.Args[1])
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// environ is the environment of another process, with variable added. The race
// detector would have each sleep for a second when it ends.
func environ(variable string) []string {
	return append(os.Environ(), variable, "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
}

// processes runs n processes in role at once, and returns what each printed.
// All must succeed.
func processes(t *testing.T, n int, role, path string) []string {
	t.Helper()
	start, release, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmds := make([]*exec.Cmd, n)
	out := make([]bytes.Buffer, n)
	failed := make([]bytes.Buffer, n)
	for i := range cmds {
		cmds[i] = exec.CommandContext(t.Context(), os.Args[0], path)
		cmds[i].Env = environ(roleVar + "=" + role)
		cmds[i].Stdin, cmds[i].Stdout, cmds[i].Stderr = start, &out[i], &failed[i]
		if err := cmds[i].Start(); err != nil {
			t.Fatal(err)
		}
	}
	start.Close()
	release.Close()
	printed := make([]string, n)
	for i, cmd := range cmds {
		if err := cmd.Wait(); err != nil {
			t.Errorf("process %d: %v: %s", i, err, &failed[i])
		}
		printed[i] = out[i].String()
	}
	return printed
}

// inNamespace reports whether the test is running in namespaces of its own,
// where it can mount. Where it is not, inNamespace runs it again in such a
// process, and fails if that fails; the test has nothing more to do then.
func inNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(namespaceVar) != "" {
		return true
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = environ(namespaceVar + "=1")
	cmd.SysProcAttr = need.Namespaces(t)
	out, err := cmd.CombinedOutput()
	t.Logf("in namespaces of its own:\n%s", out)
	if err != nil {
		t.Fatal(err)
	}
	return false
}

// mount mounts a tmpfs of some KiB, and unmounts it when the test ends.
func mount(t *testing.T, kib int) string {
	t.Helper()
	// Without this, root's mounts are seen outside as well.
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dk", kib)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// testStore opens a new database that is closed when the test ends.
func testStore(t testing.TB) *Store {
	t.Helper()
	return reopen(t, filepath.Join(t.TempDir(), "state.db"))
}

// reopen opens the database at path until the test ends.
func reopen(t testing.TB, path string) *Store {
	t.Helper()
	s, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// record returns a VM to insert.
func record() Record {
	now := time.Now()
	return Record{
		VM: vm.VM{
			ID: vm.NewID(), Profile: "debian-base", VCPUCount: 2, MemMiB: 512, TTLSeconds: 600,
			CreatedAt: vm.Time{Time: now}, ExpiresAt: vm.Time{Time: now.Add(10 * time.Minute)},
			State: vm.Created, Metadata: map[string]string{"kernel_image": "/a \"b\" ü", "rootfs_image": ""},
			Backend: vm.GVisor, Isolation: vm.IsolationGVisor,
		},
		Owner:  OwnerRun,
		BootID: "5c0f1d3e-8a54-4d0c-9d3b-0a3c1f2e4b5d",
	}
}

// insert adds a VM to s, however many there are.
func insert(t testing.TB, s *Store) Record {
	t.Helper()
	r := record()
	if err := s.Insert(t.Context(), r, 1<<30); err != nil {
		t.Fatal(err)
	}
	return r
}

// wantUnavailable checks that err is what a user gets to see when the database
// at path cannot be used: message names the path, and hint says what to do.
func wantUnavailable(t *testing.T, err error, path, message, hint string) {
	t.Helper()
	var e *vm.Error
	if !errors.Is(err, vm.CodeStateUnavailable) || !errors.As(err, &e) {
		t.Fatalf("error %v, want code %s", err, vm.CodeStateUnavailable)
	}
	t.Logf("%s\n\thint: %s", e.Message, e.Hint)
	if !strings.Contains(e.Message, path) || !strings.Contains(e.Message, message) {
		t.Errorf("message %q, want %q and the path %s", e.Message, message, path)
	}
	if !strings.Contains(e.Hint, hint) {
		t.Errorf("hint %q, want %q", e.Hint, hint)
	}
}
