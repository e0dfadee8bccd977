// Package limits makes a VM's mem_mib, its vcpu_count and a bound on its tasks
// real on the host, in the best way that the machine allows, and says
// truthfully which way that was.
//
// It works on processes from outside, because what isolates a VM cannot be
// trusted to hold itself back: a gVisor sandbox takes its memory and its
// processes from the host as its guest asks for them. The caller is the shim:
// process 1 of a process namespace, which sees in its own /proc exactly itself
// and the VM's processes. Every process there but the shim is held; the shim
// itself stays outside so that it survives and can report.
//
// There are three ways, chosen per limit:
//
//   - control groups of version 1, wherever root may make them;
//   - control groups of version 2, where the place in the tree that the caller
//     may use offers the controller (place.go has the rules);
//   - without control groups: a watchdog that adds up the VM's memory and kills
//     the VM when it is too much (watchdog.go), processor affinity, and
//     RLIMIT_NPROC, which Linux counts per user namespace (tasks.go).
//
// Cgroups are named pyro-<vm_id> and lie directly in the cgroup where the
// caller is already (version 1) or in the nearest ancestor that may have them
// (version 2), never in a fixed directory of our own at the top: so limits that
// someone set on pyro as a whole, a container's or a batch job's, still hold
// for its VMs, and there is no shared parent that somebody would have to clean
// up. The price is that Reclaim has to look for them; it searches the trees for
// the name, which also works with every record lost.
package limits

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	"pyro/internal/vm"
)

// The keys of Enforced.
const (
	KeyMemory = "limit_memory"
	KeyCPU    = "limit_cpu"
	KeyTasks  = "limit_tasks"
)

// The values of Enforced, besides "none: " followed by a reason.
const (
	CgroupV1 = "cgroup v1"
	CgroupV2 = "cgroup v2"
	// CgroupV1Outer says that an outer cgroup grants less processor time than
	// the VM's vcpu_count, so that no quota of its own could be set.
	CgroupV1Outer = "cgroup v1 (outer quota)"
	Watchdog      = "watchdog"
	Affinity      = "cpu affinity"
	Rlimit        = "rlimit"
)

// closeTimeout bounds how long Close and Reclaim wait for a cgroup whose last
// processes are still dying: the kernel frees gigabytes in well under a second.
const closeTimeout = 3 * time.Second

// Limits holds one VM's processes to its resources. OOM and Enforced may be
// called at any time; Warm, Confine and Close one at a time.
type Limits struct {
	sys  system
	want amounts
	log  *slog.Logger

	groups   []*group          // the VM's cgroups
	memory   *group            // the one that limits memory; nil means the watchdog does
	cpus     *cpuSet           // where the VM may run; nil means a cgroup or nothing limits it
	nproc    uint64            // RLIMIT_NPROC for the VM's processes; 0 means not set
	enforced map[string]string // for Enforced; never changed after Open

	running sync.WaitGroup
	cancel  context.CancelFunc // ends the goroutines of running
	closed  <-chan struct{}    // closed by cancel
	kick    chan struct{}      // makes the watchdog look at once; nil without it
	warming *warming           // nil while nothing is warmed

	mu    sync.Mutex
	fired bool  // the watchdog has killed the VM since the last Confine
	base  int64 // the kernel's count of kills at the last Confine
	last  int64 // that count when it could last be read
}

// Open chooses how res is enforced for the VM id, and makes its cgroups, which
// are empty until Confine. The caller must be process 1 of a process namespace
// with a /proc of its own: anything else is an error, since every other process
// that /proc shows is going to be limited, and killed if need be. Where the
// machine offers no way to enforce a limit, Open succeeds and Enforced says so.
func Open(ctx context.Context, id vm.ID, res vm.Resources, log *slog.Logger) (*Limits, error) {
	sys, err := host()
	if err != nil {
		return nil, err
	}
	return open(ctx, sys, id, amountsOf(res), log)
}

func open(ctx context.Context, sys system, id vm.ID, want amounts, log *slog.Logger) (*Limits, error) {
	log = log.With("vm", string(id))
	trees, err := readTrees(sys.proc)
	if err != nil {
		return nil, err
	}
	l := &Limits{sys: sys, want: want, log: log}
	var bg context.Context
	bg, l.cancel = context.WithCancel(context.WithoutCancel(ctx))
	l.closed = bg.Done()
	if err := l.choose(ctx, trees, id); err != nil {
		return nil, errors.Join(fmt.Errorf("set the limits of VM %s: %w", id, err), l.Close(ctx))
	}
	if l.memory != nil && l.memory.version == 1 {
		if err := l.watchGroup(bg); err != nil {
			// The kernel still kills one process, if not all at once.
			log.Warn("cannot be told when the memory limit is reached", "op", "limits", "err", err)
		}
	}
	if l.memory == nil {
		l.kick = make(chan struct{}, 1)
		l.watchProcesses(bg)
	}
	return l, nil
}

// Enforced says how each limit is enforced, for the VM's metadata. Its keys are
// KeyMemory, KeyCPU and KeyTasks; its values those named beside them, or
// "none: " and why.
func (l *Limits) Enforced() map[string]string { return maps.Clone(l.enforced) }

// OOM reports whether the VM was killed for want of memory since the last
// Confine: by the kernel, because the VM's limit or one around it was reached,
// or by the watchdog. It keeps its answer after Close.
func (l *Limits) OOM() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fired || l.killsLocked() > l.base
}

// killsLocked is how many of the VM's processes the kernel has killed for want
// of memory.
func (l *Limits) killsLocked() int64 {
	if l.memory != nil {
		if n, err := l.memory.oomKills(); err == nil {
			l.last = n
		}
	}
	return l.last
}

// Close frees what Open took. It is called when the VM's processes are gone and
// waits a bounded time for the last of them to be, whether or not ctx is done;
// after an error it may be called again. Once it has succeeded it does nothing.
func (l *Limits) Close(ctx context.Context) error {
	l.endWarming()
	l.cancel()
	l.running.Wait()
	l.OOM() // keeps the count that the cgroup is about to take with it
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	var errs []error
	var left []*group
	for _, g := range l.groups {
		if err := removeCgroup(ctx, l.sys, g.dir); err != nil {
			errs = append(errs, err)
			left = append(left, g)
		}
	}
	l.groups = left
	return errors.Join(errs...)
}
