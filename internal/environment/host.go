package environment

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"pyro/internal/vm"
)

// Hostname is the name by which a VM of the host environment knows itself: its
// /etc/hosts and /etc/hostname say so. It is the same for all, because all
// share one /etc.
const Hostname = "pyro"

// stageAttempts is how often preparing starts again because the host's files
// changed meanwhile.
const stageAttempts = 5

// errChanged says that the host's files are not what they were a moment ago.
var errChanged = errors.New("its files changed while they were copied")

// Host returns the environment that lends this machine's own /usr, prepared in
// cacheDir, which is made where it does not exist and must be private to the
// user. It may be called by any number of processes at once; a call that finds
// the environment prepared only compares it with the machine.
//
// Root.Dir is <cacheDir>/host-<key>. The key stands for the state of every
// file that was looked at, so an upgraded package gives another directory and
// a prepared one never changes. The key also stands for this boot of the
// machine. That is why nothing is synced to disk: only the machine's own crash
// can lose what was written, and after it no earlier directory is used again.
// Collect removes those.
//
// An error carries vm.CodeStateUnavailable where cacheDir cannot be written
// and vm.CodeArtifactsMissing where the machine has no /usr.
func Host(ctx context.Context, cacheDir string) (Root, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Root{}, fmt.Errorf("identify this boot of the machine: %w", err)
	}
	return hostTree{root: "/", boot: string(boot)}.prepare(ctx, cacheDir)
}

// hostTree is a machine to make the environment from.
type hostTree struct {
	root string // its root directory
	boot string // names what no prepared directory outlives
}

// hostState is what a scan of a machine found.
type hostState struct {
	key   string   // stands for all that was looked at
	binds []string // directories to show as they are
	shell string   // the best shell there is
}

// prepare is Host for t.
func (t hostTree) prepare(ctx context.Context, cacheDir string) (Root, error) {
	cacheDir, err := filepath.Abs(cacheDir)
	if err != nil {
		return Root{}, fmt.Errorf("locate the cache: %w", err)
	}
	c := cache{dir: cacheDir}
	state, found, err := t.find(ctx, c)
	if err == nil && !found {
		state, err = t.publish(ctx, c)
	}
	if err != nil {
		return Root{}, err
	}
	return Root{
		Dir:        c.published(state.key),
		Binds:      state.binds,
		Env:        hostEnv(state.shell),
		WorkingDir: "/root",
	}, nil
}

// find returns the machine's state and whether it is published.
func (t hostTree) find(ctx context.Context, c cache) (state hostState, found bool, err error) {
	state, err = t.scan(ctx, nil)
	if errors.Is(err, errChanged) {
		return hostState{}, false, nil
	}
	if err == nil {
		found, err = c.has(state.key)
	}
	return state, found, err
}

// publish makes the directory for the machine's state, unless another process
// did meanwhile, and returns that state.
func (t hostTree) publish(ctx context.Context, c cache) (state hostState, err error) {
	l, err := c.lock(ctx)
	if err != nil {
		return hostState{}, err
	}
	defer func() { err = errors.Join(err, l.unlock()) }()
	if state, found, err := t.find(ctx, c); found || err != nil {
		return state, err
	}
	for range stageAttempts {
		if state, err = t.stage(ctx, c); err == nil {
			return state, c.publish(state.key)
		}
		if !errors.Is(err, errChanged) {
			break
		}
	}
	if errors.Is(err, errChanged) {
		err = vm.Errorf(vm.CodeInternal, "prepare the host environment: %w", err).
			WithHint("try again when no packages are being installed on this machine")
	}
	return hostState{}, errors.Join(err, c.clear())
}

// stage makes the environment in the staging directory and returns the state
// it is of. The caller holds c's lock.
//
// Files may change while they are copied. What was copied stands only if the
// whole state is the same afterwards: then it was the machine's at one moment.
func (t hostTree) stage(ctx context.Context, c cache) (hostState, error) {
	if err := c.clear(); err != nil {
		return hostState{}, err
	}
	b := builder{root: c.staging()}
	if err := b.begin(); err != nil {
		return hostState{}, err
	}
	state, err := t.scan(ctx, b.add)
	if err != nil {
		return hostState{}, err
	}
	if err := b.finish(state.shell); err != nil {
		return hostState{}, err
	}
	now, err := t.scan(ctx, nil)
	if err == nil && now.key != state.key {
		err = errChanged
	}
	return state, err
}

// hostEnv is the environment of commands: nothing of it is the host's. TERM is
// for whoever attaches a terminal.
func hostEnv(shell string) []string {
	return []string{
		"PATH=" + hostPath,
		"HOME=/root",
		"USER=root",
		"LOGNAME=root",
		"SHELL=" + shell,
		"LANG=C.UTF-8",
	}
}
