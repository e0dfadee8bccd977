package backendtest

import (
	"crypto/rand"
	"maps"
	"slices"
	"strings"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// environments is what commands find in their environment.
func environments() []subtest {
	return []subtest{
		{"exactly as composed", envExact},
		{"a later entry wins", envLater},
		{"nothing of the driver's process", envCanary},
		{"programs are looked up by its path", envPath},
	}
}

// environ runs env in a machine with the entries root and cmd, and returns what
// is to be seen but for what the driver sets as it likes.
func (f *fixture) environ(root, cmd []string) (got, composed map[string]string) {
	f.Helper()
	s := f.spec()
	s.Root.Env = append(s.Root.Env, root...)
	m := f.createdFrom(s)
	f.start(m)
	c := command("env")
	c.Env = cmd
	got = parseEnv(strings.Split(f.line(m, c), "\n"))
	composed = parseEnv(slices.Concat(s.Root.Env, cmd))
	for _, name := range f.OwnEnv {
		delete(got, name)
		delete(composed, name)
	}
	return got, composed
}

// parseEnv returns an environment's variables; of those with one name the last.
func parseEnv(entries []string) map[string]string {
	env := map[string]string{}
	for _, e := range entries {
		name, value, _ := strings.Cut(e, "=")
		env[name] = value
	}
	return env
}

func envExact(f *fixture) {
	got, composed := f.environ(
		[]string{"SUITE_ROOT=root", "SUITE_BOTH=root", "SUITE_EMPTIED=root"},
		[]string{"SUITE_CMD=cmd", "SUITE_BOTH=cmd", "SUITE_EMPTIED=", `SUITE_ODD= a=b "c' $d \e ünï`, "suite.lower-case=yes"},
	)
	if !maps.Equal(got, composed) {
		f.Errorf("the environment is %q, want %q", got, composed)
	}
	for name, want := range map[string]string{"SUITE_ROOT": "root", "SUITE_CMD": "cmd", "SUITE_BOTH": "cmd", "SUITE_EMPTIED": ""} {
		if value, ok := got[name]; !ok || value != want {
			f.Errorf("%s is %q, want %q", name, value, want)
		}
	}
}

func envLater(f *fixture) {
	got, _ := f.environ([]string{"SUITE_A=1", "SUITE_A=2"}, []string{"SUITE_B=1", "SUITE_B=2", "SUITE_B=3"})
	if got["SUITE_A"] != "2" || got["SUITE_B"] != "3" {
		f.Errorf("SUITE_A is %q and SUITE_B %q, want 2 and 3", got["SUITE_A"], got["SUITE_B"])
	}
}

func envCanary(f *fixture) {
	canary := rand.Text()
	f.Setenv("SUITE_CANARY", canary)
	f.Setenv("LC_ALL", canary) // a name that is often passed on
	f.Setenv("PATH", canary)
	m := f.started()
	if env := f.output(m, command("env")); strings.Contains(env, canary) {
		f.Errorf("a command sees the environment of the driver's process: %q", env)
	}
}

func envPath(f *fixture) {
	m := f.started()
	nowhere := command("true")
	nowhere.Env = []string{"PATH=/no/such/directory"}
	f.expectExec(m, nowhere, vm.CodeCommandNotFound)
	root := f.spec()
	root.Root.Env = append(root.Root.Env, "PATH=/no/such/directory")
	m = f.createdFrom(root)
	f.start(m)
	f.expectExec(m, command("true"), vm.CodeCommandNotFound)
	f.expectFinds(m, "PATH=/no/such/directory:/bin/sh:/bin")
}

// expectFinds checks that sh is found with an environment.
func (f *fixture) expectFinds(m backend.Machine, env ...string) {
	f.Helper()
	c := shell("exit 9")
	c.Env = env
	f.expectExit(f.run(m, c, nil).status, 9)
}
