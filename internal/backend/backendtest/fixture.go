package backendtest

import (
	"context"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

const (
	// patience is how long a call that should succeed may take. It is reached
	// only when something hangs.
	patience = 30 * time.Second
	// promptly is how soon something must be seen that no longer has anything
	// to wait for.
	promptly = 2 * time.Second
	// unlikely is how long something must not happen to count as not
	// happening.
	unlikely = 100 * time.Millisecond
)

// markVariable is in the environment of every command, so that leftovers are
// recognised even when they have left the family of this process.
const markVariable = "PYRO_BACKENDTEST"

// fixture is what one subtest works with: its T, the harness, and helpers that
// end the subtest when something fails that it does not ask about.
type fixture struct {
	*testing.T
	Harness
	mark string
}

// newFixture starts a subtest. At its end, after everything that it registers
// for cleanup, it checks that nothing is left.
func newFixture(t *testing.T, newHarness func(t *testing.T) Harness) *fixture {
	f := &fixture{T: t, mark: markVariable + "=" + rand.Text()}
	before := takeFootprint(t)
	t.Cleanup(func() { before.check(t, f.mark) })
	f.Harness = newHarness(t)
	return f
}

// ctx returns a context that ends when the subtest does, or has run for too
// long.
func (f *fixture) ctx() context.Context {
	ctx, cancel := context.WithTimeout(f.Context(), patience)
	f.Cleanup(cancel)
	return ctx
}

// spec returns the Spec of a new machine. When the subtest ends, nothing may
// be left in its directories.
func (f *fixture) spec() backend.Spec {
	f.Helper()
	s := f.NewSpec(f)
	if f.mark != "" {
		s.Root.Env = append(s.Root.Env[:len(s.Root.Env):len(s.Root.Env)], f.mark)
	}
	f.Cleanup(func() {
		for _, dir := range []string{s.Dir, s.Scratch} {
			f.expectEmpty(dir)
		}
	})
	return s
}

// expectEmpty checks that nothing is below dir.
func (f *fixture) expectEmpty(dir string) {
	f.Helper()
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		f.Errorf("list %s: %v", dir, err)
	}
	if len(left) > 0 {
		f.Errorf("left in the directories of the spec: %s", strings.Join(left, ", "))
	}
}

// created returns a new machine, which is deleted when the subtest ends.
func (f *fixture) created() backend.Machine {
	f.Helper()
	return f.createdFrom(f.spec())
}

// createdFrom is created for a Spec that the subtest has changed.
func (f *fixture) createdFrom(s backend.Spec) backend.Machine {
	f.Helper()
	m, err := f.Driver.Create(f.ctx(), s)
	if err != nil {
		f.Fatalf("create: %v", err)
	}
	f.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(f.Context()), patience)
		defer cancel()
		if err := m.Delete(ctx); err != nil {
			f.Errorf("delete: %v", err)
		}
	})
	return m
}

// started returns a new machine that runs.
func (f *fixture) started() backend.Machine {
	f.Helper()
	m := f.created()
	f.start(m)
	return m
}

func (f *fixture) start(m backend.Machine) {
	f.Helper()
	if err := m.Start(f.ctx()); err != nil {
		f.Fatalf("start: %v", err)
	}
}

func (f *fixture) stop(m backend.Machine) {
	f.Helper()
	if err := m.Stop(f.ctx()); err != nil {
		f.Fatalf("stop: %v", err)
	}
}

func (f *fixture) delete(m backend.Machine) {
	f.Helper()
	if err := m.Delete(f.ctx()); err != nil {
		f.Fatalf("delete: %v", err)
	}
}

// expectCode checks that err carries code.
func (f *fixture) expectCode(what string, err error, code vm.Code) {
	f.Helper()
	if !errors.Is(err, code) {
		f.Errorf("%s: error is %v, want one with code %s", what, err, code)
	}
}

// expectExec checks that a command cannot be started, with code.
func (f *fixture) expectExec(m backend.Machine, cmd vm.Command, code vm.Code) {
	f.Helper()
	r, err := launch(f.ctx(), m, cmd, nothing)
	if err == nil {
		r.close()
		f.killAll(r)
	}
	f.expectCode("exec "+cmd.String(), err, code)
}

// expectRunning checks that a command has not ended, nor is about to.
func (f *fixture) expectRunning(p backend.Process) {
	f.Helper()
	ctx, cancel := context.WithTimeout(f.Context(), unlikely)
	defer cancel()
	status, err := p.Wait(ctx)
	if !errors.Is(err, context.DeadlineExceeded) {
		f.Errorf("wait for a command that should run on: status %#x, error %v", uint32(status), err)
	}
}

// wait returns how a command ended.
func (f *fixture) wait(p backend.Process) syscall.WaitStatus {
	f.Helper()
	status, err := p.Wait(f.ctx())
	if err != nil {
		f.Fatalf("wait: %v", err)
	}
	return status
}

// killAll kills a command with all that it started, which must not take long.
func (f *fixture) killAll(p backend.Process) {
	f.Helper()
	ctx, cancel := context.WithTimeout(f.Context(), promptly)
	defer cancel()
	if err := p.KillAll(ctx); err != nil {
		f.Errorf("kill all: %v", err)
	}
}

// expectExit checks that a command ended by itself with code.
func (f *fixture) expectExit(status syscall.WaitStatus, code int) {
	f.Helper()
	if !status.Exited() || status.ExitStatus() != code {
		f.Errorf("status is %#x, want exit code %d", uint32(status), code)
	}
}

// expectKilled checks that a command was ended by sig.
func (f *fixture) expectKilled(status syscall.WaitStatus, sig syscall.Signal) {
	f.Helper()
	if !status.Signaled() || status.Signal() != sig {
		f.Errorf("status is %#x, want the end by signal %d", uint32(status), sig)
	}
}

// expectEnded checks that a command whose machine was taken away did not end by
// itself: Wait says that it was killed, or that its machine is gone.
func (f *fixture) expectEnded(p backend.Process) {
	f.Helper()
	ctx, cancel := context.WithTimeout(f.Context(), promptly)
	defer cancel()
	status, err := p.Wait(ctx)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		f.Errorf("a command of a machine that has ended still runs")
	case err == nil:
		f.expectKilled(status, syscall.SIGKILL)
	}
}

// hostFile returns the path of a new file of the host's.
func (f *fixture) hostFile(content string) string {
	f.Helper()
	path := filepath.Join(f.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		f.Fatal(err)
	}
	return path
}
