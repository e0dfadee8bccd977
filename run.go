package pyro

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"pyro/internal/environment"
	"pyro/internal/shim"
	"pyro/internal/store"
	"pyro/internal/vm"
)

// cleanupTime bounds the orderly deletion of a VM; after it the VM's processes
// are killed.
const cleanupTime = 15 * time.Second

// DefaultMaxOutput is how many bytes of each stream Run keeps for its result
// unless told otherwise.
const DefaultMaxOutput = 16 << 20

// RunRequest asks for one command in a fresh VM. A zero number means the
// contract's default.
type RunRequest struct {
	// Args is the program, looked up inside the VM, and its arguments.
	Args []string
	// Env is added to the profile's environment, as KEY=VALUE.
	Env []string
	// Dir is an absolute directory inside the VM; empty means the profile's.
	Dir string

	// Profile names the environment; empty means "host".
	Profile string
	// Backend says what must isolate the VM; empty means Auto.
	Backend BackendName

	VCPUCount      int // 1 to 8; 0 means 1
	MemMiB         int // 256 to 32768 MiB; 0 means 1024
	TTLSeconds     int // 60 to 3600; 0 means 600
	TimeoutSeconds int // 1 to 3600; 0 means 30. A negative one is refused

	// Stdin is what the command reads; nil means nothing. Run does not wait
	// for a Read that is under way when the command ends.
	Stdin io.Reader
	// Stdout and Stderr get what the command prints, as it is printed; a
	// writer that is slow slows the command, and one that fails ends it with
	// SIGPIPE. They may be the same writer, which then gets one Write at a
	// time. Where one is nil the stream is kept for the result, up to
	// MaxOutput bytes. When ctx ends Run waits a second, not more, for a Write
	// that is under way.
	Stdout, Stderr io.Writer
	// MaxOutput is how many bytes of each kept stream the result holds, 0 or
	// more; 0 means DefaultMaxOutput. What is over it is counted and dropped.
	MaxOutput int

	// Signals, if not nil, are passed on to the command, until it is closed.
	Signals <-chan syscall.Signal
}

// fill puts the contract's defaults where r names nothing.
func (r *RunRequest) fill() {
	for _, d := range []struct {
		value   *int
		byValue int
	}{
		{&r.VCPUCount, vm.DefaultVCPUs},
		{&r.MemMiB, vm.DefaultMemMiB},
		{&r.TTLSeconds, vm.DefaultTTLSeconds},
		{&r.TimeoutSeconds, vm.DefaultTimeoutSeconds},
		{&r.MaxOutput, DefaultMaxOutput},
	} {
		if *d.value == 0 {
			*d.value = d.byValue
		}
	}
	if r.Profile == "" {
		r.Profile = environment.HostProfile
	}
}

// check refuses what can be refused without looking at anything, in the
// contract's order.
func (r *RunRequest) check() (vm.Resources, vm.Command, error) {
	resources := vm.Resources{VCPUCount: r.VCPUCount, MemMiB: r.MemMiB, TTLSeconds: r.TTLSeconds}
	command := vm.Command{Args: r.Args, Env: r.Env, Dir: r.Dir, TimeoutSeconds: r.TimeoutSeconds}
	if err := resources.Validate(); err != nil {
		return resources, command, err
	}
	if err := environment.CheckProfile(r.Profile); err != nil {
		return resources, command, err
	}
	backend, err := vm.ParseBackendName(string(r.Backend))
	if err != nil {
		return resources, command, err
	}
	r.Backend = backend
	if r.MaxOutput < 0 {
		return resources, command, vm.Errorf(vm.CodeInvalidArgument, "the output to keep cannot be %d bytes", r.MaxOutput)
	}
	return resources, command, command.Validate()
}

// Run makes a VM, runs one command in it and deletes it. Whatever happens, the
// VM and all that it held are gone when Run returns; if the calling process
// dies in between, its shim sees to that within moments.
//
// The result is what the contract says of exec_vm; a command that fails, is
// killed or runs out of time is a result and no error. Errors are pyro's own,
// of type *Error:
// CodeInvalidArgument, CodeUnknownProfile, CodeCapacityExceeded,
// CodeBackendUnavailable, CodeCommandNotFound, CodeCommandNotRunnable,
// CodeVMExpired, CodeVMFailed, CodeStateUnavailable, and CodeCanceled when ctx
// ends first. Where the command has ended but a file or the row of its VM could
// not be removed, the result's Cleanup says that it is not deleted, and the
// next Run of anybody tries again.
func (m *Manager) Run(ctx context.Context, r RunRequest) (*ExecResult, error) {
	result, err := m.run(ctx, r)
	if err != nil {
		return nil, vm.AsError(canceled(ctx, err))
	}
	return result, nil
}

func (m *Manager) run(ctx context.Context, r RunRequest) (*ExecResult, error) {
	r.fill()
	resources, command, err := r.check()
	if err != nil {
		return nil, err
	}
	streams, err := openStreams(r)
	if err != nil {
		return nil, err
	}
	result, err := m.runIn(ctx, r, resources, command, streams)
	// The VM is gone: the streams come to their end.
	if streamErr := streams.finish(ctx); err == nil {
		err = streamErr
	}
	if err != nil {
		return nil, err
	}
	if result.TimedOut {
		if err := streams.note(fmt.Sprintf("pyro: the command timed out after %d s\n", r.TimeoutSeconds)); err != nil {
			return nil, err
		}
	}
	streams.fill(result)
	return result, nil
}

// canceled gives an error that came of ctx's end its code.
func canceled(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if cause == nil || !errors.Is(err, cause) && !errors.Is(err, ctx.Err()) {
		return err
	}
	e := vm.Errorf(vm.CodeCanceled, "the run was cancelled: %w", cause)
	e.Err = errors.Join(cause, ctx.Err())
	return e
}

// runIn makes the VM, runs the command and deletes the VM.
func (m *Manager) runIn(ctx context.Context, r RunRequest, resources vm.Resources, command vm.Command, streams *streams) (result *ExecResult, err error) {
	defer streams.closeGuestEnds()
	claim, err := m.claim()
	if err != nil {
		return nil, err
	}
	// Whatever the shim leaves, or never came to take, is freed here.
	defer func() {
		releaseErr := m.release(context.WithoutCancel(ctx), claim)
		if result != nil && releaseErr != nil {
			m.log.Warn("free the vm", "vm", claim.ID, "err", releaseErr)
			result.Cleanup.Deleted = false
			return
		}
		err = errors.Join(err, releaseErr)
	}()

	client, err := shim.Spawn(m.executable, claim)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	v, err := m.admit(ctx, claim.ID, r, resources)
	if err != nil {
		return nil, err
	}
	root, err := m.environment(ctx, claim, r.Profile)
	if err != nil {
		return nil, err
	}
	exit, err := m.exec(ctx, client, &v, root, command, streams, r.Signals)
	if err != nil {
		return nil, m.explain(v, err)
	}
	deletion, err := m.delete(ctx, client, v.ID, vm.ReasonPostExec)
	if err != nil {
		return nil, err
	}
	return &ExecResult{
		ID: v.ID, Command: command.String(), Exit: exit, Cleanup: deletion,
		Profile: v.Profile, Backend: v.Backend, Isolation: v.Isolation, Metadata: v.Metadata,
	}, nil
}

// exec has the shim make and start the VM and run the command, all asked for
// at once, and follows them. It completes v.
func (m *Manager) exec(ctx context.Context, client *shim.Client, v *vm.VM, root environment.Root, command vm.Command, streams *streams, signals <-chan syscall.Signal) (vm.Exit, error) {
	creation, err := client.Create(v.ID, v.Backend, vm.Resources{VCPUCount: v.VCPUCount, MemMiB: v.MemMiB, TTLSeconds: v.TTLSeconds}, root)
	if err != nil {
		return vm.Exit{}, err
	}
	starting, err := client.Start()
	if err != nil {
		return vm.Exit{}, err
	}
	execution, err := client.Exec(command, streams.stdin.guest, streams.stdout.guest, streams.stderr.guest)
	if err != nil {
		return vm.Exit{}, err
	}
	streams.closeGuestEnds()
	created, err := unlessStuck(ctx, bootTime, creation.Wait)
	if err != nil {
		return vm.Exit{}, err
	}
	v.Backend, v.Isolation = created.Backend, created.Isolation
	started, err := unlessStuck(ctx, bootTime, starting.Wait)
	if err != nil {
		return vm.Exit{}, err
	}
	v.Metadata, v.State = started.Metadata, vm.Started
	if err := m.store.Update(ctx, v.ID, func(r *store.Record) error { r.VM = *v; return nil }); err != nil {
		m.log.Warn("enter the start into the store", "vm", v.ID, "err", err) // the command runs all the same
	}
	stop := forward(ctx, execution, signals, streams)
	defer stop()
	return unlessStuck(ctx, time.Duration(command.TimeoutSeconds)*time.Second+stuckTime, execution.Wait)
}

// bootTime is how long a shim may take to make a VM, and how long to start it:
// many times what that takes on a busy machine.
const bootTime = time.Minute

// stuckTime is how much longer than a command's timeout a shim may take to
// answer, which has to kill what does not want to be killed.
const stuckTime = 12 * time.Second

// errStuck is the failure of a run whose shim does not answer. The shim is
// killed, and the VM with it.
var errStuck = vm.Errorf(vm.CodeVMFailed, "the process that owns the VM does not answer").
	WithHint("it may have been stopped (SIGSTOP), or the machine is overloaded")

// unlessStuck waits for an answer of the shim's for so long. The shim keeps a
// command's time, but one that is stopped, though not dead, does not.
func unlessStuck[T any](ctx context.Context, patience time.Duration, wait func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errStuck)
	defer cancel()
	answer, err := wait(ctx)
	if err != nil && errors.Is(context.Cause(ctx), errStuck) {
		err = errStuck
	}
	return answer, err
}

// forward passes signals on to a command until stop is called, and the one
// that says that nobody reads its output any more.
func forward(ctx context.Context, e *shim.Exec, signals <-chan syscall.Signal, s *streams) (stop func()) {
	broken := s.broken
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			// A command that cannot be signalled has ended or will be killed;
			// Wait tells.
			select {
			case sig, ok := <-signals:
				if !ok {
					signals = nil
					continue
				}
				_ = e.Signal(ctx, sig)
			case <-broken:
				broken = nil
				_ = e.Signal(ctx, syscall.SIGPIPE)
				s.tell()
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

// explain replaces the error of a VM that ended under its manager by the
// reason, where that is its deadline.
func (m *Manager) explain(v vm.VM, err error) error {
	if errors.Is(err, vm.CodeVMFailed) && !time.Now().Before(v.ExpiresAt.Time) {
		return vm.Errorf(vm.CodeVMExpired, "vm %s expired after %d s and was deleted", v.ID, v.TTLSeconds).
			WithHint("ask for a longer life (--ttl-seconds, at most 3600)")
	}
	return err
}

// delete deletes a VM that its shim still serves.
func (m *Manager) delete(ctx context.Context, client *shim.Client, id vm.ID, reason string) (vm.Deletion, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	if err := client.Delete(ctx); err != nil {
		m.log.Warn("delete the vm in order", "vm", id, "err", err)
		// Killing the shim ends the VM all the same, and what it leaves is
		// freed by release.
		if err := client.Close(); err != nil {
			return vm.Deletion{}, err
		}
	}
	return vm.Deletion{ID: id, Deleted: true, Reason: reason}, nil
}

// admit enters a new VM into the store, if there is room for it, and returns
// it.
func (m *Manager) admit(ctx context.Context, id vm.ID, r RunRequest, resources vm.Resources) (vm.VM, error) {
	if err := m.reap(ctx); err != nil {
		return vm.VM{}, err
	}
	now := time.Now().Round(0) // by the wall clock, which counts sleep as the shim does
	v := vm.VM{
		ID: id, Profile: r.Profile, Backend: r.Backend,
		VCPUCount: resources.VCPUCount, MemMiB: resources.MemMiB, TTLSeconds: resources.TTLSeconds,
		CreatedAt: vm.Time{Time: now}, ExpiresAt: vm.Time{Time: now.Add(time.Duration(resources.TTLSeconds) * time.Second)},
		State: vm.Created, Metadata: map[string]string{},
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return vm.VM{}, fmt.Errorf("identify this boot: %w", err)
	}
	record := store.Record{VM: v, Owner: store.OwnerRun, BootID: strings.TrimSpace(string(boot))}
	return v, m.store.Insert(ctx, record, m.maxActiveVMs)
}
