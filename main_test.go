package pyro_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"pyro/internal/backend"
	"pyro/internal/backend/mock"
	"pyro/internal/need"
	"pyro/internal/shim"
)

// roleVar makes this program another process of a test: see process_test.go.
const roleVar = "PYRO_TEST_ROLE"

// scratch is a directory of this run of the tests. In it are the program by
// whose name pyro is found in $PATH, and what shims report of data races: nobody
// reads their output.
var scratch string

func raceLogs() string { return filepath.Join(scratch, "race") }

func TestMain(m *testing.M) {
	if shim.IsRole(os.Args) {
		os.Exit(shim.Main(os.Args, []backend.Driver{newScripted(mock.New())}))
	}
	if role := os.Getenv(roleVar); role != "" {
		os.Exit(roles[role]())
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	var err error
	if scratch, err = os.MkdirTemp("", "pyro-test"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(scratch)
	// The examples use pyro as it is used after it was installed.
	if err := writeProgram(filepath.Join(scratch, "pyro"), nil); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// Making the environment takes longer than all the rest, so it is shared.
	if err := shareEnvironments(filepath.Join(scratch, "base")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	os.Setenv("PATH", scratch+":"+os.Getenv("PATH"))
	os.Setenv("PYRO_BASE_DIR", filepath.Join(scratch, "base"))
	os.Unsetenv("PYRO_MAX_ACTIVE_VMS")
	flag.Parse()
	skipExamplesWithoutNamespaces()
	code := m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	logs, _ := filepath.Glob(raceLogs() + "*")
	for _, name := range logs {
		text, _ := os.ReadFile(name)
		fmt.Fprintf(os.Stderr, "another process reported:\n%s\n", text)
		code = max(code, 1)
	}
	return code
}

// shareEnvironments makes a base directory that has its environments in common
// with all others of this run of the tests.
func shareEnvironments(base string) error {
	environments := filepath.Join(scratch, "environments")
	return errors.Join(os.MkdirAll(environments, 0o700), os.Mkdir(base, 0o700), os.Symlink(environments, filepath.Join(base, "environments")))
}

// asker finds out whether a need is met outside of a test.
type asker struct {
	testing.TB
	skipped bool
}

func (*asker) Helper()                 {}
func (*asker) Fatalf(string, ...any)   {} // the examples fail by themselves
func (a *asker) Skipf(string, ...any)  { a.skipped = true }
func (a *asker) Logf(string, ...any)   {}
func (a *asker) Errorf(string, ...any) {}

// skipExamplesWithoutNamespaces leaves out what has no way to skip itself.
func skipExamplesWithoutNamespaces() {
	a := &asker{}
	need.Namespaces(a)
	if f := flag.Lookup("test.skip"); a.skipped && f.Value.String() == "" {
		fmt.Fprintln(os.Stderr, "no examples are run: they need namespaces")
		_ = f.Value.Set("^Example")
	}
}

// writeProgram makes a program at path that becomes this one, with env added to
// its environment: a shim is given none.
func writeProgram(path string, env []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	quoted := []string{"GORACE='" + gorace() + "'"}
	for _, entry := range env {
		name, value, _ := strings.Cut(entry, "=")
		quoted = append(quoted, name+"='"+value+"'")
	}
	// A process that is being started by another goroutine holds a copy of
	// every descriptor, and what somebody can write cannot be executed.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(path, []byte("#!/bin/sh\n"+strings.Join(quoted, " ")+" exec '"+self+"' \"$@\"\n"), 0o700)
}

// gorace has the race detector of another process tell of races in a file, and
// not sleep for a second at its end.
func gorace() string { return "atexit_sleep_ms=0 log_path=" + raceLogs() }
