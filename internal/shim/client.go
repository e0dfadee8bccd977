package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	"pyro/internal/environment"
	"pyro/internal/vm"
)

// Client is a manager's handle on one shim. It is safe for concurrent use. The
// VM lives until Close, or until the process that holds the Client dies.
type Client struct {
	channel channel
	cmd     *exec.Cmd
	logPath string // what the shim says on standard error

	ended   chan struct{} // closed when the shim's process has been collected
	mu      sync.Mutex
	lastSeq uint64
	waiting map[uint64]*call // nil once the shim is gone
	gone    *vm.Error        // why calls fail from then on
}

func newClient(conn *net.UnixConn, cmd *exec.Cmd, logPath string) *Client {
	c := &Client{
		channel: channel{conn: conn},
		cmd:     cmd,
		logPath: logPath,
		ended:   make(chan struct{}),
		waiting: map[uint64]*call{},
	}
	go c.receive()
	return c
}

// receive hands out responses until the shim is gone, and then collects its
// process.
func (c *Client) receive() {
	defer close(c.ended)
	err := c.handOut()
	c.channel.conn.Close()
	// The shim ends soon after its connection does. What talks nonsense is no
	// shim and may not.
	patience := teardownTime + time.Second
	if err != io.EOF {
		patience = 0
	}
	force := time.AfterFunc(patience, func() { _ = c.cmd.Process.Kill() })
	// It is process 1 of its namespace, so once it can be collected every
	// process of the VM is gone. How it ended says nothing more.
	_ = c.cmd.Wait()
	force.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = lastWords(c.logPath)
	for _, p := range c.waiting {
		p.gone = c.gone
		close(p.done)
	}
	c.waiting = nil
}

// handOut gives each response to the call that waits for it.
func (c *Client) handOut() error {
	for {
		var r response
		files, err := c.channel.receive(&r)
		closeAll(files) // a shim has none to send
		if err != nil {
			return err
		}
		c.mu.Lock()
		p := c.waiting[r.Seq]
		delete(c.waiting, r.Seq)
		c.mu.Unlock()
		if p != nil {
			p.answer = &r
			close(p.done)
		}
	}
}

// lastWords is the error of calls to a shim that ended before it answered. What
// a Go program that crashes says about it begins with a line that says why.
func lastWords(logPath string) *vm.Error {
	const enough = 64 << 10
	e := vm.Errorf(vm.CodeVMFailed, "the process that owned the VM ended unexpectedly").
		WithHint("if it was killed for lack of memory, give the machine more or the VM less (--mem-mib)")
	f, err := os.Open(logPath)
	if err != nil {
		return e // the VM was deleted with all its files
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, enough))
	if err != nil {
		return e
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "panic: ") || strings.HasPrefix(line, "fatal error: ") {
			e.Message += " (" + strings.ToValidUTF8(strings.Map(printable, strings.TrimSpace(line)), "?") + ")"
			e.Hint = "this is a defect of pyro; please report it"
			break
		}
	}
	return e
}

// printable keeps control characters from a terminal.
func printable(r rune) rune {
	if unicode.IsPrint(r) {
		return r
	}
	return '?'
}

// call is a request under way.
type call struct {
	seq    uint64
	done   chan struct{} // closed when there is an answer, or will be none
	answer *response     // nil where there is none; set before done is closed
	gone   *vm.Error     // then says why; set before done is closed
}

// send sends a request without waiting for its answer.
func (c *Client) send(r request, files ...*os.File) (*call, error) {
	p := &call{done: make(chan struct{})}
	c.mu.Lock()
	if c.waiting == nil {
		defer c.mu.Unlock()
		return nil, c.gone
	}
	c.lastSeq++
	p.seq, r.Seq = c.lastSeq, c.lastSeq
	c.waiting[r.Seq] = p
	c.mu.Unlock()
	err := c.channel.send(r, files...)
	if err == nil || errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) {
		return p, nil // a shim that is gone answers by its end
	}
	c.mu.Lock()
	delete(c.waiting, r.Seq)
	c.mu.Unlock()
	return nil, err
}

// wait returns the answer to a request.
func (p *call) wait(ctx context.Context) (response, error) {
	select {
	case <-p.done:
	case <-ctx.Done():
		return response{}, ctx.Err()
	}
	if p.answer == nil {
		return response{}, p.gone
	}
	if p.answer.Error != nil {
		return response{}, p.answer.Error
	}
	return *p.answer, nil
}

// Creation is a VM being made.
type Creation struct{ call *call }

// Create asks for the VM and returns at once, so that Start and Exec can be
// asked for while it is made.
func (c *Client) Create(id vm.ID, backend vm.BackendName, resources vm.Resources, root environment.Root) (Creation, error) {
	p, err := c.send(request{Op: opCreate, Create: &createParams{
		Protocol: protocol, ID: id, Backend: backend, Resources: resources, Root: root,
	}})
	return Creation{p}, err
}

// Wait returns when the VM is made.
func (c Creation) Wait(ctx context.Context) (Created, error) {
	r, err := c.call.wait(ctx)
	if err != nil {
		return Created{}, err
	}
	if r.Created == nil {
		return Created{}, errors.New("the shim answered a creation with something else")
	}
	return *r.Created, nil
}

// Starting is a VM being started.
type Starting struct{ call *call }

// Start asks for the VM's start and returns at once.
func (c *Client) Start() (Starting, error) {
	p, err := c.send(request{Op: opStart})
	return Starting{p}, err
}

// Wait returns when the VM is started.
func (s Starting) Wait(ctx context.Context) (Started, error) {
	r, err := s.call.wait(ctx)
	if err != nil {
		return Started{}, err
	}
	if r.Started == nil {
		return Started{}, errors.New("the shim answered a start with something else")
	}
	return *r.Started, nil
}

// Exec is a command under way.
type Exec struct {
	client *Client
	call   *call
}

// Exec asks for a command that reads and writes the given files, which may be
// closed here once Exec has returned.
func (c *Client) Exec(cmd vm.Command, stdin, stdout, stderr *os.File) (*Exec, error) {
	p, err := c.send(request{Op: opExec, Exec: &cmd}, stdin, stdout, stderr)
	if err != nil {
		return nil, err
	}
	return &Exec{c, p}, nil
}

// Wait returns when the command has ended, or could not be started.
func (e *Exec) Wait(ctx context.Context) (vm.Exit, error) {
	r, err := e.call.wait(ctx)
	if err != nil {
		return vm.Exit{}, err
	}
	if r.Exit == nil {
		return vm.Exit{}, errors.New("the shim answered a command with something else")
	}
	return *r.Exit, nil
}

// Signal sends sig to the command's process group. A command that has ended is
// no error.
func (e *Exec) Signal(ctx context.Context, sig syscall.Signal) error {
	p, err := e.client.send(request{Op: opSignal, Signal: &signalParams{Exec: e.call.seq, Signal: int(sig)}})
	if err != nil {
		return err
	}
	_, err = p.wait(ctx)
	return err
}

// Delete deletes the VM in order and waits until the shim has ended. Where that
// fails, or ctx ends first, Close still ends it by force.
func (c *Client) Delete(ctx context.Context) error {
	p, err := c.send(request{Op: opDelete})
	if err != nil {
		return err
	}
	if _, err := p.wait(ctx); err != nil {
		return fmt.Errorf("delete the VM: %w", err)
	}
	select {
	case <-c.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close ends the shim, if it has not ended, and returns when the VM's last
// process is gone. What a killed shim leaves on disk is an Orphan.
func (c *Client) Close() error {
	select {
	case <-c.ended:
	default:
		c.cmd.Process.Kill()
		c.channel.conn.Close()
		<-c.ended
	}
	return nil
}

// Done is closed when the shim has ended and the VM's last process is gone.
func (c *Client) Done() <-chan struct{} { return c.ended }

var _ io.Closer = (*Client)(nil)
