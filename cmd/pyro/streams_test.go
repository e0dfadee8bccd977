package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"pyro"
)

// allBytes has every byte, so it is no UTF-8, and a line's end in the middle.
var allBytes = func() []byte {
	var b []byte
	for i := range 256 {
		b = append(b, byte(i))
	}
	return append(b, '\n', 0xff)
}()

// TestOutputStreams: what a command prints appears while it runs, and what is
// typed reaches it, line by line.
func TestOutputStreams(t *testing.T) {
	for _, backend := range []string{"gvisor", "mock"} {
		t.Run(backend, func(t *testing.T) { outputStreams(newWorld(t), "--backend", backend) })
	}
}

func outputStreams(w *world, flags ...string) {
	p := w.start(append(flags, "-i", "--", "sh", "-c", `echo one; read a; echo "two $a" >&2; printf three; read b; echo " four $b"; exit 5`)...)
	p.says("one\n")
	io.WriteString(p.stdin, "A\n")
	p.says("three")
	io.WriteString(p.stdin, "B\n")
	p.wait(patience).want(5, "one\nthree four B\n", "two A\n")
}

// TestNothingHoldsUpTheEnd: a run ends with its command, whatever the command
// leaves running, and whether or not its input has ended.
func TestNothingHoldsUpTheEnd(t *testing.T) {
	for _, backend := range []string{"gvisor", "mock"} {
		w := newWorld(t)
		p := w.start("--backend", backend, "-i", "--", "sh", "-c", "sleep 1000 & setsid sleep 1000 & echo hello")
		p.wait(10 * time.Second).ok("hello\n")
	}
}

// TestBytesPassUnchanged: neither input nor output is touched, whatever the
// bytes.
func TestBytesPassUnchanged(t *testing.T) { bytesPassUnchanged(newWorld(t)) }

func bytesPassUnchanged(w *world) {
	big := make([]byte, 5<<20)
	rand.NewChaCha8([32]byte{1}).Read(big)
	for _, input := range [][]byte{nil, {0}, allBytes, big} {
		r := w.pyro(string(input), "run", "-i", "--", "cat")
		if r.code != 0 || r.stderr != "" || r.stdout != string(input) {
			w.t.Errorf("%d bytes: exit code %d, %d bytes back, stderr %q", len(input), r.code, len(r.stdout), r.stderr)
		}
	}
	w.pyro(string(allBytes), "run", "-i", "--", "sh", "-c", "cat >&2").want(0, "", string(allBytes))
}

// TestBytesInJSON: output that is no text is lossless in JSON, and marked; each
// stream for itself.
func TestBytesInJSON(t *testing.T) {
	w := newWorld(t)
	a := w.pyro(string(allBytes), "run", "-i", "--json", "--", "sh", "-c", "cat; echo text >&2").json()
	if got, err := base64.StdEncoding.DecodeString(a.Stdout); err != nil || !bytes.Equal(got, allBytes) || a.StdoutEncoding != "base64" {
		t.Errorf("stdout is %q, marked %q: %v", a.Stdout, a.StdoutEncoding, err)
	}
	if a.Stderr != "text\n" || a.StderrEncoding != "" || a.StdoutBytes != int64(len(allBytes)) {
		t.Errorf("stderr is %q, marked %q; %d bytes", a.Stderr, a.StderrEncoding, a.StdoutBytes)
	}
	// A timeout's line comes after bytes as well.
	a = w.run("--json", "--timeout-seconds", "1", "--", "sh", "-c", `printf '\377' >&2; sleep 100`).json()
	if got, err := base64.StdEncoding.DecodeString(a.Stderr); err != nil || string(got) != "\xff\npyro: the command timed out after 1 s\n" || a.StderrEncoding != "base64" {
		t.Errorf("stderr is %q, marked %q: %v", got, a.StderrEncoding, err)
	}
	// What looks broken but is text stays text.
	a = w.run("--json", "--", "printf", `\357\277\275 \342\202\254 \000 <&>\n`).json()
	if a.Stdout != "\ufffd € \x00 <&>\n" || a.StdoutEncoding != "" {
		t.Errorf("stdout is %q, marked %q", a.Stdout, a.StdoutEncoding)
	}
}

// TestSlowReader: a gigabyte for a reader that takes its time costs no memory
// in any process of pyro's, and arrives whole.
func TestSlowReader(t *testing.T) {
	const total, slowFor = 1 << 30, 2 * time.Second
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := w.command(ctx, "run", "--timeout-seconds", "120", "--", "dd", "if=/dev/zero", "bs=1M", "count=1024", "status=none")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	buf := make([]byte, 1<<20)
	read := int64(0)
	first, most := 0, 0
	for began := time.Now(); ; {
		slow := time.Since(began) < slowFor
		piece := buf
		if slow {
			piece = buf[:32<<10]
			kib := 0
			for _, p := range w.processes() {
				kib += p.statusKiB("RssAnon") + p.statusKiB("RssShmem")
			}
			if first == 0 {
				first = kib
			}
			most = max(most, kib)
			time.Sleep(5 * time.Millisecond) // the reader takes its time
		}
		n, err := stdout.Read(piece)
		read += int64(n)
		if err == io.EOF {
			break
		}
		check(t, err)
		if slow && read > total/2 {
			t.Fatalf("%d bytes came in the slow phase: the test measures nothing", read)
		}
	}
	if err := cmd.Wait(); err != nil || read != total || stderr.Len() > 0 {
		t.Errorf("%d bytes, %v, stderr %q", read, err, stderr.String())
	}
	t.Logf("memory of all processes: %d MiB at first, %d MiB at most", first>>10, most>>10)
	if most > 96<<10 {
		t.Errorf("pyro's processes took up to %d MiB", most>>10)
	}
}

// TestReaderGoesAway: when nobody reads any more the command gets what it would
// get on any Linux, SIGPIPE, and the run ends at once; nothing is said about
// it.
func TestReaderGoesAway(t *testing.T) {
	for _, backend := range []string{"gvisor", "mock"} {
		for name, command := range map[string][]string{
			"program": {"yes"},
			"shell":   {"sh", "-c", "while :; do echo y; done"}, // tries again when a write fails
			"quiet":   {"sh", "-c", "while :; do echo y; echo n >&2; done 2>/dev/null"},
		} {
			t.Run(backend+" "+name, func(t *testing.T) {
				readerGoesAway(newWorld(t), append([]string{"run", "--backend", backend, "--timeout-seconds", "10", "--"}, command...))
			})
		}
	}
}

func readerGoesAway(w *world, args []string) {
	const soon = 5 * time.Second
	r, stdout, err := os.Pipe()
	check(w.t, err)
	defer r.Close()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	cmd := w.command(ctx, args...)
	cmd.Stdout = stdout
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	check(w.t, cmd.Start())
	stdout.Close()
	line := make([]byte, 2)
	if _, err := io.ReadFull(r, line); err != nil || string(line) != "y\n" {
		w.t.Errorf("read %q, %v", line, err)
	}
	r.Close()
	gone := time.Now()
	cmd.Wait()
	if took := time.Since(gone); took > soon {
		w.t.Errorf("the run went on for %v", took)
	}
	if code := cmd.ProcessState.ExitCode(); code != 141 || stderr.Len() > 0 {
		w.t.Errorf("exit code %d, want 141; stderr has %d bytes: %.200q", code, stderr.Len(), stderr.String())
	}
}

// TestOutputThatCannotBeDelivered: output that is lost is never a success.
func TestOutputThatCannotBeDelivered(t *testing.T) {
	w := newWorld(t)
	for _, args := range [][]string{
		{"run", "--", "echo", "hello"},
		{"run", "--json", "--", "echo", "hello"},
		{"run", "--", "sh", "-c", "yes | head -c 10000000"},
	} {
		full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		check(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		cmd := w.command(ctx, args...)
		cmd.Stdout = full
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		err = cmd.Run()
		cancel()
		full.Close()
		if code := cmd.ProcessState.ExitCode(); code != 125 || !strings.Contains(stderr.String(), "no space left") {
			t.Errorf("%q on a full disk: exit code %d, %v, stderr %q", args, code, err, stderr.String())
		}
	}
}

// TestClosedDescriptors: pyro started with standard streams that are closed
// does its work.
func TestClosedDescriptors(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := w.command(ctx, "-c", `"$0" run -i -- sh -c 'cat; echo hello; echo hello >&2; exit 7' <&- >&- 2>&-`, w.exe)
	cmd.Path, cmd.Err = exec.LookPath("sh")
	finish(t, ctx, cmd).want(7, "", "")
}

// TestOddArguments: arguments arrive as they are, whatever is in them.
func TestOddArguments(t *testing.T) {
	for _, backend := range []string{"gvisor", "mock"} {
		t.Run(backend, func(t *testing.T) { oddArguments(newWorld(t), backend) })
	}
}

func oddArguments(w *world, backend string) {
	long := strings.Repeat("0123456789", 10_000) // 100 KB
	for name, args := range map[string][]string{
		"none":       nil,
		"empty":      {"", "", " "},
		"shell":      {"two words", `"`, `'`, `\`, "$HOME", "`id`", "*", ";", "&&", "#", "!", "~", "{a,b}", "a=b"},
		"lines":      {"\n", "a\nb\n", "\r\n", "\t", "\x01\x1b[31m\x7f"},
		"flags":      {"-", "--", "---", "-n", "-e", "--json", "-h", "--help"},
		"unicode":    {"äöü€", "\U0001f525", "e\u0301", "\u202e", "\ufeff", "\ufffd", "\u2028"},
		"JSON":       {`{"a":"b"}`, `\u0000`, "<&>", `\n`},
		"100 KB":     {long},
		"many words": strings.SplitAfter(long, "9"),
		"1 MB":       {long, long, long, long, long, long, long, long, long, long},
	} {
		want := strings.Join(append(args, ""), "\x00")
		if len(args) == 0 {
			want = "\x00" // printf's format is used once in any case
		}
		r := w.run(append([]string{"--backend", backend, "--", "/usr/bin/printf", `%s\0`}, args...)...)
		if r.code != 0 || r.stdout != want || r.stderr != "" {
			w.t.Errorf("%s: exit code %d, stdout %.300q, stderr %.300q", name, r.code, r.stdout, r.stderr)
		}
	}
	// The result repeats the command, so that a shell would read it again.
	a := w.run("--backend", backend, "--json", "--", "printf", "%s", "it's", "a b", "").json()
	if a.Command != `printf %s 'it'\''s' 'a b' ''` || a.Stdout != "it'sa b" {
		w.t.Errorf("command %q, stdout %q", a.Command, a.Stdout)
	}
	// What JSON cannot carry is refused, not changed.
	for _, args := range [][]string{
		{"--", "printf", "%s", "\xff"}, {"--", "\xff"}, {"-e", "A=\xff", "--", "true"}, {"-e", "\xff=A", "--", "true"}, {"--workdir", "/\xff", "--", "true"},
	} {
		w.run(append([]string{"--backend", backend}, args...)...).failed(125, pyro.CodeInvalidArgument)
	}
}
