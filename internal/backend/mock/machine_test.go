package mock

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// startMachine returns a started machine that is deleted when the test ends.
func startMachine(t *testing.T, spec backend.Spec) backend.Machine {
	t.Helper()
	m, err := New().Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Delete(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return m
}

// begin starts a command and returns the file from which its output is read.
func begin(t *testing.T, m backend.Machine, cmd vm.Command) (backend.Process, *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	defer w.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	p, err := m.Exec(t.Context(), cmd, backend.Stdio{Stdin: null, Stdout: w, Stderr: w})
	if err != nil {
		t.Fatalf("exec: %v", err)
	}
	return p, r
}

// output runs a script and returns what it printed.
func output(t *testing.T, m backend.Machine, script string, env ...string) string {
	t.Helper()
	p, r := begin(t, m, vm.Command{Args: []string{"sh", "-c", script}, Env: env, TimeoutSeconds: 10})
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	status, err := p.Wait(t.Context())
	if err != nil || status != 0 {
		t.Fatalf("%s: status %#x, error %v, output %q", script, uint32(status), err, out)
	}
	return string(bytes.TrimSuffix(out, []byte("\n")))
}

func TestCreateKeepsWhatIsThere(t *testing.T) {
	spec := newSpec(t)
	file := filepath.Join(spec.Dir, workdirName)
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New().Create(t.Context(), spec); err == nil {
		t.Fatal("create succeeded in a directory that was not empty")
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file is %q, %v", b, err)
	}
}

func TestEnvironment(t *testing.T) {
	spec := newSpec(t)
	spec.Root.Env = []string{"HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/zsh", "EDITOR=ed", "LANG=de"}
	m := startMachine(t, spec)
	workdir := filepath.Join(spec.Dir, "workdir")
	if got := m.Metadata(); !maps.Equal(got, map[string]string{"workdir": workdir}) {
		t.Errorf("metadata is %v", got)
	}
	u, err := user.Current()
	if err != nil {
		t.Skipf("no name to compare with: %v", err)
	}
	got := strings.Split(output(t, m, "exec env", "EDITOR=vi"), "\n")
	want := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + workdir, "USER=" + u.Username, "LOGNAME=" + u.Username, "SHELL=/bin/sh", "LANG=de", "EDITOR=vi",
		"PWD=" + workdir, // sh's own
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the environment is %q, want %q", got, want)
	}
}

func TestInvalidUTF8(t *testing.T) {
	m := startMachine(t, newSpec(t))
	const odd = "\xff\xfe a\x80b \xed\xa0\x80"
	if got := output(t, m, `printf %s "$ODD"`, "ODD="+odd); got != odd {
		t.Errorf("a variable arrived as %q, want %q", got, odd)
	}
	p, r := begin(t, m, vm.Command{Args: []string{"printf", "%s", odd}, TimeoutSeconds: 10})
	got, err := io.ReadAll(r)
	if err != nil || string(got) != odd {
		t.Errorf("an argument arrived as %q, %v; want %q", got, err, odd)
	}
	if _, err := p.Wait(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestStopKeepsWorkdir(t *testing.T) {
	spec := newSpec(t)
	m := startMachine(t, spec)
	output(t, m, "echo content > file")
	if err := m.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(spec.Dir, "workdir", "file")); err != nil || string(b) != "content\n" {
		t.Errorf("after a stop the file is %q, %v", b, err)
	}
}

func TestDeleteForbiddenDirectories(t *testing.T) {
	outside := t.TempDir()
	if err := os.Chmod(outside, 0o550); err != nil {
		t.Fatal(err)
	}
	spec := newSpec(t)
	m := startMachine(t, spec)
	output(t, m, `
		mkdir -p a/b/c d e/f
		echo content > a/b/c/file
		echo content > d/file
		ln -s "$OUTSIDE" a/link
		ln -s "$OUTSIDE" link
		chmod 0 a/b/c/file a/b/c a/b a
		chmod 0500 d e
		chmod 0 .`, "OUTSIDE="+outside)
	if err := m.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(spec.Dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if info, err := os.Stat(outside); err != nil || info.Mode().Perm() != 0o550 {
		t.Errorf("the target of a link has mode %v, %v", info.Mode(), err)
	}
}

func TestReplacedWorkdir(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	spec := newSpec(t)
	m := startMachine(t, spec)
	output(t, m, `rmdir "$HOME" && ln -s "$OUTSIDE" "$HOME"`, "OUTSIDE="+outside)
	for _, step := range []func(context.Context) error{m.Stop, m.Start, m.Delete} {
		if err := step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(outside, "file")); err != nil {
		t.Error(err)
	}
}

func TestNotStarted(t *testing.T) {
	m := startMachine(t, newSpec(t))
	workdir := m.Metadata()["workdir"]
	write := func(name, content string, mode os.FileMode) {
		if err := os.WriteFile(filepath.Join(workdir, name), []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("no-format", "exit 0\n", 0o755)
	write("no-interpreter", "#!/no/such/interpreter\n", 0o755)
	write("not-executable", "#!/bin/sh\n", 0o644)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, c := range []struct {
		program string
		code    vm.Code
		message string
	}{
		{"no-such", vm.CodeCommandNotFound, "command not found: no-such"},
		{"./no-such", vm.CodeCommandNotFound, "command not found: ./no-such"},
		{"./no-format", vm.CodeCommandNotRunnable, "cannot execute ./no-format: exec format error"},
		{"./no-interpreter", vm.CodeCommandNotRunnable, "cannot execute ./no-interpreter: no such file or directory"},
		{"./not-executable", vm.CodeCommandNotRunnable, "cannot execute ./not-executable: permission denied"},
		{"/", vm.CodeCommandNotRunnable, "cannot execute /: is a directory"},
	} {
		cmd := vm.Command{Args: []string{c.program}, TimeoutSeconds: 1}
		_, err := m.Exec(t.Context(), cmd, backend.Stdio{Stdin: null, Stdout: null, Stderr: null})
		if !errors.Is(err, c.code) || err.Error() != c.message {
			t.Errorf("%s: error is %v, want %q with code %s", c.program, err, c.message, c.code)
		}
	}
	long := vm.Command{Args: []string{"true", strings.Repeat("x", 200<<10)}, TimeoutSeconds: 1}
	_, err = m.Exec(t.Context(), long, backend.Stdio{Stdin: null, Stdout: null, Stderr: null})
	if !errors.Is(err, vm.CodeInvalidArgument) {
		t.Errorf("an argument longer than the kernel takes: error is %v", err)
	}
}

func TestLookup(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"a/program": 0o755, "b/program": 0o755, "data/program": 0o644, "here": 0o755} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name, path, want string
		code             vm.Code
	}{
		{name: "program", path: dir + "/a:" + dir + "/b", want: dir + "/a/program"},
		{name: "program", path: "/no/such:" + dir + "/data:" + dir + "/b", want: dir + "/b/program"},
		{name: "program", path: "b:a", want: "b/program"},
		{name: "here", path: "a:", want: "./here"},
		{name: "a/program", path: "", want: "a/program"},
		{name: "here", path: "", code: vm.CodeCommandNotFound},
		{name: "program", path: dir + "/here", code: vm.CodeCommandNotFound},
		{name: "program", path: dir + "/data", code: vm.CodeCommandNotRunnable},
		{name: "a", path: dir, code: vm.CodeCommandNotRunnable},
	} {
		got, err := lookup(c.name, dir, c.path)
		if got != c.want || (c.code == "") != (err == nil) || c.code != "" && !errors.Is(err, c.code) {
			t.Errorf("lookup %q in %q: %q, %v; want %q, code %q", c.name, c.path, got, err, c.want, c.code)
		}
	}
}

// TestOrphansAreCollected checks that an adopter collects the machine's orphans
// while the machine runs, and nobody else's children.
func TestOrphansAreCollected(t *testing.T) {
	adopt(t)
	m := startMachine(t, newSpec(t))
	other := exec.Command("sh", "-c", "exit 3")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	if err := awaitChild(other.Process.Pid, syscall.WEXITED); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		output(t, m, "(sleep 0 & sleep 0 &)")
	}
	ours := m.(*machine).owns
	deadline := time.Now().Add(5 * time.Second)
	for {
		left := 0
		if _, err := scan(ours, func(sighting) error { left++; return nil }); err != nil {
			t.Fatal(err)
		}
		if left == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d orphans are not collected", left)
		}
		time.Sleep(time.Millisecond)
	}
	var exit *exec.ExitError
	if err := other.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("the other child's end: %v", err)
	}
}
