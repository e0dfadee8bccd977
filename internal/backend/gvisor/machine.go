package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/container"
	"gvisor.dev/gvisor/runsc/sandbox"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// machine is one gVisor sandbox. Start, Stop and Delete come one at a time, as
// the contract says; mu guards what Exec and Done read beside them.
type machine struct {
	spec   backend.Spec
	bundle string
	conf   *config.Config

	mu      sync.Mutex
	sandbox *container.Container // nil when stopped or deleted
	deleted bool
	started *started      // nil when not
	done    chan struct{} // closed when the sandbox of the last Start is gone
}

// started is what commands need of a sandbox that runs.
type started struct {
	sandbox *sandbox.Sandbox
	gofer   int // the process that serves the sandbox files
	done    <-chan struct{}
}

// create starts a sandbox process, and the gofer that serves it files, without
// anything inside.
func (m *machine) create(ctx context.Context) error {
	boot := bootArgs{
		CPUs:   m.spec.Resources.VCPUCount,
		Memory: uint64(m.spec.Resources.MemMiB) << 20,
	}
	oci := ociSpec(m.spec)
	if err := writeBundle(m.bundle, oci, boot); err != nil {
		return err
	}
	init, err := idleFile()
	if err != nil {
		return err
	}
	defer init.Close()
	c, err := container.New(m.conf, container.Args{
		ID:        string(m.spec.ID),
		Spec:      oci,
		BundleDir: m.bundle,
		ExecFile:  init,
	})
	if err != nil {
		return m.blame(fmt.Errorf("create the sandbox: %w", err))
	}
	m.mu.Lock()
	m.sandbox = c
	m.mu.Unlock()
	return ctx.Err()
}

// Start boots the sandbox, under its limits.
func (m *machine) Start(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	c, running, deleted := m.sandbox, m.started != nil, m.deleted
	m.mu.Unlock()
	switch {
	case deleted:
		return vm.Errorf(vm.CodeInvalidState, "vm %s is deleted", m.spec.ID)
	case running:
		return vm.Errorf(vm.CodeInvalidState, "vm %s is already started", m.spec.ID)
	case c == nil:
		if err := m.create(ctx); err != nil {
			return errors.Join(err, m.kill())
		}
		c = m.sandbox
	}
	// Joining control groups waits for the kernel, and so does booting; both
	// are done before anything of the environment's runs.
	confined := make(chan error, 1)
	go func() { confined <- m.spec.Limits.Confine(ctx) }()
	err := c.Start(m.conf)
	if err != nil {
		err = m.blame(fmt.Errorf("start the sandbox: %w", err))
	}
	if err := errors.Join(err, <-confined, ctx.Err()); err != nil {
		return errors.Join(err, m.kill())
	}
	done := make(chan struct{})
	s := &started{sandbox: c.Sandbox, gofer: c.GoferPid.Load(), done: done}
	m.mu.Lock()
	m.started, m.done = s, done
	m.mu.Unlock()
	go func() {
		defer close(done)
		// Returns when process 1 or the sandbox has ended, and has then
		// collected the sandbox's process. How it ended says nothing more.
		_, _ = s.sandbox.Wait(c.ID)
	}()
	go s.watchGofer()
	return nil
}

// watchGofer kills the sandbox when its gofer ends: without files, and at
// gVisor's leisure, it would come to its end in the oddest ways.
func (s *started) watchGofer() {
	// It is left for Destroy to collect, which ends this as well.
	if unix.Waitid(unix.P_PID, s.gofer, nil, unix.WEXITED|unix.WNOWAIT, nil) != nil {
		return
	}
	if pid := s.sandbox.Getpid(); pid > 0 { // 0 once it is collected
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// broken reports whether one of the sandbox's processes has ended. When the
// gofer does, gVisor kills all that runs inside, one after another.
func (s *started) broken() bool {
	for _, pid := range []int{s.sandbox.Getpid(), s.gofer} {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if err != nil || info.Signo != 0 {
			return true
		}
	}
	return false
}

// Stop kills the sandbox.
func (m *machine) Stop(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	deleted := m.deleted
	m.mu.Unlock()
	if deleted {
		return vm.Errorf(vm.CodeInvalidState, "vm %s is deleted", m.spec.ID)
	}
	return m.kill()
}

// Delete kills the sandbox and removes its files.
func (m *machine) Delete(context.Context) error {
	m.mu.Lock()
	deleted := m.deleted
	m.mu.Unlock()
	if deleted {
		return nil
	}
	if err := m.kill(); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(m.bundle), os.RemoveAll(m.conf.RootDir), os.RemoveAll(m.panicLog())); err != nil {
		return fmt.Errorf("remove the sandbox's files: %w", err)
	}
	m.mu.Lock()
	m.deleted = true
	m.mu.Unlock()
	return nil
}

// kill ends the sandbox's processes and frees what gVisor holds for them.
func (m *machine) kill() error {
	m.mu.Lock()
	c, done := m.sandbox, m.done
	m.started = nil
	m.mu.Unlock()
	if c == nil {
		return unpinNetwork(m.conf) // a failed creation may have got that far
	}
	// Destroy kills both processes too, but one after the other, and it and the
	// goroutine that waits for a started sandbox would both try to collect its
	// process.
	pids := []int{c.GoferPid.Load()}
	if c.Sandbox != nil { // nil where an earlier attempt came that far
		pids = append(pids, c.SandboxPid())
	}
	for _, pid := range pids {
		if pid <= 0 {
			continue
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill the sandbox: %w", err)
		}
	}
	if done != nil {
		<-done
	}
	if err := c.Destroy(); err != nil {
		return fmt.Errorf("destroy the sandbox: %w", err)
	}
	if err := unpinNetwork(m.conf); err != nil {
		return err
	}
	m.mu.Lock()
	m.sandbox = nil
	m.mu.Unlock()
	return nil
}

// Done is closed when the sandbox has ended.
func (m *machine) Done() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.done
}

// Metadata says what the sandbox runs on.
func (m *machine) Metadata() map[string]string {
	return map[string]string{"platform": m.conf.Platform}
}

// running returns the sandbox that commands can run in.
func (m *machine) running() (*started, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.started == nil {
		return nil, vm.Errorf(vm.CodeInvalidState, "vm %s is not started", m.spec.ID)
	}
	return m.started, nil
}

// panicLog is where the sandbox's process writes its last words.
func (m *machine) panicLog() string { return filepath.Join(m.spec.Scratch, "panic.log") }

// blame adds the sandbox's last words, if there are any, to an error that came
// of its end.
func (m *machine) blame(err error) error {
	const enough = 2048
	f, openErr := os.Open(m.panicLog())
	if openErr != nil {
		return err
	}
	defer f.Close()
	words, readErr := io.ReadAll(io.LimitReader(f, enough))
	if text := strings.TrimSpace(string(words)); readErr == nil && text != "" {
		return fmt.Errorf("%w (the sandbox said: %s)", err, text)
	}
	return err
}

// unpinNetwork removes the mount by which gVisor keeps an empty network
// namespace for later gofers.
func unpinNetwork(conf *config.Config) error {
	path := nullNetwork(conf)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}
