package mock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// Exec starts a process of the host.
func (m *machine) Exec(ctx context.Context, cmd vm.Command, stdio backend.Stdio) (backend.Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Args[0], err)
	}
	// Held until the command is known, so that Stop cannot miss it and its
	// process cannot be taken for an orphan.
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state != started {
		return nil, m.invalidState(m.state)
	}
	m.execs++
	p := &process{machine: m, mark: m.mark.exec(m.execs), ended: make(chan struct{})}
	dir := m.workdir
	if cmd.Dir != "" {
		dir = cmd.Dir
	}
	var err error
	p.pid, err = program{cmd.Args, dir, backend.MergeEnv(m.env, cmd.Env), stdio, p.mark}.start()
	if err != nil {
		return nil, err
	}
	m.commands[p.pid] = p
	go p.collect()
	return p, nil
}

// forget removes a command that has been collected.
func (m *machine) forget(p *process) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.commands[p.pid] == p { // the number may have been used again
		delete(m.commands, p.pid)
	}
}

// program is a program to start.
type program struct {
	args  []string
	dir   string
	env   []string
	stdio backend.Stdio
	mark  mark
}

// start starts the program, marked and in a session of its own, and returns its
// process id. The caller collects it.
func (p program) start() (int, error) {
	if err := checkDir(p.dir); err != nil {
		return 0, err
	}
	path, err := lookup(p.args[0], p.dir, searchPath(p.env))
	if err != nil {
		return 0, err
	}
	// A traced process stops before its program's first instruction, which is
	// the only moment to mark it in time. Tracing is a matter between threads.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pid, err := syscall.ForkExec(path, p.args, &syscall.ProcAttr{
		Dir:   p.dir,
		Env:   p.env,
		Files: []uintptr{p.stdio.Stdin.Fd(), p.stdio.Stdout.Fd(), p.stdio.Stderr.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true, Ptrace: true},
	})
	runtime.KeepAlive(p.stdio)
	if err != nil {
		return 0, startError(p.args[0], err)
	}
	err = awaitChild(pid, unix.WSTOPPED|unix.WEXITED)
	if err == nil {
		err = p.mark.put(pid)
	}
	if err == nil {
		err = unix.PtraceDetach(pid)
	}
	if err != nil {
		return 0, fmt.Errorf("mark %s: %w", p.args[0], errors.Join(err, discard(pid)))
	}
	return pid, nil
}

// startError gives the kernel's refusal to start a program that exists its
// code.
func startError(program string, err error) error {
	var errno syscall.Errno
	errors.As(err, &errno)
	switch errno {
	case syscall.E2BIG:
		return vm.Errorf(vm.CodeInvalidArgument, "start %s: %w", program, err).
			WithHint("pass large input on stdin (-i)")
	case syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE:
		return fmt.Errorf("start %s: %w", program, err)
	}
	// ENOENT is here too: the interpreter that the program names is missing.
	return vm.Errorf(vm.CodeCommandNotRunnable, "cannot execute %s: %w", program, err)
}

// checkDir reports a directory that a command cannot start in.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	switch {
	case err == nil && !info.IsDir():
		err = syscall.ENOTDIR
	case err == nil:
		err = unix.Access(dir, unix.X_OK)
	}
	if err != nil {
		return vm.Errorf(vm.CodeInvalidArgument, "cannot start in the working directory %s: %w", dir, err)
	}
	return nil
}

// searchPath returns the PATH of an environment that has each name once.
func searchPath(env []string) string {
	i := slices.IndexFunc(env, func(entry string) bool { return strings.HasPrefix(entry, "PATH=") })
	if i < 0 {
		return ""
	}
	return strings.TrimPrefix(env[i], "PATH=")
}

// lookup finds a program as execvp(3) does: a name with a slash is a path, any
// other is looked for in each directory of path, and the first that can be
// executed counts. What is relative is so to dir, where the command starts.
func lookup(name, dir, path string) (string, error) {
	candidates := []string{name}
	if !strings.Contains(name, "/") {
		candidates = nil
		for _, d := range filepath.SplitList(path) {
			if d == "" {
				d = "."
			}
			candidates = append(candidates, d+"/"+name)
		}
	}
	var refused error
	for _, c := range candidates {
		at := c
		if !filepath.IsAbs(c) {
			at = dir + "/" + c
		}
		err := executable(at)
		if err == nil {
			return c, nil
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
			refused = err
		}
	}
	if refused != nil {
		return "", vm.Errorf(vm.CodeCommandNotRunnable, "cannot execute %s: %w", name, refused)
	}
	return "", vm.Errorf(vm.CodeCommandNotFound, "command not found: %s", name)
}

// executable says why the file at path cannot be executed, if it cannot.
func executable(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return syscall.EISDIR
	}
	return unix.Access(path, unix.X_OK)
}
