package main

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"
	"time"

	"pyro"
)

// hungry are programs that take more than 256 MiB, each in its own way.
var hungry = map[string]string{
	"memory":            "tail /dev/zero",
	"file":              "dd if=/dev/zero of=/tmp/x bs=1M count=600",
	"file in /root":     "dd if=/dev/zero of=/root/x bs=1M count=600",
	"file in /dev/shm":  "dd if=/dev/zero of=/dev/shm/x bs=1M count=600",
	"several processes": "for i in 1 2 3 4; do head -c 120M /dev/zero | tail -n 1 >/dev/null & done; wait; sleep 100",
}

// TestOutOfMemory: a VM that takes more memory than it was given is killed, in
// memory or in files, and the result says why.
func TestOutOfMemory(t *testing.T) { outOfMemory(newWorld(t), slices.Collect(maps.Keys(hungry))...) }

func outOfMemory(w *world, names ...string) {
	for _, name := range names {
		a := w.run("--json", "--mem-mib", "256", "--", "sh", "-c", hungry[name]).json()
		if a.Code != 137 || !a.OOM || a.Signal != int(syscall.SIGKILL) || a.TimedOut {
			w.t.Errorf("%s: exit code %d, oom %v, signal %d, timed out %v, stderr %q", name, a.Code, a.OOM, a.Signal, a.TimedOut, a.Stderr)
		}
		if left := w.left(); len(left) > 0 {
			w.t.Errorf("%s: there is still %q", name, left)
		}
	}
	r := w.run("--mem-mib", "256", "--", "tail", "/dev/zero")
	r.want(137, "", "pyro: the machine ran out of memory (256 MiB) and was killed\n")
}

// TestEnoughMemory: a VM may use what it was given, again and again, and a
// command that is killed for another reason did not run out of memory.
func TestEnoughMemory(t *testing.T) { enoughMemory(newWorld(t)) }

func enoughMemory(w *world) {
	for _, script := range []string{
		"head -c 100M /dev/zero | tail -n 1 | wc -c",
		"for i in 1 2 3 4 5; do dd if=/dev/zero of=/tmp/x bs=1M count=100 status=none; rm /tmp/x; done; echo 104857600",
	} {
		a := w.run("--json", "--mem-mib", "256", "--", "sh", "-c", script).json()
		if a.Code != 0 || a.OOM || a.Stdout != "104857600\n" {
			w.t.Errorf("%q: exit code %d, oom %v, stdout %q, stderr %q", script, a.Code, a.OOM, a.Stdout, a.Stderr)
		}
	}
	a := w.run("--json", "--mem-mib", "1024", "--", "sh", "-c", "head -c 400M /dev/zero >/tmp/x; wc -c </tmp/x").json()
	if a.Code != 0 || a.OOM || a.Stdout != "419430400\n" {
		w.t.Errorf("400 of 1024 MiB: exit code %d, oom %v, stdout %q, stderr %q", a.Code, a.OOM, a.Stdout, a.Stderr)
	}
	if a := w.run("--json", "--", "sh", "-c", "kill -KILL $$").json(); a.Code != 137 || a.OOM || a.Signal != 9 {
		w.t.Errorf("SIGKILL: exit code %d, oom %v, signal %d", a.Code, a.OOM, a.Signal)
	}
}

// TestForkBomb: while a VM starts as many processes as it can the host stays
// responsive, and when its time is up nothing of it is left.
func TestForkBomb(t *testing.T) { forkBomb(newWorld(t)) }

func forkBomb(w *world) {
	const responsive = 500 * time.Millisecond
	// Each copy starts two more and waits; those that are refused try again.
	bomb := `echo ready; f() { f & f & wait; }; while :; do f; done 2>/dev/null`
	p := w.start("--json", "--timeout-seconds", "5", "--", "bash", "-c", bomb)
	p.has(w, "runsc-sandbox")
	var took []time.Duration
	for ended := false; !ended; {
		began := time.Now()
		check(w.t, exec.Command("/bin/true").Run())
		took = append(took, time.Since(began))
		select {
		case <-p.ended:
			ended = true
		case <-time.After(20 * time.Millisecond): // leaves the machine to the bomb
		}
	}
	r := p.wait(patience)
	slices.Sort(took)
	median := took[len(took)/2]
	w.t.Logf("%d times true on the host: median %v, worst %v; the run took %v", len(took), median, took[len(took)-1], r.took)
	if median > responsive || len(took) < 10 {
		w.t.Errorf("the host's median is %v of %d", median, len(took))
	}
	a := r.json()
	// A sandbox that reaches its limit on tasks ends; one that does not in the
	// time given is killed when that is up.
	failed := r.code == 125 && a.Error != nil && a.Error.Code == pyro.CodeVMFailed
	if !failed && (a.Code != 124 || !a.TimedOut || r.code != 124) {
		w.t.Errorf("exit code %d, %+v", r.code, a)
	}
	if r.took > 5*time.Second+endTime {
		w.t.Errorf("the run took %v", r.took)
	}
	if left := w.left(); len(left) > 0 {
		w.t.Errorf("when pyro has ended there is %q", left)
	}
}

// TestManyAtOnce: as many VMs as the setting allows run at once, each with its
// own files, and do not disturb each other.
func TestManyAtOnce(t *testing.T) {
	const n = 12
	w := newWorld(t)
	w.setenv(fmt.Sprintf("PYRO_MAX_ACTIVE_VMS=%d", n))
	var all []*running
	for i := range n {
		all = append(all, w.start("-i", "--", "sh", "-c", fmt.Sprintf("echo %d >/tmp/x; echo ready; read go; cat /tmp/x; exit %d", i, i)))
	}
	for _, p := range all {
		p.says("ready\n")
	}
	// All of them are there now, and there is room for no more.
	if ids := w.born.all(); len(ids) != n {
		t.Errorf("%d VMs, want %d", len(ids), n)
	}
	w.run("--", "true").failed(125, pyro.CodeCapacityExceeded)
	for i, p := range all {
		_, err := p.stdin.Write([]byte("go\n"))
		check(t, err)
		p.wait(patience).want(i, fmt.Sprintf("ready\n%d\n", i), "")
	}
}

// TestFirstRunsAtOnce: the very first runs of a user, all at once, do not get in
// each other's way.
func TestFirstRunsAtOnce(t *testing.T) {
	const n = 8
	w := newWorld(t)
	w.setenv(fmt.Sprintf("PYRO_MAX_ACTIVE_VMS=%d", n))
	check(t, os.RemoveAll(w.environments()))
	var all []*running
	for range n {
		all = append(all, w.start("--", "echo", "hello"))
	}
	for _, p := range all {
		p.wait(patience).ok("hello\n")
	}
}

// TestCapacity: one VM more than the setting allows is refused, at once and
// with a code of its own, until there is room again.
func TestCapacity(t *testing.T) {
	w := newWorld(t)
	w.setenv("PYRO_MAX_ACTIVE_VMS=1")
	p := w.start("-i", "--", "sh", "-c", "echo ready; read go")
	p.says("ready\n")
	r := w.run("--json", "--", "true")
	if e := r.json().Error; r.code != 125 || e == nil || e.Code != pyro.CodeCapacityExceeded || e.Hint == "" {
		t.Errorf("exit code %d, %s", r.code, describe(e))
	}
	r = w.run("--", "true").failed(125, pyro.CodeCapacityExceeded)
	if r.took > endTime {
		t.Errorf("the refusal took %v", r.took)
	}
	// The contract's order: limits and profile come before capacity.
	w.run("--vcpu-count", "9", "--", "true").failed(125, pyro.CodeInvalidArgument)
	w.run("--env", "nothing", "--", "true").failed(125, pyro.CodeUnknownProfile)
	_, err := p.stdin.Write([]byte("go\n"))
	check(t, err)
	p.wait(patience).want(0, "ready\n", "")
	w.run("--", "echo", "hello").ok("hello\n")
}
