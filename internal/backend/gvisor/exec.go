package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/sentry/control"
	"gvisor.dev/gvisor/pkg/sentry/kernel/auth"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/specutils"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// killPause is how long KillAll waits before it looks for survivors again.
const killPause = 2 * time.Millisecond

// Exec starts a command beside the sandbox's process 1.
func (m *machine) Exec(ctx context.Context, cmd vm.Command, stdio backend.Stdio) (backend.Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s, err := m.running()
	if err != nil {
		return nil, err
	}
	dir := cmd.Dir
	if dir == "" {
		dir = m.spec.Root.WorkingDir
	}
	caps, err := specutils.Capabilities(false, specutils.AllCapabilities())
	if err != nil {
		return nil, fmt.Errorf("compose the command's capabilities: %w", err)
	}
	pid, err := s.sandbox.Execute(m.conf, &control.ExecArgs{
		Argv: cmd.Args,
		Envv: backend.MergeEnv(m.spec.Root.Env, cmd.Env),
		// gVisor takes a file for a working directory; this way it does not.
		WorkingDirectory: dir + "/.",
		KUID:             auth.RootKUID,
		KGID:             auth.RootKGID,
		Capabilities:     caps,
		ContainerID:      string(m.spec.ID),
		FilePayload: control.NewFilePayload(map[int]*os.File{
			0: stdio.Stdin, 1: stdio.Stdout, 2: stdio.Stderr,
		}, nil),
	})
	if err != nil {
		return nil, startError(err, cmd.Args[0], dir)
	}
	p := &process{started: s, id: string(m.spec.ID), pid: pid, ended: make(chan struct{})}
	go p.wait()
	return p, nil
}

// startError gives a failed start its code. gVisor's errors reach us as text
// alone: the phrases are those of control.Proc.execAsync and of Linux's error
// numbers, and the conformance suite notices when they change.
func startError(err error, program, dir string) error {
	text := err.Error()
	has := func(phrase string) bool { return strings.Contains(text, phrase) }
	switch {
	case has("initial working directory"):
		// First, because a directory may fail in the ways of a program.
		return vm.Errorf(vm.CodeInvalidArgument, "there is no directory %s in the VM", dir).
			WithHint("a fresh VM of host has / and /root, /home, /tmp, /var and the like, empty")
	case has("permission denied"), has("exec format error"), has("is a directory"):
		return notRunnable(program)
	case has("error finding executable"), has("failed to load") && (has("no such file or directory") || has("not a directory")):
		return vm.Errorf(vm.CodeCommandNotFound, "command not found: %s", program).
			WithHint("the VM has the programs of its environment alone; for host those are this machine's /usr")
	case has("failed to load"):
		return notRunnable(program)
	}
	return fmt.Errorf("start %s in %s: %w", program, dir, err)
}

// notRunnable says that there is such a file, but no program.
func notRunnable(program string) error {
	return vm.Errorf(vm.CodeCommandNotRunnable, "not executable: %s", program).
		WithHint("make it executable (chmod +x), or name what runs it, as in: sh FILE")
}

// process is one command in a sandbox.
type process struct {
	*started
	id  string // the sandbox's
	pid int32

	ended  chan struct{} // closed once status and err are set
	status unix.WaitStatus
	err    error
}

// wait collects the command's end; it returns also when the sandbox ends.
func (p *process) wait() {
	defer close(p.ended)
	p.status, p.err = p.sandbox.WaitPID(p.id, p.pid)
	if p.err == nil && p.status.Signaled() && p.status.Signal() == unix.SIGKILL && p.broken() {
		p.err = errors.New("a process that it consists of was killed")
	}
}

// Wait returns how the command ended.
func (p *process) Wait(ctx context.Context) (syscall.WaitStatus, error) {
	select {
	case <-p.ended:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	if p.err != nil {
		return 0, vm.Errorf(vm.CodeVMFailed, "the sandbox ended before the command did: %w", p.err).
			WithHint("a VM ends when what runs in it starts thousands of processes, which is its limit, or when its processes on the host are killed")
	}
	return syscall.WaitStatus(p.status), nil
}

// Signal signals the command's process group.
func (p *process) Signal(ctx context.Context, sig syscall.Signal) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-p.ended:
		return nil
	default:
	}
	err := p.sandbox.SignalProcessGroup(p.id, p.pid, sig)
	if err == nil || strings.Contains(err.Error(), "no such process") {
		return nil
	}
	return fmt.Errorf("signal the command: %w", err)
}

// KillAll kills every process of the sandbox but its first. gVisor cannot tell
// whose an orphan is, so this takes other commands of the same VM with it.
func (p *process) KillAll(ctx context.Context) error {
	// A sandbox that is full of processes answers late, and its answers cannot
	// be cut short. Whoever stops the machine then ends this too.
	killed := make(chan error, 1)
	go func() { killed <- p.killAll(ctx) }()
	select {
	case err := <-killed:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *process) killAll(ctx context.Context) error {
	for {
		list, err := p.sandbox.Processes(p.id)
		if err != nil {
			// A sandbox that does not answer is, as a rule, one that ends, and
			// nothing in it outlives that.
			select {
			case <-p.done:
				return nil
			case <-ctx.Done():
				return fmt.Errorf("list the sandbox's processes: %w", err)
			}
		}
		alive := 0
		for _, q := range list {
			if q.PID == 1 {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			alive++
			// One that ends in between is no error.
			_ = p.sandbox.SignalProcess(p.id, int32(q.PID), unix.SIGKILL, false)
		}
		if alive == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(killPause):
		}
	}
}

// nullNetwork is where gVisor pins its empty network namespace.
func nullNetwork(conf *config.Config) string {
	return filepath.Join(conf.SharedRoot(), specutils.NullNetNSFilename)
}
