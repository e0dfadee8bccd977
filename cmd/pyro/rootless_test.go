package main

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"pyro"
	"pyro/internal/need"
)

// nobody is an ordinary user, for tests that root runs.
var nobody = &syscall.Credential{Uid: 65534, Gid: 65534, Groups: []uint32{}}

// ordinary is an ordinary user: the one who runs the tests, but for root.
func ordinary() *syscall.Credential {
	if os.Geteuid() == 0 {
		return nobody
	}
	return nil
}

// TestRootless: an ordinary user is promised the same as root.
func TestRootless(t *testing.T) {
	for name, promise := range map[string]func(*world){
		"streams":        func(w *world) { outputStreams(w) },
		"bytes":          bytesPassUnchanged,
		"inside":         inside,
		"interrupt":      secondInterrupt,
		"caller killed":  func(w *world) { callerKilledAtAnyMoment(w, 8) },
		"goes by itself": callerKilledWhileItRuns,
		"shim killed":    func(w *world) { partKilled(w, "shim") },
		"all killed":     allKilled,
		"out of memory":  func(w *world) { outOfMemory(w, "memory", "file") },
		"enough memory":  enoughMemory,
		"fork bomb":      forkBomb,
		"its result":     rootlessResult,
		"its directory":  rootlessDirectory,
	} {
		if ordinary() == nil && !strings.HasPrefix(name, "its ") {
			continue // this is what the other tests have shown already
		}
		t.Run(name, func(t *testing.T) { promise(newWorldOf(t, ordinary())) })
	}
}

// rootlessResult: the first run of an ordinary user makes a private directory,
// and the result says which limits hold and how.
func rootlessResult(w *world) {
	a := w.run("--json", "--vcpu-count", "2", "--", "sh", "-c", "nproc; id -u; exit 9").json()
	if a.Code != 9 || a.Stdout != "2\n0\n" || a.Isolation != "gvisor" || !a.Cleanup.Deleted {
		w.t.Errorf("result %+v", a)
	}
	for _, key := range []string{"limit_memory", "limit_cpu", "limit_tasks"} {
		if a.Metadata[key] == "" {
			w.t.Errorf("metadata %v lacks %s", a.Metadata, key)
		}
	}
	for _, dir := range []string{w.base, w.base + "/vms", w.base + "/environments"} {
		info, err := os.Stat(dir)
		check(w.t, err)
		if info.Mode().Perm() != 0o700 {
			w.t.Errorf("%s has mode %v", dir, info.Mode())
		}
	}
}

// rootlessDirectory: without a setting an ordinary user's state is where the
// rules for desktops say, and without a home there is an error.
func rootlessDirectory(w *world) {
	run := func(env ...string) result {
		ctx, cancel := context.WithTimeout(w.t.Context(), patience)
		defer cancel()
		cmd := w.command(ctx, "run", "--json", "--", "true")
		cmd.Env = append([]string{}, env...) // nil would be the test's own
		return finish(w.t, ctx, cmd)
	}
	for dir, env := range map[string][]string{
		"home/.local/state/pyro":  {"HOME=" + w.home},
		"home/.local/state/pyro/": {"HOME=" + w.home, "XDG_STATE_HOME=relative"},
		"tmp/state/pyro":          {"HOME=" + w.home, "XDG_STATE_HOME=" + w.tmp + "/state"},
	} {
		if r := run(env...); r.code != 0 {
			w.t.Errorf("%q: exit code %d, %s", env, r.code, r.stdout)
		}
		info, err := os.Stat(filepath.Join(w.dir, dir))
		check(w.t, err)
		if info.Mode().Perm() != 0o700 {
			w.t.Errorf("%s has mode %v", dir, info.Mode())
		}
	}
	run().unavailable("")
	check(w.t, os.RemoveAll(filepath.Join(w.tmp, "state")))
	check(w.t, os.RemoveAll(filepath.Join(w.home, ".local")))
}

// forbidRole is the name by which the test binary forbids namespaces before it
// becomes pyro.
const forbidRole = "forbid"

// forbidNamespaces is that: it runs with the right to change its own user
// namespace's limits, gives it up and becomes pyro.
func forbidNamespaces() {
	// Rights belong to threads, and the program that exec starts takes those of
	// its thread.
	runtime.LockOSThread()
	err := os.WriteFile(os.Getenv("FORBID"), []byte("0"), 0)
	if err == nil {
		err = unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	}
	if err == nil {
		err = unix.Exec("/proc/self/exe", append([]string{"pyro"}, os.Args[1:]...), os.Environ())
	}
	panic(err)
}

// TestForbiddenNamespaces: where an ordinary user may not make the namespaces
// that isolate a VM, pyro says which setting forbids it and how to change it.
func TestForbiddenNamespaces(t *testing.T) {
	need.Namespaces(t)
	for _, setting := range []string{"max_user_namespaces", "max_pid_namespaces", "max_mnt_namespaces"} {
		t.Run(setting, func(t *testing.T) {
			w := newWorldOf(t, ordinary())
			for _, args := range [][]string{{"run", "--json", "--", "true"}, {"run", "--json", "--backend", "gvisor", "--", "true"}} {
				r := w.forbidden(setting, args...)
				e := r.json().Error
				if r.code != 125 || e == nil || e.Code != pyro.CodeBackendUnavailable ||
					!strings.Contains(e.Message, "user."+setting) || !strings.Contains(e.Hint, "sysctl -w user."+setting+"=") {
					t.Errorf("exit code %d, %s", r.code, describe(e))
				}
			}
			w.forbidden(setting, "run", "--", "true").failed(125, pyro.CodeBackendUnavailable)
		})
	}
}

// forbidden runs pyro as an ordinary user in a user namespace where a limit on
// namespaces is 0.
func (w *world) forbidden(setting string, args ...string) result {
	w.t.Helper()
	const uid = 1000
	outer := syscall.Credential{Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid())}
	if w.cred != nil {
		outer = *w.cred
	}
	cmd := w.command(w.t.Context(), args...)
	cmd.Args[0] = forbidRole
	cmd.Env = append(cmd.Env, "FORBID=/proc/sys/user/"+setting)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: int(outer.Uid), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: int(outer.Gid), Size: 1}},
		Credential:  &syscall.Credential{Uid: uid, Gid: uid, NoSetGroups: true},
		AmbientCaps: []uintptr{unix.CAP_SYS_RESOURCE},
	}
	return finish(w.t, w.t.Context(), cmd)
}
