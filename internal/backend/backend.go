// Package backend is the contract between the shim and whatever isolates a VM.
//
// A Driver makes machines of one kind; a Machine is one VM's isolated
// computer. Both live inside the shim, the process that owns the VM: a driver
// may start processes, mount filesystems and hold memory, and everything it
// takes is gone when the shim is, because the shim is process 1 of a process
// namespace of its own and lives in a mount namespace of its own. A driver
// therefore keeps no state outside the directories of its Spec.
//
// Package backendtest holds the suite of tests that every driver passes.
package backend

import (
	"context"
	"os"
	"syscall"

	"pyro/internal/environment"
	"pyro/internal/vm"
)

// Driver makes machines. It is safe for concurrent use.
type Driver interface {
	// Describe says what the driver is. It does no I/O.
	Describe() Description

	// Probe reports whether machines can run here: nil, or an error with
	// vm.CodeBackendUnavailable whose hint says what to change.
	Probe(ctx context.Context) error

	// Create makes a machine and takes what it needs, without running
	// anything of the environment's. On an error nothing is left taken.
	Create(ctx context.Context, spec Spec) (Machine, error)
}

// Description says what a driver is.
type Description struct {
	Name      vm.BackendName
	Isolation vm.Isolation
}

// Spec is what a machine is made from. Its fields are trusted: the manager
// made or checked them.
type Spec struct {
	ID        vm.ID
	Resources vm.Resources
	// Dir is the VM's own directory, empty, on disk: for sockets and spools
	// that must be reachable from outside the shim.
	Dir string
	// Scratch is a private directory in memory that vanishes with the shim.
	Scratch string
	// Root is the environment's root filesystem, shared with other machines:
	// what a machine writes stays in the machine.
	Root environment.Root
	// Limits holds the machine's processes to its Resources.
	Limits Limiter
}

// Limiter holds a machine's processes to what its VM may use. The shim
// chooses how (control groups, or what else the machine offers) and the driver
// only says when.
type Limiter interface {
	// Confine moves every process below the calling one under the limits, and
	// all that those will start. Drivers call it, in each Start, after the
	// machine's processes exist and before anything of the environment's runs
	// in them. A driver without processes of that kind, as the mock, has
	// nothing that could be confined, and its commands are not limited.
	Confine(ctx context.Context) error
}

// Machine is one VM's isolated computer. Start, Stop and Delete are called one
// at a time; Exec, Done and Metadata at any time.
//
// A call whose context is over returns promptly with an error that wraps the
// context's. Start and Exec, like Driver.Create, then take nothing; Stop and
// Delete, and a Process's Signal and KillAll, may do their work all the same.
type Machine interface {
	// Start boots the machine; it is allowed when the machine was never
	// started or was stopped, else the error has vm.CodeInvalidState. After an
	// error the machine is as it was before.
	Start(ctx context.Context) error

	// Exec starts a command in a started machine and returns while it runs;
	// ctx covers the starting alone. The command is valid, as its Validate has
	// it, and gets a session of its own and the environment of the machine's
	// Root with its own on top; a later entry wins. Errors:
	// vm.CodeCommandNotFound, vm.CodeCommandNotRunnable;
	// vm.CodeInvalidArgument for a working directory that does not exist;
	// vm.CodeInvalidState for a machine that is not started.
	Exec(ctx context.Context, cmd vm.Command, stdio Stdio) (Process, error)

	// Stop ends every process in the machine. What was written inside is
	// gone at the next Start. Stopping a stopped machine does nothing; a
	// deleted one cannot be stopped (vm.CodeInvalidState).
	Stop(ctx context.Context) error

	// Delete stops the machine and frees all that it holds. It may be called
	// again after an error, and does nothing once it has succeeded.
	Delete(ctx context.Context) error

	// Done is closed when a started machine has ended by itself, because it
	// crashed or was killed; it may be closed by Stop as well. A new channel
	// belongs to each Start; before the first it is nil.
	Done() <-chan struct{}

	// Metadata describes the running machine for the VM's metadata.
	Metadata() map[string]string
}

// Stdio is what a command reads and writes: pipes, or /dev/null, none of them
// nil. The machine does not close them; it holds its own descriptors. It may
// make them blocking.
type Stdio struct {
	Stdin, Stdout, Stderr *os.File
}

// Process is one running command. It is safe for concurrent use.
type Process interface {
	// Wait returns when the command's first process has ended, or with an
	// error when ctx has, or when the machine ended first and took the status
	// along. It may be called again.
	Wait(ctx context.Context) (syscall.WaitStatus, error)

	// Signal sends sig to the command's process group. Once the command's
	// first process has ended nothing is sent, and that is no error.
	Signal(ctx context.Context, sig syscall.Signal) error

	// KillAll kills the command with everything that it started, however
	// detached, and returns when all of it is dead. A driver that cannot tell
	// whose a process is may kill the machine's other commands too.
	KillAll(ctx context.Context) error
}
