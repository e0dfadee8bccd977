package shim

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"pyro/internal/backend"
	"pyro/internal/backend/mock"
)

// raceLogs is where shims, whose output nobody reads, report data races.
var raceLogs string

func TestMain(m *testing.M) {
	if IsRole(os.Args) {
		os.Exit(Main(os.Args, []backend.Driver{newScripted(mock.New())}))
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "shim-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	raceLogs = filepath.Join(dir, "race")
	flag.Parse()
	code := m.Run()
	if fuzzing() {
		return code
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	logs, _ := filepath.Glob(raceLogs + "*")
	for _, name := range logs {
		text, _ := os.ReadFile(name)
		fmt.Fprintf(os.Stderr, "a shim reported:\n%s\n", text)
		code = max(code, 1)
	}
	return code
}

// fuzzing reports whether the program serves the fuzzing engine, which has
// goroutines of its own.
func fuzzing() bool {
	for _, name := range []string{"test.fuzz", "test.fuzzworker"} {
		if f := flag.Lookup(name); f != nil && f.Value.String() != f.DefValue {
			return true
		}
	}
	return false
}
