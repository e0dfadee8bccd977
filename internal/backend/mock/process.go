package mock

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// process is one command: the process that was started for it, which leads a
// session and a group of the same number, and everything that carries its mark.
type process struct {
	machine *machine
	mark    mark
	pid     int

	ended  chan struct{} // closed once status and err are set
	status syscall.WaitStatus
	err    error

	// mu makes sure that nothing is sent to pid once it may be another's.
	mu        sync.Mutex
	collected bool
}

// collect waits for the first process to end. It is the only one that does.
func (p *process) collect() {
	err := awaitChild(p.pid, unix.WEXITED)
	p.mu.Lock()
	if err == nil {
		p.status, err = collectChild(p.pid)
	}
	if err != nil { // something in this process collects children that are not its own
		p.err = fmt.Errorf("wait for the command: %w", err)
	}
	p.collected = true
	p.mu.Unlock()
	p.machine.forget(p)
	close(p.ended)
}

// Wait returns how the first process ended. That is known even when the
// machine was stopped, which shows as SIGKILL.
func (p *process) Wait(ctx context.Context) (syscall.WaitStatus, error) {
	select {
	case <-p.ended:
		return p.status, p.err
	default:
	}
	select {
	case <-p.ended:
		return p.status, p.err
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for the command: %w", ctx.Err())
	}
}

// Signal signals the group of the first process.
func (p *process) Signal(ctx context.Context, sig syscall.Signal) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("signal the command: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.collected {
		return nil
	}
	if err := syscall.Kill(-p.pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal the command: %w", err)
	}
	return nil
}

// KillAll kills the command.
func (p *process) KillAll(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("kill the command: %w", err)
	}
	return killAll(ctx, []*process{p}, func(k mark) bool { return k == p.mark }, p.machine.bury)
}

// awaitChild waits until a child has changed its state in one of the ways that
// options name, and leaves it to be collected.
func awaitChild(pid, options int) error {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, options|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// discard kills and collects a process that has not run yet.
func discard(pid int) error {
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return err
	}
	_, err := collectChild(pid)
	return err
}

// collectChild waits until a child has ended and frees its number.
func collectChild(pid int) (syscall.WaitStatus, error) {
	var status syscall.WaitStatus
	for {
		_, err := syscall.Wait4(pid, &status, 0, nil)
		if !errors.Is(err, syscall.EINTR) {
			return status, err
		}
	}
}
