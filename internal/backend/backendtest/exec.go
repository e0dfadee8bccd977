package backendtest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"time"

	"pyro/internal/vm"
)

// execs is how commands start and end.
func execs() []subtest {
	return []subtest{
		{"exit codes", exitCodes},
		{"end by a signal", endBySignal},
		{"working directory", workingDirectory},
		{"missing working directory", missingDirectory},
		{"wait ends with its context", waitContext},
		{"wait many times", waitOften},
		{"outlive the context of exec", outliveContext},
		{"many at once", manyAtOnce},
		{"many in a row", manyInARow},
		{"a session of its own", ownSession},
	}
}

func exitCodes(f *fixture) {
	m := f.started()
	f.expectExit(f.run(m, command("true"), nil).status, 0)
	for _, code := range []int{0, 1, 42, 124, 128 + 9, 255} {
		f.expectExit(f.run(m, shell(`exit "$1"`, fmt.Sprint(code)), nil).status, code)
	}
}

func endBySignal(f *fixture) {
	m := f.started()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGUSR1} {
		f.expectKilled(f.run(m, shell(`kill -"$1" $$`, fmt.Sprint(int(sig))), nil).status, sig)
	}
}

func workingDirectory(f *fixture) {
	s := f.spec()
	m := f.createdFrom(s)
	f.start(m)
	switch dir := f.line(m, shell("pwd -P")); {
	case !strings.HasPrefix(dir, "/"):
		f.Errorf("the default working directory is %q", dir)
	case f.Isolated && s.Root.WorkingDir != "" && dir != s.Root.WorkingDir:
		f.Errorf("the default working directory is %q, want %q", dir, s.Root.WorkingDir)
	}
	f.output(m, shell("echo something > file && test -s file"))
	for _, dir := range []string{"/", "/tmp"} {
		cmd := shell("pwd -P")
		cmd.Dir = dir
		if got := f.line(m, cmd); got != dir {
			f.Errorf("the working directory is %q, want %q", got, dir)
		}
	}
}

func missingDirectory(f *fixture) {
	m := f.started()
	for _, dir := range []string{"/no/such/directory", "/bin/sh"} {
		cmd := command("true")
		cmd.Dir = dir
		f.expectExec(m, cmd, vm.CodeInvalidArgument)
	}
	f.expectExit(f.run(m, command("true"), nil).status, 0)
}

func waitContext(f *fixture) {
	m := f.started()
	r := f.begin(m, command("sleep", "1000"), nothing)
	f.expectRunning(r) // with a deadline
	ctx, cancel := context.WithCancel(f.ctx())
	waited := make(chan error, 1)
	go func() {
		_, err := r.Wait(ctx)
		waited <- err
	}()
	cancel()
	if err := <-waited; !errors.Is(err, context.Canceled) {
		f.Errorf("wait with a canceled context: error is %v", err)
	}
	f.expectRunning(r)
	f.killAll(r)
	f.expectKilled(f.wait(r), syscall.SIGKILL)
}

func waitOften(f *fixture) {
	m := f.started()
	r := f.begin(m, shell("cat; exit 5"), piped)
	ctx := f.ctx()
	var waits sync.WaitGroup
	for range 3 {
		waits.Go(func() {
			status, err := r.Wait(ctx)
			if err != nil {
				f.Errorf("wait: %v", err)
			}
			f.expectExit(status, 5)
		})
	}
	if err := r.stdin.Close(); err != nil {
		f.Error(err)
	}
	waits.Wait()
	f.expectExit(f.wait(r), 5)
}

func outliveContext(f *fixture) {
	m := f.started()
	ctx, cancel := context.WithCancel(f.ctx())
	r, err := launch(ctx, m, shell("cat; exit 6"), piped)
	cancel()
	if err != nil {
		f.Fatalf("exec: %v", err)
	}
	f.Cleanup(r.close)
	f.expectRunning(r)
	if err := r.stdin.Close(); err != nil {
		f.Error(err)
	}
	f.expectExit(f.wait(r), 6)
}

func manyAtOnce(f *fixture) {
	m := f.started()
	ctx := f.ctx()
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			word := strings.Repeat(fmt.Sprintf("command %d\n", i), 1000)
			r, err := runTo(ctx, m, shell(`cat; echo "$1" >&2; exit "$1"`, fmt.Sprint(i)), []byte(word))
			if err != nil {
				f.Errorf("command %d: %v", i, err)
				return
			}
			f.expectExit(r.status, i)
			f.expectBytes("standard output", r.stdout, []byte(word))
			f.expectBytes("standard error", r.stderr, []byte(fmt.Sprintln(i)))
		})
	}
	all.Wait()
}

func manyInARow(f *fixture) {
	m := f.started()
	for i := range 50 {
		f.expectExit(f.run(m, shell(`exit "$1"`, fmt.Sprint(i)), nil).status, i)
	}
}

// ownSession checks that no command is in the session or the group of another:
// a signal to one must not reach it.
func ownSession(f *fixture) {
	m := f.started()
	one := f.begin(m, command("cat"), piped)
	other := f.begin(m, command("cat"), piped)
	if err := one.Signal(f.ctx(), syscall.SIGTERM); err != nil {
		f.Errorf("signal: %v", err)
	}
	f.expectKilled(f.wait(one), syscall.SIGTERM)
	f.expectRunning(other)
	// sh signals its whole group.
	f.expectKilled(f.run(m, shell("kill -TERM 0; sleep 1000"), nil).status, syscall.SIGTERM)
	f.expectRunning(other)
	start := time.Now()
	if err := other.stdin.Close(); err != nil {
		f.Error(err)
	}
	f.expectExit(f.wait(other), 0)
	if took := time.Since(start); took > promptly {
		f.Errorf("cat took %v to see the end of its input", took)
	}
}
