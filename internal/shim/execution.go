package shim

import (
	"context"
	"errors"
	"os"
	"syscall"
	"time"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// killTime bounds the killing of a command whose time is up; after it the
// whole machine is stopped.
const killTime = 700 * time.Millisecond

// execution is one command that runs.
type execution struct {
	process backend.Process
}

// exec starts a command; its end is answered from a goroutine of its own.
func (s *server) exec(ctx context.Context, seq uint64, cmd vm.Command, files []*os.File) error {
	if s.machine == nil || !s.started {
		return vm.Errorf(vm.CodeInvalidState, "the VM is not started")
	}
	if err := cmd.Validate(); err != nil {
		return err
	}
	began := time.Now()
	p, err := s.machine.Exec(ctx, cmd, backend.Stdio{
		Stdin: files[0], Stdout: files[1], Stderr: files[2],
	})
	if err != nil {
		return err
	}
	e := &execution{process: p}
	s.mu.Lock()
	s.execs[seq] = e
	s.mu.Unlock()
	machine, lim := s.machine, s.limits
	s.commands.Go(func() {
		exit, err := s.await(ctx, e, machine, time.Duration(cmd.TimeoutSeconds)*time.Second)
		exit.DurationMS = time.Since(began).Milliseconds()
		if lim.OOM() {
			exit = vm.Exit{Code: vm.ExitSignalBase + int(syscall.SIGKILL), Signal: int(syscall.SIGKILL), OOM: true, DurationMS: exit.DurationMS}
			err = nil
		}
		s.mu.Lock()
		delete(s.execs, seq)
		s.mu.Unlock()
		answer := response{Seq: seq}
		if err != nil {
			answer.Error = vm.AsError(err)
		} else {
			answer.Exit = &exit
		}
		// A manager that is gone ends the shim by other means.
		s.channel.send(answer)
	})
	return nil
}

// await waits for a command, and kills it with all that it started when its
// time is up.
func (s *server) await(ctx context.Context, e *execution, machine backend.Machine, timeout time.Duration) (vm.Exit, error) {
	timed, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	status, err := e.process.Wait(timed)
	if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
		return exitOf(status), err
	}
	kill, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	if err := e.process.KillAll(kill); err != nil {
		// A machine in which nothing can be killed has to go as a whole.
		stop, cancel := context.WithTimeout(ctx, teardownTime)
		defer cancel()
		if err := s.stopMachine(stop, machine); err != nil {
			return vm.Exit{}, err
		}
	}
	return vm.Exit{Code: vm.ExitTimedOut, TimedOut: true}, nil
}

// exitOf translates a wait status.
func exitOf(status syscall.WaitStatus) vm.Exit {
	if status.Signaled() {
		return vm.Exit{Code: vm.ExitSignalBase + int(status.Signal()), Signal: int(status.Signal())}
	}
	return vm.Exit{Code: status.ExitStatus()}
}
