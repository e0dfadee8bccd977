package mock

import (
	"context"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"pyro/internal/backend"
	"pyro/internal/backend/backendtest"
	"pyro/internal/environment"
	"pyro/internal/vm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// unlimited is a backend.Limiter that limits nothing.
type unlimited struct{}

func (unlimited) Confine(context.Context) error { return nil }

func newSpec(t testing.TB) backend.Spec {
	return backend.Spec{
		ID:        vm.NewID(),
		Resources: vm.Resources{VCPUCount: 1, MemMiB: 256, TTLSeconds: 600},
		Dir:       t.TempDir(),
		Scratch:   t.TempDir(),
		Root:      environment.Root{Env: []string{"PATH=" + hostPath, "LANG=C.UTF-8"}},
		Limits:    unlimited{},
	}
}

func newHarness(*testing.T) backendtest.Harness {
	return backendtest.Harness{
		Driver:  New(),
		NewSpec: newSpec,
		OwnEnv:  []string{"HOME", "USER", "LOGNAME", "SHELL"},
	}
}

func TestConformance(t *testing.T) { backendtest.Run(t, newHarness) }

// TestConformanceOfAdopter runs the suite in a process that is given the
// orphans of its descendants, as process 1 of a namespace is.
func TestConformanceOfAdopter(t *testing.T) {
	adopt(t)
	backendtest.Run(t, newHarness)
}

// adopt makes this process the adopter of orphans for the time of a test.
func adopt(t *testing.T) {
	t.Helper()
	set := func(on uintptr) {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, on, 0, 0, 0); err != nil {
			t.Fatalf("prctl: %v", err)
		}
	}
	set(1)
	t.Cleanup(func() { set(0) })
}
