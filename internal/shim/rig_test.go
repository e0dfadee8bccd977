package shim

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"pyro/internal/environment"
	"pyro/internal/need"
	"pyro/internal/vm"
)

// patience is how long a call that should succeed may take. It is reached only
// when something hangs.
const patience = 20 * time.Second

// background returns a context that is good for one test's calls.
func background(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	t.Cleanup(cancel)
	return ctx
}

// await waits until something is so.
func await(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after %v it is not so that %s", patience, what)
		}
	}
}

// check ends the test on an error.
func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// expectCode checks that err carries code.
func expectCode(t testing.TB, what string, err error, code vm.Code) {
	t.Helper()
	if !errors.Is(err, code) {
		t.Errorf("%s: the error is %v, want one with code %s", what, err, code)
	}
}

// shimsCanLive is set once the machine has shown that it allows namespaces.
var shimsCanLive atomic.Bool

func needNamespaces(t testing.TB) {
	t.Helper()
	if !shimsCanLive.Load() {
		need.Namespaces(t)
		shimsCanLive.Store(true)
	}
}

// rig is one VM's claim and shim, seen as its manager sees it.
type rig struct {
	*testing.T
	vms    string          // the directory that holds all VMs
	before map[string]bool // the processes that were there first
	claim  *Claim
	client *Client
	stage  stage
	path   string // the program that becomes the shim
	mark   string // an entry in the environment of the shim
	inside string // an entry in the environment of its commands
}

// newRig spawns a shim whose driver follows script. At the end of the test the
// manager's part is done, if the test did not, and nothing may be left.
func newRig(t *testing.T, script string) *rig {
	t.Helper()
	needNamespaces(t)
	expectNothingLeft(t)
	return newSharedRig(t, script)
}

// newSharedRig is newRig for tests that run at the same time as others.
func newSharedRig(t *testing.T, script string) *rig {
	t.Helper()
	needNamespaces(t)
	r := &rig{T: t, vms: t.TempDir(), before: processes(), stage: stage(t.TempDir())}
	r.mark, r.inside = markVar+"="+rand.Text(), markVar+"="+rand.Text()
	var err error
	r.claim, err = NewClaim(r.vms, vm.NewID())
	check(t, err)
	t.Cleanup(func() {
		check(t, errors.Join(r.claim.Reclaim(background(t)), r.claim.Release()))
		r.expectFreed()
	})
	r.path = r.program(script)
	r.client, err = Spawn(r.path, r.claim)
	check(t, err)
	t.Cleanup(func() { r.client.Close() })
	return r
}

// program returns a program that becomes this test binary with a script for
// its driver: a shim gets no environment.
func (r *rig) program(script string) string {
	self, err := os.Executable()
	check(r, err)
	return program(r, fmt.Sprintf("GORACE='atexit_sleep_ms=0 log_path=%s' %s='%s' %s='%s' %s exec '%s' \"$@\"\n",
		raceLogs, scriptVar, script, stageVar, r.stage, r.mark, self))
}

// program returns a program made of a shell's commands.
func program(t testing.TB, commands string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	// A process that is being started by another goroutine holds a copy of
	// every descriptor, and what somebody can write cannot be executed.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	check(t, os.WriteFile(path, []byte("#!/bin/sh\n"+commands), 0o700))
	return path
}

// ctx returns a context for calls that should succeed.
func (r *rig) ctx() context.Context { return background(r) }

// resources are those of every VM here, but for ttl, in seconds.
func resources(ttl int) vm.Resources {
	return vm.Resources{VCPUCount: 1, MemMiB: 256, TTLSeconds: ttl}
}

// create asks for the VM.
func (r *rig) create() Creation { return r.createFor(600) }

func (r *rig) createFor(ttl int) Creation {
	r.Helper()
	c, err := r.client.Create(r.claim.ID, vm.Mock, resources(ttl), environment.Root{})
	check(r, err)
	return c
}

// start asks for the VM's start.
func (r *rig) start() Starting {
	r.Helper()
	s, err := r.client.Start()
	check(r, err)
	return s
}

// boot makes and starts the VM.
func (r *rig) boot() {
	r.Helper()
	c, s := r.create(), r.start()
	_, err := c.Wait(r.ctx())
	check(r, err)
	_, err = s.Wait(r.ctx())
	check(r, err)
}

// command is a command under way whose output goes to a file.
type command struct {
	*Exec
	out *os.File
}

// exec asks for a shell's command, which may take a number of seconds.
func (r *rig) exec(timeout int, line string) *command {
	r.Helper()
	return r.execArgs(timeout, "sh", "-c", line)
}

func (r *rig) execArgs(timeout int, args ...string) *command {
	r.Helper()
	c, err := r.tryExecArgs(timeout, args...)
	check(r, err)
	return c
}

// tryExec is exec where the shim may be gone.
func (r *rig) tryExec(timeout int, line string) (*command, error) {
	r.Helper()
	return r.tryExecArgs(timeout, "sh", "-c", line)
}

func (r *rig) tryExecArgs(timeout int, args ...string) (*command, error) {
	r.Helper()
	null, err := os.Open(os.DevNull)
	check(r, err)
	defer null.Close()
	out, err := os.CreateTemp(r.TempDir(), "output")
	check(r, err)
	r.Cleanup(func() { out.Close() })
	e, err := r.client.Exec(vm.Command{Args: args, Env: []string{r.inside}, TimeoutSeconds: timeout}, null, out, out)
	return &command{e, out}, err
}

// output is what the command has printed so far.
func (c *command) output() string {
	b, err := os.ReadFile(c.out.Name())
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// wait returns how a command ended.
func (r *rig) wait(c *command) vm.Exit {
	r.Helper()
	exit, err := c.Wait(r.ctx())
	check(r, err)
	return exit
}

// expectGone checks that the shim ends, by itself or otherwise, and that its
// processes are dead then.
func (r *rig) expectGone() {
	r.Helper()
	select {
	case <-r.client.Done():
	case <-time.After(patience):
		r.Fatal("the shim lives on")
	}
	if alive := r.alive(); len(alive) > 0 {
		r.Errorf("the shim has ended, but these live on: %v", alive)
	}
}

// alive returns the processes of the shim and of its commands. The shim is the
// shell of its program first, which has no environment.
func (r *rig) alive() []string { return carriers(r.before, r.path, r.mark, r.inside) }

// expectFreed checks that of the VM nothing is left.
func (r *rig) expectFreed() {
	r.Helper()
	if left := names(r, r.vms); len(left) > 0 {
		r.Errorf("left of the VM: %v", left)
	}
	r.expectNoCgroups()
	if alive := r.alive(); len(alive) > 0 {
		r.Errorf("left of the VM: %v", alive)
	}
}

// expectNoCgroups checks that no control group is named after the VM.
func (r *rig) expectNoCgroups() {
	r.Helper()
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(d.Name(), string(r.claim.ID)) {
			r.Errorf("left of the VM: %s", path)
		}
		return nil
	})
}

// names lists a directory.
func names(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	check(t, err)
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

// processes returns the numbers of all processes there are.
func processes() map[string]bool {
	all := map[string]bool{}
	if proc, err := os.Open("/proc"); err == nil {
		defer proc.Close()
		names, _ := proc.Readdirnames(-1)
		for _, name := range names {
			if name[0] >= '1' && name[0] <= '9' {
				all[name] = true
			}
		}
	}
	return all
}

// carriers returns the live processes, but for those of before, that have one
// of entries in their arguments or their environment.
func carriers(before map[string]bool, entries ...string) []string {
	var found []string
	for pid := range processes() {
		if before[pid] {
			continue
		}
		environ, _ := os.ReadFile("/proc/" + pid + "/environ")
		args, _ := os.ReadFile("/proc/" + pid + "/cmdline")
		if slices.ContainsFunc(strings.Split(string(environ)+string(args), "\x00"), func(s string) bool { return slices.Contains(entries, s) }) {
			found = append(found, fmt.Sprintf("process %s %q", pid, bytes.TrimRight(args, "\x00")))
		}
	}
	return found
}

// expectNothingLeft checks, when the test and its other cleanups are over, that
// this process has no goroutine, no descriptor and no child more than now.
func expectNothingLeft(t testing.TB) {
	t.Helper()
	before, current := descriptors(), goleak.IgnoreCurrent()
	t.Cleanup(func() {
		var more map[string]string
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(2 * time.Millisecond) {
			more = descriptors()
			maps.DeleteFunc(more, func(fd, target string) bool { return before[fd] == target })
			if len(more) == 0 && !haveChildren() {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("left open: %v; children left: %v", more, haveChildren())
				break
			}
		}
		if err := goleak.Find(current); err != nil {
			t.Error(err)
		}
	})
}

// descriptors returns what this process has open, but for what Go's runtime
// opens for itself.
func descriptors() map[string]string {
	all := map[string]string{}
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || target == "anon_inode:[eventpoll]" || target == "anon_inode:[eventfd]" {
			continue
		}
		all[e.Name()] = target
	}
	return all
}

// haveChildren reports whether this process has children, dead ones included.
func haveChildren() bool {
	return unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT|unix.WALL, nil) == nil
}

// canceled returns a context that has ended.
func canceled(t testing.TB) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}
