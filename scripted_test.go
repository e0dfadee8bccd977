package pyro_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"time"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// The variables by which a test tells its shims what to do.
const (
	scriptVar = "PYRO_TEST_SCRIPT"
	stageVar  = "PYRO_TEST_STAGE"
	markVar   = "PYRO_TEST_MARK"
)

// scripted is a driver in which things go wrong as a script says, a list of
// operation=fault separated by spaces. Operations are create, start, exec and
// delete; faults are fail (with errScripted), panic, stuck (for ever) and pause
// (until a file of that name, ending in .go, appears on the stage). Whenever an
// operation begins, a file of its name appears there.
type scripted struct {
	backend.Driver
	faults map[string]string
	stage  string
}

// errScripted is how a scripted operation fails.
var errScripted = vm.Errorf(vm.CodeBackendUnavailable, "it was in the script").WithHint("change the script")

func newScripted(d backend.Driver) *scripted {
	s := &scripted{Driver: d, faults: map[string]string{}, stage: os.Getenv(stageVar)}
	for _, f := range strings.Fields(os.Getenv(scriptVar)) {
		op, fault, _ := strings.Cut(f, "=")
		s.faults[op] = fault
	}
	return s
}

func (s *scripted) act(op string) error {
	if s.stage != "" {
		if f, err := os.Create(filepath.Join(s.stage, op)); err == nil {
			f.Close()
		}
	}
	switch s.faults[op] {
	case "fail":
		return errScripted
	case "panic":
		panic("it was in the script")
	case "stuck":
		select {}
	case "pause":
		for {
			if _, err := os.Stat(filepath.Join(s.stage, op+".go")); err == nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

func (s *scripted) Create(ctx context.Context, spec backend.Spec) (backend.Machine, error) {
	if err := s.act("create"); err != nil {
		return nil, err
	}
	m, err := s.Driver.Create(ctx, spec)
	if err != nil {
		return nil, err
	}
	return &scriptedMachine{m, s}, nil
}

type scriptedMachine struct {
	backend.Machine
	*scripted
}

func (m *scriptedMachine) Start(ctx context.Context) error {
	if err := m.act("start"); err != nil {
		return err
	}
	return m.Machine.Start(ctx)
}

func (m *scriptedMachine) Exec(ctx context.Context, cmd vm.Command, stdio backend.Stdio) (backend.Process, error) {
	if err := m.act("exec"); err != nil {
		return nil, err
	}
	return m.Machine.Exec(ctx, cmd, stdio)
}

func (m *scriptedMachine) Delete(ctx context.Context) error {
	if err := m.act("delete"); err != nil {
		return err
	}
	return m.Machine.Delete(ctx)
}
