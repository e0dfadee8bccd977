package limits

import (
	"context"
	"time"

	"golang.org/x/sys/unix"
)

// How often the watchdog looks, at least and at most. fillRate is faster than a
// guest was seen to fill memory (under 2 GiB/s for each CPU here), so that a
// look comes before what is left can be used up, as far as pollMin allows. Where
// nothing has changed for a while, a look may come as late as pollIdle.
//
// A look costs 100 to 400 µs of processor time, most of it for waking up the Go
// runtime with cold caches. Where that is more than 1/pollShare of a CPU, looks
// come less often, down to pollBusy. Other work of the process counts as the
// watchdog's: while it has some, every pollBusy is often enough.
const (
	pollMin  = 10 * time.Millisecond
	pollBusy = 25 * time.Millisecond
	pollIdle = 100 * time.Millisecond
	idleTime = time.Second // without a change of more than idleStep
	idleStep = 1 << 20     // bytes
	fillRate = 4 << 30     // bytes/s

	pollShare = 50
)

// watchProcesses starts the watchdog: it kills the VM when its memory is over
// the limit, and again should some of it remain over the limit.
func (l *Limits) watchProcesses(ctx context.Context) {
	l.running.Go(func() {
		m, q := newMeter(l.sys), quiet{}
		timer := time.NewTimer(pollIdle)
		defer timer.Stop()
		complained, spent := false, processTime()
		for {
			select {
			case <-ctx.Done():
				return
			case <-l.kick:
				m.refresh()
			case <-timer.C:
			}
			now := time.Now()
			used, err := m.usage(now)
			if err == nil {
				err = m.blind
			}
			if err != nil && !complained {
				l.log.Error("cannot see all of the VM's memory", "op", "limits", "err", err)
				complained = true
			}
			if used > l.want.memory {
				l.bite(used)
			}
			cost := processTime() - spent
			spent += cost
			timer.Reset(max(pollAfter(l.want.memory-used, q.since(used, now)), min(pollShare*cost, pollBusy)))
		}
	})
}

// processTime is the processor time that the process has used.
func processTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// bite kills the VM for using too much memory.
func (l *Limits) bite(used int64) {
	l.mu.Lock()
	l.fired = true
	l.mu.Unlock()
	l.killAll("memory limit reached, killing the VM", used)
}

// pollAfter is how long to wait before looking again, with left bytes to the
// limit and no change for the time quiet.
func pollAfter(left int64, quiet time.Duration) time.Duration {
	most := pollBusy
	if quiet >= idleTime {
		most = pollIdle
	}
	full := time.Duration(float64(left) / fillRate * float64(time.Second))
	return min(max(full, pollMin), most)
}

// quiet tells for how long a number has not changed much.
type quiet struct {
	value int64
	at    time.Time
}

// since takes the number at the time now.
func (q *quiet) since(value int64, now time.Time) time.Duration {
	if d := value - q.value; d > idleStep || d < -idleStep || q.at.IsZero() {
		q.value, q.at = value, now
	}
	return now.Sub(q.at)
}
