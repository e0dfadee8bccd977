package shim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pyro/internal/environment"
	"pyro/internal/vm"
)

func TestRequestsNeedNotWaitForEachOther(t *testing.T) {
	r := newRig(t, "create=pause")
	c, s := r.create(), r.start()
	e := r.exec(30, "echo out; echo err >&2; exit 3")
	await(t, "the VM is being made", func() bool { return r.stage.has("create") })
	if r.stage.has("start") {
		t.Error("it is being started before it is made")
	}
	r.stage.put("create" + goOn)
	created, err := c.Wait(r.ctx())
	check(t, err)
	if created.Backend != vm.Mock || created.Isolation != vm.IsolationNone {
		t.Errorf("created: %+v", created)
	}
	started, err := s.Wait(r.ctx())
	check(t, err)
	if want := filepath.Join(r.claim.Dir, "workdir"); started.Metadata["workdir"] != want {
		t.Errorf("the metadata is %v, want workdir %s", started.Metadata, want)
	}
	for _, key := range []string{"limit_memory", "limit_cpu", "limit_tasks"} {
		if started.Metadata[key] == "" {
			t.Errorf("the metadata does not tell %s: %v", key, started.Metadata)
		}
	}
	exit := r.wait(e)
	if exit.Code != 3 || exit.Signal != 0 || exit.TimedOut || exit.OOM || exit.DurationMS < 0 {
		t.Errorf("it ended as %+v", exit)
	}
	if got := e.output(); got != "out\nerr\n" {
		t.Errorf("it printed %q", got)
	}
	check(t, r.client.Delete(r.ctx()))
	r.expectGone()
	if left := names(t, r.vms); len(left) > 0 {
		t.Errorf("the shim left %v", left)
	}
}

func TestVMIsReachedInItsOrderOnly(t *testing.T) {
	r := newRig(t, "")
	_, err := r.start().Wait(r.ctx())
	expectCode(t, "start before create", err, vm.CodeInvalidState)
	_, err = r.exec(5, "true").Wait(r.ctx())
	expectCode(t, "exec before create", err, vm.CodeInvalidState)
	_, err = r.create().Wait(r.ctx())
	check(t, err)
	_, err = r.exec(5, "true").Wait(r.ctx())
	expectCode(t, "exec before start", err, vm.CodeInvalidState)
	_, err = r.start().Wait(r.ctx())
	check(t, err)
	_, err = r.start().Wait(r.ctx())
	expectCode(t, "start again", err, vm.CodeInvalidState)
	if exit := r.wait(r.exec(5, "exit 4")); exit.Code != 4 {
		t.Errorf("it ended as %+v", exit)
	}
}

func TestShimHasOneVM(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	e := r.exec(30, "while [ ! -e done ]; do sleep 0.01; done; echo mine")
	other := vm.NewID()
	c, err := r.client.Create(other, vm.Mock, resources(60), environment.Root{})
	check(t, err)
	_, err = c.Wait(r.ctx())
	expectCode(t, "create again", err, vm.CodeInvalidState)
	if got, want := names(t, r.vms), []string{string(r.claim.ID), string(r.claim.ID) + lockSuffix}; !slices.Equal(got, want) {
		t.Errorf("there are %v, want %v", got, want)
	}
	r.wait(r.exec(5, "touch done"))
	if exit := r.wait(e); exit.Code != 0 || e.output() != "mine\n" {
		t.Errorf("the command that ran meanwhile ended as %+v and printed %q", exit, e.output())
	}
}

func TestExitSaysHowTheCommandEnded(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	for _, test := range []struct {
		line string
		want vm.Exit
	}{
		{"exit 0", vm.Exit{}},
		{"exit 1", vm.Exit{Code: 1}},
		{"exit 124", vm.Exit{Code: 124}},
		{"exit 255", vm.Exit{Code: 255}},
		{"kill -KILL $$", vm.Exit{Code: 137, Signal: 9}},
		{"kill -TERM $$", vm.Exit{Code: 143, Signal: 15}},
	} {
		exit := r.wait(r.exec(30, test.line))
		exit.DurationMS = 0
		if exit != test.want {
			t.Errorf("%s: it ended as %+v, want %+v", test.line, exit, test.want)
		}
	}
}

func TestCommandThatCannotStartSaysWhy(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	_, err := r.execArgs(5, "no-such-command").Wait(r.ctx())
	expectCode(t, "no such command", err, vm.CodeCommandNotFound)
	_, err = r.execArgs(5, "/").Wait(r.ctx())
	expectCode(t, "a directory", err, vm.CodeCommandNotRunnable)
	// The manager has checked these; the shim does not rely on it.
	_, err = r.execArgs(5).Wait(r.ctx())
	expectCode(t, "no command", err, vm.CodeInvalidArgument)
	_, err = r.exec(0, "true").Wait(r.ctx())
	expectCode(t, "no timeout", err, vm.CodeInvalidArgument)
}

func TestCommandsRunSideBySide(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	const n = 8
	var all []*command
	for i := range n {
		// Each waits for all others.
		all = append(all, r.exec(30, fmt.Sprintf("touch %d; for i in 0 1 2 3 4 5 6 7; do while [ ! -e $i ]; do sleep 0.01; done; done; echo %d; exit %d", i, i, i)))
	}
	var waiting sync.WaitGroup
	for i, e := range slices.Backward(all) {
		waiting.Go(func() {
			exit, err := e.Wait(r.ctx())
			if err != nil || exit.Code != i || e.output() != fmt.Sprintln(i) {
				t.Errorf("command %d ended as %+v with error %v and printed %q", i, exit, err, e.output())
			}
		})
	}
	waiting.Wait()
}

func TestSignalReachesTheCommand(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	e := r.exec(30, "trap 'echo caught; exit 42' USR1; echo ready; while :; do sleep 0.01; done")
	other := r.exec(30, "echo ready; while [ ! -e done ]; do sleep 0.01; done")
	await(t, "both commands run", func() bool { return e.output() == "ready\n" && other.output() == "ready\n" })
	check(t, e.Signal(r.ctx(), syscall.SIGUSR1))
	if exit := r.wait(e); exit.Code != 42 || !strings.HasSuffix(e.output(), "caught\n") {
		t.Errorf("it ended as %+v and printed %q", exit, e.output())
	}
	r.wait(r.exec(30, "touch done"))
	if exit := r.wait(other); exit.Code != 0 {
		t.Errorf("the other command ended as %+v", exit)
	}
}

func TestSignalThatFollowsItsCommandAtOnceIsNotLost(t *testing.T) {
	r := newRig(t, "create=pause")
	r.create()
	r.start()
	e := r.exec(30, "sleep 300")
	signaled := make(chan error, 1)
	go func() { signaled <- e.Signal(r.ctx(), syscall.SIGTERM) }()
	await(t, "the VM is being made", func() bool { return r.stage.has("create") })
	r.stage.put("create" + goOn)
	if exit := r.wait(e); exit.Signal != int(syscall.SIGTERM) {
		t.Errorf("it ended as %+v", exit)
	}
	check(t, <-signaled)
}

func TestSignalForACommandThatHasEndedIsNoError(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	e := r.exec(30, "true")
	r.wait(e)
	check(t, e.Signal(r.ctx(), syscall.SIGTERM))
	unknown := &Exec{client: r.client, call: &call{seq: 4711}}
	check(t, unknown.Signal(r.ctx(), syscall.SIGTERM))
	expectCode(t, "signal 0", e.Signal(r.ctx(), 0), vm.CodeInvalidArgument)
}

func TestStopEndsCommandsAndStartBeginsAfresh(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	e := r.exec(30, "touch here; echo ready; sleep 300")
	await(t, "the command runs", func() bool { return e.output() == "ready\n" })
	p, err := r.client.send(request{Op: opStop})
	check(t, err)
	_, err = p.wait(r.ctx())
	check(t, err)
	if exit := r.wait(e); exit.Code != 137 {
		t.Errorf("it ended as %+v", exit)
	}
	_, err = r.exec(5, "true").Wait(r.ctx())
	expectCode(t, "exec in a stopped VM", err, vm.CodeInvalidState)
	_, err = r.start().Wait(r.ctx())
	check(t, err)
	if exit := r.wait(r.exec(30, "test -e here")); exit.Code != 1 {
		t.Errorf("the search for an earlier start's file ended as %+v", exit)
	}
}

func TestShimIsAloneInItsNamespaces(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	e := r.exec(30, `readlink /proc/self/ns/pid /proc/self/ns/mnt; tr '\0' ' ' </proc/1/cmdline; echo; ls -d /proc/[0-9]* | wc -l; grep -c " $PWD/../scratch\| ${PWD%/workdir}/scratch " /proc/self/mounts`)
	r.wait(e)
	lines := strings.Split(e.output(), "\n")
	if len(lines) < 5 {
		t.Fatalf("it printed %q", lines)
	}
	for i, ns := range []string{"pid", "mnt"} {
		ours, err := os.Readlink("/proc/self/ns/" + ns)
		check(t, err)
		if lines[i] == ours {
			t.Errorf("it is in this process's %s namespace", ns)
		}
	}
	if !strings.HasSuffix(lines[2], " "+role+" "+r.claim.Dir+" ") {
		t.Errorf("process 1 is %q", lines[2])
	}
	var processes int
	if fmt.Sscan(lines[3], &processes); processes > 6 {
		t.Errorf("it sees %d processes", processes)
	}
	if lines[4] != "1" {
		t.Errorf("the scratch directory is mounted %s times", lines[4])
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	check(t, err)
	if strings.Contains(string(mounts), r.claim.Dir) {
		t.Error("its mounts are seen outside")
	}
}

func TestCommandsInheritNothingOfTheShims(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	e := r.exec(30, "ls -l /proc/self/fd; echo; env")
	r.wait(e)
	files, env, _ := strings.Cut(e.output(), "\n\n")
	for _, secret := range []string{"socket:", lockSuffix, "shim.log", "timerfd"} {
		if strings.Contains(files, secret) {
			t.Errorf("it has the shim's %s:\n%s", secret, files)
		}
	}
	if !strings.Contains(files, " 0 -> /dev/null") {
		t.Errorf("its descriptors are\n%s", files)
	}
	if strings.Contains(env, scriptVar) || strings.Contains(env, "GORACE") {
		t.Errorf("it has the shim's environment: %s", env)
	}
}

func TestManySignalsAndCommandsAtOnceDoNoHarm(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	var working sync.WaitGroup
	for range 4 {
		working.Go(func() {
			for range 8 {
				e := r.exec(30, "sleep 300")
				var signaling sync.WaitGroup
				for range 3 {
					signaling.Go(func() {
						if err := e.Signal(r.ctx(), syscall.SIGKILL); err != nil {
							t.Error(err)
						}
					})
				}
				if exit, err := e.Wait(r.ctx()); err != nil || exit.Signal != int(syscall.SIGKILL) {
					t.Errorf("it ended as %+v, error %v", exit, err)
				}
				signaling.Wait()
			}
		})
	}
	working.Wait()
}

func TestAnswerCanBeWaitedForAgainAfterACanceledWait(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	e := r.exec(30, "while [ ! -e done ]; do sleep 0.01; done; exit 7")
	ctx := canceled(t)
	if _, err := e.Wait(ctx); !errors.Is(err, ctx.Err()) {
		t.Errorf("the error is %v", err)
	}
	r.wait(r.exec(30, "touch done"))
	if exit := r.wait(e); exit.Code != 7 {
		t.Errorf("it ended as %+v", exit)
	}
}

func TestCallersDescriptorsDoNotReachCommands(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "the-callers-own")
	check(t, err)
	defer f.Close()
	fd, err := unix.Dup(int(f.Fd())) // without close-on-exec
	check(t, err)
	defer unix.Close(fd)
	r := newRig(t, "")
	r.boot()
	e := r.exec(30, "ls -l /proc/self/fd")
	r.wait(e)
	if strings.Contains(e.output(), "the-callers-own") {
		t.Errorf("the command has open:\n%s", e.output())
	}
}

func TestLargeCommandDoesNotWaitForASlowCreation(t *testing.T) {
	r := newRig(t, "create=pause")
	r.create()
	r.start()
	var sending sync.WaitGroup
	sent := make(chan struct{})
	sending.Go(func() {
		defer close(sent)
		_, _ = r.tryExecArgs(30, "true", strings.Repeat("x", vm.MaxArgsBytes/2))
	})
	select {
	case <-sent:
	case <-time.After(3 * time.Second):
		t.Error("Exec waits, and no context can end it")
	}
	r.stage.put("create" + goOn)
	sending.Wait()
}

func TestWaitMayBeRepeated(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	e := r.exec(30, "exit 7")
	r.wait(e)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		exit, err := e.Wait(r.ctx())
		if err != nil || exit.Code != 7 {
			t.Errorf("again: %+v, error %v", exit, err)
		}
	}()
	select {
	case <-ended:
	case <-time.After(2 * time.Second):
		t.Error("it waits")
		r.client.Close()
	}
}

func TestLogIsTheOwnersAlone(t *testing.T) {
	r := newRig(t, "")
	r.boot()
	info, err := os.Stat(r.claim.logPath())
	check(t, err)
	if info.Mode() != 0o600 {
		t.Errorf("it is %v", info.Mode())
	}
}
