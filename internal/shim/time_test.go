package shim

import (
	"strings"
	"testing"
	"time"

	"pyro/internal/vm"
)

// TestInTime runs side by side what has to wait for seconds to pass.
func TestInTime(t *testing.T) {
	needNamespaces(t)
	expectNothingLeft(t)
	for name, test := range map[string]func(*testing.T){
		"CommandThatOutlivesItsTimeIsKilledWithAllThatItStarted": commandThatOutlivesItsTimeIsKilledWithAllThatItStarted,
		"TimeOfOneCommandIsNotTheOthers":                         timeOfOneCommandIsNotTheOthers,
		"VMEndsWhenItsTimeIsUp":                                  vmEndsWhenItsTimeIsUp,
		"VMEndsWhenItsTimeIsUpWithNobodyWatching":                vmEndsWhenItsTimeIsUpWithNobodyWatching,
		"VMWhoseTimeIsUpEndsThoughItsManagerReadsNothing":        vmWhoseTimeIsUpEndsThoughItsManagerReadsNothing,
		"MachineInWhichKillingHangsIsStopped":                    func(t *testing.T) { machineInWhichNothingCanBeKilledIsStopped(t, "hang") },
		"MachineInWhichKillingFailsIsStopped":                    func(t *testing.T) { machineInWhichNothingCanBeKilledIsStopped(t, "fail") },
		"MachineThatCanNeitherKillNorStopEndsWithItsShim":        machineThatCanNeitherKillNorStopEndsWithItsShim,
		"TimeOfAVMIsUpWhileItIsMade":                             timeOfAVMIsUpWhileItIsMade,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t)
		})
	}
}

func commandThatOutlivesItsTimeIsKilledWithAllThatItStarted(t *testing.T) {
	r := newSharedRig(t, "")
	r.boot()
	e := r.exec(1, `
		(sleep 300 &)
		setsid sleep 301 &
		(trap '' TERM HUP INT; setsid sh -c 'while :; do sleep 0.1; done' &)
		trap '' TERM
		echo so far
		sleep 302`)
	began := time.Now()
	exit := r.wait(e)
	if alive := carriers(r.before, r.inside); len(alive) > 0 {
		t.Errorf("these outlived it: %v", alive)
	}
	if took := time.Since(began); took < time.Second {
		t.Errorf("it was killed after %v", took)
	}
	if exit.Code != vm.ExitTimedOut || !exit.TimedOut || exit.Signal != 0 || exit.DurationMS < 1000 {
		t.Errorf("it ended as %+v", exit)
	}
	if got := e.output(); !strings.HasPrefix(got, "so far\n") {
		t.Errorf("it printed %q", got)
	}
	// The VM goes on.
	if exit := r.wait(r.exec(30, "exit 5")); exit.Code != 5 {
		t.Errorf("the next command ended as %+v", exit)
	}
}

func timeOfOneCommandIsNotTheOthers(t *testing.T) {
	r := newSharedRig(t, "")
	r.boot()
	long := r.exec(60, "while [ ! -e done ]; do sleep 0.01; done; exit 6")
	if exit := r.wait(r.exec(1, "sleep 300")); !exit.TimedOut {
		t.Errorf("the short one ended as %+v", exit)
	}
	r.wait(r.exec(30, "touch done"))
	if exit := r.wait(long); exit.Code != 6 || exit.TimedOut {
		t.Errorf("the long one ended as %+v", exit)
	}
}

func vmEndsWhenItsTimeIsUp(t *testing.T) {
	r := newSharedRig(t, "")
	c, s := r.createFor(1), r.start()
	e := r.exec(60, "(setsid sleep 300 &); sleep 300")
	_, err := c.Wait(r.ctx())
	check(t, err)
	_, err = s.Wait(r.ctx())
	check(t, err)
	_, err = e.Wait(r.ctx())
	expectCode(t, "the command", err, vm.CodeVMFailed)
	r.expectGone()
	_, err = r.client.Start()
	expectCode(t, "a call afterwards", err, vm.CodeVMFailed)
	r.expectFreed()
}

func vmEndsWhenItsTimeIsUpWithNobodyWatching(t *testing.T) {
	r := newSharedRig(t, "")
	_, err := r.createFor(1).Wait(r.ctx())
	check(t, err)
	r.expectGone()
	r.expectFreed()
}

func vmWhoseTimeIsUpEndsThoughItsManagerReadsNothing(t *testing.T) {
	r := newSharedRig(t, "")
	c := r.createFor(1)
	_, err := c.Wait(r.ctx())
	check(t, err)
	// The client's reader stops at the first answer, as the manager's does that
	// is under a debugger; and the shim stops when it has no room for more.
	r.client.mu.Lock()
	long := frame(`{"op":"` + strings.Repeat("x", 100_000) + `"}`)
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		for {
			if _, err := r.client.channel.conn.Write(long); err != nil {
				return
			}
		}
	}()
	<-flooded
	r.client.mu.Unlock()
	r.expectGone()
	r.expectFreed()
}

func machineInWhichNothingCanBeKilledIsStopped(t *testing.T, fault string) {
	r := newSharedRig(t, "killall="+fault)
	r.boot()
	e := r.exec(1, "(setsid sleep 300 &); echo so far; sleep 300")
	other := r.exec(60, "sleep 300")
	exit := r.wait(e)
	if alive := carriers(r.before, r.inside); len(alive) > 0 {
		t.Errorf("these outlived it: %v", alive)
	}
	if exit.Code != vm.ExitTimedOut || !exit.TimedOut {
		t.Errorf("it ended as %+v", exit)
	}
	if !r.stage.has("stop") {
		t.Error("the machine was not stopped")
	}
	if exit := r.wait(other); exit.Code != 137 {
		t.Errorf("the other command ended as %+v", exit)
	}
	_, err := r.exec(5, "true").Wait(r.ctx())
	expectCode(t, "exec in a stopped machine", err, vm.CodeInvalidState)
	check(t, r.client.Delete(r.ctx()))
}

func machineThatCanNeitherKillNorStopEndsWithItsShim(t *testing.T) {
	r := newSharedRig(t, "killall=fail stop=fail")
	r.boot()
	_, err := r.exec(1, "(setsid sleep 300 &); sleep 300").Wait(r.ctx())
	expectScripted(t, "exec", err)
	check(t, r.client.Close())
	r.expectGone()
}

// timeOfAVMIsUpWhileItIsMade has a driver that ends with its context; one that
// does not is in TestServerThatIsToEndDoesSoWhateverIsStuck.
func timeOfAVMIsUpWhileItIsMade(t *testing.T) {
	r := newSharedRig(t, "create=hang")
	_, err := r.createFor(1).Wait(r.ctx())
	expectCode(t, "create", err, vm.CodeVMFailed)
	r.expectGone()
	r.expectFreed()
}
