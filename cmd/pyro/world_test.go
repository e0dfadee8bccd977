package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pyro"
	"pyro/internal/need"
)

// patience is how long a run may take that is expected to end by itself, on a
// machine that is busy with other things.
const patience = 60 * time.Second

// world is one user's pyro: a program, a base directory, a home and an
// environment that no other test shares.
type world struct {
	t    testing.TB
	dir  string
	exe  string
	base string
	home string
	tmp  string
	env  []string
	cred *syscall.Credential // nil for the user who runs the tests

	born idWatch
}

var worlds atomic.Int32

// newWorld makes a world, which must be empty again when the test ends.
func newWorld(t testing.TB) *world {
	t.Helper()
	return newWorldOf(t, nil)
}

// newWorldOf makes the world of another user.
func newWorldOf(t testing.TB, cred *syscall.Credential) *world {
	t.Helper()
	need.Namespaces(t)
	dir := filepath.Join(nest, fmt.Sprintf("w%d", worlds.Add(1)))
	w := &world{
		t: t, dir: dir, cred: cred,
		exe:  filepath.Join(dir, "pyro"),
		base: filepath.Join(dir, "base"),
		home: filepath.Join(dir, "home"),
		tmp:  filepath.Join(dir, "tmp"),
	}
	check(t, os.Mkdir(dir, 0o755))
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	check(t, os.Link(filepath.Join(nest, "pyro"), w.exe))
	// The directory of the VMs is there beforehand so that their names can be
	// watched; that pyro makes it is for TestScript/first.
	for _, d := range []string{w.base, w.home, w.tmp, filepath.Join(w.base, "vms")} {
		check(t, os.Mkdir(d, 0o700))
		if cred != nil {
			check(t, os.Chown(d, int(cred.Uid), int(cred.Gid)))
		}
	}
	w.takeEnvironments()
	w.env = []string{
		"PATH=" + dir + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + w.home, "TMPDIR=" + w.tmp, "PYRO_BASE_DIR=" + w.base,
	}
	w.born = watchIDs(t, filepath.Join(w.base, "vms"))
	t.Cleanup(w.census)
	return w
}

// prepared are the directories of environments that worlds of a user have left
// to those that come after them: making one takes longer than most tests.
var prepared = struct {
	mu   sync.Mutex
	dirs map[int][]string // by user
}{dirs: map[int][]string{}}

// takeEnvironments spares the world its first run's preparations, if another
// world has made them, and leaves its own to the next.
func (w *world) takeEnvironments() {
	owner := os.Geteuid()
	if w.cred != nil {
		owner = int(w.cred.Uid)
	}
	prepared.mu.Lock()
	defer prepared.mu.Unlock()
	if dirs := prepared.dirs[owner]; len(dirs) > 0 {
		prepared.dirs[owner] = dirs[:len(dirs)-1]
		check(w.t, os.Rename(dirs[len(dirs)-1], w.environments()))
	}
	w.t.Cleanup(func() {
		prepared.mu.Lock()
		defer prepared.mu.Unlock()
		dir := filepath.Join(nest, "environments of "+filepath.Base(w.dir))
		if os.Rename(w.environments(), dir) == nil {
			prepared.dirs[owner] = append(prepared.dirs[owner], dir)
		}
	})
}

// environments is where the world's pyro keeps what it prepares for VMs.
func (w *world) environments() string { return filepath.Join(w.base, "environments") }

// setenv adds to the environment of what is started from here on.
func (w *world) setenv(kv ...string) { w.env = append(w.env, kv...) }

// command is pyro with arguments, to be started by the caller. It is killed
// when the test ends.
func (w *world) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, w.exe, args...)
	cmd.Env = w.env
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: w.cred, Setpgid: true}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// result is how a pyro ended.
type result struct {
	t              testing.TB
	args           []string
	code           int // -1 if a signal ended it
	stdout, stderr string
	took           time.Duration
}

// run runs pyro run with arguments to its end.
func (w *world) run(args ...string) result {
	w.t.Helper()
	return w.pyro("", append([]string{"run"}, args...)...)
}

// pyro runs pyro with an input to its end.
func (w *world) pyro(stdin string, args ...string) result {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	cmd := w.command(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	return finish(w.t, ctx, cmd)
}

// finish runs a command to its end.
func finish(t testing.TB, ctx context.Context, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	began := time.Now()
	err := cmd.Run()
	var exit *exec.ExitError
	if ctx.Err() != nil || err != nil && !errors.As(err, &exit) {
		t.Fatalf("%q: %v, %v\nstdout %.1000s\nstderr %.1000s", cmd.Args, err, ctx.Err(), stdout.String(), stderr.String())
	}
	return result{t, cmd.Args, cmd.ProcessState.ExitCode(), stdout.String(), stderr.String(), time.Since(began)}
}

// want ends the test unless this is how pyro ended.
func (r result) want(code int, stdout, stderr string) result {
	r.t.Helper()
	if r.code != code || r.stdout != stdout || r.stderr != stderr {
		r.t.Fatalf("%.300q ended with %d, stdout %.1000q, stderr %.1000q\nwant %d, %.300q, %.300q", r.args, r.code, r.stdout, r.stderr, code, stdout, stderr)
	}
	return r
}

// ok ends the test unless the command succeeded and printed nothing but
// stdout.
func (r result) ok(stdout string) result { r.t.Helper(); return r.want(0, stdout, "") }

// failed ends the test unless pyro failed with a code, in text, and said what
// to do.
func (r result) failed(exit int, code pyro.Code) result {
	r.t.Helper()
	if r.code != exit || r.stdout != "" || !strings.HasPrefix(r.stderr, "pyro: ") || !strings.Contains(r.stderr, " ("+string(code)+")\n") {
		r.t.Fatalf("%.300q ended with %d, stdout %.300q, stderr %.1000q\nwant %d and %s", r.args, r.code, r.stdout, r.stderr, exit, code)
	}
	return r
}

// answer is what --json prints, of a success or of a failure.
type answer struct {
	pyro.ExecResult
	Error *pyro.Error `json:"error"`
}

// describe shows all of an error.
func describe(e *pyro.Error) string {
	if e == nil {
		return "no error"
	}
	return fmt.Sprintf("error %s, message %q, hint %q", e.Code, e.Message, e.Hint)
}

// json reads what --json printed, which must be all there is.
func (r result) json() answer {
	r.t.Helper()
	var a answer
	d := json.NewDecoder(strings.NewReader(r.stdout))
	d.DisallowUnknownFields()
	if err := d.Decode(&a); err != nil {
		r.t.Fatalf("%.300q: %v\nexit code %d, stdout %.1000q, stderr %.1000q", r.args, err, r.code, r.stdout, r.stderr)
	}
	if rest, _ := io.ReadAll(d.Buffered()); strings.TrimSpace(string(rest)) != "" || r.stderr != "" {
		r.t.Fatalf("%.300q printed more than JSON: %.300q, stderr %.1000q", r.args, rest, r.stderr)
	}
	return a
}

// running is a pyro under way.
type running struct {
	t              testing.TB
	cmd            *exec.Cmd
	stdin          io.WriteCloser
	stdout, stderr *output
	began          time.Time
	ended          chan struct{}
	endedAt        time.Time
}

// start starts pyro run with arguments.
func (w *world) start(args ...string) *running {
	w.t.Helper()
	return launch(w.t, w.command(w.t.Context(), append([]string{"run"}, args...)...))
}

// launch starts a command, which is killed when the test ends.
func launch(t testing.TB, cmd *exec.Cmd) *running {
	t.Helper()
	p := &running{t: t, cmd: cmd, stdout: newOutput(), stderr: newOutput(), ended: make(chan struct{}), began: time.Now()}
	cmd.Stdout, cmd.Stderr = p.stdout, p.stderr
	var err error
	p.stdin, err = cmd.StdinPipe()
	check(t, err)
	check(t, cmd.Start())
	go func() {
		cmd.Wait()
		p.endedAt = time.Now()
		close(p.ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-p.ended
	})
	return p
}

// wait waits for the end.
func (p *running) wait(within time.Duration) result {
	p.t.Helper()
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-p.ended:
	case <-timer.C:
		p.t.Fatalf("%.300q has not ended after %v\nstdout %.1000s\nstderr %.1000s", p.cmd.Args, within, p.stdout, p.stderr)
	}
	return result{p.t, p.cmd.Args, p.cmd.ProcessState.ExitCode(), p.stdout.String(), p.stderr.String(), p.endedAt.Sub(p.began)}
}

// signal sends a signal to pyro itself.
func (p *running) signal(sig syscall.Signal) {
	p.t.Helper()
	check(p.t, p.cmd.Process.Signal(sig))
}

// has waits until a process that plays a part is there for this run.
func (p *running) has(w *world, part string) []process {
	p.t.Helper()
	var found []process
	eventually(p.t, patience, "a "+part, func() bool {
		select {
		case <-p.ended:
			p.t.Fatalf("ended without a %s: stdout %.1000q, stderr %.1000q", part, p.stdout, p.stderr)
		default:
		}
		found = w.find(part)
		return len(found) > 0
	})
	return found
}

// take is how a command begins that is fed, in a shell.
const take = "head -c 4000000 >/dev/null; "

// fed passes the command more input than all pipes on the way hold, so that it
// is known to run when fed returns, also where nothing is seen of its output.
func (p *running) fed() {
	p.t.Helper()
	if _, err := p.stdin.Write(make([]byte, 4_000_000)); err != nil {
		p.t.Fatalf("%v; stdout %.1000q, stderr %.1000q", err, p.stdout, p.stderr)
	}
}

// says waits until text has come out.
func (p *running) says(text string) {
	p.t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for {
		more := p.stdout.more()
		if strings.Contains(p.stdout.String(), text) {
			return
		}
		select {
		case <-more:
		case <-p.ended:
			if !strings.Contains(p.stdout.String(), text) {
				p.t.Fatalf("ended without saying %q: stdout %.1000q, stderr %.1000q", text, p.stdout, p.stderr)
			}
		case <-deadline.C:
			p.t.Fatalf("has not said %q: stdout %.1000q, stderr %.1000q", text, p.stdout, p.stderr)
		}
	}
}

// output collects what is written to it.
type output struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	arrived chan struct{} // closed at the next write
}

func newOutput() *output { return &output{arrived: make(chan struct{})} }

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.arrived)
	o.arrived = make(chan struct{})
	return o.buf.Write(p)
}

// more returns a channel that is closed when more is written.
func (o *output) more() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.arrived
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}
