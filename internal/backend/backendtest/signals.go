package backendtest

import (
	"sync"
	"syscall"
)

// signals is whom a signal reaches.
func signals() []subtest {
	return []subtest{
		{"a command handles one", signalHandled},
		{"the whole group gets it", signalGroup},
		{"by number", signalNumbers},
		{"stop and continue", stopAndContinue},
		{"after the end", signalLate},
		{"after the end, with the group alive", signalOrphans},
		{"while the command ends", signalRace},
	}
}

func (f *fixture) signal(r *running, sig syscall.Signal) {
	f.Helper()
	if err := r.Signal(f.ctx(), sig); err != nil {
		f.Errorf("send signal %d: %v", sig, err)
	}
}

func signalHandled(f *fixture) {
	m := f.started()
	r := f.begin(m, shell(`trap 'echo caught; kill -KILL $!; exit 33' INT; sleep 1000 & echo ready; wait`), nothing)
	f.expectLine(r, "ready")
	f.signal(r, syscall.SIGINT)
	f.expectLine(r, "caught")
	f.expectExit(f.wait(r), 33)
	f.expectEOF(r)
}

func signalGroup(f *fixture) {
	m := f.started()
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		r := f.begin(m, shell(`(echo ready; exec sleep 1000) | cat; exit 1`), nothing)
		f.expectLine(r, "ready")
		f.signal(r, sig)
		f.expectKilled(f.wait(r), sig)
		f.expectEOF(r)
	}
}

func signalNumbers(f *fixture) {
	m := f.started()
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR2, syscall.SIGKILL} {
		r := f.begin(m, command("cat"), piped)
		f.signal(r, sig)
		status := f.wait(r)
		f.expectKilled(status, sig)
	}
}

func stopAndContinue(f *fixture) {
	m := f.started()
	r := f.begin(m, shell("cat; exit 4"), piped)
	f.signal(r, syscall.SIGSTOP)
	if err := r.stdin.Close(); err != nil {
		f.Error(err)
	}
	f.expectRunning(r)
	f.signal(r, syscall.SIGCONT)
	f.expectExit(f.wait(r), 4)
}

func signalLate(f *fixture) {
	m := f.started()
	r := f.begin(m, command("true"), nothing)
	f.expectExit(f.wait(r), 0)
	f.signal(r, syscall.SIGTERM)
	f.signal(r, syscall.SIGKILL)
	f.killAll(r)
	f.signal(r, syscall.SIGTERM)
	f.killAll(r)
}

func signalOrphans(f *fixture) {
	m := f.started()
	r := f.begin(m, shell(`sleep 1000 & echo ready`), nothing)
	f.expectLine(r, "ready")
	f.expectExit(f.wait(r), 0)
	f.signal(r, syscall.SIGTERM)
	f.killAll(r)
	f.expectEOF(r)
}

func signalRace(f *fixture) {
	m := f.started()
	for range 10 {
		r := f.begin(m, command("true"), nothing)
		var both sync.WaitGroup
		both.Go(func() { f.signal(r, syscall.SIGTERM) })
		both.Go(func() { f.killAll(r) })
		both.Wait()
		f.wait(r)
	}
}
