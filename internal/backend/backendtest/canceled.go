package backendtest

import (
	"context"
	"errors"
	"syscall"
	"time"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// canceled is what calls do whose context has ended before them: they return
// promptly. Those that take something fail and take nothing; those that free or
// end something may do so all the same.
func canceled() []subtest {
	return []subtest{
		{"create", canceledCreate},
		{"start", canceledStart},
		{"exec", canceledExec},
		{"wait", canceledWait},
		{"signal and kill all", canceledKill},
		{"stop and delete", canceledStop},
	}
}

// over returns a context that has ended.
func (f *fixture) over() context.Context {
	ctx, cancel := context.WithCancel(f.Context())
	cancel()
	return ctx
}

// prompt returns what call returns, which must take no time.
func (f *fixture) prompt(what string, call func() error) error {
	f.Helper()
	start := time.Now()
	err := call()
	if took := time.Since(start); took > promptly {
		f.Errorf("%s with a canceled context took %v", what, took)
	}
	return err
}

// expectCanceled checks that err is that of a canceled context.
func (f *fixture) expectCanceled(what string, err error) {
	f.Helper()
	if !errors.Is(err, context.Canceled) {
		f.Errorf("%s with a canceled context: error is %v", what, err)
	}
}

// expectTried checks that a call which may do its work all the same has done
// it, or says why not.
func (f *fixture) expectTried(what string, err error) {
	f.Helper()
	if err != nil {
		f.expectCanceled(what, err)
	}
}

func canceledCreate(f *fixture) {
	var m backend.Machine
	s := f.spec()
	f.expectCanceled("create", f.prompt("create", func() (err error) {
		m, err = f.Driver.Create(f.over(), s)
		return err
	}))
	if m != nil {
		f.Errorf("a failed create returned a machine")
		f.delete(m)
	}
}

func canceledStart(f *fixture) {
	m := f.created()
	f.expectCanceled("start", f.prompt("start", func() error { return m.Start(f.over()) }))
	f.expectExec(m, command("true"), vm.CodeInvalidState)
	f.start(m)
	f.expectExit(f.run(m, command("true"), nil).status, 0)
}

func canceledExec(f *fixture) {
	m := f.started()
	var r *running
	f.expectCanceled("exec", f.prompt("exec", func() (err error) {
		r, err = launch(f.over(), m, command("sleep", "1000"), nothing)
		return err
	}))
	if r != nil {
		f.killAll(r)
		r.close()
	}
	f.expectExit(f.run(m, command("true"), nil).status, 0)
}

func canceledWait(f *fixture) {
	m := f.started()
	r := f.begin(m, shell("cat; exit 5"), piped)
	f.expectCanceled("wait", f.prompt("wait", func() error {
		_, err := r.Wait(f.over())
		return err
	}))
	if err := r.stdin.Close(); err != nil {
		f.Error(err)
	}
	f.expectExit(f.wait(r), 5)
}

func canceledKill(f *fixture) {
	m := f.started()
	r := f.begin(m, command("sleep", "1000"), nothing)
	f.expectTried("signal", f.prompt("signal", func() error { return r.Signal(f.over(), syscall.SIGKILL) }))
	f.expectTried("kill all", f.prompt("kill all", func() error { return r.KillAll(f.over()) }))
	f.killAll(r)
	f.expectKilled(f.wait(r), syscall.SIGKILL)
	f.expectEOF(r)
}

func canceledStop(f *fixture) {
	m := f.started()
	r := f.begin(m, command("sleep", "1000"), nothing)
	f.expectTried("stop", f.prompt("stop", func() error { return m.Stop(f.over()) }))
	f.stop(m)
	f.expectEnded(r)
	f.expectEOF(r)
	f.expectTried("delete", f.prompt("delete", func() error { return m.Delete(f.over()) }))
	f.delete(m)
}
