// Package backendtest is the suite of tests that every backend driver passes,
// the mock included: it is what makes their machines interchangeable. It knows
// a driver through package backend alone, so what it demands is the contract,
// and where a driver cannot keep a part of that the Harness says so.
//
// A driver may live in the test's own process or need another one around it, as
// a driver does that must be process 1 of a namespace: the suite then runs in
// there. It uses nothing but its *testing.T and /proc.
//
// Every subtest has machines of its own, and afterwards the suite looks at what
// they left behind: processes, files below the directories of their Spec, open
// descriptors, goroutines. Nothing may be left. What a driver takes once for
// the life of its process is not counted: one machine lives and dies before
// the first subtest.
//
// Inside a machine the suite needs only what every system has: a POSIX sh, cat,
// sleep, kill, env, head and true. It uses setsid where there is one.
//
// Subtests wait for conditions, never for time to pass, with one exception:
// that a thing does not happen can only be seen by waiting, which is kept to a
// fraction of a second.
package backendtest

import (
	"testing"

	"pyro/internal/backend"
)

// Harness is a driver and what the suite must know about it.
type Harness struct {
	Driver backend.Driver

	// NewSpec returns the Spec of a new machine: directories of its own that
	// are empty, a Root that holds the programs of the package's doc, an ID,
	// Resources, and Limits. It cleans up with t.
	NewSpec func(t testing.TB) backend.Spec

	// Isolated says that a machine has files of its own: that it sees neither
	// the host's nor another machine's, and starts in Root.WorkingDir.
	Isolated bool

	// KillsOthers says that Process.KillAll may end the machine's other
	// commands as well.
	KillsOthers bool

	// OwnEnv names the variables that the driver sets as it likes in the
	// environment of commands, whatever Root.Env and Command.Env say.
	OwnEnv []string
}

// subtest is one demand on a driver.
type subtest struct {
	name string
	run  func(f *fixture)
}

// Run checks that a driver keeps the contract. It calls newHarness for each
// subtest; Driver may be the same every time.
func Run(t *testing.T, newHarness func(t *testing.T) Harness) {
	warmUp(t, newHarness)
	for _, theme := range []struct {
		name     string
		subtests []subtest
	}{
		{"lifecycle", lifecycle()},
		{"limits", limits()},
		{"exec", execs()},
		{"env", environments()},
		{"lookup", lookups()},
		{"args", arguments()},
		{"streams", streams()},
		{"signals", signals()},
		{"killing", killing()},
		{"canceled", canceled()},
		{"isolation", isolation()},
	} {
		t.Run(theme.name, func(t *testing.T) {
			for _, s := range theme.subtests {
				t.Run(s.name, func(t *testing.T) {
					s.run(newFixture(t, newHarness))
				})
			}
		})
	}
}

// warmUp lets a machine live and die, so that what a driver takes once is there
// before anything is counted.
func warmUp(t *testing.T, newHarness func(t *testing.T) Harness) {
	f := &fixture{T: t, Harness: newHarness(t)}
	m := f.started()
	f.run(m, command("true"), nil)
	if err := m.Delete(f.ctx()); err != nil {
		t.Fatalf("delete the first machine: %v", err)
	}
}
