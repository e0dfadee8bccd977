package backendtest

import (
	"context"
	"errors"
	"sync/atomic"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// limits is when a driver confines a machine.
func limits() []subtest {
	return []subtest{
		{"every start confines", everyStartConfines},
		{"a failed confinement fails the start", confinementFails},
	}
}

// limiter counts the calls of another, and fails while it is told to.
type limiter struct {
	backend.Limiter
	calls atomic.Int32
	fail  atomic.Pointer[error]
}

// Confine calls the other limiter.
func (l *limiter) Confine(ctx context.Context) error {
	l.calls.Add(1)
	if err := l.fail.Load(); err != nil {
		return *err
	}
	return l.Limiter.Confine(ctx)
}

func everyStartConfines(f *fixture) {
	s := f.spec()
	l := &limiter{Limiter: s.Limits}
	s.Limits = l
	m := f.createdFrom(s)
	if n := l.calls.Load(); n != 0 {
		f.Errorf("create confined %d times", n)
	}
	for n := int32(1); n <= 2; n++ {
		f.start(m)
		if got := l.calls.Load(); got != n {
			f.Errorf("%d starts confined %d times", n, got)
		}
		f.stop(m)
	}
}

func confinementFails(f *fixture) {
	s := f.spec()
	l := &limiter{Limiter: s.Limits}
	s.Limits = l
	m := f.createdFrom(s)
	refused := errors.New("refused by the suite")
	l.fail.Store(&refused)
	if err := m.Start(f.ctx()); !errors.Is(err, refused) {
		f.Errorf("start: error is %v, want one that wraps the limiter's", err)
	}
	f.expectExec(m, command("true"), vm.CodeInvalidState)
	l.fail.Store(nil)
	f.start(m)
	f.expectExit(f.run(m, command("true"), nil).status, 0)
}
