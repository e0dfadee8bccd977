package pyro_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pyro"
)

// recorder is a writer that can be looked at while it is written.
type recorder struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.buf.Write(p)
}

func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.buf.String()
}

// writer is a function as a writer.
type writer func(p []byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }

func TestOutputIsDeliveredAsItIsPrinted(t *testing.T) {
	r := newRig(t, "")
	var out, errs recorder
	q := r.shell("printf a; printf b >&2; while [ ! -e '" + r.stage("done") + "' ]; do sleep 0.01; done; printf c; printf d >&2")
	q.Stdout, q.Stderr = &out, &errs
	done := r.begin(r.ctx(), q)
	await(t, "the beginning is delivered", func() bool { return out.String() == "a" && errs.String() == "b" })
	r.goOn("done")
	result, err := r.end(done)
	check(t, err)
	if out.String() != "ac" || errs.String() != "bd" {
		t.Errorf("delivered: %q and %q", out.String(), errs.String())
	}
	if result.Stdout != "" || result.Stderr != "" || result.Truncated {
		t.Errorf("kept as well: %+v", result)
	}
}

func TestOneStreamCanBeDeliveredAndTheOtherKept(t *testing.T) {
	r := newRig(t, "")
	var out, errs recorder
	q := r.shell("echo out; echo err >&2")
	q.Stdout = &out
	got := r.run(q)
	if out.String() != "out\n" || got.Stdout != "" || got.Stderr != "err\n" {
		t.Errorf("delivered %q, kept %q and %q", out.String(), got.Stdout, got.Stderr)
	}
	if got.StdoutBytes != 4 || got.StderrBytes != 4 {
		t.Errorf("%d and %d bytes were counted", got.StdoutBytes, got.StderrBytes)
	}
	q.Stdout, q.Stderr = nil, &errs
	if got := r.run(q); errs.String() != "err\n" || got.Stdout != "out\n" || got.Stderr != "" {
		t.Errorf("delivered %q, kept %q and %q", errs.String(), got.Stdout, got.Stderr)
	}
}

func TestKeptOutputIsCutAtItsLimitAndCountedInFull(t *testing.T) {
	r := newRig(t, "")
	for _, test := range []struct {
		print         string // what printf(1) is told to print
		limit         int
		out, encoding string
		total         int64
		truncated     bool
	}{
		{print: "12345", limit: 5, out: "12345", total: 5},
		{print: "12345", limit: 4, out: "1234", total: 5, truncated: true},
		{print: "12345", limit: 1, out: "1", total: 5, truncated: true},
		{print: "", limit: 1, out: "", total: 0},
		// é is 2 bytes, € 3, 😀 4.
		{print: `a\303\251`, limit: 3, out: "aé", total: 3},
		{print: `a\303\251`, limit: 2, out: "a", total: 3, truncated: true},
		{print: `\342\202\254`, limit: 2, out: "", total: 3, truncated: true},
		{print: `\360\237\230\200b`, limit: 4, out: "😀", total: 5, truncated: true},
		{print: `\360\237\230\200b`, limit: 3, out: "", total: 5, truncated: true},
		// What was not cut is kept to the last byte.
		{print: `a\303`, limit: 2, out: base64.StdEncoding.EncodeToString([]byte("a\xc3")), encoding: "base64", total: 2},
		{print: `\377\376`, limit: 16, out: base64.StdEncoding.EncodeToString([]byte("\xff\xfe")), encoding: "base64", total: 2},
		{print: `\377\376\375`, limit: 2, out: base64.StdEncoding.EncodeToString([]byte("\xff\xfe")), encoding: "base64", total: 3, truncated: true},
		// What is not text has no half characters.
		{print: `\377\303\251`, limit: 2, out: base64.StdEncoding.EncodeToString([]byte("\xff\xc3")), encoding: "base64", total: 3, truncated: true},
		{print: `a\000b`, limit: 16, out: "a\x00b", total: 3},
	} {
		q := r.shell("printf '" + test.print + "' | tee /dev/stderr")
		q.MaxOutput = test.limit
		got := r.run(q)
		if got.Stdout != test.out || got.StdoutEncoding != test.encoding || got.StdoutBytes != test.total || got.Truncated != test.truncated {
			t.Errorf("%q up to %d: stdout %q (%s), %d bytes, truncated %v; want %+v", test.print, test.limit, got.Stdout, got.StdoutEncoding, got.StdoutBytes, got.Truncated, test)
		}
		if got.Stderr != test.out || got.StderrEncoding != test.encoding || got.StderrBytes != test.total {
			t.Errorf("%q up to %d: stderr %q (%s), %d bytes; want %+v", test.print, test.limit, got.Stderr, got.StderrEncoding, got.StderrBytes, test)
		}
	}
}

func TestMuchOutputOnBothStreamsIsCountedInFull(t *testing.T) {
	r := newRig(t, "")
	// Several times what the pipes hold.
	const size = 3 << 20
	q := r.shell(fmt.Sprintf("head -c %d /dev/zero & head -c %d /dev/zero >&2; wait", size, size+1))
	q.MaxOutput = 1000
	got := r.run(q)
	if got.StdoutBytes != size || got.StderrBytes != size+1 || !got.Truncated || len(got.Stdout) != 1000 || len(got.Stderr) != 1000 {
		t.Errorf("kept %d of %d and %d of %d, truncated %v", len(got.Stdout), got.StdoutBytes, len(got.Stderr), got.StderrBytes, got.Truncated)
	}
}

func TestOutputOfWhatTheCommandLeavesBehindDoesNotHangRun(t *testing.T) {
	r := newRig(t, "")
	got := r.run(r.shell("(setsid sh -c 'echo late; sleep 300' &); echo done"))
	if !strings.Contains(got.Stdout, "done\n") || got.Code != 0 {
		t.Errorf("the result is %+v", got)
	}
}

func TestOneWriterMayTakeBothStreams(t *testing.T) {
	r := newRig(t, "")
	var both bytes.Buffer // which is not safe for concurrent use
	q := r.shell("for i in 0 1 2 3 4 5 6 7 8 9; do echo a; echo b >&2; done")
	q.Stdout, q.Stderr = &both, &both
	got := r.run(q)
	if strings.Count(both.String(), "a\n") != 10 || strings.Count(both.String(), "b\n") != 10 || both.Len() != 40 {
		t.Errorf("delivered: %q", both.String())
	}
	if got.StdoutBytes != 20 || got.StderrBytes != 20 {
		t.Errorf("%d and %d bytes were counted", got.StdoutBytes, got.StderrBytes)
	}
}

func TestWriterThatFailsFailsRunAndEndsTheOutput(t *testing.T) {
	r := newRig(t, "")
	broken := errors.New("the disk is full")
	for _, stream := range []string{"stdout", "stderr"} {
		q := r.shell("while echo x; do :; done; while echo x >&2; do :; done; exit 7")
		w := writer(func([]byte) (int, error) { return 0, broken })
		if stream == "stdout" {
			q.Stdout, q.Stderr = w, io.Discard
			q.Args[2] = "trap '' PIPE; while echo x; do :; done 2>/dev/null; exit 7"
		} else {
			q.Stdout, q.Stderr = io.Discard, w
			q.Args[2] = "trap '' PIPE; exec 3>&1; while sh -c 'echo x >&2'; do :; done; exit 7"
		}
		_, err := r.Run(r.ctx(), q)
		if !errors.Is(err, broken) || !strings.Contains(err.Error(), stream) {
			t.Errorf("%s: the error is %v", stream, err)
		}
		r.expectFreed()
	}
}

func TestReaderThatWentAwayIsNoError(t *testing.T) {
	r := newRig(t, "")
	gone := writer(func([]byte) (int, error) { return 0, fmt.Errorf("write |1: %w", syscall.EPIPE) })
	q := r.shell("trap '' PIPE; while echo x; do :; done 2>/dev/null; exit 7")
	q.Stdout = gone
	if got := r.run(q); got.Code != 7 {
		t.Errorf("the result is %+v", got)
	}
	// A command that does nothing about it is killed by the signal, as it is
	// anywhere.
	q = r.shell("while echo x; do :; done")
	q.Stdout = gone
	if got := r.run(q); got.Signal != int(syscall.SIGPIPE) {
		t.Errorf("the result is %+v", got)
	}
}

func TestPipeWhoseReaderWentAwayIsNoError(t *testing.T) {
	r := newRig(t, "")
	reader, writer := io.Pipe()
	reader.Close()
	q := r.shell("trap '' PIPE; echo x; exit 7")
	q.Stdout = writer
	if got, err := r.Run(r.ctx(), q); err != nil || got.Code != 7 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestSlowWriterGetsEverything(t *testing.T) {
	r := newRig(t, "")
	var got recorder
	q := r.shell("head -c 400000 /dev/zero")
	q.Stdout = writer(func(p []byte) (int, error) {
		time.Sleep(5 * time.Millisecond) // what is slow about it
		return got.Write(p)
	})
	r.run(q)
	if n := len(got.String()); n != 400000 {
		t.Errorf("it got %d bytes", n)
	}
}

func TestInputReachesTheCommand(t *testing.T) {
	r := newRig(t, "")
	big := strings.Repeat("0123456789abcdef", 1<<16)
	for name, input := range map[string]string{"nothing": "", "a line": "hello\n", "binary": "\x00\xff\n\r", "1 MiB": big} {
		var out recorder
		q := r.shell("cat")
		q.Stdin, q.Stdout = strings.NewReader(input), &out
		r.run(q)
		if out.String() != input {
			t.Errorf("%s: %d bytes came back, which differ", name, len(out.String()))
		}
	}
}

func TestCommandWithoutInputReadsNothing(t *testing.T) {
	r := newRig(t, "")
	if got := r.run(r.shell("cat; readlink /proc/self/fd/0")); got.Stdout != "/dev/null\n" {
		t.Errorf("it printed %q", got.Stdout)
	}
}

func TestInputThatNeverComesDoesNotHangRun(t *testing.T) {
	r := newRig(t, "")
	never, release := io.Pipe()
	defer release.Close() // lets the reading goroutine go
	q := r.shell("echo done")
	q.Stdin = never
	if got := r.run(q); got.Stdout != "done\n" {
		t.Errorf("it printed %q", got.Stdout)
	}
}

func TestInputThatIsNotReadDoesNotHangRun(t *testing.T) {
	r := newRig(t, "")
	q := r.shell("read line; echo $line")
	q.Stdin = io.MultiReader(strings.NewReader("first\n"), endless{})
	if got := r.run(q); got.Stdout != "first\n" || got.Code != 0 {
		t.Errorf("the result is %+v", got)
	}
}

// endless is a reader that has always more.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

func TestInputThatFailsEndsThere(t *testing.T) {
	r := newRig(t, "")
	q := r.shell("cat; echo end")
	q.Stdin = io.MultiReader(strings.NewReader("so far\n"), broken{})
	if got := r.run(q); got.Stdout != "so far\nend\n" {
		t.Errorf("it printed %q", got.Stdout)
	}
}

// broken is a reader that fails.
type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("it is broken") }

// TestTimeout runs side by side what has to wait for a second to pass.
func TestTimeout(t *testing.T) {
	needNamespaces(t)
	expectNothingLeft(t)
	for name, test := range map[string]func(*testing.T){
		"IsAResultWithALineThatSaysSo":      timeoutIsAResultWithALineThatSaysSo,
		"LineIsOnALineOfItsOwn":             timeoutsLineIsOnALineOfItsOwn,
		"LineIsOnALineOfItsOwnInOneWriter":  timeoutsLineIsOnALineOfItsOwnInOneWriter,
		"LineIsOnALineOfItsOwnToo":          timeoutsLineIsOnALineOfItsOwnToo,
		"LineIsDeliveredToo":                timeoutsLineIsDeliveredToo,
		"LineIsThereThoughOutputIsCut":      timeoutsLineIsThereThoughOutputIsCut,
		"LineIsInEncodedOutput":             timeoutsLineIsInEncodedOutput,
		"LeavesNothingOfTheCommandRunning":  timeoutLeavesNothingOfTheCommandRunning,
		"LineForAReaderThatIsGoneIsNoError": timeoutsLineForAReaderThatIsGoneIsNoError,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t)
		})
	}
}

const timeoutLine = "pyro: the command timed out after 1 s\n"

// timeout runs a command that takes too long, after what line prints.
func (r *rig) timeout(line string, change func(*pyro.RunRequest)) *pyro.ExecResult {
	r.Helper()
	q := r.shell(line + "; exec sleep 300")
	q.TimeoutSeconds = 1
	if change != nil {
		change(&q)
	}
	got := r.run(q)
	if !got.TimedOut || got.Code != 124 || got.DurationMS < 1000 {
		r.Errorf("the result is %+v", got)
	}
	return got
}

func timeoutIsAResultWithALineThatSaysSo(t *testing.T) {
	r := newSharedRig(t, "", 4)
	got := r.timeout("echo out; echo err >&2", nil)
	if got.Stdout != "out\n" || got.Stderr != "err\n"+timeoutLine {
		t.Errorf("it printed %q and %q", got.Stdout, got.Stderr)
	}
	if got.StderrBytes != 4 || got.Truncated {
		t.Errorf("%d bytes were printed, truncated %v", got.StderrBytes, got.Truncated)
	}
}

func timeoutsLineIsOnALineOfItsOwn(t *testing.T) {
	r := newSharedRig(t, "", 4)
	if got := r.timeout("printf partial >&2", nil); got.Stderr != "partial\n"+timeoutLine {
		t.Errorf("it printed %q", got.Stderr)
	}
}

func timeoutsLineIsDeliveredToo(t *testing.T) {
	r := newSharedRig(t, "", 4)
	var errs recorder
	r.timeout("trap '' PIPE; echo err >&2", func(q *pyro.RunRequest) { q.Stderr = &errs })
	if errs.String() != "err\n"+timeoutLine {
		t.Errorf("delivered: %q", errs.String())
	}
}

func timeoutsLineIsOnALineOfItsOwnToo(t *testing.T) {
	r := newSharedRig(t, "", 4)
	var errs recorder
	r.timeout("printf partial >&2", func(q *pyro.RunRequest) { q.Stderr = &errs })
	if got := errs.String(); got != "partial\n"+timeoutLine {
		t.Errorf("delivered: %q", got)
	}
}

func timeoutsLineIsOnALineOfItsOwnInOneWriter(t *testing.T) {
	r := newSharedRig(t, "", 4)
	var both recorder
	r.timeout("printf partial", func(q *pyro.RunRequest) { q.Stdout, q.Stderr = &both, &both })
	if got := both.String(); got != "partial\n"+timeoutLine {
		t.Errorf("delivered: %q", got)
	}
}

func timeoutsLineIsThereThoughOutputIsCut(t *testing.T) {
	r := newSharedRig(t, "", 4)
	got := r.timeout("printf 12345 >&2", func(q *pyro.RunRequest) { q.MaxOutput = 3 })
	if got.Stderr != "123\n"+timeoutLine || got.StderrBytes != 5 || !got.Truncated {
		t.Errorf("it printed %q, %d bytes, truncated %v", got.Stderr, got.StderrBytes, got.Truncated)
	}
}

func timeoutsLineIsInEncodedOutput(t *testing.T) {
	r := newSharedRig(t, "", 4)
	got := r.timeout(`printf '\377' >&2`, nil)
	b, err := base64.StdEncoding.DecodeString(got.Stderr)
	check(t, err)
	if string(b) != "\xff\n"+timeoutLine || got.StderrEncoding != "base64" {
		t.Errorf("it printed %q (%s)", b, got.StderrEncoding)
	}
}

func timeoutLeavesNothingOfTheCommandRunning(t *testing.T) {
	r := newSharedRig(t, "", 4)
	r.timeout("trap '' TERM HUP INT; (setsid sleep 301 &); setsid sleep 302 & sleep 303 & :", nil)
	if alive := r.alive(); len(alive) > 0 {
		t.Errorf("these are alive: %v", alive)
	}
}

func timeoutsLineForAReaderThatIsGoneIsNoError(t *testing.T) {
	r := newSharedRig(t, "", 4)
	r.timeout("trap '' PIPE; echo err >&2", func(q *pyro.RunRequest) {
		q.Stderr = writer(func([]byte) (int, error) { return 0, syscall.EPIPE })
	})
}
