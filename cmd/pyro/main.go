// Command pyro is all of pyro in one program: the command line, the shim that
// owns a VM, and gVisor's own processes. It is the only place that chooses
// implementations.
package main

import (
	"context"
	"math"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"

	"pyro/internal/backend"
	"pyro/internal/backend/gvisor"
	"pyro/internal/backend/mock"
	"pyro/internal/cli"
	"pyro/internal/nocgo"
	"pyro/internal/quickstart"
	"pyro/internal/shim"
)

func main() {
	nocgo.Program()
	role(os.Args)
	// What the caller left open is nothing for the processes that we start, and
	// what we make is nothing for others. Without the call, of Linux 5.11, each
	// part of pyro closes what it knows of.
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	unix.Umask(0o077)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	// A reader that goes away is seen where the writing fails. Taking the signal,
	// unlike ignoring it, is not inherited by the programs that we start.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	os.Exit(cli.Main(context.Background(), cli.Program{
		Executable:  "/proc/self/exe",
		Version:     version(),
		Args:        os.Args[1:],
		Stdin:       os.Stdin,
		Stdout:      os.Stdout,
		Stderr:      os.Stderr,
		Signals:     signals,
		StopSignals: func() { signal.Stop(signals) },
	}))
}

// role plays the part that args ask for, and never returns then, unless that is
// the command line.
func role(args []string) {
	gvisor.Role(args)
	quickstart.PostponeCollection()
	if shim.IsRole(args) {
		os.Exit(shim.Main(args, []backend.Driver{gvisor.New(), mock.New()}))
	}
}

// version is what the module system knows of this build.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "devel"
	}
	return info.Main.Version
}
