package limits

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// system is what this package needs of the machine. Tests put a made-up tree
// of files in its place, and a harmless kill.
type system struct {
	proc string // where procfs is mounted
	pid  int    // the caller, the one process that is never limited

	// kill sends SIGKILL to every process of the process namespace except the
	// caller.
	kill func() error

	mkdir func(dir string) error
	rmdir func(dir string) error
	write func(file, value string) error // to a control file that exists
	// writable reports whether the caller may write to a file, or make
	// entries in a directory.
	writable func(path string) bool
	// delegated reports whether systemd has handed a cgroup over to whoever
	// runs in it.
	delegated func(dir string) bool
}

// host is the machine as it is, seen by a shim.
func host() (system, error) {
	self, err := os.Readlink("/proc/self")
	if err != nil {
		return system{}, fmt.Errorf("find the calling process in /proc: %w", err)
	}
	if os.Getpid() != 1 || self != "1" {
		return system{}, errors.New("limit processes: the caller is not process 1 of a process namespace with its own /proc")
	}
	return system{
		proc:      "/proc",
		pid:       1,
		kill:      func() error { return unix.Kill(-1, unix.SIGKILL) }, // spares process 1, its caller
		mkdir:     func(dir string) error { return os.Mkdir(dir, 0o755) },
		rmdir:     unix.Rmdir,
		write:     writeFile,
		writable:  func(path string) bool { return unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS) == nil },
		delegated: isDelegated,
	}, nil
}

// isDelegated looks for systemd's mark on a cgroup with Delegate=yes: the
// extended attribute user.delegate, or trusted.delegate before systemd 251
// (systemd's docs/CGROUP_DELEGATION.md).
func isDelegated(dir string) bool {
	var b [8]byte
	for _, name := range []string{"user.delegate", "trusted.delegate"} {
		if n, err := unix.Getxattr(dir, name, b[:]); err == nil && string(b[:n]) == "1" {
			return true
		}
	}
	return false
}

// writeFile writes to a control file. One call of write is one order to the
// kernel.
func writeFile(name, value string) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// processes lists the processes that /proc shows, the caller left out. It
// includes those that are dead but not yet waited for.
func (s system) processes() ([]int, error) {
	names, err := readNames(s.proc)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, name := range names {
		if name[0] < '1' || name[0] > '9' {
			continue
		}
		if pid, err := strconv.Atoi(name); err == nil && pid != s.pid {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// dead reports whether a process has nothing left that could run. A process
// whose first thread has ended looks like a zombie and may still be alive in
// its other threads.
func (s system) dead(pid int) bool {
	b, err := os.ReadFile(filepath.Join(s.proc, strconv.Itoa(pid), "stat"))
	if err != nil {
		return true
	}
	// The fields after the name, which is in parentheses and may hold any
	// character, begin with field 3 of proc_pid_stat(5), the state; field 20
	// is the number of threads.
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) < 18 {
		return true
	}
	return (f[0][0] == 'Z' || f[0][0] == 'X') && len(f[17]) == 1 && f[17][0] <= '1'
}

// readNames returns the names in a directory, without the inquiry about each
// entry that os.ReadDir sorts and keeps.
func readNames(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}
