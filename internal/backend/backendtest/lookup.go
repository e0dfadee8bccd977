package backendtest

import (
	"pyro/internal/vm"
)

// lookups is how programs are found, and what happens when they are not.
func lookups() []subtest {
	return []subtest{
		{"not found", notFound},
		{"not executable", notExecutable},
		{"relative to the working directory", relativeProgram},
	}
}

func notFound(f *fixture) {
	m := f.started()
	for _, program := range []string{"no-such-program-of-the-suite", "/no/such/program", "./no-such-program", "/bin/sh/program"} {
		f.expectExec(m, command(program, "argument"), vm.CodeCommandNotFound)
	}
	f.expectExit(f.run(m, command("true"), nil).status, 0)
}

func notExecutable(f *fixture) {
	m := f.started()
	dir := f.line(m, shell("echo exit 1 > suite-data && pwd -P"))
	for _, program := range []string{"./suite-data", dir + "/suite-data", dir, "/"} {
		f.expectExec(m, command(program), vm.CodeCommandNotRunnable)
	}
	inPath := command("suite-data")
	inPath.Env = []string{"PATH=/no/such/directory:" + dir}
	f.expectExec(m, inPath, vm.CodeCommandNotRunnable)
	f.expectExit(f.run(m, command("true"), nil).status, 0)
}

func relativeProgram(f *fixture) {
	m := f.started()
	c := command("./sh", "-c", "exit 8")
	c.Dir = "/bin"
	f.expectExit(f.run(m, c, nil).status, 8)
	c.Args[0] = "bin/sh"
	c.Dir = "/"
	f.expectExit(f.run(m, c, nil).status, 8)
}
