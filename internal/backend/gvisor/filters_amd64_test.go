package gvisor

import (
	"bytes"
	"encoding/gob"
	"flag"
	"os"
	"slices"
	"testing"

	"gvisor.dev/gvisor/pkg/bpf"
	"gvisor.dev/gvisor/pkg/seccomp"
	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	fconfig "gvisor.dev/gvisor/runsc/boot/filter/config"
)

var update = flag.Bool("update", false, "compile the filters in filters.gob again")

// filterOptions are the options of the sandboxes that pyro makes: those whose
// root is a directory, served by a gofer, and those whose root is an image.
func filterOptions(t *testing.T) []fconfig.Options {
	t.Helper()
	systrap, err := platform.Lookup("systrap")
	if err != nil {
		t.Fatal(err)
	}
	var options []fconfig.Options
	for _, info := range systrap.PrecompiledSeccompInfo() {
		for _, files := range []bool{true, false} {
			options = append(options, fconfig.Options{Platform: info, HostFilesystem: files, ControllerFD: 7})
		}
	}
	return options
}

// TestFilters fails when gVisor's filters have changed, as they may with every
// version, and the compiled ones are to be generated again with
//
//	go test ./internal/backend/gvisor -run TestFilters -update
func TestFilters(t *testing.T) {
	// One rule holds the process's own number, which in a sandbox is 1, as a
	// constant: pkg/sentry/platform/systrap, filters.go. So filters have to be
	// compiled, and compared, by a process 1.
	if os.Getpid() != 1 {
		if *update {
			asProcessOne(t, "-update")
		} else {
			asProcessOne(t)
		}
		return
	}
	options := filterOptions(t)
	if *update {
		writeFilters(t, options)
	}
	var programs []precompiledseccomp.Program
	if err := gob.NewDecoder(bytes.NewReader(filters)).Decode(&programs); err != nil {
		t.Fatalf("decode filters.gob: %v", err)
	}
	for _, o := range options {
		i := slices.IndexFunc(programs, func(p precompiledseccomp.Program) bool { return p.Name == o.ConfigKey() })
		if i < 0 {
			t.Errorf("no compiled filter for %s: generate them again with -update", o.ConfigKey())
			continue
		}
		got, err := programs[i].RenderInstructions(o.Vars())
		if err != nil {
			t.Errorf("render the filter for %s: %v", o.ConfigKey(), err)
			continue
		}
		if want := compile(t, o); !slices.Equal(got, want) {
			t.Errorf("the compiled filter for %s is not gVisor's any more: generate them again with -update", o.ConfigKey())
		}
	}
}

// compile does what gVisor does where it has no compiled filter:
// runsc/boot/filter, Install.
func compile(t *testing.T, o fconfig.Options) []bpf.Instruction {
	t.Helper()
	rules, denied := fconfig.Rules(o)
	program := &seccomp.Program{
		RuleSets: []seccomp.RuleSet{{Rules: denied}, {Rules: rules, Action: seccomp.Allow}},
		Options:  fconfig.SeccompOptions(o),
	}
	instructions, _, err := program.Build()
	if err != nil {
		t.Fatal(err)
	}
	return instructions
}

// writeFilters compiles the filters for the options and writes filters.gob.
func writeFilters(t *testing.T, options []fconfig.Options) {
	t.Helper()
	all, err := fconfig.PrecompiledPrograms()
	if err != nil {
		t.Fatal(err)
	}
	var used []precompiledseccomp.Program
	for _, p := range all {
		if slices.ContainsFunc(options, func(o fconfig.Options) bool { return p.Name == o.ConfigKey() }) {
			used = append(used, p)
		}
	}
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(used); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("filters.gob", b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	filters = b.Bytes()
}
