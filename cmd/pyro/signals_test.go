package main

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"pyro"
)

// endTime is how long the end of a VM may take once it is asked for.
const endTime = 5 * time.Second

// loop is a command that goes on until a signal ends it.
const loop = "while :; do sleep 0.05; done"

// TestSignalsReachTheCommand: the first signal is the command's, which does
// with it what it likes.
func TestSignalsReachTheCommand(t *testing.T) {
	for name, c := range map[string]struct {
		signal syscall.Signal
		script string
		code   int
		stdout string
	}{
		"INT caught":   {syscall.SIGINT, `trap 'echo caught; exit 3' INT; echo ready; ` + loop, 3, "ready\ncaught\n"},
		"INT":          {syscall.SIGINT, `echo ready; ` + loop, 130, "ready\n"},
		"TERM caught":  {syscall.SIGTERM, `trap 'echo caught; exit 0' TERM; echo ready; ` + loop, 0, "ready\ncaught\n"},
		"TERM":         {syscall.SIGTERM, `echo ready; exec sleep 100`, 143, "ready\n"},
		"QUIT":         {syscall.SIGQUIT, `echo ready; ` + loop, 131, "ready\n"},
		"whole group":  {syscall.SIGINT, `trap 'exit 4' INT; (trap 'echo child' INT; ` + loop + `) & echo ready; while :; do wait; done`, 4, ""},
		"INT, ignored": {syscall.SIGINT, `trap '' INT; echo ready; sleep 1; exit 6`, 6, "ready\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			p := w.start("--", "sh", "-c", c.script)
			p.says("ready\n")
			p.signal(c.signal)
			r := p.wait(endTime)
			if name == "whole group" { // whether the child's word still comes is nobody's promise
				r.stdout = ""
			}
			if r.code != c.code || r.stdout != c.stdout || strings.Contains(r.stderr, "pyro") {
				t.Errorf("exit code %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
			}
		})
	}
}

// TestTerminalInterrupt: Ctrl-C reaches all of pyro's process group; the VM's
// processes are not in it, so the command is interrupted once.
func TestTerminalInterrupt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("--", "sh", "-c", `trap 'echo caught; exit 3' INT; echo ready; `+loop)
	p.says("ready\n")
	check(t, syscall.Kill(-p.cmd.Process.Pid, syscall.SIGINT))
	p.wait(endTime).want(3, "ready\ncaught\n", "")
}

// TestSecondInterrupt: a command that does not go at the first Ctrl-C goes with
// its machine at the second, and pyro says by its exit code why.
func TestSecondInterrupt(t *testing.T) { t.Parallel(); secondInterrupt(newWorld(t)) }

func secondInterrupt(w *world) {
	p := w.start("--", "sh", "-c", `trap 'echo once' INT; echo ready; `+loop)
	p.says("ready\n")
	p.signal(syscall.SIGINT)
	p.says("once\n")
	p.signal(syscall.SIGINT)
	r := p.wait(endTime)
	if r.code != 130 || r.stdout != "ready\nonce\n" || !strings.Contains(r.stderr, "("+string(pyro.CodeCanceled)+")") {
		w.t.Errorf("exit code %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
	}
}

// TestSecondInterruptInJSON: the exit code is the same with --json.
func TestSecondInterruptInJSON(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("--json", "-i", "--", "sh", "-c", "trap '' INT; "+take+loop)
	p.fed()
	// What the first one does cannot be seen here, and two that come together
	// may be one.
	eventually(t, endTime, "the end of a run that is interrupted again and again", func() bool {
		p.cmd.Process.Signal(syscall.SIGINT)
		select {
		case <-p.ended:
			return true
		default:
			return false
		}
	})
	r := p.wait(endTime)
	e := r.json().Error
	if r.code != 130 {
		t.Errorf("exit code %d, want 130: %s", r.code, describe(e))
	}
}

// TestTerminateTwice: SIGTERM is like SIGINT.
func TestTerminateTwice(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("--", "sh", "-c", `trap 'echo once' TERM INT; echo ready; `+loop)
	p.says("ready\n")
	p.signal(syscall.SIGINT)
	p.says("once\n")
	p.signal(syscall.SIGTERM)
	if r := p.wait(endTime); r.code != 143 {
		t.Errorf("exit code %d, stderr %q", r.code, r.stderr)
	}
}

// TestHangup: a terminal that is gone takes the machine with it at once.
func TestHangup(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start("--", "sh", "-c", `trap '' HUP INT TERM; echo ready; `+loop)
	p.says("ready\n")
	p.signal(syscall.SIGHUP)
	if r := p.wait(endTime); r.code != 129 || r.stdout != "ready\n" {
		t.Errorf("exit code %d, stderr %q", r.code, r.stderr)
	}
}

// TestInterruptAtAnyMoment: a Ctrl-C while the machine is being made ends the
// run as well, and never half.
func TestInterruptAtAnyMoment(t *testing.T) {
	w := newWorld(t)
	for delay := range steps(t, w, 10) {
		p := w.start("--", "sleep", "100")
		<-time.After(delay) // the moment is what is tested
		p.signal(syscall.SIGINT)
		r := p.wait(endTime)
		// Before pyro takes signals, the first one is the kernel's to handle.
		if r.code != 130 && r.code != -1 || r.stdout != "" {
			t.Errorf("SIGINT after %v: exit code %d, stdout %q, stderr %q", delay, r.code, r.stdout, r.stderr)
		}
		if left := w.leftRunning(w.born.all()); len(left) > 0 {
			t.Errorf("SIGINT after %v: %q is there when pyro has ended", delay, left)
		}
	}
}
