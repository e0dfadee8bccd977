package backendtest

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"pyro/internal/backend"
)

// streams is what commands read and write.
func streams() []subtest {
	return []subtest{
		{"output is separate and exact", outputExact},
		{"input arrives and ends", inputArrives},
		{"no input", noInput},
		{"input need not be read", inputUnread},
		{"input that stays open", inputOpen},
		{"one pipe for both outputs", onePipe},
		{"the caller's files stay its own", callersFiles},
		{"a slow reader holds the command back", slowReader},
		{"a reader that goes away", readerGone},
	}
}

// allBytes is every byte value once, in an order of its own for each seed.
func allBytes(seed uint64) []byte {
	b := make([]byte, 256)
	for i, n := range rand.New(rand.NewPCG(seed, 0)).Perm(256) {
		b[i] = byte(n)
	}
	return b
}

// octal writes b for printf(1).
func octal(b []byte) string {
	var s strings.Builder
	for _, c := range b {
		fmt.Fprintf(&s, `\%03o`, c)
	}
	return s.String()
}

func outputExact(f *fixture) {
	m := f.started()
	out, err := allBytes(1), allBytes(2)
	r := f.run(m, shell(`printf "$1"; printf "$2" >&2`, octal(out), octal(err)), nil)
	f.expectExit(r.status, 0)
	f.expectBytes("standard output", r.stdout, out)
	f.expectBytes("standard error", r.stderr, err)
}

func inputArrives(f *fixture) {
	m := f.started()
	for _, size := range []int{0, 1, 1 << 20} {
		in := bytes.Repeat(allBytes(3), size/256+1)[:size]
		r := f.run(m, shell("cat; echo end >&2"), in)
		f.expectExit(r.status, 0)
		f.expectBytes("what was read", r.stdout, in)
		f.expectBytes("standard error", r.stderr, []byte("end\n"))
	}
}

func noInput(f *fixture) {
	m := f.started()
	if out := f.output(m, command("cat")); out != "" {
		f.Errorf("read %q from /dev/null", out)
	}
}

func inputUnread(f *fixture) {
	m := f.started()
	in := make([]byte, 1<<20) // more than a pipe holds
	f.expectExit(f.run(m, command("true"), in).status, 0)
	r := f.run(m, command("head", "-c", "3"), []byte("abcdef"))
	f.expectExit(r.status, 0)
	f.expectBytes("the beginning", r.stdout, []byte("abc"))
}

func inputOpen(f *fixture) {
	m := f.started()
	r := f.begin(m, command("true"), piped)
	f.expectExit(f.wait(r), 0)
	f.expectEOF(r)
}

func onePipe(f *fixture) {
	m := f.started()
	theirs, ours, err := newPipes(nothing)
	if err != nil {
		f.Fatal(err)
	}
	defer ours.close()
	p, err := m.Exec(f.ctx(), shell("echo out; echo err >&2; echo out"), backend.Stdio{
		Stdin: theirs.Stdin, Stdout: theirs.Stdout, Stderr: theirs.Stdout,
	})
	closeStdio(theirs)
	if err != nil {
		f.Fatalf("exec: %v", err)
	}
	f.expectExit(f.wait(p), 0)
	both, err := readAll(ours.stdout, time.Now().Add(promptly))
	if err != nil {
		f.Errorf("read: %v", err)
	}
	f.expectBytes("both outputs", both, []byte("out\nerr\nout\n"))
}

func callersFiles(f *fixture) {
	m := f.started()
	theirs, ours, err := newPipes(piped)
	if err != nil {
		f.Fatal(err)
	}
	defer ours.close()
	defer closeStdio(theirs)
	for range 2 {
		p, err := m.Exec(f.ctx(), command("echo", "command"), theirs)
		if err != nil {
			f.Fatalf("exec: %v", err)
		}
		f.expectExit(f.wait(p), 0)
	}
	for _, w := range []*os.File{theirs.Stdout, theirs.Stderr, ours.stdin} {
		if _, err := io.WriteString(w, "caller\n"); err != nil {
			f.Errorf("write to a file that was given to a command: %v", err)
		}
	}
	closeStdio(backend.Stdio{Stdout: theirs.Stdout, Stderr: theirs.Stderr})
	out, err := readAll(ours.stdout, time.Now().Add(promptly))
	if err != nil {
		f.Errorf("read: %v", err)
	}
	f.expectBytes("standard output", out, []byte("command\ncommand\ncaller\n"))
}

// slowReader checks that what a command writes is not collected anywhere but
// in the pipe: a command that has far more to say than was read cannot end.
func slowReader(f *fixture) {
	const total, slack = 64 << 20, 8 << 20
	m := f.started()
	r := f.begin(m, command("head", "-c", fmt.Sprint(total), "/dev/zero"), nothing)
	if err := r.stdout.SetReadDeadline(time.Now().Add(patience)); err != nil {
		f.Fatal(err)
	}
	read := int64(0)
	for _, upTo := range []int64{0, 1 << 20, total / 2, total - slack} {
		n, err := io.CopyN(io.Discard, r.lines, upTo-read)
		read += n
		if err != nil {
			f.Fatalf("read: %v", err)
		}
		f.expectRunning(r)
	}
	n, err := io.Copy(io.Discard, r.lines)
	if err != nil || read+n != total {
		f.Errorf("read %d bytes, error %v; want %d", read+n, err, total)
	}
	f.expectExit(f.wait(r), 0)
}

func readerGone(f *fixture) {
	m := f.started()
	r := f.begin(m, command("cat", "/dev/zero"), nothing)
	r.close()
	// Whether a signal or an error tells the command is the machine's affair.
	if status := f.wait(r); status.ExitStatus() == 0 {
		f.Errorf("status is %#x, want a failure", status)
	}
}
