package limits

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// watchGroup kills the whole VM when the kernel has killed one of its processes
// because a memory cgroup of version 1 was full. The kernel picks the one
// process that looks largest; a sandbox that lost it may hang or run on
// crippled, and guest memory, a file that several processes hold, is not freed.
// Version 2 does the same by itself (memory.oom.group).
func (l *Limits) watchGroup(ctx context.Context) error {
	event, err := l.memory.notifyOOM()
	if err != nil {
		return err
	}
	l.running.Go(func() {
		<-ctx.Done()
		event.Close() // ends the read below
	})
	l.running.Go(func() {
		var handled int64
		for {
			var count [8]byte
			if _, err := event.Read(count[:]); err != nil {
				return
			}
			if n := l.awaitKill(ctx, handled); n > handled {
				handled = n
				l.killAll("the kernel killed a process at the memory limit, killing the VM", 0)
			}
		}
	})
	return nil
}

// notifyOOM asks for an event whenever the cgroup is out of memory
// (Documentation/admin-guide/cgroup-v1/memory.rst, "OOM Control").
func (g *group) notifyOOM() (*os.File, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make an eventfd: %w", err)
	}
	event := os.NewFile(uintptr(fd), "oom event")
	control, err := os.Open(filepath.Join(g.dir, "memory.oom_control"))
	if err != nil {
		return nil, errors.Join(err, event.Close())
	}
	defer control.Close()
	if err := g.set("cgroup.event_control", fmt.Sprintf("%d %d", fd, control.Fd())); err != nil {
		return nil, errors.Join(err, event.Close())
	}
	return event, nil
}

// awaitKill returns the kernel's count of kills as soon as it is more than
// handled, or when that does not happen. The event comes before the kill; and
// it comes too when an outer cgroup is full, in which case the victim may be
// somebody else.
func (l *Limits) awaitKill(ctx context.Context, handled int64) int64 {
	for range 100 {
		l.mu.Lock()
		n := l.killsLocked()
		l.mu.Unlock()
		if n > handled {
			return n
		}
		select {
		case <-ctx.Done():
			return handled
		case <-time.After(2 * time.Millisecond):
		}
	}
	return handled
}

// killAll kills the VM. usage is in bytes, for the log; 0 if unknown.
func (l *Limits) killAll(why string, usage int64) {
	l.log.Warn(why, "op", "limits", "limit_bytes", l.want.memory, "usage_bytes", usage)
	if err := l.sys.kill(); err != nil && !gone(err) {
		l.log.Error("cannot kill the VM's processes", "op", "limits", "err", err)
	}
}
