package pyro_test

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

	"pyro"
	"pyro/internal/need"
	"pyro/internal/store"
)

// patience is how long a call that should succeed may take. It is reached only
// when something hangs.
const patience = 20 * time.Second

// rig is a Manager of a base directory of its own.
type rig struct {
	*testing.T
	manager *pyro.Manager
	base    string
	program string          // Options.Executable
	before  map[string]bool // the processes that were there first
	mark    string          // an entry in the environment of the shims
	inside  string          // an entry in the environment of their commands
}

// newRig opens a Manager whose shims' driver follows script. At the end of the
// test nothing may be left.
func newRig(t *testing.T, script string) *rig {
	t.Helper()
	needNamespaces(t)
	expectNothingLeft(t)
	return newSharedRig(t, script, 4)
}

// newSharedRig is newRig for tests that run at the same time as others, with a
// number of VMs that there may be at once.
func newSharedRig(t *testing.T, script string, vms int) *rig {
	t.Helper()
	needNamespaces(t)
	dir := t.TempDir()
	r := &rig{T: t, base: filepath.Join(dir, "base"), program: filepath.Join(dir, "pyro"), before: processes()}
	r.mark, r.inside = markVar+"="+rand.Text(), markVar+"="+rand.Text()
	check(t, writeProgram(r.program, []string{r.mark, scriptVar + "=" + script, stageVar + "=" + dir}))
	check(t, shareEnvironments(r.base))
	r.manager = r.open(vms)
	t.Cleanup(r.expectFreed)
	return r
}

// open opens one more Manager of the base directory.
func (r *rig) open(vms int) *pyro.Manager {
	r.Helper()
	m, err := pyro.Open(r.ctx(), pyro.Options{BaseDir: r.base, Executable: r.program, MaxActiveVMs: vms})
	check(r, err)
	r.Cleanup(func() { check(r, m.Close()) })
	return m
}

// ctx returns a context for calls that should succeed.
func (r *rig) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), patience)
	r.Cleanup(cancel)
	return ctx
}

// shell asks for a shell's command.
func (r *rig) shell(line string) pyro.RunRequest {
	return pyro.RunRequest{Args: []string{"sh", "-c", line}, Backend: pyro.Mock, Env: []string{r.inside}}
}

// Run has the Manager run a command.
func (r *rig) Run(ctx context.Context, q pyro.RunRequest) (*pyro.ExecResult, error) {
	return r.manager.Run(ctx, q)
}

// run runs a command, which must work.
func (r *rig) run(q pyro.RunRequest) *pyro.ExecResult {
	r.Helper()
	result, err := r.Run(r.ctx(), q)
	check(r, err)
	return result
}

// outcome is what a Run under way returns.
type outcome struct {
	result *pyro.ExecResult
	err    error
}

// begin runs a command at the same time.
func (r *rig) begin(ctx context.Context, q pyro.RunRequest) <-chan outcome {
	done := make(chan outcome, 1)
	go func() {
		result, err := r.Run(ctx, q)
		done <- outcome{result, err}
	}()
	return done
}

// end returns what a Run returned, which must not take long.
func (r *rig) end(done <-chan outcome) (*pyro.ExecResult, error) {
	r.Helper()
	select {
	case o := <-done:
		return o.result, o.err
	case <-time.After(patience):
		r.Fatal("Run does not return")
		return nil, nil
	}
}

// stage returns the path of a file by which commands, drivers and the test tell
// each other how far they are.
func (r *rig) stage(name string) string { return filepath.Join(filepath.Dir(r.base), name) }

// reached reports whether somebody has made a file of the stage.
func (r *rig) reached(name string) bool {
	_, err := os.Stat(r.stage(name))
	return err == nil
}

// goOn makes a file of the stage.
func (r *rig) goOn(name string) {
	r.Helper()
	check(r, os.WriteFile(r.stage(name), nil, 0o600))
}

// records is what the store holds.
func (r *rig) records() []store.Record {
	r.Helper()
	s, err := store.Open(r.ctx(), filepath.Join(r.base, "state.db"))
	check(r, err)
	defer s.Close()
	list, err := s.List(r.ctx())
	check(r, err)
	return list
}

// vms is where VMs have their directories and locks.
func (r *rig) vms() string { return filepath.Join(r.base, "vms") }

// alive returns the processes of all shims and their commands. A shim is the
// shell of its program first, which has no environment.
func (r *rig) alive() []string { return carriers(r.before, r.program, r.mark, r.inside) }

// expectFreed checks that of no VM anything is left.
func (r *rig) expectFreed() {
	r.Helper()
	if alive := r.alive(); len(alive) > 0 {
		r.Errorf("processes are left: %v", alive)
	}
	if left := names(r, r.vms()); len(left) > 0 {
		r.Errorf("files are left: %v", left)
	}
	if left := r.records(); len(left) > 0 {
		r.Errorf("records are left: %+v", left)
	}
}

// expectNoCgroups checks that no control group is named after a VM.
func expectNoCgroups(t testing.TB, id string) {
	t.Helper()
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(d.Name(), id) {
			t.Errorf("a control group is left: %s", path)
		}
		return nil
	})
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
func expectCode(t testing.TB, what string, err error, code pyro.Code) {
	t.Helper()
	if !errors.Is(err, code) {
		t.Errorf("%s: the error is %v, want one with code %s", what, err, code)
	}
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
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(2 * time.Millisecond) {
			more := descriptors()
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

// writeScript makes a program of a shell's commands; see writeProgram.
func writeScript(t testing.TB, path, commands string) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	check(t, os.WriteFile(path, []byte("#!/bin/sh\n"+commands+"\n"), 0o700))
}
