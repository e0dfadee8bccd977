package shim

import (
	"sync/atomic"
	"testing"
	"time"
)

// soon is a short time to a deadline, and never one that is not reached.
const (
	soon  = 10 * time.Millisecond
	never = time.Hour
)

func TestDeadlineCallsOnceItsTimeHasPassed(t *testing.T) {
	expectNothingLeft(t)
	for _, after := range []time.Duration{soon, 1, 0, -time.Second} {
		began := time.Now()
		called := make(chan time.Duration, 2)
		d, err := newDeadline(after, func() { called <- time.Since(began) })
		check(t, err)
		select {
		case took := <-called:
			if took < after {
				t.Errorf("after %v: called after %v", after, took)
			}
		case <-time.After(patience):
			t.Errorf("after %v: not called", after)
		}
		d.stop()
		if len(called) > 0 {
			t.Errorf("after %v: called again", after)
		}
	}
}

func TestStoppedDeadlineNeverCalls(t *testing.T) {
	expectNothingLeft(t)
	var calls atomic.Int32
	for range 20 {
		d, err := newDeadline(never, func() { calls.Add(1) })
		check(t, err)
		d.stop()
	}
	if n := calls.Load(); n > 0 {
		t.Errorf("called %d times", n)
	}
}

func TestDeadlineIsNotInItsCallOnceStopReturns(t *testing.T) {
	expectNothingLeft(t)
	for i := range 200 {
		var begun, ended atomic.Int32
		// Around the time that it takes until stop is called.
		d, err := newDeadline(time.Duration(i)*time.Microsecond, func() {
			begun.Add(1)
			time.Sleep(50 * time.Microsecond)
			ended.Add(1)
		})
		check(t, err)
		d.stop()
		if begun.Load() != ended.Load() || begun.Load() > 1 {
			t.Fatalf("%d calls have begun and %d ended", begun.Load(), ended.Load())
		}
	}
}

func TestStopWaitsForTheCallUnderWay(t *testing.T) {
	expectNothingLeft(t)
	called, goOn, stopped := make(chan struct{}), make(chan struct{}), make(chan struct{})
	d, err := newDeadline(1, func() { close(called); <-goOn })
	check(t, err)
	<-called
	go func() { d.stop(); close(stopped) }()
	select {
	case <-stopped:
		t.Error("stop returned")
	case <-time.After(5 * time.Millisecond):
	}
	close(goOn)
	<-stopped
}
