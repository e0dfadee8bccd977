package limits

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// chooseRlimit decides whether RLIMIT_NPROC can bound the VM's tasks. Since
// Linux 5.14 the kernel counts the tasks of a user per user namespace, and of a
// namespace nested in another in both; a shim with a user namespace of its own
// therefore has a count of its own, whatever else the user is running. Linux
// 6.18 was seen to stop a fork bomb in such a namespace, and in one nested in
// it, at the limit, with 400 other processes of the same user around.
//
// The limit is set on the VM's processes alone (Confine), never on the caller:
// they have one count, and a Go program that cannot start a thread aborts.
func (l *Limits) chooseRlimit() string {
	release, err := os.ReadFile(filepath.Join(l.sys.proc, "sys/kernel/osrelease"))
	if err != nil {
		return "none: the kernel's version cannot be read"
	}
	if !atLeast(string(release), 5, 14) {
		return "none: Linux before 5.14 counts tasks per user, not per VM"
	}
	uids, err := os.ReadFile(filepath.Join(l.sys.proc, "self/uid_map"))
	if err != nil {
		return "none: the user namespace cannot be read"
	}
	// ID inside, ID outside, how many: user_namespaces(7).
	switch f := strings.Fields(string(uids)); {
	case len(f) != 3 || f[2] != "1":
		return "none: RLIMIT_NPROC needs a user namespace for the VM alone"
	case f[1] == "0":
		return "none: Linux does not hold root to RLIMIT_NPROC"
	}
	l.nproc = uint64(l.want.tasks)
	return Rlimit
}

// atLeast compares a kernel release such as 6.18.44-fc with major.minor.
func atLeast(release string, major, minor int) bool {
	var a, b int
	if _, err := fmt.Sscanf(release, "%d.%d", &a, &b); err != nil {
		return false
	}
	return a > major || a == major && b >= minor
}

// limitTasks sets RLIMIT_NPROC of a process and returns 1 if it was higher.
func limitTasks(pid int, n uint64) (int, error) {
	var old unix.Rlimit
	err := unix.Prlimit(pid, unix.RLIMIT_NPROC, nil, &old)
	if err == nil && old.Max > n {
		err = unix.Prlimit(pid, unix.RLIMIT_NPROC, &unix.Rlimit{Cur: min(old.Cur, n), Max: n}, nil)
	}
	switch {
	case gone(err):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("set RLIMIT_NPROC of process %s: %w", strconv.Itoa(pid), err)
	case old.Max > n:
		return 1, nil
	}
	return 0, nil
}
