package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"pyro"
)

// TestScript runs the scripts in testdata/script, each as a user of its own
// who has nothing but pyro and leaves nothing behind. Besides testscript's
// commands they have:
//
//	exits CODE PROGRAM [ARG...]   run a program, which must exit with CODE
//	fails CODE ERROR PROGRAM ...  run pyro with --json, which must fail so
//	[!] json KEY REGEXP           a value in the JSON on stdout, as a.b.c
//	types FILE                    write the keys of the JSON on stdout, and
//	                              their types, to FILE
//
// The condition [root] holds for root.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "script"),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		ContinueOnError:     true,
		Setup: func(env *testscript.Env) error {
			w := newWorld(env.T().(testing.TB))
			if err := os.RemoveAll(w.environments()); err != nil { // a user of its own
				return err
			}
			env.Vars = append(slices.DeleteFunc(env.Vars, func(kv string) bool {
				return strings.HasPrefix(kv, "PATH=") || strings.HasPrefix(kv, "HOME=") || strings.HasPrefix(kv, "TMPDIR=")
			}), w.env...)
			env.Setenv("WORLD", w.dir)
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("no condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits, "fails": fails, "json": jsonValue, "types": jsonTypes,
		},
	})
}

// exits runs a program and checks its exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM [ARG...]")
	}
	if code := execute(ts, args[1:]); strconv.Itoa(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}

// execute runs a program and returns its exit code, or -1 if a signal ended it.
func execute(ts *testscript.TestScript, args []string) int {
	err := ts.Exec(args[0], args[1:]...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		ts.Check(err)
		return 0
	}
	return exit.ExitCode()
}

// fails runs pyro and checks what it prints of its failure: a code, a message
// and a hint, and nothing else.
func fails(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: fails CODE ERROR PROGRAM [ARG...]")
	}
	code := execute(ts, args[2:])
	var answer struct {
		Error *pyro.Error `json:"error"`
	}
	d := json.NewDecoder(strings.NewReader(ts.ReadFile("stdout")))
	d.DisallowUnknownFields()
	ts.Check(d.Decode(&answer))
	if stderr := ts.ReadFile("stderr"); stderr != "" {
		ts.Fatalf("standard error has %q", stderr)
	}
	e := answer.Error
	if e == nil || e.Message == "" || string(e.Code) != args[1] || strconv.Itoa(code) != args[0] {
		ts.Fatalf("exit code %d, %s; want %s, %s", code, describe(e), args[0], args[1])
	}
	if e.Hint == "" {
		ts.Fatalf("there is no hint what to do about it")
	}
}

// jsonValue checks one value in the JSON on stdout.
func jsonValue(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: [!] json KEY REGEXP")
	}
	value, ok := flatten(ts)[args[0]]
	text := ""
	if ok {
		text = fmt.Sprint(value)
	}
	matches, err := regexp.MatchString("(?s)^(?:"+args[1]+")$", text)
	ts.Check(err)
	if ok && matches == neg || !ok && !neg {
		ts.Fatalf("%s is %q", args[0], text)
	}
}

// jsonTypes writes down which keys the JSON on stdout has.
func jsonTypes(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: types FILE")
	}
	values := flatten(ts)
	var lines strings.Builder
	for _, key := range slices.Sorted(maps.Keys(values)) {
		fmt.Fprintf(&lines, "%s %s\n", key, typeOf(values[key]))
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(lines.String()), 0o644))
}

// typeOf names the type of a JSON value.
func typeOf(value any) string {
	switch v := value.(type) {
	case string:
		return "string"
	case bool:
		return "boolean"
	case json.Number:
		if _, err := v.Int64(); err == nil {
			return "integer"
		}
		return "number"
	}
	return fmt.Sprintf("%T", value)
}

// flatten reads the JSON on stdout, an object; the keys of one in another are
// joined with dots.
func flatten(ts *testscript.TestScript) map[string]any {
	var object map[string]any
	d := json.NewDecoder(strings.NewReader(ts.ReadFile("stdout")))
	d.UseNumber()
	ts.Check(d.Decode(&object))
	flat := map[string]any{}
	var walk func(prefix string, object map[string]any)
	walk = func(prefix string, object map[string]any) {
		for k, v := range object {
			if inner, ok := v.(map[string]any); ok {
				walk(prefix+k+".", inner)
				continue
			}
			flat[prefix+k] = v
		}
	}
	walk("", object)
	return flat
}
