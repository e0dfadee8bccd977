// Package mock is the driver that isolates nothing: a machine is a directory,
// and its commands are ordinary processes of the host with the rights of the
// process that hosts the driver. It exists so that everything above the
// backends can be developed and tested anywhere, in milliseconds. Nothing
// selects it by itself.
//
// It keeps the contract wherever that is possible without isolation, so that
// what works on it works on a real backend:
//
//   - A machine has the host's own filesystem; Spec.Root.Dir, Binds and
//     WorkingDir are ignored. Commands start in a directory of the machine,
//     which is also their HOME. What they write there is lost when the machine
//     is started again, and what they write elsewhere stays.
//   - Commands see nothing of the hosting process's environment. Spec.Root.Env
//     counts except for the variables that name a user and a home of that root
//     filesystem, because the command's are the host's.
//   - Limits.Confine is called as the contract says, but a machine has no
//     process at that time: its commands are children of the hosting process,
//     so the limits hold only if that process is under them itself.
//   - KillAll, Stop and Delete find a command's processes by a mark that every
//     process inherits (mark.go). What they cannot find are processes that
//     something else starts on a command's behalf (a job scheduler, a container
//     engine), and one that removes the mark on purpose. A program that runs as
//     another user (sudo, for one) is found, and where it may not be killed they
//     say so. Marking needs leave to trace a child for an instant, so a command
//     that is itself a set-user-ID program gets no privilege by it unless the
//     hosting process is privileged.
//   - If the hosting process is killed, its commands live on, unless it was
//     process 1 of a process namespace, as a shim is.
//   - Where the hosting process was told to ignore SIGHUP or SIGINT when it
//     started (by nohup, for one), its commands ignore it as well.
package mock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// hostPath is where commands are looked up unless their environment says
// otherwise. It is fixed, so that a command does not depend on who started
// pyro.
const hostPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// workdirName is the directory of a machine below its Spec.Dir.
const workdirName = "workdir"

// Driver makes machines that isolate nothing. It is safe for concurrent use.
type Driver struct{}

// New returns the driver.
func New() *Driver { return &Driver{} }

// Describe says what the driver is.
func (*Driver) Describe() backend.Description {
	return backend.Description{Name: vm.Mock, Isolation: vm.IsolationNone}
}

// Probe starts a process as a command would be started and looks for its mark.
func (*Driver) Probe(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("probe the mock backend: %w", err)
	}
	if err := probe(); err != nil {
		return vm.Errorf(vm.CodeBackendUnavailable, "the mock backend cannot keep track of processes here: %w", err).
			WithHint("it must be allowed to trace its own children (kernel.yama.ptrace_scope 0 or 1; in a container: docker run --cap-add SYS_PTRACE), and /proc must be that of its process namespace")
	}
	return nil
}

func probe() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	p := program{
		args:  []string{"true"},
		dir:   "/",
		env:   []string{"PATH=" + hostPath},
		stdio: backend.Stdio{Stdin: null, Stdout: null, Stderr: null},
		mark:  newMark(),
	}
	pid, err := p.start()
	if err != nil {
		return err
	}
	_, found, lookErr := look(pid, func(k mark) bool { return k == p.mark })
	if lookErr == nil && !found {
		lookErr = fmt.Errorf("process %d does not show its mark in /proc", pid)
	}
	_, err = collectChild(pid)
	return errors.Join(lookErr, err)
}

// Create makes the machine's directory.
func (*Driver) Create(ctx context.Context, spec backend.Spec) (backend.Machine, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("create vm %s: %w", spec.ID, err)
	}
	workdir := filepath.Join(spec.Dir, workdirName)
	if err := os.Mkdir(workdir, 0o700); err != nil {
		return nil, fmt.Errorf("create vm %s: %w", spec.ID, err)
	}
	return &machine{
		spec:     spec,
		workdir:  workdir,
		env:      baseEnv(workdir, spec.Root.Env),
		mark:     newMark(),
		state:    created,
		commands: map[int]*process{},
	}, nil
}

// baseEnv is the environment of every command of a machine, given its
// directory and the environment that its root filesystem asks for.
func baseEnv(workdir string, root []string) []string {
	name := strconv.Itoa(os.Getuid())
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	own := []string{
		"PATH=" + hostPath,
		"HOME=" + workdir,
		"USER=" + name,
		"LOGNAME=" + name,
		"SHELL=/bin/sh",
		"LANG=C.UTF-8",
	}
	usable := slices.DeleteFunc(slices.Clone(root), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		return slices.Contains([]string{"HOME", "USER", "LOGNAME", "SHELL"}, name)
	})
	return backend.MergeEnv(own, usable)
}
