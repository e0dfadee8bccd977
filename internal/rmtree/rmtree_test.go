package rmtree

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// TestRemove runs as an ordinary user, whom permissions bind.
func TestRemove(t *testing.T) {
	if os.Geteuid() == 0 {
		asNobody(t)
		return
	}
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.Mkdir(outside, 0o500); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(t.TempDir(), "root")
	for _, dir := range []string{"a/b/c", "d", "e/f"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, dir, "file"), nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	for dir, mode := range map[string]os.FileMode{"a/b/c": 0, "a/b": 0o500, "a": 0, "d": 0o400, "e": 0o100} {
		if err := os.Chmod(filepath.Join(root, dir), mode); err != nil && !errors.Is(err, fs.ErrPermission) {
			t.Fatal(err)
		}
	}
	if err := Remove(root); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(root); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is there: %v", err)
	}
	if info, err := os.Stat(outside); err != nil || info.Mode().Perm() != 0o500 {
		t.Errorf("what a link led to was changed: %v, %v", info, err)
	}
	if err := Remove(root); err != nil {
		t.Errorf("removing nothing: %v", err)
	}
}

// asNobody runs the test again as an ordinary user, from a copy of this
// program that such a one may read.
func asNobody(t *testing.T) {
	t.Helper()
	dir, err := os.MkdirTemp("", "rmtree")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "test")
	binary, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = errors.Join(os.Chmod(dir, 0o777), os.WriteFile(program, binary, 0o700), os.Chmod(program, 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-test.run=^"+t.Name()+"$")
	cmd.Dir, cmd.Env = dir, []string{"TMPDIR=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("as an ordinary user: %v\n%s", err, out)
	}
}
