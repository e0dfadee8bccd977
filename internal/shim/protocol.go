package shim

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"pyro/internal/environment"
	"pyro/internal/vm"
)

// A message on the control connection is a length of four bytes, big-endian,
// and that many bytes of JSON. Descriptors travel with the first byte.
const (
	maxMessage = 16 << 20 // a command and its environment, escaped, fit many times
	maxFiles   = 3
)

// op is what a request asks for.
type op string

const (
	opCreate op = "create"
	opStart  op = "start"
	opExec   op = "exec" // with three descriptors: stdin, stdout, stderr
	opSignal op = "signal"
	opStop   op = "stop"
	opDelete op = "delete"
)

// request is what a manager sends. Requests are carried out in the order in
// which they come, so that a manager need not wait for one before it sends the
// next; only the end of a command is not waited for.
type request struct {
	Seq    uint64        `json:"seq"`
	Op     op            `json:"op"`
	Create *createParams `json:"create,omitempty"`
	Exec   *vm.Command   `json:"exec,omitempty"`
	Signal *signalParams `json:"signal,omitempty"`
}

// protocol is the version of these messages. A library and a program may come
// from different versions of pyro; a field that one of them does not know could
// be a restriction.
const protocol = 1

// createParams says what VM to make.
type createParams struct {
	Protocol  int              `json:"protocol"`
	ID        vm.ID            `json:"vm_id"`
	Backend   vm.BackendName   `json:"backend"`
	Resources vm.Resources     `json:"resources"`
	Root      environment.Root `json:"root"`
}

// signalParams names a command by the number of its exec request.
type signalParams struct {
	Exec   uint64 `json:"exec"`
	Signal int    `json:"signal"`
}

// response answers the request with the same number.
type response struct {
	Seq     uint64    `json:"seq"`
	Error   *vm.Error `json:"error,omitempty"`
	Created *Created  `json:"created,omitempty"`
	Started *Started  `json:"started,omitempty"`
	Exit    *vm.Exit  `json:"exit,omitempty"`
}

// Created describes a VM that was made.
type Created struct {
	Backend   vm.BackendName `json:"backend"`
	Isolation vm.Isolation   `json:"isolation"`
}

// Started describes a VM that was started.
type Started struct {
	Metadata map[string]string `json:"metadata"`
}

// channel carries messages over a unix stream socket. One goroutine may read
// while any number write.
type channel struct {
	conn *net.UnixConn

	writing sync.Mutex
}

// send writes v and passes files along; they stay open here.
func (c *channel) send(v any, files ...*os.File) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(body) > maxMessage {
		return vm.Errorf(vm.CodeInvalidArgument, "a message of %d bytes is too long", len(body))
	}
	msg := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(body)), uint32(len(body)))
	msg = append(msg, body...)
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	n, _, err := c.conn.WriteMsgUnix(msg, oob, nil)
	if err == nil && n < len(msg) {
		_, err = c.conn.Write(msg[n:])
	}
	if err != nil {
		return fmt.Errorf("send message: %w", err)
	}
	return nil
}

// receive reads one message into v and returns the descriptors that came with
// it, which the caller closes. It returns io.EOF when the peer is gone.
func (c *channel) receive(v any) ([]*os.File, error) {
	var head [4]byte
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, flags, _, err := c.conn.ReadMsgUnix(head[:], oob)
	if err != nil {
		return nil, endOfStream(err)
	}
	if n == 0 {
		return nil, io.EOF
	}
	files, err := parseFiles(oob[:oobn], flags)
	if err != nil {
		return nil, err
	}
	if err := c.receiveBody(head, n, v); err != nil {
		closeAll(files)
		return nil, err
	}
	return files, nil
}

// receiveBody reads what follows the n bytes of head that have come.
func (c *channel) receiveBody(head [4]byte, n int, v any) error {
	if _, err := io.ReadFull(c.conn, head[n:]); err != nil {
		return endOfStream(err)
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > maxMessage {
		return fmt.Errorf("receive message: %d bytes are too many", size)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(c.conn, body); err != nil {
		return endOfStream(err)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("decode message: %w", err)
	}
	return nil
}

// endOfStream gives every way in which a peer can vanish one error.
func endOfStream(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, net.ErrClosed) {
		return io.EOF
	}
	return err
}

// parseFiles returns the descriptors in a control message.
func parseFiles(oob []byte, flags int) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("receive descriptors: %w", err)
	}
	var files []*os.File
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue // credentials or the like, which nobody asked for
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	if flags&unix.MSG_CTRUNC != 0 || len(files) > maxFiles {
		closeAll(files)
		return nil, errors.New("receive descriptors: too many")
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
