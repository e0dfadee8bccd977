package shim

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"pyro/internal/vm"
)

// expectScripted checks that err is errScripted, as it comes over the
// connection.
func expectScripted(t *testing.T, what string, err error) {
	t.Helper()
	e := vm.AsError(err)
	if e == nil || e.Code != errScripted.Code || !strings.Contains(e.Message, errScripted.Message) || e.Hint != errScripted.Hint {
		t.Errorf("%s: the error is %+v, want %+v", what, e, errScripted)
	}
}

func TestCreationThatFailsSaysWhyAndTakesNothing(t *testing.T) {
	r := newRig(t, "create=fail")
	c, s, e := r.create(), r.start(), r.exec(5, "true")
	_, err := c.Wait(r.ctx())
	expectScripted(t, "create", err)
	_, err = s.Wait(r.ctx())
	expectCode(t, "start", err, vm.CodeInvalidState)
	_, err = e.Wait(r.ctx())
	expectCode(t, "exec", err, vm.CodeInvalidState)
	check(t, r.client.Delete(r.ctx()))
	r.expectGone()
	r.expectFreed()
}

func TestStartThatFailsSaysWhyAndTheVMCanBeDeleted(t *testing.T) {
	r := newRig(t, "start=fail")
	c, s, e := r.create(), r.start(), r.exec(5, "true")
	_, err := c.Wait(r.ctx())
	check(t, err)
	_, err = s.Wait(r.ctx())
	expectScripted(t, "start", err)
	_, err = e.Wait(r.ctx())
	expectCode(t, "exec", err, vm.CodeInvalidState)
	check(t, r.client.Delete(r.ctx()))
	r.expectGone()
	r.expectFreed()
}

func TestExecThatFailsSaysWhyAndTheVMGoesOn(t *testing.T) {
	r := newRig(t, "exec=fail")
	r.boot()
	for range 2 {
		_, err := r.exec(5, "true").Wait(r.ctx())
		expectScripted(t, "exec", err)
	}
	check(t, r.client.Delete(r.ctx()))
}

func TestWaitThatFailsSaysWhy(t *testing.T) {
	r := newRig(t, "wait=fail")
	r.boot()
	_, err := r.exec(5, "sleep 300").Wait(r.ctx())
	expectScripted(t, "wait", err)
	check(t, r.client.Delete(r.ctx()))
	r.expectGone()
}

func TestSignalThatFailsSaysWhy(t *testing.T) {
	r := newRig(t, "signal=fail")
	r.boot()
	e := r.exec(30, "while [ ! -e done ]; do sleep 0.01; done")
	expectScripted(t, "signal", e.Signal(r.ctx(), 15))
	r.wait(r.exec(30, "touch done"))
	r.wait(e)
}

func TestMachineThatDiesUnderACommandIsReportedAndCanBeDeleted(t *testing.T) {
	r := newRig(t, "wait=die")
	r.boot()
	e := r.exec(30, "echo so far; sleep 300")
	await(t, "the command runs", func() bool { return e.output() == "so far\n" })
	r.stage.put("wait" + goOn)
	_, err := e.Wait(r.ctx())
	expectCode(t, "a command of a machine that died", err, vm.CodeVMFailed)
	check(t, r.client.Delete(r.ctx()))
	r.expectGone()
	r.expectFreed()
}

func TestDeletionThatFailsSaysWhyAndEndsTheShimAllTheSame(t *testing.T) {
	r := newRig(t, "delete=fail")
	r.boot()
	r.wait(r.exec(30, "touch here"))
	expectScripted(t, "delete", r.client.Delete(r.ctx()))
	r.expectGone()
}

func TestDeletionThatHangsIsEndedByForce(t *testing.T) {
	r := newRig(t, "delete=stuck")
	r.boot()
	e := r.exec(60, "sleep 300")
	ctx, cancel := context.WithTimeout(r.ctx(), 100*time.Millisecond)
	defer cancel()
	if err := r.client.Delete(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the error is %v", err)
	}
	check(t, r.client.Close())
	r.expectGone()
	_, err := e.Wait(r.ctx())
	expectCode(t, "the command", err, vm.CodeVMFailed)
	free(t, r.claim)
	r.expectFreed()
}

func TestCloseEndsAShimWhoseDriverIsStuck(t *testing.T) {
	for _, op := range []string{"create", "start", "exec", "wait", "signal"} {
		t.Run(op, func(t *testing.T) {
			r := newRig(t, op+"=stuck")
			r.create()
			r.start()
			e := r.exec(60, "sleep 300")
			signaled := make(chan error, 1)
			go func() { signaled <- e.Signal(r.ctx(), 15) }()
			await(t, "the driver is stuck", func() bool { return r.stage.has(op) })
			check(t, r.client.Close())
			r.expectGone()
			_, err := e.Wait(r.ctx())
			expectCode(t, "the command", err, vm.CodeVMFailed)
			<-signaled
			free(t, r.claim)
			r.expectFreed()
		})
	}
}

func TestPanicInADriverEndsTheVMAndEveryCall(t *testing.T) {
	for _, op := range []string{"create", "start", "exec", "wait"} {
		t.Run(op, func(t *testing.T) {
			r := newRig(t, op+"=panic")
			r.create()
			// The shim may be gone before it is asked for the rest.
			if _, err := r.client.Start(); err != nil {
				expectCode(t, "start", err, vm.CodeVMFailed)
			}
			e, err := r.tryExec(60, "sleep 300")
			if err == nil {
				_, err = e.Wait(r.ctx())
			}
			expectCode(t, "exec", err, vm.CodeVMFailed)
			r.expectGone()
			expectCode(t, "delete", r.client.Delete(r.ctx()), vm.CodeVMFailed)
			free(t, r.claim)
			r.expectFreed()
		})
	}
}
