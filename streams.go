package pyro

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"pyro/internal/vm"
)

// pipeSize is asked of the kernel for each stream; an ordinary user may have
// as much (/proc/sys/fs/pipe-max-size), and throughput is several times that
// of the default 64 KiB.
const pipeSize = 1 << 20

// stream is one of a command's three: the guest's end is passed to the VM, and
// the other is served here. A guest never gets the caller's own descriptors,
// so it cannot do to a terminal or a file what it could do to those.
type stream struct {
	guest *os.File
	host  *os.File // nil where there is nothing to serve
}

// streams are the three of one command.
type streams struct {
	stdin, stdout, stderr stream

	out     [2]output // stdout and stderr
	lines   *lines    // stderr, where the caller gave a writer
	copying sync.WaitGroup

	// broken is closed when output can be delivered no more. The command is to
	// get SIGPIPE, which not every backend's pipes give it; so a pipe stays open,
	// unread, until told is closed.
	broken, told chan struct{}
	breakOnce    sync.Once
	tellOnce     sync.Once
}

// output is one of the two streams that a command writes.
type output struct {
	kept  *capture // where the caller gave no writer
	bytes int64    // what came of it
	err   error    // why not all of it was delivered
}

// openStreams makes the pipes and starts to serve them.
func openStreams(r RunRequest) (_ *streams, err error) {
	s := &streams{broken: make(chan struct{}), told: make(chan struct{})}
	defer func() {
		if err != nil {
			s.closeGuestEnds()
			s.closeHostEnds()
		}
	}()
	if s.stdin, err = openStdin(r.Stdin != nil); err != nil {
		return nil, err
	}
	if s.stdout, err = openOutput(); err != nil {
		return nil, err
	}
	if s.stderr, err = openOutput(); err != nil {
		return nil, err
	}
	if r.Stdin != nil {
		go feed(s.stdin.host, r.Stdin)
	}
	stdout, stderr := r.Stdout, r.Stderr
	if stderr != nil {
		s.lines = &lines{w: stderr}
		stderr = s.lines
		if same(r.Stdout, r.Stderr) {
			stderr = &turns{w: stderr}
			stdout = stderr
		}
	}
	s.serve(&s.out[0], s.stdout.host, stdout, r.MaxOutput)
	s.serve(&s.out[1], s.stderr.host, stderr, r.MaxOutput)
	return s, nil
}

// same reports whether a and b are one writer, as far as that can be told.
func same(a, b io.Writer) (equal bool) {
	defer func() { _ = recover() }() // of types that cannot be compared
	return a == b
}

// turns gives its callers turns.
type turns struct {
	mu sync.Mutex
	w  io.Writer
}

func (t *turns) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.w.Write(p)
}

// lines knows whether what it wrote last ended a line.
type lines struct {
	w       io.Writer
	partial bool
}

func (l *lines) Write(p []byte) (int, error) {
	if len(p) > 0 {
		l.partial = p[len(p)-1] != '\n'
	}
	return l.w.Write(p)
}

// note writes a line of its own.
func (l *lines) note(line string) error {
	if l.partial {
		line = "\n" + line
	}
	_, err := io.WriteString(l.w, line)
	return err
}

// openStdin returns a pipe, or /dev/null where there is no input.
func openStdin(input bool) (stream, error) {
	if !input {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return stream{}, fmt.Errorf("open the command's input: %w", err)
		}
		return stream{guest: null}, nil
	}
	r, w, err := pipe()
	if err != nil {
		return stream{}, err
	}
	return hosted(r, w)
}

// openOutput returns a pipe that the guest writes.
func openOutput() (stream, error) {
	r, w, err := pipe()
	if err != nil {
		return stream{}, err
	}
	return hosted(w, r)
}

// pipe returns a blocking pipe: whether an end blocks belongs to the end, and
// guests expect that theirs does.
func pipe() (r, w int, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return 0, 0, fmt.Errorf("make a pipe: %w", err)
	}
	// Refused to a user who has many pipes; the default size works too.
	_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize)
	return fds[0], fds[1], nil
}

// hosted makes a stream of a pipe's ends; the host's is served by the runtime's
// poller, so that closing it interrupts a read.
func hosted(guest, host int) (stream, error) {
	s := stream{guest: os.NewFile(uintptr(guest), "guest")}
	err := unix.SetNonblock(host, true)
	s.host = os.NewFile(uintptr(host), "host")
	if err != nil {
		return s, fmt.Errorf("prepare a pipe: %w", err)
	}
	return s, nil
}

// feed copies the command's input. The command may end at any time; nothing
// that goes wrong here matters to it.
func feed(w *os.File, r io.Reader) {
	_, _ = io.Copy(w, r)
	w.Close()
}

// serve copies an output stream to w, or keeps it.
func (s *streams) serve(o *output, r *os.File, w io.Writer, maxOutput int) {
	if w == nil {
		o.kept = &capture{limit: maxOutput}
		w = o.kept
	}
	s.copying.Go(func() {
		// To a command that takes no notice of SIGPIPE its writes fail.
		defer r.Close()
		if o.bytes, o.err = io.Copy(w, r); o.err != nil {
			s.breakOnce.Do(func() { close(s.broken) })
			<-s.told
		}
	})
}

// tell says that the command knows, or is gone. It may be called again.
func (s *streams) tell() { s.tellOnce.Do(func() { close(s.told) }) }

// closeGuestEnds closes the ends that the VM has its own copies of. It may be
// called again.
func (s *streams) closeGuestEnds() {
	for _, st := range []stream{s.stdin, s.stdout, s.stderr} {
		if st.guest != nil {
			st.guest.Close()
		}
	}
}

func (s *streams) closeHostEnds() {
	for _, st := range []stream{s.stdin, s.stdout, s.stderr} {
		if st.host != nil {
			st.host.Close()
		}
	}
}

// writeTime is how long a Write that is under way when the context ends may
// take to return.
const writeTime = time.Second

// finish waits until all output is delivered, or ctx ends; the guest's ends
// must be closed everywhere. A reader that went away is the caller's affair and
// no error.
func (s *streams) finish(ctx context.Context) error {
	s.tell()
	copied := make(chan struct{})
	go func() { defer close(copied); s.copying.Wait() }()
	select {
	case <-copied:
	case <-ctx.Done():
		s.closeHostEnds()
		select {
		case <-copied:
		case <-time.After(writeTime):
			return ctx.Err() // a Write that does not return is its owner's
		}
	}
	s.closeHostEnds()
	for i, name := range []string{"stdout", "stderr"} {
		if err := s.out[i].err; err != nil && !readerGone(err) {
			if ctx.Err() != nil {
				return ctx.Err() // which cut the delivery short
			}
			return vm.Errorf(vm.CodeInternal, "deliver the command's %s: %w", name, err).
				WithHint("what it was to be written to has no room, or is closed")
		}
	}
	return nil
}

// readerGone reports whether a write failed because nobody reads any more.
func readerGone(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrClosedPipe)
}

// note adds a line of pyro's own to the end of stderr, on a line of its own.
func (s *streams) note(line string) error {
	if kept := s.out[1].kept; kept != nil {
		kept.note(line)
		return nil
	}
	if err := s.lines.note(line); err != nil && !readerGone(err) {
		return fmt.Errorf("deliver the command's stderr: %w", err)
	}
	return nil
}

// fill puts what is known of the output into the result.
func (s *streams) fill(r *ExecResult) {
	r.StdoutBytes, r.StderrBytes = s.out[0].bytes, s.out[1].bytes
	if c := s.out[0].kept; c != nil {
		r.Stdout, r.StdoutEncoding = c.text()
		r.Truncated = r.Truncated || c.truncated()
	}
	if c := s.out[1].kept; c != nil {
		r.Stderr, r.StderrEncoding = c.text()
		r.Truncated = r.Truncated || c.truncated()
	}
}

// capture keeps the first bytes written to it.
type capture struct {
	limit int
	buf   []byte
	total int64
	notes string
}

// Write keeps what there is room for and takes the rest as well.
func (c *capture) Write(p []byte) (int, error) {
	c.total += int64(len(p))
	c.buf = append(c.buf, p[:min(len(p), c.limit-len(c.buf))]...)
	return len(p), nil
}

// note adds a line after what was written, whatever room is left.
func (c *capture) note(line string) {
	if len(c.buf) > 0 && c.buf[len(c.buf)-1] != '\n' {
		c.notes += "\n"
	}
	c.notes += line
}

func (c *capture) truncated() bool { return c.total > int64(len(c.buf)) }

// text returns what was kept as it stands in a result: as text where that
// loses nothing. A character that was cut in two by the limit is left out.
func (c *capture) text() (text, encoding string) {
	if c.truncated() {
		if whole := wholeRunes(c.buf); utf8.Valid(whole) {
			return string(whole) + c.notes, ""
		}
	}
	if utf8.Valid(c.buf) {
		return string(c.buf) + c.notes, ""
	}
	return base64.StdEncoding.EncodeToString(append(c.buf, c.notes...)), vm.Base64
}

// wholeRunes returns b without the beginning of a UTF-8 sequence at its end.
func wholeRunes(b []byte) []byte {
	for i := len(b) - 1; i >= max(0, len(b)-utf8.UTFMax); i-- {
		if utf8.RuneStart(b[i]) {
			if !utf8.FullRune(b[i:]) {
				return b[:i]
			}
			break
		}
	}
	return b
}
