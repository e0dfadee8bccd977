package main

import (
	"context"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"pyro"
	"pyro/internal/need"
)

// onDisk runs a script in a mount namespace of its own, where it may mount
// things at the state directory; $0 is pyro. What it prints is pyro's.
func (w *world) onDisk(script string) result {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	cmd := w.command(ctx, "-c", "set -e\nmount --make-rprivate /\n"+script, w.exe)
	cmd.Path = "/bin/sh"
	cmd.SysProcAttr = need.Namespaces(w.t)
	cmd.SysProcAttr.Cloneflags &^= syscall.CLONE_NEWPID
	return finish(w.t, ctx, cmd)
}

// unavailable ends the test unless pyro said with --json that its state
// directory cannot be used, why, and what to do.
func (r result) unavailable(why string) {
	r.t.Helper()
	a := r.json()
	e := a.Error
	if r.code != 125 || e == nil || e.Code != pyro.CodeStateUnavailable || e.Hint == "" {
		r.t.Errorf("exit code %d, result %+v, %s", r.code, a.ExecResult, describe(e))
		return
	}
	if ok, err := regexp.MatchString(why, e.Message); !ok || err != nil {
		r.t.Errorf("the message is %q, not about %s; hint %q", e.Message, why, e.Hint)
	}
}

// TestReadOnlyDisk: a state directory that cannot be written is a failure that
// says so, whether pyro has used it before or not.
func TestReadOnlyDisk(t *testing.T) {
	w := newWorld(t)
	w.onDisk(`mount -t tmpfs -o mode=700,ro none "$PYRO_BASE_DIR"; exec "$0" run --json -- true`).unavailable("read-only")
	w.onDisk(`mount -t tmpfs -o mode=700,ro none "$PYRO_BASE_DIR"; PYRO_BASE_DIR=$PYRO_BASE_DIR/below exec "$0" run --json -- true`).unavailable("read-only")
	w.onDisk(`mount -t tmpfs -o mode=700 none "$PYRO_BASE_DIR"; "$0" run -- true
		mount -o remount,ro,bind "$PYRO_BASE_DIR"; exec "$0" run --json -- true`).unavailable("read-only")
}

// TestFullDisk: however little room the disk has, a run works or says that the
// disk is full, and leaves nothing of its VM.
func TestFullDisk(t *testing.T) {
	w := newWorld(t)
	report := ` && code=0 || code=$?; if [ -n "$(ls -A "$PYRO_BASE_DIR/vms")" ]; then find "$PYRO_BASE_DIR/vms" >&2; fi; exit $code`
	worked, refused := 0, 0
	for _, kib := range []string{"4", "8", "16", "32", "64", "128", "256", "512", "1024", "2048", "4096", "8192"} {
		r := w.onDisk(`mount -t tmpfs -o mode=700,size=` + kib + `k none "$PYRO_BASE_DIR"; mkdir -p "$PYRO_BASE_DIR/vms"
			"$0" run --json -- true` + report)
		if r.code == 0 {
			r.json()
			worked++
			continue
		}
		refused++
		r.unavailable("full|no space")
	}
	if worked == 0 || refused == 0 {
		t.Errorf("%d sizes worked, %d did not: the test shows nothing", worked, refused)
	}
	// A disk that is filled up by others later.
	for _, free := range []string{"0", "1", "4", "8", "16", "40"} {
		r := w.onDisk(`mount -t tmpfs -o mode=700,size=64m none "$PYRO_BASE_DIR"; "$0" run -- true
			head -c ` + free + `k /dev/zero >"$PYRO_BASE_DIR/room"
			cat /dev/zero >"$PYRO_BASE_DIR/filling" 2>/dev/null || :
			rm "$PYRO_BASE_DIR/room"; "$0" run --json -- true` + report)
		if r.code == 0 {
			r.json()
			continue
		}
		r.unavailable("full|no space")
	}
}

// TestForeignDirectory: a state directory that belongs to somebody else is not
// used, since who owns it could change what runs in a VM.
func TestForeignDirectory(t *testing.T) {
	need.RealRoot(t)
	w := newWorld(t)
	check(t, os.Chown(w.base, int(nobody.Uid), int(nobody.Gid)))
	w.run("--json", "--", "true").unavailable("belongs to user 65534")
	w = newWorldOf(t, nobody)
	check(t, os.Chown(w.base, 0, 0))
	for _, mode := range []os.FileMode{0o700, 0o755, 0o777} {
		check(t, os.Chmod(w.base, mode))
		w.run("--json", "--", "true").unavailable("belongs to user 0|permission denied")
	}
}

// TestSharedDirectory: a directory that is made for everybody, as /tmp is, is not
// taken away from the others: pyro wants one of its own.
func TestSharedDirectory(t *testing.T) {
	w := newWorld(t)
	check(t, os.Chmod(w.base, 0o777|os.ModeSticky))
	w.run("--json", "--", "true").unavailable("")
	if info, err := os.Stat(w.base); err != nil || info.Mode() != 0o777|os.ModeSticky|os.ModeDir {
		t.Errorf("the directory's mode is now %v, %v", info.Mode(), err)
	}
}

// TestUnspeakableDirectory: a path that is no text is refused with a reason, or
// works.
func TestUnspeakableDirectory(t *testing.T) {
	w := newWorld(t)
	w.setenv("PYRO_BASE_DIR=" + w.base + "/\xff")
	if r := w.run("--json", "--", "echo", "hello"); r.code != 0 {
		r.unavailable("UTF-8")
	}
}

// TestDamagedState: a database that is none, or a directory in the place of a
// file, is a failure that says so.
func TestDamagedState(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"text": func(path string) error {
			return os.WriteFile(path, []byte(strings.Repeat("no database\n", 1000)), 0o600)
		},
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"fifo":      func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"nowhere":   func(path string) error { return os.Symlink("/no/such/dir/state.db", path) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			path := w.base + "/state.db"
			check(t, damage(path))
			w.run("--json", "--", "true").unavailable("state.db")
			check(t, os.RemoveAll(path))
			w.run("--", "echo", "hello").ok("hello\n")
		})
	}
}
