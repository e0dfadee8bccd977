package main

import (
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"pyro"
)

// steps yields moments of a run: from its start to a little beyond the time
// that a whole one takes here and now, at random within equal steps.
func steps(t testing.TB, w *world, n int) iter.Seq[time.Duration] {
	w.run("--", "true").ok("") // prepares the environment
	span := w.run("--", "true").ok("").took * 5 / 4
	t.Logf("a run takes about %v", span*4/5)
	return func(yield func(time.Duration) bool) {
		step := span / time.Duration(n)
		for _, i := range rand.Perm(n) {
			if !yield(time.Duration(i)*step + rand.N(step)) {
				return
			}
		}
	}
}

// TestCallerKilledAtAnyMoment: whenever pyro run is killed, its VM is gone
// within 3 s, and the next run works and frees what is left.
func TestCallerKilledAtAnyMoment(t *testing.T) { callerKilledAtAnyMoment(newWorld(t), 25) }

func callerKilledAtAnyMoment(w *world, times int) {
	for delay := range steps(w.t, w, times) {
		p := w.start("--", "sh", "-c", "sleep 100 & sleep 100")
		<-time.After(delay) // the moment is what is tested
		p.signal(syscall.SIGKILL)
		p.wait(endTime)
		if left := poll(censusTime, func() []string { return w.leftRunning(w.born.all()) }); len(left) > 0 {
			w.t.Errorf("3 s after SIGKILL at %v there is %q", delay, left)
		}
		w.run("--", "echo", "hello").ok("hello\n")
		if left := w.left(); len(left) > 0 {
			w.t.Errorf("after SIGKILL at %v and another run there is %q", delay, left)
		}
	}
}

// TestCallerKilledWhileItRuns: the VM of a killed pyro run goes by itself, with
// all its files: nobody has to come and clean up.
func TestCallerKilledWhileItRuns(t *testing.T) { callerKilledWhileItRuns(newWorld(t)) }

func callerKilledWhileItRuns(w *world) {
	p := w.start("--", "sh", "-c", "echo ready; "+loop)
	p.says("ready\n")
	p.signal(syscall.SIGKILL)
	p.wait(endTime)
	left := poll(censusTime, func() []string {
		left := w.leftRunning(w.born.all())
		for _, id := range w.born.all() {
			left = append(left, cgroups("pyro-"+id)...)
		}
		return append(left, leftFiles(filepath.Join(w.base, "vms"), "*")...)
	})
	if len(left) > 0 {
		w.t.Errorf("after 3 s there is %q", left)
	}
	// Its place is free again.
	w.setenv("PYRO_MAX_ACTIVE_VMS=1")
	w.run("--", "true").ok("")
}

// TestShimKilled: without its shim a sandbox dies at once, and the caller is
// told the truth.
func TestShimKilled(t *testing.T) { partKilled(newWorld(t), "shim") }

// TestSandboxKilled: the same when the sandbox itself is killed.
func TestSandboxKilled(t *testing.T) { partKilled(newWorld(t), "runsc-sandbox") }

// TestFileServerKilled: and when the process that serves it files is.
func TestFileServerKilled(t *testing.T) { partKilled(newWorld(t), "runsc-gofer") }

func partKilled(w *world, part string) {
	w.run("--", "true").ok("") // prepares the environment
	for _, json := range []bool{true, false} {
		// Files are looked for all the time, so that the file server is missed.
		args := []string{"-i", "--timeout-seconds", "20", "--", "sh", "-c", take + "while :; do find /usr/share >/dev/null 2>&1; done"}
		if json {
			args = append([]string{"--json"}, args...)
		}
		p := w.start(args...)
		p.fed()
		for _, victim := range w.find(part) {
			check(w.t, syscall.Kill(victim.pid, syscall.SIGKILL))
		}
		dead := poll(time.Second, func() []string {
			var left []string
			for _, p := range append(w.find("runsc-sandbox"), w.find("runsc-gofer")...) {
				left = append(left, p.String())
			}
			return left
		})
		if len(dead) > 0 {
			w.t.Errorf("1 s after the %s was killed there is %q", part, dead)
		}
		r := p.wait(endTime)
		if !json {
			r.failed(125, pyro.CodeVMFailed)
		} else if a := r.json(); r.code != 125 || a.Error == nil || a.Error.Code != pyro.CodeVMFailed {
			w.t.Errorf("exit code %d, %s", r.code, describe(a.Error))
		}
		if left := w.left(); len(left) > 0 {
			w.t.Errorf("when pyro has ended there is %q", left)
		}
	}
	w.run("--", "echo", "hello").ok("hello\n")
}

// TestPartKilledEarly: what is killed while the machine is made ends the run as
// well, as an error of pyro's.
func TestPartKilledEarly(t *testing.T) {
	w := newWorld(t)
	for _, part := range []string{"shim", "runsc-sandbox", "runsc-gofer"} {
		p := w.start("--json", "--", "sleep", "100")
		for _, victim := range p.has(w, part) {
			check(t, syscall.Kill(victim.pid, syscall.SIGKILL))
		}
		r := p.wait(endTime)
		if e := r.json().Error; r.code != 125 || e == nil || e.Message == "" {
			t.Errorf("%s: exit code %d, %s", part, r.code, describe(e))
		}
		if left := w.left(); len(left) > 0 {
			t.Errorf("%s: when pyro has ended there is %q", part, left)
		}
	}
}

// TestAllKilled: where nobody is left to clean up, the next run does.
func TestAllKilled(t *testing.T) { allKilled(newWorld(t)) }

func allKilled(w *world) {
	p := w.start("--", "sh", "-c", "echo ready; "+loop)
	p.says("ready\n")
	// Stopped, pyro cannot clean up after its shim.
	p.signal(syscall.SIGSTOP)
	for _, shim := range w.find("shim") {
		check(w.t, syscall.Kill(shim.pid, syscall.SIGKILL))
	}
	p.signal(syscall.SIGKILL)
	p.wait(endTime)
	ids := w.born.all()
	left := poll(time.Second, func() []string { return w.leftRunning(ids) })
	if len(left) > 0 {
		w.t.Errorf("1 s after all was killed there is %q", left)
	}
	if files := leftFiles(filepath.Join(w.base, "vms"), "*"); len(files) == 0 {
		w.t.Error("nothing is left of the VM: the test shows nothing")
	}
	w.setenv("PYRO_MAX_ACTIVE_VMS=1")
	w.run("--", "echo", "hello").ok("hello\n")
	if left := w.left(); len(left) > 0 {
		w.t.Errorf("after another run there is %q", left)
	}
}

// TestStrangersInTheStateDirectory: what is not pyro's there is left alone, and
// stops nobody.
func TestStrangersInTheStateDirectory(t *testing.T) {
	w := newWorld(t)
	vms := filepath.Join(w.base, "vms")
	strange := []string{"README", "0123456789ab", "0123456789abc.lock", "ABCDEF012345.lock", ".lock"}
	for _, name := range strange {
		check(t, os.WriteFile(filepath.Join(vms, name), nil, 0o600))
	}
	w.run("--", "echo", "hello").ok("hello\n")
	for _, name := range strange {
		if err := os.Remove(filepath.Join(vms, name)); err != nil {
			t.Error(err)
		}
	}
}

// TestStoppedCaller: a pyro run that is stopped does not keep its command
// alive: the timeout holds with nobody watching.
func TestStoppedCaller(t *testing.T) {
	const timeout = 2 * time.Second
	for _, backend := range []string{"gvisor", "mock"} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			began := time.Now()
			p := w.start("--backend", backend, "--timeout-seconds", "2", "--", "sh", "-c", "while :; do date +%s.%N; sleep 0.02; done")
			p.says("\n")
			p.signal(syscall.SIGSTOP)
			stopped := func() bool {
				q, ok := look(p.cmd.Process.Pid)
				return ok && q.state == 'T'
			}
			eventually(t, endTime, "pyro is stopped", stopped)
			// Time has to pass: the clock is what is tested.
			eventually(t, patience, "the timeout is over", func() bool {
				return time.Since(began) > 2*timeout
			})
			if !stopped() {
				t.Error("pyro was not stopped all the time")
			}
			p.signal(syscall.SIGCONT)
			r := p.wait(endTime)
			if r.code != 124 {
				t.Errorf("exit code %d, stderr %q", r.code, r.stderr)
			}
			lines := strings.Fields(r.stdout)
			first, last := seconds(t, lines[0]), seconds(t, lines[len(lines)-1])
			if alive := last.Sub(first); alive > timeout+time.Second {
				t.Errorf("the command went on for %v", alive)
			}
		})
	}
}

// seconds reads a time as date +%s.%N prints it.
func seconds(t testing.TB, s string) time.Time {
	t.Helper()
	d, err := time.ParseDuration(s + "s")
	check(t, err)
	return time.Unix(0, 0).Add(d)
}
