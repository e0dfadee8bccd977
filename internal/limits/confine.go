package limits

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"
)

// Confine puts every process of the process namespace except the caller under
// the limits, and with that all they will ever start. Processes may start
// others meanwhile. It is called whenever the machine's processes have been
// made and before anything untrusted runs in them; OOM counts from here.
func (l *Limits) Confine(ctx context.Context) error {
	defer l.endWarming()
	l.mu.Lock()
	l.fired = false
	l.base = l.killsLocked()
	l.mu.Unlock()
	if err := l.confineAll(ctx); err != nil {
		return fmt.Errorf("confine the VM's processes: %w", err)
	}
	if l.cpus != nil || l.nproc != 0 {
		l.settle()
	}
	if l.kick != nil {
		select {
		case l.kick <- struct{}{}:
		default:
		}
	}
	return nil
}

// settle looks again for processes without affinity or rlimit, a while after
// Confine. Moving into a cgroup excludes forks. Here, though, a process that
// was being forked while its parent was changed has inherited the old state,
// and may have appeared only after Confine had looked for the last time. The
// machine is idle at that moment, so this is for the sake of certainty.
func (l *Limits) settle() {
	l.running.Go(func() {
		for wait := settleFirst; wait <= settleLast; wait *= 4 {
			select {
			case <-l.closed:
				return
			case <-time.After(wait):
			}
			if _, err := l.confineRound(); err != nil {
				l.log.Warn("cannot confine all of the VM's processes", "op", "limits", "err", err)
			}
		}
	})
}

// When settle looks, after the one before.
const (
	settleFirst = 5 * time.Millisecond
	settleLast  = 320 * time.Millisecond
)

// maxRounds is how often Confine looks for processes that it has missed. Three
// times is usual.
const maxRounds = 500

// confineAll repeats until a round finds nothing to do: a process that was
// started by one not yet held appears in a later round, and one started by a
// held one is held from birth.
func (l *Limits) confineAll(ctx context.Context) error {
	for round := 0; ; round++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		done, err := l.confineRound()
		if err != nil || done == 0 {
			return err
		}
		if round >= maxRounds {
			return errors.New("processes keep appearing that are not limited")
		}
		if round >= 3 {
			// Most likely a process that is ending: it takes the order and
			// does not follow it.
			time.Sleep(time.Millisecond)
		}
	}
}

// confineRound holds every process of this moment and returns how many things
// were left to do for that.
func (l *Limits) confineRound() (int, error) {
	pids, err := l.sys.processes()
	if err != nil {
		return 0, err
	}
	done, err := l.adoptAll(pids)
	if err != nil {
		return done, err
	}
	for _, pid := range pids {
		n, err := l.confineProcess(pid)
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// adoptAll moves processes into the cgroups that they are not in, and returns
// how many moves that took.
func (l *Limits) adoptAll(pids []int) (int, error) {
	members := make([]map[int]bool, len(l.groups))
	for i, g := range l.groups {
		var err error
		if members[i], err = g.members(); err != nil {
			return 0, err
		}
	}
	moves := 0
	for _, pid := range pids {
		for i, g := range l.groups {
			if members[i][pid] {
				continue
			}
			if l.sys.dead(pid) {
				break
			}
			if err := g.adopt(pid); err != nil {
				return moves, err
			}
			moves++
		}
	}
	return moves, nil
}

// confineProcess sets what is set on a process instead of a cgroup, and returns
// how much of it was not set yet.
func (l *Limits) confineProcess(pid int) (int, error) {
	done := 0
	if l.nproc != 0 {
		changed, err := limitTasks(pid, l.nproc)
		if err != nil {
			return 0, err
		}
		done += changed
	}
	if l.cpus != nil {
		changed, err := l.cpus.pin(l.sys, pid)
		if err != nil {
			return 0, err
		}
		done += changed
	}
	return done, nil
}

// gone reports whether an error says that a process or thread has ended.
func gone(err error) bool {
	return errors.Is(err, syscall.ESRCH) || errors.Is(err, syscall.ENOENT)
}
