package mock

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A mark says which command of which machine a process descends from. Being a
// child of something, or in its session or group, does not, for a daemon leaves
// all of those on purpose. A mark is the soft limit RLIMIT_LOCKS, which has had
// no effect since Linux 2.4.25: every process inherits it, no program has a
// reason to change it, and every process may read another's.
type mark uint64

const (
	// execBits is how many of a mark's bits number the command; the others
	// are the machine's.
	execBits = 24
	// marked is set in every mark, and keeps it beyond any real limit.
	marked mark = 1 << 61
)

// newMark returns the mark of a new machine.
func newMark() mark {
	var b [8]byte
	rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	random := mark(binary.NativeEndian.Uint64(b[:]))
	return marked | random&(marked-1).machine()
}

// exec returns the mark of a machine's nth command.
func (k mark) exec(n uint64) mark { return k | mark(n)&(1<<execBits-1) }

// machine returns the mark of the machine whose command k marks.
func (k mark) machine() mark { return k &^ (1<<execBits - 1) }

// put marks the process pid.
func (k mark) put(pid int) error {
	var limit unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_LOCKS, nil, &limit); err != nil {
		return err
	}
	limit.Cur = uint64(k)
	return unix.Prlimit(pid, unix.RLIMIT_LOCKS, &limit, nil)
}

// sighting is a marked process as it was seen.
type sighting struct {
	pid, parent int
	dead        bool // only its status is left to collect
}

// errGone says that a process ended while it was looked at.
var errGone = errors.New("the process has ended")

// scan calls visit with every process whose mark is in scope as soon as it has
// seen it, the newest first. It is complete if none of the processes that were
// there ended before it was looked at: one that did could have started another.
func scan(scope func(mark) bool, visit func(sighting) error) (complete bool, err error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return false, fmt.Errorf("list processes: %w", err)
	}
	names, err := proc.Readdirnames(-1)
	proc.Close()
	if err != nil {
		return false, fmt.Errorf("list processes: %w", err)
	}
	complete = true
	for _, name := range slices.Backward(names) {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue // not a process
		}
		s, ours, err := look(pid, scope)
		switch {
		case errors.Is(err, errGone):
			complete = false
		case err != nil:
			return false, fmt.Errorf("look at process %d: %w", pid, err)
		case ours:
			if err := visit(s); err != nil {
				return false, err
			}
		}
	}
	return complete, nil
}

// look reports whether the mark of process pid is in scope.
func look(pid int, scope func(mark) bool) (sighting, bool, error) {
	limits, err := readProc(pid, "limits")
	switch {
	case errors.Is(err, fs.ErrPermission):
		return sighting{}, false, nil // another user's, where /proc hides those
	case err == nil && len(limits) == 0:
		return sighting{}, false, errGone
	case err != nil:
		return sighting{}, false, err
	}
	if k, ok := parseLimits(limits); !ok || !scope(k) {
		return sighting{}, false, nil
	}
	stat, err := readProc(pid, "stat")
	if err != nil {
		return sighting{}, false, err
	}
	s, err := parseStat(pid, stat)
	return s, err == nil, err
}

// readProc reads a file below /proc/pid.
func readProc(pid int, name string) ([]byte, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/" + name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return nil, errGone
	}
	return b, err
}

// parseLimits returns the mark in /proc/<pid>/limits, proc_pid_limits(5), if
// there is one.
func parseLimits(limits []byte) (mark, bool) {
	_, after, _ := bytes.Cut(limits, []byte("Max file locks"))
	fields := bytes.Fields(after)
	if len(fields) == 0 {
		return 0, false
	}
	n, err := strconv.ParseUint(string(fields[0]), 10, 64)
	return mark(n), err == nil && mark(n)&marked != 0
}

// parseStat reads what is needed of /proc/<pid>/stat, proc_pid_stat(5).
func parseStat(pid int, stat []byte) (sighting, error) {
	// The second field, the program's name, may hold anything. These are the
	// third, the fourth and the twentieth.
	const state, parent, threads = 0, 1, 17
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) <= threads {
		return sighting{}, fmt.Errorf("parse stat: %q", stat)
	}
	ppid, err := strconv.Atoi(fields[parent])
	if err != nil {
		return sighting{}, fmt.Errorf("parse stat: %w", err)
	}
	ended := fields[state] == "Z" || fields[state] == "X"
	// A first thread that has ended is shown as a zombie while others run.
	others := fields[threads] != "0" && fields[threads] != "1"
	return sighting{pid: pid, parent: ppid, dead: ended && !others}, nil
}
