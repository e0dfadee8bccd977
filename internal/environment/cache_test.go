package environment

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"pyro/internal/need"
	"pyro/internal/vm"
)

func TestHostIsPreparedOnce(t *testing.T) {
	h, cacheDir := newTree(t).debian(), filepath.Join(t.TempDir(), "a", "cache")
	first, err := h.host().prepare(t.Context(), cacheDir)
	check(t, err)
	mark := filepath.Join(first.Dir, "etc/mark")
	check(t, os.WriteFile(mark, nil, 0o644))
	second, err := h.host().prepare(t.Context(), cacheDir)
	check(t, err)
	if first.Dir != second.Dir {
		t.Errorf("prepared as %s and %s", first.Dir, second.Dir)
	}
	if _, err := os.Stat(mark); err != nil {
		t.Error("it was made again")
	}
	info, err := os.Stat(cacheDir)
	check(t, err)
	if info.Mode().Perm() != 0o700 {
		t.Errorf("the cache has mode %v", info.Mode())
	}
}

func TestHostTakesARelativeCache(t *testing.T) {
	h := newTree(t).debian()
	t.Chdir(t.TempDir())
	r, err := h.host().prepare(t.Context(), "cache")
	check(t, err)
	if !filepath.IsAbs(r.Dir) {
		t.Errorf("the root is %s", r.Dir)
	}
}

// TestHostIgnoresTheUmask also finds what a dead process left behind, with
// modes under which an ordinary user cannot remove it as it is.
func TestHostIgnoresTheUmask(t *testing.T) {
	h, cacheDir := newTree(t).debian(), t.TempDir()
	for _, name := range []string{stagingName, trashName} {
		dir := filepath.Join(cacheDir, name, "a", "b")
		check(t, os.MkdirAll(dir, 0o755))
		check(t, os.WriteFile(filepath.Join(dir, "c"), nil, 0))
		check(t, os.Symlink(h.root, filepath.Join(dir, "d")))
		check(t, os.Chmod(dir, 0))
		check(t, os.Chmod(filepath.Dir(dir), 0o555))
	}
	before := listing(t, h.root)
	defer syscall.Umask(syscall.Umask(0o777))
	r, err := h.host().prepare(t.Context(), cacheDir)
	check(t, err)
	same(t, listing(t, r.Dir), always, debianFiles)
	same(t, listing(t, h.root), before)
	for _, name := range []string{stagingName, trashName} {
		if _, err := os.Lstat(filepath.Join(cacheDir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", name, err)
		}
	}
}

func TestHostRefusesWhatOthersCanChange(t *testing.T) {
	for name, spoil := range map[string]func(dir string) error{
		"writable": func(dir string) error { return os.Chmod(dir, 0o777) },
		"link": func(dir string) error {
			return errors.Join(os.Rename(dir, dir+".real"), os.Symlink(dir+".real", dir))
		},
		"file":    func(dir string) error { return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600)) },
		"foreign": func(dir string) error { return os.Chown(dir, 12345, -1) },
	} {
		t.Run(name, func(t *testing.T) {
			if name == "foreign" && os.Geteuid() != 0 {
				need.Missing(t, need.Root, "only root can give a directory away")
			}
			h, cacheDir := newTree(t).debian(), t.TempDir()
			r, err := h.host().prepare(t.Context(), cacheDir)
			check(t, err)
			check(t, spoil(r.Dir))
			_, err = h.host().prepare(t.Context(), cacheDir)
			if e := vm.AsError(err); e == nil || e.Code != vm.CodeStateUnavailable || e.Hint == "" {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestHostWaitsForTheLockNoLongerThanItsContext(t *testing.T) {
	h, cacheDir := newTree(t).debian(), t.TempDir()
	l, err := cache{dir: cacheDir}.tryLock()
	check(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := h.host().prepare(ctx, cacheDir); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	check(t, l.unlock())
	_, err = h.host().prepare(t.Context(), cacheDir)
	check(t, err)
}

func TestHostTakesWhatItWaitedFor(t *testing.T) {
	h, c := newTree(t).debian(), cache{dir: t.TempDir()}
	l, err := c.lock(t.Context())
	check(t, err)
	waiting, once := make(chan struct{}), sync.Once{}
	done := make(chan error)
	go func() {
		ctx := waitContext{t.Context(), func() { once.Do(func() { close(waiting) }) }}
		_, err := h.host().prepare(hookContext{ctx, func() {
			if _, err := os.Stat(c.published(h.key())); err != nil {
				return
			}
			if _, err := os.Stat(c.staging()); err == nil {
				t.Error("it is made again")
			}
		}}, c.dir)
		done <- err
	}()
	<-waiting
	state, err := h.host().stage(t.Context(), c)
	check(t, err)
	check(t, c.publish(state.key))
	check(t, l.unlock())
	check(t, <-done)
}

func TestStateErrors(t *testing.T) {
	for _, test := range []struct {
		err  error
		code vm.Code
	}{
		{syscall.ENOSPC, vm.CodeStateUnavailable},
		{syscall.EDQUOT, vm.CodeStateUnavailable},
		{syscall.EROFS, vm.CodeStateUnavailable},
		{syscall.EACCES, vm.CodeStateUnavailable},
		{syscall.EPERM, vm.CodeStateUnavailable},
		{syscall.ENOTDIR, vm.CodeStateUnavailable},
		{syscall.EIO, vm.CodeInternal},
	} {
		err := stateError("make a file", &os.PathError{Op: "open", Path: "/x", Err: test.err})
		e := vm.AsError(err)
		if e.Code != test.code || (e.Hint != "") != (test.code == vm.CodeStateUnavailable) || !errors.Is(err, test.err) {
			t.Errorf("%v became %v with hint %q", test.err, e.Code, e.Hint)
		}
	}
	if stateError("x", nil) != nil {
		t.Error("no error became one")
	}
}

func TestHostWhereNothingCanBeWritten(t *testing.T) {
	h := newTree(t).debian()
	h.file("tmp/file", "", 0o644)
	cacheDirs := []string{h.at("tmp/file/cache")}
	if os.Geteuid() != 0 {
		h.dir("tmp/read-only", 0o555)
		cacheDirs = append(cacheDirs, h.at("tmp/read-only"), h.at("tmp/read-only/cache"))
	}
	for _, cacheDir := range cacheDirs {
		_, err := h.host().prepare(t.Context(), cacheDir)
		if e := vm.AsError(err); e == nil || e.Code != vm.CodeStateUnavailable || e.Hint == "" {
			t.Errorf("%s: error %v", cacheDir, err)
		}
	}
}

// publishedDirs publishes n directories of different states, the oldest first.
func publishedDirs(t *testing.T, h tree, cacheDir string, n int) []string {
	var dirs []string
	for i := range n {
		h.file("etc/timezone", fmt.Sprint(i), 0o644)
		r, err := h.host().prepare(t.Context(), cacheDir)
		check(t, err)
		when := longAgo.Add(time.Duration(i) * time.Hour)
		check(t, os.Chtimes(r.Dir, when, when))
		dirs = append(dirs, r.Dir)
	}
	return dirs
}

func TestCollect(t *testing.T) {
	h, cacheDir := newTree(t).debian(), t.TempDir()
	dirs := publishedDirs(t, h, cacheDir, 4)
	check(t, os.Chmod(filepath.Join(dirs[0], "etc/ssl"), 0o500))
	check(t, os.Mkdir(filepath.Join(cacheDir, stagingName), 0o700))
	others := []string{"image-1", "hostile", "host"}
	for _, name := range others {
		check(t, os.Mkdir(filepath.Join(cacheDir, name), 0o700))
	}
	check(t, Collect(cacheDir, func(dir string) bool { return dir == dirs[1] }))
	var want string
	for _, name := range append(others, filepath.Base(dirs[1]), filepath.Base(dirs[3]), lockName) {
		want += name + "\n"
	}
	entries, err := os.ReadDir(cacheDir)
	check(t, err)
	var got string
	for _, e := range entries {
		got += e.Name() + "\n"
	}
	same(t, got, want)
	r, err := h.host().prepare(t.Context(), cacheDir)
	check(t, err)
	if r.Dir != dirs[3] {
		t.Errorf("now it is %s, not %s", r.Dir, dirs[3])
	}
}

func TestCollectWithoutACache(t *testing.T) {
	check(t, Collect(filepath.Join(t.TempDir(), "none"), func(string) bool { return false }))
	check(t, Collect(t.TempDir(), func(string) bool { return false }))
}

func TestCollectLeavesAloneWhatIsBeingPrepared(t *testing.T) {
	h, cacheDir := newTree(t).debian(), t.TempDir()
	dirs := publishedDirs(t, h, cacheDir, 2)
	l, err := cache{dir: cacheDir}.tryLock()
	check(t, err)
	none := func(string) bool { return false }
	check(t, Collect(cacheDir, none))
	if _, err := os.Stat(dirs[0]); err != nil {
		t.Error(err)
	}
	check(t, l.unlock())
	check(t, Collect(cacheDir, none))
	if _, err := os.Stat(dirs[0]); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the old directory is still there: %v", err)
	}
}
