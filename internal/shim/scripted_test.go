package shim

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// The variables by which a test tells its shim what to do: see program.
const (
	scriptVar = "SHIM_TEST_SCRIPT"
	stageVar  = "SHIM_TEST_STAGE"
	markVar   = "SHIM_TEST_MARK"
)

// scripted is a driver in which things go wrong as a script says. The script
// is a list of operation=fault, separated by spaces. Operations are create,
// start, exec, wait, signal, killall, stop and delete. Faults are
//
//	fail   return errScripted
//	hang   return when the context ends, with its error
//	stuck  never return
//	panic  panic
//	pause  go on when the test says so
//	die    (wait alone) when the test says so the machine dies under its command
//	mount  (create alone) leave a mount in the VM's directory
//
// Whenever an operation begins, a file of its name appears on the stage, a
// directory that is shared with the test.
type scripted struct {
	backend.Driver
	faults map[string]string
	stage  stage
}

// errScripted is how a scripted operation fails.
var errScripted = vm.Errorf(vm.CodeBackendUnavailable, "it was in the script").WithHint("change the script")

func newScripted(d backend.Driver) *scripted {
	s := &scripted{Driver: d, faults: map[string]string{}, stage: stage(os.Getenv(stageVar))}
	for _, f := range strings.Fields(os.Getenv(scriptVar)) {
		op, fault, _ := strings.Cut(f, "=")
		s.faults[op] = fault
	}
	return s
}

// act does what the script says of an operation that begins.
func (s *scripted) act(ctx context.Context, op string) error {
	s.stage.put(op)
	switch s.faults[op] {
	case "fail":
		return errScripted
	case "hang":
		<-ctx.Done()
		return ctx.Err()
	case "stuck":
		select {}
	case "panic":
		panic("it was in the script")
	case "pause":
		for !s.stage.has(op + goOn) {
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

func (s *scripted) Create(ctx context.Context, spec backend.Spec) (backend.Machine, error) {
	if err := s.act(ctx, "create"); err != nil {
		return nil, err
	}
	if s.faults["create"] == "mount" {
		dir := filepath.Join(spec.Dir, "busy")
		if err := errors.Join(os.Mkdir(dir, 0o700), unix.Mount("x", dir, "tmpfs", 0, "")); err != nil {
			return nil, err
		}
	}
	m, err := s.Driver.Create(ctx, spec)
	if err != nil {
		return nil, err
	}
	return &scriptedMachine{Machine: m, scripted: s}, nil
}

type scriptedMachine struct {
	backend.Machine
	*scripted
}

func (m *scriptedMachine) Start(ctx context.Context) error {
	if err := m.act(ctx, "start"); err != nil {
		return err
	}
	return m.Machine.Start(ctx)
}

func (m *scriptedMachine) Stop(ctx context.Context) error {
	if err := m.act(ctx, "stop"); err != nil {
		return err
	}
	return m.Machine.Stop(ctx)
}

func (m *scriptedMachine) Delete(ctx context.Context) error {
	if err := m.act(ctx, "delete"); err != nil {
		return err
	}
	return m.Machine.Delete(ctx)
}

func (m *scriptedMachine) Exec(ctx context.Context, cmd vm.Command, stdio backend.Stdio) (backend.Process, error) {
	if err := m.act(ctx, "exec"); err != nil {
		return nil, err
	}
	p, err := m.Machine.Exec(ctx, cmd, stdio)
	if err != nil {
		return nil, err
	}
	return &scriptedProcess{Process: p, scripted: m.scripted}, nil
}

type scriptedProcess struct {
	backend.Process
	*scripted
	dying sync.Once
}

func (p *scriptedProcess) Wait(ctx context.Context) (syscall.WaitStatus, error) {
	if err := p.act(ctx, "wait"); err != nil {
		return 0, err
	}
	if p.faults["wait"] == "die" {
		for !p.stage.has("wait" + goOn) {
			time.Sleep(time.Millisecond)
		}
		p.dying.Do(func() { _ = p.Process.KillAll(ctx) })
		return 0, vm.Errorf(vm.CodeVMFailed, "the machine died")
	}
	return p.Process.Wait(ctx)
}

func (p *scriptedProcess) Signal(ctx context.Context, sig syscall.Signal) error {
	if err := p.act(ctx, "signal"); err != nil {
		return err
	}
	return p.Process.Signal(ctx, sig)
}

func (p *scriptedProcess) KillAll(ctx context.Context) error {
	if err := p.act(ctx, "killall"); err != nil {
		return err
	}
	return p.Process.KillAll(ctx)
}

// stage is a directory through which a test and its shim tell each other how
// far they are.
type stage string

// goOn is appended to the name of an operation that may go on.
const goOn = ".go"

func (s stage) put(name string) {
	if f, err := os.Create(filepath.Join(string(s), name)); err == nil {
		f.Close()
	}
}

func (s stage) has(name string) bool {
	_, err := os.Stat(filepath.Join(string(s), name))
	return err == nil
}
