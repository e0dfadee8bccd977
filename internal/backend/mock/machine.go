package mock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"pyro/internal/backend"
	"pyro/internal/rmtree"
	"pyro/internal/vm"
)

// state is where a machine is in its life.
type state string

const (
	created  state = "created"
	started  state = "started"
	stopping state = "stopping" // a Stop is under way, or has failed
	stopped  state = "stopped"
	deleted  state = "deleted"
)

// machine is a directory and the processes that commands started in it. It
// never ends by itself, for there is nothing of it that could, so the channel
// of Done is never closed.
type machine struct {
	spec    backend.Spec
	workdir string
	env     []string
	mark    mark

	// orphans is the reaping of orphans between Start and Stop.
	orphans   sync.WaitGroup
	endReaper func()

	mu       sync.Mutex
	state    state
	done     chan struct{}
	execs    uint64           // how many commands were started
	commands map[int]*process // that have not been collected, by process id
}

// Start allows commands. Of an earlier start nothing is left to see.
func (m *machine) Start(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("start vm %s: %w", m.spec.ID, err)
	}
	was := m.currentState()
	if was != created && was != stopped {
		return m.invalidState(was)
	}
	if was == stopped {
		if err := m.renewWorkdir(); err != nil {
			return fmt.Errorf("start vm %s: %w", m.spec.ID, err)
		}
	}
	if err := m.spec.Limits.Confine(ctx); err != nil {
		return fmt.Errorf("confine vm %s: %w", m.spec.ID, err)
	}
	m.startReaper()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = started
	m.done = make(chan struct{})
	return nil
}

// renewWorkdir empties the machine's directory.
func (m *machine) renewWorkdir() error {
	if err := rmtree.Remove(filepath.Join(m.spec.Dir, workdirName)); err != nil {
		return err
	}
	return os.Mkdir(m.workdir, 0o700)
}

// Stop kills every process that a command started. The machine's directory
// stays, for whoever wants to look at it, until the next Start or Delete.
func (m *machine) Stop(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("stop vm %s: %w", m.spec.ID, err)
	}
	m.mu.Lock()
	was := m.state
	switch was {
	case created:
		m.state = stopped
	case started:
		m.state = stopping // no command starts from here on
	}
	m.mu.Unlock()
	switch was {
	case created, stopped:
		return nil
	case deleted:
		return m.invalidState(was)
	}
	if err := killAll(ctx, m.running(), m.owns, m.bury); err != nil {
		return fmt.Errorf("stop vm %s: %w", m.spec.ID, err)
	}
	m.endReaper()
	m.orphans.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = stopped
	return nil
}

// Delete removes the machine's directory.
func (m *machine) Delete(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("delete vm %s: %w", m.spec.ID, err)
	}
	if m.currentState() == deleted {
		return nil
	}
	if err := m.Stop(ctx); err != nil {
		return err
	}
	if err := rmtree.Remove(filepath.Join(m.spec.Dir, workdirName)); err != nil {
		return fmt.Errorf("delete vm %s: %w", m.spec.ID, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = deleted
	return nil
}

// Done returns a channel that is never closed; it is nil before the first
// Start.
func (m *machine) Done() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.done
}

// Metadata names the machine's directory.
func (m *machine) Metadata() map[string]string {
	return map[string]string{"workdir": m.workdir}
}

func (m *machine) currentState() state {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

func (m *machine) invalidState(s state) error {
	return vm.Errorf(vm.CodeInvalidState, "vm %s is %s", m.spec.ID, s)
}

// running returns the commands that have not been collected.
func (m *machine) running() []*process {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []*process
	for _, p := range m.commands {
		all = append(all, p)
	}
	return all
}

// owns reports whether k marks a process of this machine.
func (m *machine) owns(k mark) bool { return k.machine() == m.mark }

// startReaper collects orphans of the machine as they end, for as long as it
// is started, where the kernel hands orphans to this process.
func (m *machine) startReaper() {
	m.endReaper = func() {}
	if !adoptsOrphans() {
		return
	}
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	m.endReaper = sync.OnceFunc(func() {
		signal.Stop(children)
		close(children)
	})
	m.orphans.Go(func() {
		for range children {
			// What is missed here, for whatever reason, Stop collects.
			_, _ = scan(m.owns, func(s sighting) error {
				m.bury(s)
				return nil
			})
		}
	})
}

// adoptsOrphans reports whether this process becomes the parent of its
// descendants' orphans.
func adoptsOrphans() bool {
	if os.Getpid() == 1 {
		return true
	}
	var subreaper int32
	_, _, errno := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_GET_CHILD_SUBREAPER, uintptr(unsafe.Pointer(&subreaper)), 0)
	return errno == 0 && subreaper != 0
}

// bury collects a dead process of the machine that was handed to this process.
// A command's first process is left to the goroutine that waits for it, and
// any other child of this process to whoever started it.
func (m *machine) bury(s sighting) {
	if !s.dead || s.parent != os.Getpid() {
		return
	}
	// Exec holds mu until a new command is known.
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.commands[s.pid]; ok {
		return
	}
	var status syscall.WaitStatus
	for {
		_, err := syscall.Wait4(s.pid, &status, syscall.WNOHANG, nil)
		if !errors.Is(err, syscall.EINTR) {
			return
		}
	}
}
