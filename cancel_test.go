package pyro_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"pyro"
)

// expectCanceled checks that a Run ended because of its context.
func expectCanceled(t testing.TB, what string, result *pyro.ExecResult, err error, cause error) {
	t.Helper()
	expectCode(t, what, err, pyro.CodeCanceled)
	if !errors.Is(err, cause) {
		t.Errorf("%s: the cause %v is not in %v", what, cause, err)
	}
	if result != nil {
		t.Errorf("%s: there is a result: %+v", what, result)
	}
}

func TestCancelWhileTheVMIsMadeEndsIt(t *testing.T) {
	for _, op := range []string{"create", "start", "exec"} {
		t.Run(op, func(t *testing.T) {
			r := newRig(t, op+"=stuck")
			ctx, cancel := context.WithCancel(r.ctx())
			defer cancel()
			done := r.begin(ctx, r.shell("sleep 300"))
			await(t, "the shim is busy", func() bool { return r.reached(op) })
			cancel()
			result, err := r.end(done)
			expectCanceled(t, op, result, err, context.Canceled)
		})
	}
}

func TestCancelWhileTheCommandRunsEndsIt(t *testing.T) {
	r := newRig(t, "")
	ctx, cancel := context.WithCancel(r.ctx())
	defer cancel()
	stdin, stdinWriter := io.Pipe()
	defer stdinWriter.Close()
	var out recorder
	q := r.shell("trap '' TERM HUP INT; (setsid sleep 300 &); echo ready; sleep 300")
	q.Stdin, q.Stdout = stdin, &out
	done := r.begin(ctx, q)
	await(t, "the command runs", func() bool { return out.String() == "ready\n" })
	cancel()
	result, err := r.end(done)
	expectCanceled(t, "run", result, err, context.Canceled)
	if alive := r.alive(); len(alive) > 0 {
		t.Errorf("these are alive: %v", alive)
	}
}

func TestDeadlineOfTheContextEndsTheRun(t *testing.T) {
	r := newRig(t, "")
	ctx, cancel := context.WithTimeout(r.ctx(), 200*time.Millisecond)
	defer cancel()
	result, err := r.Run(ctx, r.shell("sleep 300"))
	expectCanceled(t, "run", result, err, context.DeadlineExceeded)
}

func TestCancellationWithACauseIsOneAllTheSame(t *testing.T) {
	r := newRig(t, "create=stuck")
	ctx, cancel := context.WithCancelCause(r.ctx())
	done := r.begin(ctx, r.shell("true"))
	await(t, "the VM is being made", func() bool { return r.reached("create") })
	cancel(errors.New("interrupted"))
	result, err := r.end(done)
	expectCanceled(t, "run", result, err, ctx.Err())
}

// TestCancelAtAnyMomentLeavesNothing cancels from before a run begins to after
// it has ended.
func TestCancelAtAnyMomentLeavesNothing(t *testing.T) {
	r := newRig(t, "")
	began := time.Now()
	r.run(r.shell("echo done"))
	whole := time.Since(began)
	canceled := 0
	for range 30 {
		ctx, cancel := context.WithTimeout(r.ctx(), rand.N(whole*5/4))
		result, err := r.Run(ctx, r.shell("echo done"))
		cancel()
		switch {
		case err == nil && result.Stdout != "done\n":
			t.Errorf("the result is %+v", result)
		case err != nil:
			canceled++
			expectCanceled(t, "run", result, err, context.DeadlineExceeded)
		}
		r.expectFreed()
	}
	t.Logf("a run takes %v; %d of 30 were canceled", whole, canceled)
	if canceled == 0 {
		t.Error("none was canceled")
	}
}

func TestCancelDoesNotWaitForASlowWriter(t *testing.T) {
	r := newRig(t, "")
	ctx, cancel := context.WithCancel(r.ctx())
	q := r.shell("head -c 500000 /dev/zero; touch '" + r.stage("here") + "'; sleep 300")
	q.Stdout = writer(func(p []byte) (int, error) {
		time.Sleep(300 * time.Millisecond) // what is slow about it
		return len(p), nil
	})
	done := r.begin(ctx, q)
	await(t, "all is in the pipe", func() bool { return r.reached("here") })
	cancel()
	at := time.Now()
	_, err := r.end(done)
	expectCode(t, "run", err, pyro.CodeCanceled)
	if took := time.Since(at); took > 2*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestCancelAfterTheCommandEndedDoesNotTakeItsResult(t *testing.T) {
	r := newRig(t, "delete=pause")
	ctx, cancel := context.WithCancel(r.ctx())
	defer cancel()
	done := r.begin(ctx, r.shell("echo done; exit 3"))
	await(t, "the VM is being deleted", func() bool { return r.reached("delete") })
	cancel()
	select {
	case <-done:
		t.Fatal("it does not wait for the VM to be deleted in order")
	case <-time.After(50 * time.Millisecond): // most unlikely to be too short to see it
	}
	r.goOn("delete.go")
	result, err := r.end(done)
	check(t, err)
	if result.Code != 3 || result.Stdout != "done\n" {
		t.Errorf("the result is %+v", result)
	}
}

func TestOutputIsNeverCutInSilence(t *testing.T) {
	r := newRig(t, "delete=pause")
	ctx, cancel := context.WithCancel(r.ctx())
	defer cancel()
	const size = 500000
	q := r.shell("head -c 500000 /dev/zero")
	delivered := 0
	q.Stdout = writer(func(p []byte) (int, error) {
		time.Sleep(20 * time.Millisecond) // what is slow about it
		delivered += len(p)
		return len(p), nil
	})
	done := r.begin(ctx, q)
	await(t, "the command has ended", func() bool { return r.reached("delete") })
	cancel()
	r.goOn("delete.go")
	result, err := r.end(done)
	if err == nil && delivered != size {
		t.Errorf("of %d bytes %d were delivered, and the result is %+v", size, delivered, result)
	}
}

func TestSignalsArePassedOnInTheirOrder(t *testing.T) {
	r := newRig(t, "")
	var out recorder
	q := r.shell(`trap 'echo USR1' USR1; trap 'echo TERM; exit 5' TERM; echo ready; while :; do sleep 0.01 2>/dev/null; done 2>/dev/null`)
	signals := make(chan syscall.Signal)
	q.Signals, q.Stdout, q.Stderr = signals, &out, io.Discard
	done := r.begin(r.ctx(), q)
	await(t, "the command runs", func() bool { return out.String() == "ready\n" })
	signals <- syscall.SIGUSR1
	await(t, "the first has come", func() bool { return out.String() == "ready\nUSR1\n" })
	signals <- syscall.SIGTERM
	result, err := r.end(done)
	check(t, err)
	if result.Code != 5 || out.String() != "ready\nUSR1\nTERM\n" {
		t.Errorf("it ended as %+v and printed %q", result.Exit, out.String())
	}
}

func TestSignalThatCameEarlyReachesTheCommand(t *testing.T) {
	r := newRig(t, "create=pause")
	q := r.shell("sleep 300")
	signals := make(chan syscall.Signal, 1)
	q.Signals = signals
	done := r.begin(r.ctx(), q)
	await(t, "the VM is being made", func() bool { return r.reached("create") })
	signals <- syscall.SIGTERM
	r.goOn("create.go")
	result, err := r.end(done)
	check(t, err)
	if result.Signal != int(syscall.SIGTERM) || result.Code != 143 {
		t.Errorf("it ended as %+v", result.Exit)
	}
}

func TestSignalsThatNobodySendsDoNotMatter(t *testing.T) {
	r := newRig(t, "")
	q := r.shell("exit 6")
	q.Signals = make(chan syscall.Signal)
	if got := r.run(q); got.Code != 6 {
		t.Errorf("it ended as %+v", got.Exit)
	}
}

func TestClosedSignalsAreNoSignals(t *testing.T) {
	r := newRig(t, "")
	signals := make(chan syscall.Signal)
	close(signals)
	q := r.shell("sleep 1")
	q.Signals = signals
	before := cpu()
	if got := r.run(q); got.Code != 0 {
		t.Errorf("the result is %+v", got)
	}
	if used := cpu() - before; used > 700*time.Millisecond {
		t.Errorf("a second of sleep took %v of processor time", used)
	}
}

// cpu is the processor time that this process and its dead children have used.
func cpu() (sum time.Duration) {
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if syscall.Getrusage(who, &u) == nil {
			sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	return sum
}
