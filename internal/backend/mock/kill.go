package mock

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"
)

// Pauses between two looks at the processes that are being killed.
const (
	firstPause = time.Millisecond
	lastPause  = 20 * time.Millisecond
)

// killAll kills every process whose mark is in scope, and returns when all are
// dead and the first processes of commands, which are among them, are collected.
func killAll(ctx context.Context, commands []*process, scope func(mark) bool, bury func(sighting)) error {
	if err := killMarked(ctx, scope, bury); err != nil {
		return err
	}
	for _, p := range commands {
		select {
		case <-p.ended:
		case <-ctx.Done():
			return fmt.Errorf("kill processes: %w", ctx.Err())
		}
	}
	return nil
}

// killMarked kills every process whose mark is in scope, and returns when none
// is alive. It calls bury with each dead one that it meets.
//
// A process may start others while it is being killed, or be gone already and
// have left one behind that was not there to be seen. So a look counts as the
// last only if it met nothing alive, nothing newly dead, and missed nothing. A
// process that keeps replacing itself is a race, which is won by killing the
// newest at first sight: see scan.
func killMarked(ctx context.Context, scope func(mark) bool, bury func(sighting)) error {
	buried := map[int]bool{}
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		quiet := true
		complete, err := scan(scope, func(s sighting) error {
			if s.dead {
				quiet = quiet && buried[s.pid]
				buried[s.pid] = true
				bury(s)
				return nil
			}
			quiet = false
			if err := syscall.Kill(s.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("kill process %d: %w", s.pid, err)
			}
			return nil
		})
		if err != nil || complete && quiet {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("kill processes: %w", ctx.Err())
		case <-time.After(pause):
		}
	}
}
