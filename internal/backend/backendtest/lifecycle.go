package backendtest

import (
	"sync"
	"syscall"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// lifecycle is what holds for the states of a machine.
func lifecycle() []subtest {
	return []subtest{
		{"describe", describe},
		{"probe", probe},
		{"create and delete", func(f *fixture) { f.delete(f.created()) }},
		{"exec needs a start", execNeedsStart},
		{"start twice", startTwice},
		{"start after delete", startAfterDelete},
		{"stop from every state, twice", stopEverywhere},
		{"start again after a stop", startAgain},
		{"a stop loses what was written", stopLosesFiles},
		{"a stop ends running commands", func(f *fixture) { endsCommands(f, f.stop) }},
		{"a delete ends running commands", func(f *fixture) { endsCommands(f, f.delete) }},
		{"commands that are started during a stop", execDuringStop},
		{"delete twice", deleteTwice},
		{"machines live apart", machinesApart},
		{"done is open while alive", doneWhileAlive},
		{"metadata is a copy", metadataIsCopy},
	}
}

func describe(f *fixture) {
	d := f.Driver.Describe()
	if d.Name == "" || d.Name == vm.Auto {
		f.Errorf("the driver's name is %q", d.Name)
	}
	if _, err := vm.ParseBackendName(string(d.Name)); err != nil {
		f.Errorf("the driver's name: %v", err)
	}
	if (d.Isolation == vm.IsolationNone) == f.Isolated {
		f.Errorf("isolation is %q, and Isolated is %v", d.Isolation, f.Isolated)
	}
}

func probe(f *fixture) {
	if err := f.Driver.Probe(f.ctx()); err != nil {
		f.Errorf("probe: %v", err)
	}
}

func execNeedsStart(f *fixture) {
	m := f.created()
	f.expectExec(m, command("true"), vm.CodeInvalidState)
	f.start(m)
	f.expectExit(f.run(m, command("true"), nil).status, 0)
	f.stop(m)
	f.expectExec(m, command("true"), vm.CodeInvalidState)
	f.delete(m)
	f.expectExec(m, command("true"), vm.CodeInvalidState)
}

func startTwice(f *fixture) {
	m := f.started()
	f.expectCode("start again", m.Start(f.ctx()), vm.CodeInvalidState)
	f.expectExit(f.run(m, command("true"), nil).status, 0)
}

func startAfterDelete(f *fixture) {
	m := f.created()
	f.delete(m)
	f.expectCode("start a deleted machine", m.Start(f.ctx()), vm.CodeInvalidState)
}

func stopEverywhere(f *fixture) {
	m := f.created()
	f.stop(m)
	f.stop(m)
	f.start(m)
	f.expectExit(f.run(m, command("true"), nil).status, 0)
	f.stop(m)
	f.stop(m)
}

func startAgain(f *fixture) {
	m := f.started()
	for range 2 {
		f.stop(m)
		f.start(m)
		f.expectExit(f.run(m, shell("exit 7"), nil).status, 7)
	}
}

func stopLosesFiles(f *fixture) {
	m := f.started()
	f.output(m, shell("echo something > left-by-the-suite"))
	f.output(m, shell("test -e left-by-the-suite"))
	f.stop(m)
	f.start(m)
	f.output(m, shell("test ! -e left-by-the-suite"))
}

// endsCommands checks that end takes running commands with it.
func endsCommands(f *fixture, end func(backend.Machine)) {
	m := f.started()
	plain := f.begin(m, command("sleep", "1000"), nothing)
	stubborn := f.begin(m, shell(`trap "" HUP INT TERM; echo ready; while :; do sleep 1; done`), piped)
	f.expectLine(stubborn, "ready")
	orphan := f.begin(m, shell(`(sleep 1000 &); echo ready`), nothing)
	f.expectLine(orphan, "ready")
	f.expectExit(f.wait(orphan), 0)
	end(m)
	f.expectEnded(plain)
	f.expectEnded(stubborn)
	for _, r := range []*running{plain, stubborn, orphan} {
		f.expectEOF(r)
		f.killAll(r)
		if err := r.Signal(f.ctx(), syscall.SIGTERM); err != nil {
			f.Errorf("signal a command of a machine that has ended: %v", err)
		}
	}
}

// execDuringStop starts commands as fast as it can while the machine is being
// stopped: each is either refused or ended.
func execDuringStop(f *fixture) {
	m := f.started()
	for range 5 {
		var (
			ctx     = f.ctx()
			first   = make(chan struct{})
			running []*running
			done    sync.WaitGroup
		)
		done.Go(func() {
			for {
				r, err := launch(ctx, m, command("sleep", "1000"), nothing)
				if err != nil {
					return
				}
				if running = append(running, r); len(running) == 1 {
					close(first)
				}
			}
		})
		<-first
		f.stop(m)
		done.Wait()
		f.expectExec(m, command("true"), vm.CodeInvalidState)
		for _, r := range running {
			f.expectEnded(r)
			f.expectEOF(r)
			r.close()
		}
		f.start(m)
	}
}

func deleteTwice(f *fixture) {
	m := f.started()
	f.delete(m)
	f.delete(m)
	never := f.created()
	f.delete(never)
	f.delete(never)
}

func machinesApart(f *fixture) {
	one, other := f.started(), f.started()
	r := f.begin(other, command("cat"), piped)
	killed := f.begin(one, command("sleep", "1000"), nothing)
	f.killAll(killed)
	f.expectRunning(r)
	f.stop(one)
	f.expectRunning(r)
	f.delete(one)
	f.expectRunning(r)
	f.expectExit(f.run(other, shell("exit 3"), nil).status, 3)
	if err := r.stdin.Close(); err != nil {
		f.Error(err)
	}
	f.expectExit(f.wait(r), 0)
}

func doneWhileAlive(f *fixture) {
	m := f.created()
	f.expectAlive(m)
	f.start(m)
	f.expectAlive(m)
	f.run(m, shell("kill -KILL $$"), nil)
	f.killAll(f.begin(m, command("sleep", "1000"), nothing))
	f.expectAlive(m)
	f.stop(m)
	f.start(m)
	f.expectAlive(m)
}

// expectAlive checks that a machine has not ended by itself.
func (f *fixture) expectAlive(m backend.Machine) {
	f.Helper()
	select {
	case <-m.Done():
		f.Errorf("done is closed, and nothing has happened to the machine")
	default:
	}
}

func metadataIsCopy(f *fixture) {
	const changed = "changed by the suite"
	m := f.started()
	for name := range m.Metadata() {
		m.Metadata()[name] = changed
		if m.Metadata()[name] == changed {
			f.Errorf("metadata %q can be changed from outside", name)
		}
	}
}
