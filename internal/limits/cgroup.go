package limits

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// errInUse marks a cgroup that cannot be removed because processes are in it.
var errInUse = errors.New("processes are still in it")

// members returns the processes in the cgroup.
func (g *group) members() (map[int]bool, error) {
	b, err := os.ReadFile(filepath.Join(g.dir, "cgroup.procs"))
	if err != nil {
		return nil, fmt.Errorf("list the processes of a cgroup: %w", err)
	}
	in := map[int]bool{}
	for f := range bytes.FieldsSeq(b) {
		if pid, err := strconv.Atoi(string(f)); err == nil {
			in[pid] = true
		}
	}
	return in, nil
}

// adopt moves a process into the cgroup. One that has ended is no error.
func (g *group) adopt(pid int) error {
	err := g.set("cgroup.procs", strconv.Itoa(pid))
	if err != nil && !gone(err) {
		return fmt.Errorf("move process %d into cgroup %s: %w", pid, g.dir, err)
	}
	return nil
}

// oomKills returns how many of the cgroup's processes the kernel has killed for
// want of memory: of version 2 in memory.events, of version 1 in
// memory.oom_control (Linux 4.13).
func (g *group) oomKills() (int64, error) {
	name := filepath.Join(g.dir, [...]string{1: "memory.oom_control", 2: "memory.events"}[g.version])
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, fmt.Errorf("read whether memory ran out: %w", err)
	}
	for line := range bytes.Lines(b) {
		if n, ok := bytes.CutPrefix(line, []byte("oom_kill ")); ok {
			return strconv.ParseInt(string(bytes.TrimSpace(n)), 10, 64)
		}
	}
	return 0, fmt.Errorf("read whether memory ran out: no oom_kill in %s", name)
}

// removeCgroup removes a cgroup, if it is there, and waits a bounded time for
// processes that are about to end. The error wraps errInUse if they do not.
func removeCgroup(ctx context.Context, sys system, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := sys.rmdir(dir)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("remove cgroup %s: %w", dir, errInUse)
		case <-time.After(wait):
		}
	}
}
