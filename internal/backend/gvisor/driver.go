// Package gvisor runs machines as gVisor sandboxes: a kernel in user space
// that serves every system call of the programs inside. It is the only package
// that imports gVisor.
//
// The program that links it is its own runsc: gVisor starts its sandbox and
// its file server (the gofer) by executing /proc/self/exe again, and Role
// recognises those executions, so main must ask it first. Everything else is
// done by calling gVisor's packages in the shim's process: starting a command
// costs a message, not a process.
//
// Inside a sandbox, process 1 is a program of a few dozen instructions that
// only waits and lets orphans go (idle.go). Commands are started beside it.
//
// Traps that this package steps around, all found by measuring:
//   - gVisor never compiles its system call filters ahead in the form it takes
//     as a Go module, and compiling them takes longer than all else in a
//     start; seccomp.go hands it compiled ones.
//   - runsc decides the number of CPUs and the memory that a sandbox shows
//     from control groups alone; roles.go tells the sandbox instead.
//   - runsc looks for helper programs beside the executable and in a directory
//     named by the environment; a name that cannot exist keeps it from that.
package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/flag"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// noSidecars is where gVisor is told to look for helper programs, so that no
// program which happens to lie beside pyro is ever run. /proc/self/fd/-1
// cannot exist.
const noSidecars = "/proc/self/fd/-1"

// sidecarVariable names the directory of gVisor's helper programs:
// runsc/gvisorbinaries, sidecarBinariesDirEnv.
const sidecarVariable = "GVISOR_SIDECAR_BINARIES_DIR"

// Driver makes gVisor sandboxes. It is safe for concurrent use.
type Driver struct{}

// New returns the driver. It belongs in a shim: gVisor changes the limits and
// the descriptors of the process that calls it, and its log, which it would
// write to standard error, is turned off for the whole process. Errors say
// what matters of it.
func New() *Driver {
	log.SetTarget(log.GoogleEmitter{Writer: &log.Writer{Next: io.Discard}})
	return &Driver{}
}

// Describe says what the driver is.
func (*Driver) Describe() backend.Description {
	return backend.Description{Name: vm.GVisor, Isolation: vm.IsolationGVisor}
}

// Probe reports whether sandboxes can run here. gVisor's systrap platform
// needs nothing of the host but the namespaces that the shim already lives in,
// and seccomp filters.
func (*Driver) Probe(context.Context) error {
	// PR_GET_SECCOMP fails with EINVAL where the kernel was built without it.
	if _, err := unix.PrctlRetInt(unix.PR_GET_SECCOMP, 0, 0, 0, 0); err != nil {
		return vm.Errorf(vm.CodeBackendUnavailable, "gvisor needs seccomp filters, which this kernel lacks: %w", err).
			WithHint("use a kernel built with CONFIG_SECCOMP_FILTER")
	}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err == nil && lim.Max < fewestFiles {
		return vm.Errorf(vm.CodeBackendUnavailable, "gvisor needs %d open files, and the limit is %d", fewestFiles, lim.Max).
			WithHint("raise the hard limit on open files (ulimit -Hn), best to 4096 or more")
	}
	return nil
}

// fewestFiles is the least hard limit on descriptors under which a sandbox
// works; it was found by trying.
const fewestFiles = 256

// Create starts a sandbox process and its gofer, with nothing running inside.
func (d *Driver) Create(ctx context.Context, spec backend.Spec) (backend.Machine, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m := &machine{spec: spec, bundle: filepath.Join(spec.Scratch, "bundle")}
	if err := os.Setenv(sidecarVariable, noSidecars); err != nil {
		return nil, err
	}
	if err := lend(spec.Root.Binds); err != nil {
		return nil, err
	}
	var err error
	if m.conf, err = newConfig(filepath.Join(spec.Scratch, "runsc"), m.panicLog()); err != nil {
		return nil, err
	}
	if err := m.create(ctx); err != nil {
		return nil, errors.Join(err, m.Delete(context.WithoutCancel(ctx)))
	}
	return m, nil
}

// newConfig returns gVisor's configuration as its own command line would make
// it, with state below root.
func newConfig(root, panicLog string) (*config.Config, error) {
	flags := flag.NewFlagSet("runsc", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	config.RegisterFlags(flags)
	err := flags.Parse([]string{
		"--root=" + root,
		"--panic-log=" + panicLog,
		"--platform=systrap",
		"--network=none",
		// pyro confines the processes itself: see backend.Limiter.
		"--ignore-cgroups",
		"--overlay2=root:memory",
		// Checking the host's settings reads and logs; it changes nothing.
		"--host-settings=ignore",
		// The binary is complete in itself.
		"--sidecar-usage-policy=LEGACY_DEPRECATED_SLOW_EMBEDDED_FALLBACK",
		fmt.Sprintf("--dcache=%d", dentries()),
	})
	if err != nil {
		return nil, fmt.Errorf("configure gvisor: %w", err)
	}
	conf, err := config.NewFromFlags(flags)
	if err != nil {
		return nil, fmt.Errorf("configure gvisor: %w", err)
	}
	return conf, nil
}

// dentries is how many directory entries, each of which can hold a descriptor
// of the host, a sandbox may cache. A machine whose hard limit on descriptors
// is low would fail every exec after one walk over /usr; -1 leaves the choice
// to gVisor.
func dentries() int {
	const plenty = 16384
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) != nil || lim.Max >= plenty {
		return -1
	}
	return int(max(lim.Max/10, 50))
}
