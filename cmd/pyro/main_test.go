package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pyro/internal/nocgo"
)

// The test binary is pyro too: called by that name it is the command line, and
// started by that it is the shim and gVisor's processes, as in production.

// nest holds what all tests of a run write: the program, and a directory for
// each world. Its name tells this run's processes from those of any other.
var nest string

func TestMain(m *testing.M) {
	nocgo.Test()
	role(os.Args)
	switch filepath.Base(os.Args[0]) {
	case "pyro":
		main()
	case forbidRole:
		forbidNamespaces()
	}
	os.Exit(runTests(m))
}

// runTests runs the tests in a nest of their own and then sees to it that
// nothing of the whole run is left, in this process and outside.
func runTests(m *testing.M) (code int) {
	if err := makeNest(); err != nil {
		fmt.Fprintln(os.Stderr, "prepare the tests:", err)
		return 1
	}
	code = m.Run()
	errs := []error{goleak.Find()}
	if left := poll(censusTime, leftInNest); len(left) > 0 {
		errs = append(errs, fmt.Errorf("the run left behind: %s", strings.Join(left, "; ")))
	}
	errs = append(errs, os.RemoveAll(nest))
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return max(code, 1)
	}
	return code
}

// makeNest makes the directory, which other users may pass through, and puts
// the program there. Its path is short because those of sockets must be.
func makeNest() error {
	dir, err := os.MkdirTemp("", "pyro")
	if err != nil {
		return err
	}
	if nest, err = filepath.EvalSymlinks(dir); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := copyProgram(self, filepath.Join(nest, "pyro")); err != nil {
		return err
	}
	return os.Chmod(nest, 0o711)
}

// copyProgram makes a second name for a program, or a copy where the other
// directory is on another disk.
func copyProgram(from, to string) error {
	if os.Link(from, to) == nil {
		return os.Chmod(to, 0o755)
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}

// leftInNest lists the processes that run a program of this run's nest, and
// the mounts on it.
func leftInNest() []string {
	var left []string
	for _, p := range processes() {
		if p.pid != os.Getpid() && p.runsBelow(nest) {
			left = append(left, p.String())
		}
	}
	return append(left, linesWith("/proc/self/mountinfo", nest)...)
}

// poll calls find every few milliseconds until it finds nothing or the time is
// up, and returns what it found last.
func poll(within time.Duration, find func() []string) []string {
	for deadline := time.Now().Add(within); ; time.Sleep(5 * time.Millisecond) {
		found := find()
		if len(found) == 0 || time.Now().After(deadline) {
			return found
		}
	}
}

// check ends the test on an error.
func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until something holds and ends the test if it does not in
// time.
func eventually(t testing.TB, within time.Duration, what string, holds func() bool) {
	t.Helper()
	missing := poll(within, func() []string {
		if holds() {
			return nil
		}
		return []string{what}
	})
	if len(missing) > 0 {
		t.Fatalf("not within %v: %s", within, what)
	}
}
