package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pyro/internal/backend"
	"pyro/internal/limits"
	"pyro/internal/vm"
)

// teardownTime bounds what freeing a VM may take, from the moment that nobody
// wants it any more. What is not free by then the kernel takes when the shim
// ends, but for files and control groups, which are left to be reclaimed.
const teardownTime = 10 * time.Second

// queued is how many requests may wait while one is carried out. A manager
// sends a few ahead of their answers and should not have to wait for the shim
// to read them; one that sends many more is no manager.
const queued = 256

// Main is the shim: it serves one manager one VM and returns the process's
// exit code. args are the program's arguments, as IsRole has them; drivers are
// the backends that this program has.
func Main(args []string, drivers []backend.Driver) int {
	// Nothing is touched by somebody's mistake: a shim mounts over /proc and
	// removes a directory.
	err := spawned(args[2])
	var conn *net.UnixConn
	if err == nil {
		conn, err = unixConn(controlFD)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s is started by pyro itself: %v\n", role, err)
		return vm.ExitFailure
	}
	// The lock, and what the manager's caller left open without close-on-exec,
	// are nothing for the VM's processes. Without this call of Linux 5.11 it is
	// up to the driver.
	unix.CloseOnExec(lockFD)
	_ = unix.CloseRange(lockFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	unix.Umask(0o022) // commands of the mock inherit it
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	// gVisor passes on what os.Stderr is to process 1 of the sandbox, where
	// anybody may open it. The runtime's last words go to the descriptor itself.
	os.Stderr = os.Stdout // /dev/null
	s := &server{
		channel: channel{conn: conn},
		dir:     args[2],
		drivers: drivers,
		setup:   errors.Join(identify(lockFD), enterNamespaces()),
		log:     log,
	}
	s.serve()
	return 0
}

// server is the shim's side of the connection. One goroutine reads it, so that
// its end is seen at once; one carries out the requests, in order. Commands
// and the deadline have their own.
type server struct {
	channel channel
	dir     string // the VM's; "" once it is removed
	drivers []backend.Driver
	setup   error // why the namespaces are no good, told when a VM is asked for
	log     *slog.Logger

	// What carrying out requests made. Commands keep their own references.
	params    createParams
	limits    *limits.Limits
	machine   backend.Machine
	isolation vm.Isolation
	started   bool
	deadline  *deadline

	// lifecycle is held while a machine is started, stopped or deleted: the
	// contract wants one at a time, and a command that cannot be killed stops
	// the machine from its own goroutine.
	lifecycle sync.Mutex

	commands sync.WaitGroup
	mu       sync.Mutex
	execs    map[uint64]*execution
}

// incoming is a request with the descriptors that came with it.
type incoming struct {
	request
	files []*os.File
}

// serve answers requests until the manager has deleted the VM, is gone, or the
// VM's time is up, and then frees what is left, within teardownTime: a driver
// that does not return keeps nothing alive.
func (s *server) serve() {
	s.execs = map[uint64]*execution{}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	requests := make(chan incoming, queued)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.work(ctx, requests)
		// A driver that was interrupted has returned by now.
		if err := s.teardown(); err != nil {
			s.log.Error("free the VM", "err", err)
		}
		s.channel.conn.Close() // ends reading
		s.commands.Wait()
	}()
	s.read(requests)
	cancel()
	// Nobody wants the VM any more. Its processes die first, so that a driver
	// that waits for one of them returns; what is left is tidying.
	if os.Getpid() == 1 {
		_ = unix.Kill(-1, unix.SIGKILL)
	}
	select {
	case <-done:
	case <-time.After(teardownTime):
	}
}

// read queues requests until the connection ends, or the queue is full: waiting
// for room it would not see the end.
func (s *server) read(requests chan<- incoming) {
	defer close(requests)
	for {
		var r request
		files, err := s.channel.receive(&r)
		if err != nil {
			return
		}
		select {
		case requests <- incoming{r, files}:
		default:
			closeAll(files)
			return
		}
	}
}

// work carries out requests until there are no more, or the VM is deleted.
func (s *server) work(ctx context.Context, requests <-chan incoming) {
	deleted := false
	for r := range requests {
		var answer *response
		if !deleted && ctx.Err() == nil {
			answer, deleted = s.handle(ctx, r.request, r.files)
		}
		closeAll(r.files)
		if answer != nil {
			// A manager that is gone ends the reading as well.
			_ = s.channel.send(answer)
		}
		if deleted {
			s.channel.conn.Close()
		}
	}
}

// handle carries out one request. Its answer is nil where it comes later.
func (s *server) handle(ctx context.Context, r request, files []*os.File) (answer *response, deleted bool) {
	answer = &response{Seq: r.Seq}
	var err error
	switch {
	case r.Op == opCreate && r.Create != nil:
		answer.Created, err = s.create(ctx, *r.Create)
	case r.Op == opStart:
		answer.Started, err = s.start(ctx)
	case r.Op == opExec && r.Exec != nil && len(files) == 3:
		if err = s.exec(ctx, r.Seq, *r.Exec, files); err == nil {
			return nil, false
		}
	case r.Op == opSignal && r.Signal != nil:
		err = s.signal(ctx, *r.Signal)
	case r.Op == opStop:
		err = s.stop(ctx)
	case r.Op == opDelete:
		err = s.teardown()
		deleted = true
	default:
		err = vm.Errorf(vm.CodeInvalidArgument, "the shim does not know %q, or it came incomplete", r.Op)
	}
	answer.Error = vm.AsError(noRoom(err))
	return answer, deleted
}

// noRoom gives an error that came of a disk without room its code.
func noRoom(err error) error {
	for _, errno := range []syscall.Errno{unix.ENOSPC, unix.EDQUOT, unix.EROFS} {
		if errors.Is(err, errno) {
			return vm.Errorf(vm.CodeStateUnavailable, "keep the VM's state: %w", err).
				WithHint("free some space, or set PYRO_BASE_DIR to a directory that is writable and has room")
		}
	}
	return err
}

// create makes the machine, which takes nothing if it fails.
func (s *server) create(ctx context.Context, p createParams) (_ *Created, err error) {
	if p.Protocol != protocol {
		return nil, vm.Errorf(vm.CodeBackendUnavailable, "the pyro program speaks version %d of the shim's protocol, and its caller version %d", protocol, p.Protocol).
			WithHint("install the same version of the pyro program and of the library")
	}
	if s.params.ID != "" {
		return nil, vm.Errorf(vm.CodeInvalidState, "the shim has a VM already")
	}
	s.params = p
	if s.setup != nil {
		return nil, s.setup
	}
	if s.deadline, err = newDeadline(time.Duration(p.Resources.TTLSeconds)*time.Second, s.expire); err != nil {
		return nil, err
	}
	scratch, err := mountScratch(s.dir)
	if err != nil {
		return nil, err
	}
	driver, err := choose(ctx, s.drivers, p.Backend)
	if err != nil {
		return nil, err
	}
	held := openLimits(ctx, p, s.log)
	machine, err := driver.Create(ctx, backend.Spec{
		ID: p.ID, Resources: p.Resources, Dir: s.dir, Scratch: scratch, Root: p.Root, Limits: held,
	})
	if err == nil {
		s.machine = machine
	}
	<-held.opened
	s.limits = held.limits
	if err := errors.Join(err, held.err); err != nil {
		return nil, err
	}
	d := driver.Describe()
	s.isolation = d.Isolation
	return &Created{Backend: d.Name, Isolation: d.Isolation}, nil
}

// opening is a VM's limits, which are made ready while the machine is.
type opening struct {
	opened chan struct{} // closed once the others are set
	limits *limits.Limits
	err    error
}

func openLimits(ctx context.Context, p createParams, log *slog.Logger) *opening {
	o := &opening{opened: make(chan struct{})}
	go func() {
		defer close(o.opened)
		if o.limits, o.err = limits.Open(ctx, p.ID, p.Resources, log); o.err != nil {
			o.err = fmt.Errorf("prepare the VM's limits: %w", o.err)
			return
		}
		o.limits.Warm()
	}()
	return o
}

// Confine implements backend.Limiter.
func (o *opening) Confine(ctx context.Context) error {
	<-o.opened
	if o.err != nil {
		return o.err
	}
	return o.limits.Confine(ctx)
}

// choose returns the driver that name asks for, if it works here.
func choose(ctx context.Context, drivers []backend.Driver, name vm.BackendName) (backend.Driver, error) {
	// The order is the preference; auto never takes mock.
	var reasons []error
	for _, d := range drivers {
		n := d.Describe().Name
		if n != name && (name != vm.Auto || n == vm.Mock) {
			continue
		}
		err := d.Probe(ctx)
		if err == nil {
			return d, nil
		}
		reasons = append(reasons, err)
	}
	if len(reasons) == 1 {
		return nil, reasons[0]
	}
	if len(reasons) == 0 {
		return nil, vm.Errorf(vm.CodeBackendUnavailable, "this build of pyro has no %s backend", name).
			WithHint("leave --backend out for the best that works here, or use --backend gvisor")
	}
	return nil, vm.Errorf(vm.CodeBackendUnavailable, "no backend works here: %w", errors.Join(reasons...))
}

func (s *server) start(ctx context.Context) (*Started, error) {
	if s.machine == nil {
		return nil, vm.Errorf(vm.CodeInvalidState, "the VM does not exist")
	}
	s.lifecycle.Lock()
	err := s.machine.Start(ctx)
	s.lifecycle.Unlock()
	if err != nil {
		return nil, err
	}
	s.started = true
	metadata := s.limits.Enforced()
	if s.isolation == vm.IsolationNone {
		for k := range metadata {
			metadata[k] = "none: the commands of this backend are processes of the host"
		}
	}
	for k, v := range s.machine.Metadata() {
		metadata[k] = v
	}
	return &Started{Metadata: metadata}, nil
}

func (s *server) stop(ctx context.Context) error {
	if s.machine == nil {
		return vm.Errorf(vm.CodeInvalidState, "the VM does not exist")
	}
	s.started = false
	return s.stopMachine(ctx, s.machine)
}

// stopMachine stops the machine; any goroutine may call it.
func (s *server) stopMachine(ctx context.Context, m backend.Machine) error {
	s.lifecycle.Lock()
	defer s.lifecycle.Unlock()
	return m.Stop(ctx)
}

// signal passes a signal to a command; one that has ended has no use for it.
func (s *server) signal(ctx context.Context, p signalParams) error {
	if p.Signal <= 0 || p.Signal > 64 {
		return vm.Errorf(vm.CodeInvalidArgument, "%d is no signal", p.Signal)
	}
	s.mu.Lock()
	e := s.execs[p.Exec]
	s.mu.Unlock()
	if e == nil {
		return nil
	}
	return e.process.Signal(ctx, syscall.Signal(p.Signal))
}

// expire ends the connection, and with it everything: what a manager asks for
// after that fails, and it sees by the clock why.
func (s *server) expire() { s.channel.conn.Close() }

// teardown frees all that the VM holds. What it cannot free stays under the
// VM's lock, so that others find it; it may be called again.
func (s *server) teardown() error {
	ctx, cancel := context.WithTimeout(context.Background(), teardownTime)
	defer cancel()
	if s.deadline != nil {
		s.deadline.stop()
		s.deadline = nil
	}
	// One that fails does not keep the others from being freed; the directory
	// and the lock stay for whoever is to try again.
	var errs []error
	if s.machine != nil {
		s.lifecycle.Lock()
		err := s.machine.Delete(ctx)
		s.lifecycle.Unlock()
		if err != nil {
			errs = append(errs, fmt.Errorf("delete the machine: %w", err))
		} else {
			s.machine, s.started = nil, false
		}
	}
	if s.limits != nil {
		if err := s.limits.Close(ctx); err != nil {
			errs = append(errs, fmt.Errorf("remove the limits: %w", err))
		} else {
			s.limits = nil
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	if s.dir == "" {
		return nil
	}
	if err := errors.Join(unmountScratch(s.dir), removeDir(s.dir)); err != nil {
		return err
	}
	dir := s.dir
	s.dir = ""
	return removeLock(dir)
}
