package limits

import (
	"context"
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pyro/internal/backend"
	"pyro/internal/need"
	"pyro/internal/vm"
)

// shimKinds are the fake shims there are: root's and an ordinary user's, with
// cgroups and without.
var shimKinds = []struct {
	name           string
	user, noCgroup bool
}{{"root cgroup", false, false}, {"root alone", false, true}, {"user cgroup", true, false}, {"user alone", true, true}}

var _ backend.Limiter = (*Limits)(nil)

// eachShim runs a test with every kind of shim.
func eachShim(t *testing.T, test func(t *testing.T, user, noCgroup bool)) {
	for _, k := range shimKinds {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			if !k.user && os.Geteuid() != 0 {
				missing(t, need.Root, errors.New("the tests run as an ordinary user"))
			}
			if !k.noCgroup {
				if k.user && os.Geteuid() == 0 {
					missing(t, "delegation", errors.New("the tests run as root"))
				}
				needCgroup(t)
			}
			test(t, k.user, k.noCgroup)
		})
	}
}

// TestMemory checks both sides of the memory limit.
func TestMemory(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		eat    int
		memfd  bool
		killed bool
	}{
		{"anonymous under", 64, false, false},
		{"anonymous over", 400, false, true},
		{"memfd under", 64, true, false},
		{"memfd over", 400, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			eachShim(t, func(t *testing.T, user, noCgroup bool) {
				r := runShim(t, user, scenario{Name: "memory", NoCgroup: noCgroup, Nested: user,
					Want: wantJSON{MiB: 200, CPUs: 2, Tasks: 500}, Eat: c.eat, Memfd: c.memfd})
				if way := r.Enforced[KeyMemory]; (way == Watchdog) != noCgroup {
					t.Errorf("memory is limited by %q", way)
				}
				if r.OOM != c.killed || r.OOMAfter != c.killed {
					t.Errorf("OOM() = %v, %v after Close, want %v", r.OOM, r.OOMAfter, c.killed)
				}
				// With one process the whole VM dies.
				for i, killed := range r.Killed {
					if killed != c.killed {
						t.Errorf("process %d killed: %v, want %v", i, killed, c.killed)
					}
				}
			})
		})
	}
}

// TestCPU checks that four busy threads of a VM with one CPU get one CPU.
func TestCPU(t *testing.T) {
	t.Parallel()
	if runtime.NumCPU() < 2 {
		missing(t, "cpus", errors.New("the machine has only one CPU"))
	}
	eachShim(t, func(t *testing.T, user, noCgroup bool) {
		r := runShim(t, user, scenario{Name: "cpu", NoCgroup: noCgroup, Want: wantJSON{MiB: 500, CPUs: 1, Tasks: 500}})
		if way := r.Enforced[KeyCPU]; (way == Affinity) != noCgroup {
			t.Errorf("the processor is limited by %q", way)
		}
		t.Logf("%s: %.2f CPUs", r.Enforced[KeyCPU], r.CPUs)
		// Other tests want the processor too, so there is no firm lower bound.
		if r.CPUs > 1.2 || r.CPUs < 0.2 {
			t.Errorf("used %.2f CPUs, want 1", r.CPUs)
		}
	})
}

// TestForkBomb checks that a VM gets the tasks it may have and no more, and
// that its shim can go on starting threads then.
func TestForkBomb(t *testing.T) {
	t.Parallel()
	for _, nested := range []bool{false, true} {
		t.Run(map[bool]string{false: "flat", true: "nested"}[nested], func(t *testing.T) {
			eachShim(t, func(t *testing.T, user, noCgroup bool) {
				const tasks = 60
				r := runShim(t, user, scenario{Name: "bomb", NoCgroup: noCgroup, Nested: nested, Want: wantJSON{MiB: 500, CPUs: 2, Tasks: tasks}})
				t.Logf("%s: %d tasks", r.Enforced[KeyTasks], r.Tasks)
				if !user && noCgroup {
					if !strings.HasPrefix(r.Enforced[KeyTasks], "none: ") || r.Tasks < 4*tasks {
						t.Errorf("tasks of root are limited by %q to %d: say so", r.Enforced[KeyTasks], r.Tasks)
					}
					return
				}
				if r.Tasks > tasks || r.Tasks < tasks/2 {
					t.Errorf("%d tasks with %q, want near to %d", r.Tasks, r.Enforced[KeyTasks], tasks)
				}
			})
		})
	}
}

// TestConfineChurn checks that processes which start others all the time do not
// slip through.
func TestConfineChurn(t *testing.T) {
	t.Parallel()
	eachShim(t, func(t *testing.T, user, noCgroup bool) {
		r := runShim(t, user, scenario{Name: "churn", NoCgroup: noCgroup, Want: wantJSON{MiB: 500, CPUs: 1, Tasks: 500}})
		t.Logf("Confine took %v", r.Took)
		if r.Outside > 0 {
			t.Errorf("%d processes are outside the limits", r.Outside)
		}
	})
}

// TestMeterHandOver checks that shared memory counts once, and as long as
// somebody holds it.
func TestMeterHandOver(t *testing.T) {
	t.Parallel()
	eachShim(t, func(t *testing.T, user, noCgroup bool) {
		r := runShim(t, user, scenario{Name: "handover", NoCgroup: noCgroup, Want: wantJSON{MiB: 500, CPUs: 1, Tasks: 500}})
		if len(r.Sizes) != 3 {
			t.Fatalf("the meter saw %v MiB", r.Sizes)
		}
		for i, want := range []int{64, 64, 0} {
			if got := r.Sizes[i]; got < want || got > want+16 {
				t.Errorf("the meter saw %v MiB, want 64, 64, 0 and a little", r.Sizes)
			}
		}
	})
}

// TestReclaim kills a shim and removes what it left.
func TestReclaim(t *testing.T) {
	t.Parallel()
	eachShim(t, func(t *testing.T, user, noCgroup bool) {
		id := vm.NewID()
		sh := startShim(t, user, scenario{Name: "hold", ID: id, NoCgroup: noCgroup, Want: wantJSON{MiB: 500, CPUs: 1, Tasks: 500}})
		sh.report(t)
		dirs := cgroupsOf(t, id)
		if (len(dirs) == 0) != noCgroup {
			t.Errorf("cgroups of the running VM: %v", dirs)
		}
		if !noCgroup {
			short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if err := Reclaim(short, id); !errors.Is(err, errInUse) {
				t.Errorf("Reclaim of a living VM: %v, want %v", err, errInUse)
			}
			if len(cgroupsOf(t, id)) != len(dirs) {
				t.Errorf("Reclaim took a cgroup of a living VM")
			}
		}
		sh.cmd.Process.Kill()
		sh.cmd.Wait()
		for range 2 {
			if err := Reclaim(t.Context(), id); err != nil {
				t.Error(err)
			}
			wantNoCgroup(t, id)
		}
	})
}

// TestOpenLeftover checks that Open takes over the name from a dead shim of
// the same VM.
func TestOpenLeftover(t *testing.T) {
	t.Parallel()
	missing(t, need.Root, func() error {
		if os.Geteuid() != 0 {
			return errors.New("the tests run as an ordinary user")
		}
		return nil
	}())
	needCgroup(t)
	id, sys := vm.NewID(), realSystem()
	want := amountsOf(vm.Resources{VCPUCount: 1, MemMiB: 256})
	first, err := open(t.Context(), sys, id, want, testLog(t.Output()))
	if err != nil {
		t.Fatal(err)
	}
	second, err := open(t.Context(), sys, id, want, testLog(t.Output()))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(first.Close(t.Context()), second.Close(t.Context())); err != nil {
		t.Error(err)
	}
	wantNoCgroup(t, id)
}

// TestOpenOutsideShim checks that the tests' own machine is safe.
func TestOpenOutsideShim(t *testing.T) {
	t.Parallel()
	if unix.Getpid() == 1 {
		missing(t, "pid", errors.New("the tests are process 1"))
	}
	if l, err := Open(t.Context(), vm.NewID(), vm.Resources{VCPUCount: 1, MemMiB: 256}, testLog(t.Output())); err == nil {
		l.Close(t.Context())
		t.Error("Open works outside a shim: Confine would limit the whole machine")
	}
}
