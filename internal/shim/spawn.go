package shim

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"pyro/internal/vm"
)

// spareFD is a descriptor of the shim's, its lock once more, that serves nothing
// but to be high. gVisor's sandbox moves three of its own to 253 and on
// (runsc/boot, loader.go), for which the kernel has to enlarge the process's
// table of them; in a process of several threads that waits for all processors,
// some 5 to 10 ms. A child's table is made for what its parent has open, and
// the shim's is made while it has one thread, between fork and exec.
const spareFD = 255

// Spawn starts a shim: executable, a program that calls Main where IsRole says
// so, in namespaces of its own. The shim shares the claim: the VM has an owner
// while either of them lives. Nothing of the VM exists yet; see Client.Create.
//
// The shim inherits no environment, and its arguments tell no more than the
// VM's directory: what a VM is made from goes over the connection.
func Spawn(executable string, claim *Claim) (*Client, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	log, err := os.OpenFile(claim.logPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("make the shim's log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(executable, role, claim.Dir)
	cmd.Stderr = log
	cmd.Env = []string{}
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{theirs, claim.lock} // controlFD, lockFD
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err == nil && lim.Cur > spareFD {
		cmd.ExtraFiles = append(cmd.ExtraFiles, make([]*os.File, spareFD-lockFD)...)
		cmd.ExtraFiles[spareFD-3] = claim.lock
	}
	cmd.SysProcAttr = namespaces(privileged())
	if err := cmd.Start(); err != nil {
		ours.Close()
		return nil, spawnError(err, executable)
	}
	return newClient(ours, cmd, claim.logPath()), nil
}

// spawned returns an error unless this process was started by Spawn, for the VM
// whose directory is dir.
func spawned(dir string) error {
	if os.Getpid() != 1 {
		return fmt.Errorf("it is process %d and not process 1 of a namespace", os.Getpid())
	}
	var held, named unix.Stat_t
	if err := unix.Fstat(lockFD, &held); err != nil {
		return fmt.Errorf("look at the vm's lock: %w", err)
	}
	if err := unix.Lstat(dir+lockSuffix, &named); err != nil {
		return fmt.Errorf("look for the vm's lock: %w", err)
	}
	if held.Dev != named.Dev || held.Ino != named.Ino {
		return fmt.Errorf("descriptor %d is not the lock of %s", lockFD, dir)
	}
	return nil
}

// socketPair returns the two ends of a control connection.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make the control connection: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "shim")
	conn, err := unixConn(fds[0])
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn, theirs, nil
}

// unixConn takes over the socket fd.
func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "control")
	defer f.Close() // FileConn makes a copy
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("open the control connection: %w", err)
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, errors.New("open the control connection: it is not a unix socket")
	}
	return unixConn, nil
}

// namespaces asks for the shim's own namespaces. Without privilege they need a
// user namespace around them, in which the caller appears as root: it gives
// rights over those namespaces and over nothing else.
func namespaces(privileged bool) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{
		Setsid:     true, // no signal of the caller's terminal reaches the shim
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS,
	}
	if !privileged {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	return attr
}

// privileged reports whether this process may make namespaces as it is.
func privileged() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&header, &data[0]) != nil {
		return false
	}
	return os.Geteuid() == 0 && data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}

// spawnError says why a shim could not be started.
func spawnError(err error, executable string) error {
	switch {
	case errors.Is(err, unix.EACCES) && unix.Access(executable, unix.X_OK) != nil:
		return vm.Errorf(vm.CodeInvalidArgument, "start %s: %w", executable, err).
			WithHint("it must be the pyro program, and you must be allowed to execute it")
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EACCES):
		return forbidden(err, readSetting)
	}
	e := vm.Errorf(vm.CodeInternal, "start %s: %w", executable, err)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOEXEC) || errors.Is(err, unix.ENOTDIR) {
		e.Code = vm.CodeInvalidArgument
		e.Hint = "it must be the pyro program"
	}
	return e
}

// settings are the ways in which a system forbids namespaces to ordinary
// users, most telling first.
var settings = []struct {
	path, forbids string
	sysctl        string // what allows it
}{
	{"/proc/sys/user/max_user_namespaces", "0", "user.max_user_namespaces=15000"},
	{"/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"},
	{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "kernel.apparmor_restrict_unprivileged_userns=0"},
	{"/proc/sys/user/max_pid_namespaces", "0", "user.max_pid_namespaces=15000"},
	{"/proc/sys/user/max_mnt_namespaces", "0", "user.max_mnt_namespaces=15000"},
}

// forbidden explains that the kernel refused a namespace with cause, naming
// the setting that is to blame where one is.
func forbidden(cause error, read func(path string) string) error {
	for _, s := range settings {
		if read(s.path) != s.forbids {
			continue
		}
		name, _, _ := strings.Cut(s.sysctl, "=")
		return vm.Errorf(vm.CodeBackendUnavailable, "this system forbids the namespaces that isolate a VM (%s is %s): %w", name, s.forbids, cause).
			WithHint("allow them with: sudo sysctl -w " + s.sysctl + " (see the README for an AppArmor profile instead), or run pyro as root")
	}
	return vm.Errorf(vm.CodeBackendUnavailable, "this system forbids the namespaces that isolate a VM: %w", cause).
		WithHint("if this is a container, allow it user namespaces and mounts, for example with docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined")
}

// readSetting returns a kernel setting, or "" where there is none such.
func readSetting(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
