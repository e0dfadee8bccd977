package backendtest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// command returns a command that is valid as vm.Command.Validate has it.
func command(args ...string) vm.Command {
	return vm.Command{Args: args, TimeoutSeconds: vm.DefaultTimeoutSeconds}
}

// shell returns a command that runs script, with args as $1 and on.
func shell(script string, args ...string) vm.Command {
	return command(append([]string{"sh", "-c", script, "sh"}, args...)...)
}

// input is what a command has for standard input.
type input int

const (
	nothing input = iota // /dev/null
	piped                // a pipe
)

// pipes are this side's ends of a command's pipes.
type pipes struct {
	stdin          *os.File // nil without a pipe
	stdout, stderr *os.File
}

// newPipes makes pipes and returns both sides' ends. If it fails, it leaves
// nothing open.
func newPipes(in input) (theirs backend.Stdio, ours pipes, err error) {
	pipe := func(r, w **os.File) {
		if err == nil {
			*r, *w, err = os.Pipe()
		}
	}
	pipe(&ours.stdout, &theirs.Stdout)
	pipe(&ours.stderr, &theirs.Stderr)
	switch {
	case in == piped:
		pipe(&theirs.Stdin, &ours.stdin)
	case err == nil:
		theirs.Stdin, err = os.Open(os.DevNull)
	}
	if err != nil {
		ours.close()
		closeStdio(theirs)
	}
	return theirs, ours, err
}

// close closes what is open. It may be called again.
func (p pipes) close() {
	for _, f := range []*os.File{p.stdin, p.stdout, p.stderr} {
		f.Close() // nil and closed files are errors that say nothing here
	}
}

func closeStdio(s backend.Stdio) {
	for _, f := range []*os.File{s.Stdin, s.Stdout, s.Stderr} {
		f.Close()
	}
}

// running is a command under way.
type running struct {
	backend.Process
	pipes
	lines *bufio.Reader // reads stdout
}

// launch starts a command with pipes. It does not end the test, so any
// goroutine may call it.
func launch(ctx context.Context, m backend.Machine, cmd vm.Command, in input) (*running, error) {
	theirs, ours, err := newPipes(in)
	if err != nil {
		return nil, err
	}
	p, err := m.Exec(ctx, cmd, theirs)
	// The command has its own; while these are open no pipe ever ends.
	closeStdio(theirs)
	if err != nil {
		ours.close()
		return nil, err
	}
	return &running{Process: p, pipes: ours, lines: bufio.NewReader(ours.stdout)}, nil
}

// begin starts a command whose pipes are closed when the subtest ends.
func (f *fixture) begin(m backend.Machine, cmd vm.Command, in input) *running {
	f.Helper()
	r, err := launch(f.ctx(), m, cmd, in)
	if err != nil {
		f.Fatalf("exec %.100s: %v", cmd, err)
	}
	f.Cleanup(r.close)
	return r
}

// expectLine reads the next line of a command's standard output.
func (f *fixture) expectLine(r *running, want string) {
	f.Helper()
	if err := r.stdout.SetReadDeadline(time.Now().Add(patience)); err != nil {
		f.Fatal(err)
	}
	line, err := r.lines.ReadString('\n')
	if err != nil || line != want+"\n" {
		f.Fatalf("read a line: %q, error %v; want %q", line, err, want)
	}
}

// expectEOF reads what is left of a command's output. It must end promptly:
// nobody holds the other ends.
func (f *fixture) expectEOF(r *running) {
	f.Helper()
	deadline := time.Now().Add(promptly)
	for _, s := range []struct {
		name string
		file *os.File
		from io.Reader
	}{{"standard output", r.stdout, r.lines}, {"standard error", r.stderr, r.stderr}} {
		if err := s.file.SetReadDeadline(deadline); err != nil {
			f.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, s.from); err != nil {
			f.Errorf("read %s to its end: %v", s.name, err)
		}
	}
}

// result is all that a command gave.
type result struct {
	status         syscall.WaitStatus
	stdout, stderr []byte
}

// runTo runs a command to its end, and the end of its output. A nil stdin is
// /dev/null. It does not end the test, so any goroutine may call it.
func runTo(ctx context.Context, m backend.Machine, cmd vm.Command, stdin []byte) (result, error) {
	in := nothing
	if stdin != nil {
		in = piped
	}
	r, err := launch(ctx, m, cmd, in)
	if err != nil {
		return result{}, fmt.Errorf("exec %.100s: %w", cmd, err)
	}
	defer r.close()
	deadline := time.Now().Add(patience)
	var (
		got               result
		all               sync.WaitGroup
		inErr, outErr     error
		errErr, waitError error
	)
	if stdin != nil {
		all.Go(func() { inErr = feed(r.stdin, stdin, deadline) })
	}
	all.Go(func() { got.stdout, outErr = readAll(r.stdout, deadline) })
	all.Go(func() { got.stderr, errErr = readAll(r.stderr, deadline) })
	got.status, waitError = r.Wait(ctx)
	all.Wait()
	return got, errors.Join(inErr, outErr, errErr, waitError)
}

// feed writes data to a command and closes the pipe.
func feed(w *os.File, data []byte, deadline time.Time) error {
	if err := w.SetWriteDeadline(deadline); err != nil {
		return err
	}
	_, err := w.Write(data)
	if errors.Is(err, syscall.EPIPE) {
		err = nil // the command does not have to read
	}
	return errors.Join(err, w.Close())
}

func readAll(r *os.File, deadline time.Time) ([]byte, error) {
	if err := r.SetReadDeadline(deadline); err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

// run runs a command to its end.
func (f *fixture) run(m backend.Machine, cmd vm.Command, stdin []byte) result {
	f.Helper()
	r, err := runTo(f.ctx(), m, cmd, stdin)
	if err != nil {
		f.Fatal(err)
	}
	return r
}

// output returns what a command printed, which must have ended well.
func (f *fixture) output(m backend.Machine, cmd vm.Command) string {
	f.Helper()
	r := f.run(m, cmd, nil)
	if !r.status.Exited() || r.status.ExitStatus() != 0 || len(r.stderr) > 0 {
		f.Fatalf("%.100s: status %#x, standard error %q", cmd, uint32(r.status), r.stderr)
	}
	return string(r.stdout)
}

// line is output without the newline at its end.
func (f *fixture) line(m backend.Machine, cmd vm.Command) string {
	f.Helper()
	return strings.TrimSuffix(f.output(m, cmd), "\n")
}

// expectBytes compares what came out with what should have, without printing
// much of it.
func (f *fixture) expectBytes(what string, got, want []byte) {
	f.Helper()
	if bytes.Equal(got, want) {
		return
	}
	same := 0
	for same < len(got) && same < len(want) && got[same] == want[same] {
		same++
	}
	excerpt := func(b []byte) []byte { return b[same:min(same+40, len(b))] }
	f.Errorf("%s: %d bytes, want %d; from byte %d: %q, want %q", what, len(got), len(want), same, excerpt(got), excerpt(want))
}
