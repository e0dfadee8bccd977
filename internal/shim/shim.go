// Package shim is the process that owns one VM, and the manager's handle on
// it.
//
// A manager starts a shim for each VM (Spawn) and talks to it over a socket.
// The shim makes the machine with a backend driver, runs the commands, keeps
// the deadline, and frees everything at the end. It is process 1 of a process
// namespace of its own and has a mount namespace of its own (an ordinary
// user's shim a user namespace too), which gives what no cleanup code can:
// when the shim is gone, however it went, the kernel has killed every process
// of the VM and dropped every mount. What is left then are the VM's directory
// and its control groups, which carry its vm_id and which anybody may reclaim.
//
// Beside a VM's directory lies a file, <vm_id>.lock, that is locked (flock) for
// as long as the VM has an owner: first by the manager that makes it, then,
// through the same open file, by the shim. Whoever can take the lock has found
// a VM whose owner is dead. This holds across reboots and reused process
// numbers, with nothing to keep up to date. The file is made before the
// directory and removed after it, so a directory without one is garbage.
//
// One thing the lock cannot say: the kernel closes a dying shim's descriptors
// just before it kills the processes of its namespace. So a shim writes into
// the file which process it is, and whoever takes the lock of an orphan waits
// for the last of that.
//
// The VM of a shim belongs to the connection: when the manager closes it or
// dies, the shim deletes the VM and ends.
package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"pyro/internal/limits"
	"pyro/internal/rmtree"
	"pyro/internal/vm"
)

// role is the argument by which a program is told to be a shim; the directory
// of its VM follows.
const role = "shim"

// IsRole reports whether a program with these arguments is to be a shim, and
// call Main.
func IsRole(args []string) bool { return len(args) == 3 && args[1] == role }

// The descriptors that a shim is born with.
const (
	controlFD = 3
	lockFD    = 4
)

const lockSuffix = ".lock"

// errLost says that a reclaimer took a lock file for an orphan's between its
// making and its locking, which the maker sees at once.
var errLost = errors.New("the vm's lock was reclaimed while it was made")

// Claim is the right to a VM's resources on the host: its directory, its lock
// and what is named after it. Whoever makes a VM has one, and whoever finds
// that a VM's owner is dead.
type Claim struct {
	ID  vm.ID
	Dir string

	lock *os.File
}

// NewClaim makes the directory and the lock of a new VM below parent.
func NewClaim(parent string, id vm.ID) (*Claim, error) {
	dir := filepath.Join(parent, string(id))
	f, err := newLock(dir + lockSuffix)
	if err != nil {
		return nil, fmt.Errorf("make the vm's lock: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		err = fmt.Errorf("make the vm's directory: %w", err)
		return nil, errors.Join(err, os.Remove(dir+lockSuffix), f.Close())
	}
	return &Claim{ID: id, Dir: dir, lock: f}, nil
}

// newLock makes a lock file at path, which must not exist, and returns it
// locked. Where the filesystem can, the file has its name only once it is
// locked; elsewhere a reaper may be quicker, which is seen here and an error.
func newLock(path string) (*os.File, error) {
	fd, err := unix.Open(filepath.Dir(path), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return lockInPlace(path)
	}
	f := os.NewFile(uintptr(fd), path)
	err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// lockInPlace is newLock where files always have names.
func lockInPlace(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil && unlinked(f) {
		err = errLost
	}
	if err != nil {
		return nil, errors.Join(err, os.Remove(path), f.Close())
	}
	return f, nil
}

// logPath is where the VM's shim writes what it has to say.
func (c *Claim) logPath() string { return filepath.Join(c.Dir, "shim.log") }

// Orphans returns the VMs below dir, the directory that holds all of them,
// whose owner is dead. Each must be released; until then nobody else is told
// of it.
func Orphans(dir string) ([]*Claim, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list the vms: %w", err)
	}
	var orphans []*Claim
	for _, e := range entries {
		name, isLock := strings.CutSuffix(e.Name(), lockSuffix)
		if !isLock {
			continue
		}
		id, err := vm.ParseID(name)
		if err != nil {
			continue // not ours
		}
		f, err := os.OpenFile(filepath.Join(dir, e.Name()), os.O_RDWR, 0)
		if err != nil {
			continue // gone in between
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil || unlinked(f) || dying(f) {
			f.Close() // it has an owner, is reclaimed already, or not quite dead
			continue
		}
		orphans = append(orphans, &Claim{ID: id, Dir: filepath.Join(dir, name), lock: f})
	}
	return orphans, nil
}

// Reclaim frees what a dead shim could not: its control groups and its
// directory. The VM's processes must be gone. It may be called again after an
// error, and does nothing where nothing is left.
func (c *Claim) Reclaim(ctx context.Context) error {
	if unlinked(c.lock) {
		return nil // its shim has removed all, the lock last
	}
	if err := limits.Reclaim(ctx, c.ID); err != nil {
		return fmt.Errorf("reclaim vm %s: %w", c.ID, err)
	}
	if err := removeDir(c.Dir); err != nil {
		return fmt.Errorf("reclaim vm %s: %w", c.ID, err)
	}
	return nil
}

// Release lets go of the VM: for good if it was reclaimed, else for the next
// who looks.
func (c *Claim) Release() error {
	defer c.lock.Close()
	if _, err := os.Lstat(c.Dir); err == nil {
		return nil
	}
	return removeLock(c.Dir)
}

// removeLock removes the lock of the VM whose directory was dir.
func removeLock(dir string) error {
	if err := os.Remove(dir + lockSuffix); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the vm's lock: %w", err)
	}
	return nil
}

// removeDir removes a VM's directory with all that is in it.
func removeDir(dir string) error {
	if err := rmtree.Remove(dir); err != nil {
		return fmt.Errorf("remove the vm's directory: %w", err)
	}
	return nil
}

// unlinked reports whether the open file f has lost its name.
func unlinked(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) != nil || st.Nlink == 0
}

// Exists reports whether the VM id below parent is claimed by anybody, alive
// or dead.
func Exists(parent string, id vm.ID) (bool, error) {
	_, err := os.Lstat(filepath.Join(parent, string(id)+lockSuffix))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for vm %s: %w", id, err)
	}
	return true, nil
}
