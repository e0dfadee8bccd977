// Package pyro gives programs disposable machines: a fresh, isolated computer
// in a fraction of a second, a command run in it, and nothing left behind.
//
//	m, err := pyro.Open(ctx, pyro.Options{})
//	...
//	defer m.Close()
//	result, err := m.Run(ctx, pyro.RunRequest{Args: []string{"python3", "-c", "print(6*7)"}})
//
// There is no daemon. Any number of processes may open one base directory at
// once; each VM is owned by a process of its own, the shim, which the Manager
// starts from the pyro program (Options.Executable). A VM made by Run belongs
// to the calling process: however that ends, the VM ends too.
//
// Failures that a caller can act on are of type *Error; errors.Is(err,
// CodeCapacityExceeded) and the like tell them apart.
package pyro

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"pyro/internal/store"
	"pyro/internal/vm"
)

// The contract's types. Their fields and JSON keys are documented where they
// are defined, and shown by go doc on these names.
type (
	// Error is a failure with a stable code, a message and often a hint.
	Error = vm.Error
	// Code names a kind of failure; it is an error itself, for errors.Is.
	Code = vm.Code
	// ExecResult is the result of a command.
	ExecResult = vm.ExecResult
	// BackendName says what isolates a VM, or Auto for the best there is.
	BackendName = vm.BackendName
	// Resources is what a VM may use; its Validate checks the contract's limits.
	Resources = vm.Resources
)

// AsError returns err as an *Error, with CodeInternal where it has no code of
// its own, and nil for nil.
func AsError(err error) *Error { return vm.AsError(err) }

// ValidateTimeout checks a command's timeout, which must be from 1 to 3600
// seconds. The error's code is CodeInvalidArgument.
func ValidateTimeout(seconds int) error { return vm.ValidateTimeout(seconds) }

// The failures there are.
const (
	CodeInvalidArgument    = vm.CodeInvalidArgument
	CodeUnknownProfile     = vm.CodeUnknownProfile
	CodeCapacityExceeded   = vm.CodeCapacityExceeded
	CodeVMNotFound         = vm.CodeVMNotFound
	CodeVMExpired          = vm.CodeVMExpired
	CodeVMFailed           = vm.CodeVMFailed
	CodeInvalidState       = vm.CodeInvalidState
	CodeBackendUnavailable = vm.CodeBackendUnavailable
	CodeArtifactsMissing   = vm.CodeArtifactsMissing
	CodeStateUnavailable   = vm.CodeStateUnavailable
	CodeCommandNotFound    = vm.CodeCommandNotFound
	CodeCommandNotRunnable = vm.CodeCommandNotRunnable
	CodeCanceled           = vm.CodeCanceled
	CodeInternal           = vm.CodeInternal
)

// The backends there are.
const (
	Auto        = vm.Auto
	Firecracker = vm.Firecracker
	GVisor      = vm.GVisor
	Mock        = vm.Mock
)

// Options configure a Manager. The zero value is a good one.
type Options struct {
	// BaseDir is where pyro keeps its state, private to the user. Empty means
	// $PYRO_BASE_DIR; without that /var/lib/pyro for root, else
	// $XDG_STATE_HOME/pyro, else ~/.local/state/pyro.
	BaseDir string

	// Executable is the pyro program, which the Manager starts once for each
	// VM. Empty means the pyro found in $PATH.
	Executable string

	// MaxActiveVMs is how many VMs may exist at once, over all processes that
	// use BaseDir. 0 means $PYRO_MAX_ACTIVE_VMS, without that 4.
	MaxActiveVMs int

	// Logger gets what is worth knowing but is no error. Nil means none of it.
	Logger *slog.Logger
}

// Manager makes VMs and keeps account of them. It is safe for concurrent use.
type Manager struct {
	baseDir      string
	executable   string
	maxActiveVMs int
	log          *slog.Logger
	store        *store.Store
}

// Open returns a Manager for the base directory of o, which it makes if need
// be. Errors: CodeStateUnavailable where the directory cannot be used,
// CodeInvalidArgument for options that make no sense.
func Open(ctx context.Context, o Options) (*Manager, error) {
	m := &Manager{log: o.Logger}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if m.maxActiveVMs, err = maxActiveVMs(o.MaxActiveVMs); err != nil {
		return nil, err
	}
	if m.executable, err = executable(o.Executable); err != nil {
		return nil, err
	}
	if m.baseDir, err = openBaseDir(o.BaseDir); err != nil {
		return nil, err
	}
	if err := makeDirs(m.vmsDir(), m.environmentsDir()); err != nil {
		return nil, err
	}
	if m.store, err = store.Open(ctx, filepath.Join(m.baseDir, databaseName)); err != nil {
		return nil, err
	}
	return m, nil
}

// Close releases the Manager. VMs that are still running in a Run of its own
// are not touched; their Run fails when it next needs the store.
func (m *Manager) Close() error { return m.store.Close() }

func (m *Manager) vmsDir() string          { return filepath.Join(m.baseDir, "vms") }
func (m *Manager) environmentsDir() string { return filepath.Join(m.baseDir, "environments") }

// executable returns the program to run as a shim.
func executable(option string) (string, error) {
	if option != "" {
		// The shim is started in a directory of its own.
		path, err := exec.LookPath(option)
		if err == nil {
			path, err = filepath.Abs(path)
		}
		if err != nil {
			return "", vm.Errorf(vm.CodeInvalidArgument, "find the pyro program: %w", err).
				WithHint("Options.Executable must name the pyro program")
		}
		return path, nil
	}
	path, err := exec.LookPath("pyro")
	if err != nil {
		return "", vm.Errorf(vm.CodeInvalidArgument, "find the pyro program: %w", err).
			WithHint("install pyro in a directory of your PATH, or set Options.Executable")
	}
	return path, nil
}

// maxActiveVMs returns how many VMs there may be at once.
func maxActiveVMs(option int) (int, error) {
	n := option
	if n == 0 {
		s := os.Getenv("PYRO_MAX_ACTIVE_VMS")
		if s == "" {
			return vm.DefaultMaxActiveVMs, nil
		}
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			return 0, vm.Errorf(vm.CodeInvalidArgument, "PYRO_MAX_ACTIVE_VMS is %q, not a number", s).
				WithHint("set it to how many VMs may exist at once, 1 or more, or unset it")
		}
	}
	if n < 1 {
		return 0, vm.Errorf(vm.CodeInvalidArgument, "the most VMs at once (PYRO_MAX_ACTIVE_VMS) must be at least 1, not %d", n).
			WithHint("set it to how many VMs may exist at once, or unset it")
	}
	return n, nil
}
