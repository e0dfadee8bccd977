package shim

import (
	"errors"
	"os"
	"testing"

	"pyro/internal/vm"
)

// hangUp ends the connection as the manager's death does, and makes the manager
// lose its hold on the lock.
func (r *rig) hangUp() {
	r.Helper()
	check(r, r.client.channel.conn.Close())
	check(r, r.claim.lock.Close())
}

// expectFreedByShim checks that the shim ends by itself and leaves nothing for
// anybody to reclaim.
func (r *rig) expectFreedByShim() {
	r.Helper()
	r.expectGone()
	if left := names(r, r.vms); len(left) > 0 {
		r.Errorf("the shim left %v", left)
	}
	r.expectNoCgroups()
	// So that the cleanup has something to release.
	var err error
	r.claim, err = NewClaim(r.vms, r.claim.ID)
	check(r, err)
}

func TestShimThatIsAskedForNothingEndsWithItsManager(t *testing.T) {
	r := newRig(t, "")
	r.hangUp()
	r.expectFreedByShim()
}

func TestManagerThatGoesWhileTheVMIsMadeLeavesNothing(t *testing.T) {
	for _, op := range []string{"create", "start", "exec"} {
		t.Run(op, func(t *testing.T) {
			r := newRig(t, op+"=pause")
			r.create()
			r.start()
			r.exec(60, "sleep 300")
			await(t, "the shim is busy", func() bool { return r.stage.has(op) })
			r.hangUp()
			// Nobody takes it away from a shim that is still busy.
			if found := orphans(t, r.vms); found != nil {
				t.Errorf("orphans: %v", found)
			}
			r.stage.put(op + goOn)
			r.expectFreedByShim()
		})
	}
}

func TestManagerThatGoesAfterTheVMIsMadeLeavesNothing(t *testing.T) {
	r := newRig(t, "")
	_, err := r.create().Wait(r.ctx())
	check(t, err)
	r.hangUp()
	r.expectFreedByShim()
}

func TestManagerThatGoesAfterAFailureLeavesNothing(t *testing.T) {
	for _, script := range []string{"create=fail", "start=fail"} {
		t.Run(script, func(t *testing.T) {
			r := newRig(t, script)
			r.create()
			_, err := r.start().Wait(r.ctx())
			if err == nil {
				t.Error("it started")
			}
			r.hangUp()
			r.expectFreedByShim()
		})
	}
}

func TestManagerThatGoesWhileACommandRunsLeavesNothing(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	e := r.exec(60, `mkdir -p a/b; echo x >a/b/c; chmod 0 a/b; (setsid sleep 300 &); trap '' TERM HUP; echo ready; sleep 300`)
	await(t, "the command runs", func() bool { return e.output() == "ready\n" })
	r.hangUp()
	r.expectFreedByShim()
	_, err := e.Wait(r.ctx())
	expectCode(t, "the command", err, vm.CodeVMFailed)
}

func TestManagerThatIsCutOffInsideAMessageLeavesNothing(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	r.client.channel.write(t, []byte{0, 0, 1}, tempFiles(t, 3)...)
	r.hangUp()
	r.expectFreedByShim()
}

func TestShimThatIsSentGarbageDeletesItsVM(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	e := r.exec(60, "sleep 300")
	r.client.channel.write(t, frame("nonsense"))
	// What becomes of the command does not matter, as long as it ends.
	if exit, err := e.Wait(r.ctx()); err == nil && exit.Code != 137 {
		t.Errorf("the command ended as %+v", exit)
	}
	r.expectGone()
	r.expectFreed()
}

// killShim kills the shim and nothing else.
func (r *rig) killShim() {
	r.Helper()
	check(r, r.client.cmd.Process.Kill())
}

func TestShimThatIsKilledTakesItsProcessesAlongAndCanBeReclaimed(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	e := r.exec(60, `trap '' TERM HUP; (setsid sleep 300 &); echo ready; sleep 300`)
	await(t, "the command runs", func() bool { return e.output() == "ready\n" })
	r.killShim()
	_, err := e.Wait(r.ctx())
	expectCode(t, "the command", err, vm.CodeVMFailed)
	// Once a call has failed, nothing of the VM runs.
	if alive := r.alive(); len(alive) > 0 {
		t.Errorf("these live on: %v", alive)
	}
	r.expectGone()
	for what, err := range map[string]error{"delete": r.client.Delete(r.ctx()), "signal": e.Signal(r.ctx(), 15)} {
		expectCode(t, what, err, vm.CodeVMFailed)
	}
	check(t, r.client.Close())

	// Its manager is still there to free it.
	if found := orphans(t, r.vms); found != nil {
		t.Errorf("orphans: %v", found)
	}
	abandon(t, r.claim)
	found, err := Orphans(r.vms)
	check(t, err)
	if len(found) != 1 || found[0].ID != r.claim.ID || found[0].Dir != r.claim.Dir {
		t.Fatalf("orphans: %+v, want %s", found, r.claim.ID)
	}
	r.claim = found[0]
	free(t, r.claim)
	r.expectFreed()
}

func TestShimThatIsKilledEndsEveryPendingCall(t *testing.T) {
	r := newRig(t, "create=stuck")
	c, s, e := r.create(), r.start(), r.exec(60, "true")
	await(t, "the VM is being made", func() bool { return r.stage.has("create") })
	r.killShim()
	_, createErr := c.Wait(r.ctx())
	_, startErr := s.Wait(r.ctx())
	_, execErr := e.Wait(r.ctx())
	for what, err := range map[string]error{"create": createErr, "start": startErr, "exec": execErr} {
		expectCode(t, what, err, vm.CodeVMFailed)
	}
}

func TestShimHoldsTheLockAfterItsManager(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	abandon(t, r.claim)
	if found := orphans(t, r.vms); found != nil {
		t.Errorf("orphans: %v", found)
	}
	r.killShim()
	r.expectGone()
	claims, err := Orphans(r.vms)
	check(t, err)
	if len(claims) != 1 {
		t.Fatalf("%d orphans, want 1", len(claims))
	}
	r.claim = claims[0]
}

func TestDeleteReturnsOnceTheShimHasEnded(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	e := r.exec(60, "(setsid sleep 300 &); sleep 300")
	check(t, r.client.Delete(r.ctx()))
	if alive := r.alive(); len(alive) > 0 {
		t.Errorf("these live on: %v", alive)
	}
	r.expectFreed()
	// The command was killed with its machine; how the race between the two
	// answers ends does not matter.
	if exit, err := e.Wait(r.ctx()); err == nil && exit.Code != 137 || err != nil && !errors.Is(err, vm.CodeVMFailed) {
		t.Errorf("the command ended as %+v, error %v", exit, err)
	}
	if _, err := os.Lstat(r.claim.Dir + lockSuffix); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lock: %v", err)
	}
}

func TestWhatAShimCannotFreeCanBeReclaimed(t *testing.T) {
	r := newRig(t, "create=mount")
	r.boot()
	r.hangUp()
	r.expectGone()
	claims, err := Orphans(r.vms)
	check(t, err)
	if len(claims) != 1 {
		t.Errorf("left: %v, of which %d can be reclaimed", names(t, r.vms), len(claims))
		check(t, os.RemoveAll(r.claim.Dir))
		r.claim = newClaim(t, r.vms)
		return
	}
	r.claim = claims[0]
}

func TestShimThatCannotDeleteItsMachineEndsAllTheSameAndCanBeReclaimed(t *testing.T) {
	r := newRig(t, "delete=fail")
	r.boot()
	r.exec(60, "sleep 300")
	await(t, "the command runs", func() bool { return r.stage.has("wait") })
	r.hangUp()
	r.expectGone()
	claims, err := Orphans(r.vms)
	check(t, err)
	if len(claims) != 1 {
		t.Fatalf("%d orphans, want 1", len(claims))
	}
	r.claim = claims[0]
}

func TestProcessesOfAnOrphanAreDead(t *testing.T) {
	for range 10 {
		r := newRig(t, "")
		r.boot()
		e := r.exec(60, `for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
			(setsid sh -c "while :; do mkdir -p d$i/x; echo x >d$i/x/f; rm -rf d$i; done" &)
		done; echo ready; sleep 300`)
		await(t, "the command runs", func() bool { return e.output() == "ready\n" })
		abandon(t, r.claim)
		r.killShim()
		var claims []*Claim
		await(t, "it is an orphan", func() bool {
			claims, _ = Orphans(r.vms)
			return len(claims) > 0
		})
		r.claim = claims[0]
		if err := r.claim.Reclaim(r.ctx()); err != nil {
			t.Errorf("reclaim: %v", err)
		}
		if alive := r.alive(); len(alive) > 0 {
			t.Errorf("%d processes of a reclaimed VM are alive", len(alive))
		}
		r.expectGone()
	}
}
