package environment

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pyro/internal/rmtree"
	"pyro/internal/vm"
)

// The names in a cache. All but the published directories belong to whoever
// holds the lock.
const (
	publishedPrefix = "host-"        // and a key: a published directory
	lockName        = "host.lock"    // never removed
	stagingName     = "host.staging" // what is being made
	trashName       = "host.trash"   // what is being removed
)

// The waits between two tries for the lock: a directory takes its maker some
// ten milliseconds.
const (
	minLockWait = time.Millisecond
	maxLockWait = 20 * time.Millisecond
)

// cache is a directory that holds published directories.
//
// One lock covers all changes. The kernel frees it when its holder dies, so
// whoever holds it knows that what it finds staged was left by a dead process:
// nothing depends on age or on process ids. Whoever waits for it mostly waits
// for the very directory that it needs. Readers take no lock, because
// directories come and go by rename only.
type cache struct {
	dir string // absolute
}

// published is where the directory for key is published.
func (c cache) published(key string) string { return filepath.Join(c.dir, publishedPrefix+key) }

// staging is where a directory is made.
func (c cache) staging() string { return filepath.Join(c.dir, stagingName) }

// has reports whether the directory for key is published. Only one of the
// caller's own counts: anybody else could change it under the VMs that use it.
func (c cache) has(key string) (bool, error) {
	dir := c.published(key)
	info, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, stateError("find the host environment", err)
	}
	if !info.IsDir() || info.Mode()&0o022 != 0 || int(info.Sys().(*syscall.Stat_t).Uid) != os.Geteuid() {
		return false, vm.Errorf(vm.CodeStateUnavailable, "%s is not a directory that only you can change", dir).
			WithHint("remove it, or set PYRO_BASE_DIR to a directory that is yours alone")
	}
	return true, nil
}

// publish makes what is staged the directory for key, or drops it where there
// is one. The caller holds the lock.
func (c cache) publish(key string) error {
	err := os.Rename(c.staging(), c.published(key))
	if errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST) {
		_, err = c.has(key)
		return errors.Join(err, c.clear())
	}
	return stateError("publish the host environment", err)
}

// clear removes what a dead process left half made or half removed. The caller
// holds the lock.
func (c cache) clear() error {
	return errors.Join(removeTree(c.staging()), removeTree(filepath.Join(c.dir, trashName)))
}

// Collect removes the directories of the host environment in cacheDir that no
// one needs: all but the newest and those that inUse reports, which is called
// with what was in Root.Dir. It removes nothing while an environment is being
// prepared there; a later call does.
//
// A directory is in use from the moment Host returns it, so inUse must know by
// then, or its caller must be ready to call Host again when the directory is
// gone. That can only happen where the machine's state changed between the two
// calls.
func Collect(cacheDir string, inUse func(dir string) bool) error {
	cacheDir, err := filepath.Abs(cacheDir)
	if err != nil {
		return fmt.Errorf("locate the cache: %w", err)
	}
	c := cache{dir: cacheDir}
	l, err := c.tryLock()
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(c.collectLocked(inUse), l.unlock())
}

// collectLocked is Collect; the caller holds the lock.
func (c cache) collectLocked(inUse func(dir string) bool) error {
	if err := c.clear(); err != nil {
		return err
	}
	dirs, err := c.byAge()
	if err != nil || len(dirs) == 0 {
		return err
	}
	var errs []error
	for _, dir := range dirs[:len(dirs)-1] {
		if !inUse(dir) {
			errs = append(errs, c.remove(dir))
		}
	}
	return errors.Join(errs...)
}

// byAge lists the published directories, the newest last.
func (c cache) byAge() ([]string, error) {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return nil, stateError("list the cache", err)
	}
	var dirs []string
	made := map[string]time.Time{}
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), publishedPrefix) {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return nil, stateError("list the cache", err)
		}
		dir := filepath.Join(c.dir, e.Name())
		dirs, made[dir] = append(dirs, dir), info.ModTime()
	}
	slices.SortFunc(dirs, func(a, b string) int {
		return made[a].Compare(made[b])
	})
	return dirs, nil
}

// remove removes a published directory. It is renamed first, so that no one
// finds half of it.
func (c cache) remove(dir string) error {
	trash := filepath.Join(c.dir, trashName)
	if err := os.Rename(dir, trash); err != nil {
		return stateError("remove an old host environment", err)
	}
	return removeTree(trash)
}

// removeTree removes path with all below it.
func removeTree(path string) error {
	return stateError("remove what is not needed", rmtree.Remove(path))
}

// errLocked says that another process holds the lock.
var errLocked = errors.New("another process holds the lock")

// lockFile is a held lock.
type lockFile struct{ f *os.File }

// unlock frees the lock. It does not rely on closing alone: a process that is
// being started holds a copy of every descriptor for a moment.
func (l lockFile) unlock() error {
	err := unix.Flock(int(l.f.Fd()), unix.LOCK_UN)
	return errors.Join(err, l.f.Close())
}

// lock makes the cache where it does not exist and waits for its lock.
func (c cache) lock(ctx context.Context) (lockFile, error) {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return lockFile{}, stateError("make the cache", err)
	}
	for wait := minLockWait; ; wait = min(2*wait, maxLockWait) {
		l, err := c.tryLock()
		if !errors.Is(err, errLocked) {
			return l, err
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return lockFile{}, fmt.Errorf("wait for another process to prepare the host environment in %s: %w", c.dir, ctx.Err())
		case <-timer.C:
		}
	}
}

// tryLock takes the lock, or fails with errLocked.
func (c cache) tryLock() (lockFile, error) {
	path := filepath.Join(c.dir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return lockFile{}, stateError("lock the cache", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err == nil {
		return lockFile{f}, nil
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = errLocked
	} else {
		err = stateError("lock the cache", &os.PathError{Op: "flock", Path: path, Err: err})
	}
	return lockFile{}, errors.Join(err, f.Close())
}

// stateError is a failure to write what pyro keeps on disk, with what a person
// can do about it; nil for nil.
func stateError(op string, err error) error {
	if err == nil {
		return nil
	}
	var hint string
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		hint = "free some space there, or set PYRO_BASE_DIR to a directory on another disk"
	case errors.Is(err, syscall.EROFS), errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.ENOTDIR):
		hint = "set PYRO_BASE_DIR to a directory that you can write"
	default:
		return fmt.Errorf("%s: %w", op, err)
	}
	return vm.Errorf(vm.CodeStateUnavailable, "%s: %w", op, err).WithHint(hint)
}
