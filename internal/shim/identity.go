package shim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A shim says which process it is in its VM's lock file: its number, as the
// /proc that it was born with has it, and when it started, in clock ticks since
// boot, which tells it from a later process of the same number.

// dyingTime is how long a dead owner's last processes are waited for. The
// kernel kills thousands in less.
const dyingTime = 2 * time.Second

// identify writes this process's identity into the open lock file fd. It must
// come before the process gets a /proc of its own.
func identify(fd int) error {
	number, started, err := processStat("self")
	if err != nil {
		return fmt.Errorf("identify the shim: %w", err)
	}
	if _, err := unix.Pwrite(fd, fmt.Appendf(nil, "%s %s\n", number, started), 0); err != nil {
		return fmt.Errorf("identify the shim: %w", err)
	}
	return nil
}

// dying waits until the shim that wrote its identity into the lock file is
// dead, with every process of its namespace, and reports whether that is still
// to come after dyingTime.
func dying(lock io.ReaderAt) bool {
	identity := make([]byte, 64)
	n, err := lock.ReadAt(identity, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return false
	}
	number, started, ok := strings.Cut(strings.TrimSuffix(string(identity[:n]), "\n"), " ")
	if !ok {
		return false // its owner died before there was a shim
	}
	for deadline := time.Now().Add(dyingTime); alive(number, started); {
		if time.Now().After(deadline) {
			return true
		}
		time.Sleep(time.Millisecond)
	}
	return false
}

// alive reports whether the process with that identity has not wholly become a
// zombie. The last thread of process 1 of a namespace sees all others die
// before it does; its first thread may be a zombie long before.
func alive(number, started string) bool {
	n, s, err := processStat(number)
	return err == nil && n == number && s == started
}

// processStat returns the number and the start time of a process that has a
// thread which is no zombie: fields 1 and 22 of /proc/<pid>/stat, see proc(5);
// field 3 is the state of the first thread, 20 how many there are.
func processStat(name string) (number, started string, err error) {
	b, err := os.ReadFile("/proc/" + name + "/stat")
	if err != nil {
		return "", "", err
	}
	// The second field, a name in parentheses, may hold anything.
	number, _, _ = strings.Cut(string(b), " ")
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return "", "", errors.New("its /proc/…/stat has no name")
	}
	rest := strings.Fields(string(b[i+1:]))
	if len(rest) < 20 || (rest[0] == "Z" || rest[0] == "X") && (rest[17] == "0" || rest[17] == "1") {
		return "", "", errors.New("it is dead")
	}
	return number, rest[19], nil
}
