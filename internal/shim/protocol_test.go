package shim

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pyro/internal/environment"
	"pyro/internal/vm"
)

// pair returns the two ends of a control connection.
func pair(t testing.TB) (ours, theirs *channel) {
	t.Helper()
	conn, f, err := socketPair()
	check(t, err)
	fd, err := unix.Dup(int(f.Fd()))
	check(t, errors.Join(err, f.Close()))
	peer, err := unixConn(fd)
	check(t, err)
	t.Cleanup(func() { conn.Close(); peer.Close() })
	return &channel{conn: conn}, &channel{conn: peer}
}

// inodes tells open files apart, whatever descriptors they have.
func inodes(t testing.TB, files []*os.File) []uint64 {
	t.Helper()
	var all []uint64
	for _, f := range files {
		var st unix.Stat_t
		check(t, unix.Fstat(int(f.Fd()), &st))
		all = append(all, st.Ino)
	}
	return all
}

// tempFiles returns n open files, which are closed when the test ends.
func tempFiles(t testing.TB, n int) []*os.File {
	t.Helper()
	var all []*os.File
	for range n {
		f, err := os.CreateTemp(t.TempDir(), "file")
		check(t, err)
		t.Cleanup(func() { f.Close() })
		all = append(all, f)
	}
	return all
}

// frame returns body as a message.
func frame(body string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
}

// write sends raw bytes, with descriptors on the first.
func (c *channel) write(t testing.TB, b []byte, files ...*os.File) {
	t.Helper()
	var oob []byte
	if len(files) > 0 {
		var fds []int
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
		}
		oob = unix.UnixRights(fds...)
	}
	n, _, err := c.conn.WriteMsgUnix(b, oob, nil)
	if err != nil || n != len(b) {
		t.Fatalf("wrote %d of %d bytes: %v", n, len(b), err)
	}
	runtime.KeepAlive(files)
}

// drained reports whether all that was sent to c has been read.
func (c *channel) drained(t testing.TB) bool {
	t.Helper()
	raw, err := c.conn.SyscallConn()
	check(t, err)
	var unread int
	var ioctlErr error
	check(t, raw.Control(func(fd uintptr) { unread, ioctlErr = unix.IoctlGetInt(int(fd), unix.SIOCINQ) }))
	check(t, ioctlErr)
	return unread == 0
}

var everyRequest = []request{
	{Seq: 1, Op: opCreate, Create: &createParams{
		ID: "0123456789ab", Backend: vm.Mock, Resources: resources(60),
		Root: environment.Root{Dir: "/root", Binds: []string{"/usr"}, Env: []string{"A=b"}, WorkingDir: "/w"},
	}},
	{Seq: 2, Op: opStart},
	{Seq: 3, Op: opExec, Exec: &vm.Command{
		Args: []string{"sh", "-c", "echo \"<&>\u2028\x01\" '😀'"}, Env: []string{"X=y z"}, Dir: "/tmp", TimeoutSeconds: 30,
	}},
	{Seq: 4, Op: opSignal, Signal: &signalParams{Exec: 3, Signal: 15}},
	{Seq: 5, Op: opStop},
	{Seq: 1<<64 - 1, Op: opDelete},
}

var everyResponse = []response{
	{Seq: 1, Created: &Created{Backend: vm.GVisor, Isolation: vm.IsolationGVisor}},
	{Seq: 2, Started: &Started{Metadata: map[string]string{"limit_memory": "cgroup v2"}}},
	{Seq: 3, Exit: &vm.Exit{Code: 137, Signal: 9, OOM: true, DurationMS: 12}},
	{Seq: 4, Error: &vm.Error{Code: vm.CodeInvalidState, Message: "no\nway", Hint: "try"}},
	{},
}

func TestMessagesArriveAsTheyWereSent(t *testing.T) {
	expectNothingLeft(t)
	a, b := pair(t)
	var messages []any
	for _, r := range everyRequest {
		messages = append(messages, r)
	}
	for _, r := range everyResponse {
		messages = append(messages, r)
	}
	for i, sent := range messages {
		for n := range maxFiles + 1 {
			files := tempFiles(t, n)
			check(t, a.send(sent, files...))
			got := reflect.New(reflect.TypeOf(sent))
			received, err := b.receive(got.Interface())
			if err != nil {
				t.Fatalf("message %d with %d files: %v", i, n, err)
			}
			if !reflect.DeepEqual(got.Elem().Interface(), sent) {
				t.Errorf("message %d: got %+v, want %+v", i, got.Elem(), sent)
			}
			if got, want := inodes(t, received), inodes(t, files); !reflect.DeepEqual(got, want) {
				t.Errorf("message %d: got files %v, want %v", i, got, want)
			}
			for _, f := range received {
				if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
					t.Errorf("message %d: a program started now would inherit a received descriptor (%v)", i, err)
				}
			}
			closeAll(received)
		}
	}
}

func TestMessagesOfConcurrentSendersDoNotMix(t *testing.T) {
	expectNothingLeft(t)
	a, b := pair(t)
	const senders, each = 4, 6
	var sending sync.WaitGroup
	for s := range senders {
		sending.Go(func() {
			for i := range each {
				// A little beyond the socket's buffer, so that every one goes in
				// two pieces.
				long := strings.Repeat(string(rune('a'+s)), 220_000+i)
				if err := a.send(request{Seq: uint64(s), Op: op(long)}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range senders * each {
		var r request
		_, err := b.receive(&r)
		check(t, err)
		if want := strings.Repeat(string(rune('a'+r.Seq)), len(r.Op)); string(r.Op) != want {
			t.Fatalf("a message of sender %d holds something else", r.Seq)
		}
	}
	sending.Wait()
}

// TestSendersTakeTurns is of what keeps messages from mixing: that they would
// without it is so unlikely that the test above does not see it.
func TestSendersTakeTurns(t *testing.T) {
	expectNothingLeft(t)
	a, b := pair(t)
	a.writing.Lock() // as a sender does that has sent half a message
	sent := make(chan error, 1)
	go func() { sent <- a.send(everyRequest[1]) }()
	select {
	case err := <-sent:
		t.Errorf("another sender is let in between, error %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if !b.drained(t) {
		t.Error("something was sent in between")
	}
	a.writing.Unlock()
	var r request
	_, err := b.receive(&r)
	check(t, err)
}

func TestMessageMayArriveInAnyTwoPieces(t *testing.T) {
	expectNothingLeft(t)
	a, b := pair(t)
	files := tempFiles(t, 3)
	want := everyRequest[2]
	body, err := json.Marshal(want)
	check(t, err)
	message := frame(string(body))
	for cut := 1; cut < len(message); cut++ {
		type result struct {
			request request
			files   []*os.File
			err     error
		}
		done := make(chan result, 1)
		go func() {
			var r result
			r.files, r.err = b.receive(&r.request)
			done <- r
		}()
		a.write(t, message[:cut], files...)
		await(t, "the first piece has been read", func() bool { return b.drained(t) })
		a.write(t, message[cut:])
		r := <-done
		if r.err != nil || !reflect.DeepEqual(r.request, want) || !reflect.DeepEqual(inodes(t, r.files), inodes(t, files)) {
			t.Errorf("cut at %d of %d: got %+v with %d files, error %v", cut, len(message), r.request, len(r.files), r.err)
		}
		closeAll(r.files)
	}
}

func TestStreamThatEndsInsideAMessageIsAtItsEnd(t *testing.T) {
	expectNothingLeft(t)
	files := tempFiles(t, 3)
	message := frame(`{"seq":1,"op":"start"}`)
	for length := range len(message) {
		a, b := pair(t)
		if length > 0 {
			a.write(t, message[:length], files...)
		}
		check(t, a.conn.Close())
		before := len(descriptors())
		var r request
		if got, err := b.receive(&r); err != io.EOF || got != nil {
			t.Errorf("after %d of %d bytes: %d files, error %v, want io.EOF", length, len(message), len(got), err)
		}
		if after := len(descriptors()); after > before {
			t.Errorf("after %d of %d bytes: %d descriptors are open, were %d", length, len(message), after, before)
		}
		check(t, b.conn.Close())
	}
}

func TestConnectionThatIsClosedHereIsAtItsEnd(t *testing.T) {
	_, b := pair(t)
	check(t, b.conn.Close())
	var r request
	if _, err := b.receive(&r); err != io.EOF {
		t.Errorf("error is %v, want io.EOF", err)
	}
}

func TestBadMessageLeavesNoDescriptors(t *testing.T) {
	many := tempFiles(t, 253) // SCM_MAX_FD, the most that Linux passes at once
	for _, test := range []struct {
		name    string
		message []byte
		files   int
	}{
		{"not JSON", frame("nonsense"), 3},
		{"nothing", frame(""), 3},
		{"half of JSON", frame(`{"seq":1,`), 1},
		{"two values", frame(`{"seq":1}{"seq":2}`), 2},
		{"wrong types", frame(`{"seq":"one"}`), 3},
		{"negative number", frame(`{"seq":-1}`), 3},
		{"length of 4 GiB", []byte{0xff, 0xff, 0xff, 0xff}, 3},
		{"length one too many", binary.BigEndian.AppendUint32(nil, maxMessage+1), 3},
		{"4 descriptors", frame(`{"seq":1}`), 4},
		{"5 descriptors", frame(`{"seq":1}`), 5},
		{"253 descriptors", frame(`{"seq":1}`), 253},
	} {
		t.Run(test.name, func(t *testing.T) {
			expectNothingLeft(t)
			a, b := pair(t)
			a.write(t, test.message, many[:test.files]...)
			before := len(descriptors())
			var r request
			if files, err := b.receive(&r); err == nil || err == io.EOF || files != nil {
				t.Errorf("got %+v with %d files, error %v", r, len(files), err)
			}
			if after := len(descriptors()); after > before {
				t.Errorf("%d descriptors are open, were %d", after, before)
			}
		})
	}
}

func TestDescriptorsInsideAMessageAreDropped(t *testing.T) {
	expectNothingLeft(t)
	a, b := pair(t)
	message := frame(`{"seq":7}`)
	for cut := 1; cut < len(message); cut++ {
		a.write(t, message[:cut])
		a.write(t, message[cut:], tempFiles(t, 3)...)
		before := len(descriptors())
		var r request
		files, err := b.receive(&r)
		check(t, err)
		if r.Seq != 7 || len(files) > 0 && cut >= 4 {
			t.Errorf("cut at %d: got %+v with %d files", cut, r, len(files))
		}
		closeAll(files)
		if after := len(descriptors()); after > before {
			t.Errorf("cut at %d: %d descriptors are open, were %d", cut, after, before)
		}
	}
}

func TestOversizedMessageIsRefusedUnread(t *testing.T) {
	a, b := pair(t)
	var before, after runtime.MemStats
	for _, size := range []uint32{maxMessage + 1, 1 << 31, 1<<32 - 1} {
		a.write(t, binary.BigEndian.AppendUint32(nil, size))
		runtime.ReadMemStats(&before)
		var r request
		_, err := b.receive(&r)
		runtime.ReadMemStats(&after)
		if err == nil || err == io.EOF {
			t.Errorf("a length of %d: error is %v", size, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
			t.Errorf("a length of %d: %d bytes were allocated", size, n)
		}
	}
}

func TestMessageThatIsTooLongIsNotSent(t *testing.T) {
	a, b := pair(t)
	err := a.send(request{Op: op(strings.Repeat("x", maxMessage))})
	expectCode(t, "send 16 MiB and more", err, vm.CodeInvalidArgument)
	check(t, a.send(everyRequest[1]))
	var r request
	_, err = b.receive(&r)
	check(t, err)
	if !reflect.DeepEqual(r, everyRequest[1]) {
		t.Errorf("got %+v", r)
	}
}

func TestLargestCommandFitsInAMessage(t *testing.T) {
	// Of all characters, a control character grows most when it is escaped.
	cmd := vm.Command{Args: []string{"x", strings.Repeat("\x01", vm.MaxArgsBytes-8)}, TimeoutSeconds: vm.MaxTimeoutSeconds}
	check(t, cmd.Validate())
	body, err := json.Marshal(request{Seq: 1<<64 - 1, Op: opExec, Exec: &cmd})
	check(t, err)
	if len(body) > maxMessage {
		t.Errorf("it takes %d bytes, and a message has at most %d", len(body), maxMessage)
	}
}

// FuzzReceive feeds receive with what a shim or a manager gone mad might send:
// any bytes, with any number of descriptors on the first.
func FuzzReceive(f *testing.F) {
	path := filepath.Join(f.TempDir(), "file")
	check(f, os.WriteFile(path, nil, 0o600))
	file, err := os.Open(path)
	check(f, err)
	defer file.Close()
	for i, r := range everyRequest {
		body, err := json.Marshal(r)
		check(f, err)
		f.Add(append(frame(string(body)), frame(string(body))...), uint8(i))
	}
	f.Fuzz(func(t *testing.T, stream []byte, files uint8) {
		before := len(descriptors())
		a, b := pair(t)
		written := make(chan struct{})
		go func() {
			defer close(written)
			defer a.conn.Close()
			var oob []byte
			if n := int(files) % 10; n > 0 {
				fds := make([]int, n)
				for i := range fds {
					fds[i] = int(file.Fd())
				}
				oob = unix.UnixRights(fds...)
			}
			for len(stream) > 0 {
				n, _, err := a.conn.WriteMsgUnix(stream, oob, nil)
				if err != nil {
					return // the reader has had enough
				}
				stream, oob = stream[n:], nil
			}
		}()
		for {
			var r request
			received, err := b.receive(&r)
			if err != nil {
				if len(received) > 0 {
					t.Errorf("an error came with %d files", len(received))
				}
				break
			}
			closeAll(received)
			expectStable(t, r)
		}
		b.conn.Close()
		<-written
		if after := len(descriptors()); after > before {
			t.Errorf("%d descriptors are open, were %d", after, before)
		}
	})
}

// expectStable checks that a request that was understood is understood in the
// same way when it is sent on.
func expectStable(t *testing.T, r request) {
	t.Helper()
	once, err := json.Marshal(r)
	check(t, err)
	var again request
	check(t, json.Unmarshal(once, &again))
	twice, err := json.Marshal(again)
	check(t, err)
	if string(once) != string(twice) {
		t.Errorf("%s becomes %s", once, twice)
	}
}
