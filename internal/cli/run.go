package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"pyro"
)

// runFlags are the flags of pyro run.
type runFlags struct {
	request pyro.RunRequest
	backend string
	stdin   bool
	quiet   bool
}

func (c *cli) runCommand() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARG...]",
		Short: "Run a command in a fresh machine and delete the machine",
		Long: `Run makes a machine, runs COMMAND in it, shows what it prints as it prints it,
and deletes the machine with all that was written in it. The exit code is
COMMAND's own; 124 if its time was up, 125 if pyro failed, 126 if COMMAND is
not executable, 127 if there is no such command, 128+N if signal N killed it.

Ctrl-C is passed on to COMMAND; a second one ends the machine.`,
		Example: `  pyro run -- python3 -c 'print(6*7)'
  pyro run --mem-mib 512 --timeout-seconds 5 -- sh -c 'make test'
  tar c src | pyro run -i -- sh -c 'tar x && python3 -m compileall -q src'
  pyro run --json -- uname -a`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.run(cmd.Context(), &f, args)
		},
	}
	flags := cmd.Flags()
	// What follows COMMAND belongs to it, even without the --.
	flags.SetInterspersed(false)
	flags.StringVar(&f.request.Profile, "env", "host", "the `PROFILE` that the machine starts from")
	flags.StringVar(&f.backend, "backend", "auto", "what isolates the machine: auto, firecracker, gvisor, mock (no isolation)")
	flags.IntVar(&f.request.VCPUCount, "vcpu-count", 1, "processors, 1 to 8")
	flags.IntVar(&f.request.MemMiB, "mem-mib", 1024, "memory in `MIB`, 256 to 32768")
	flags.IntVar(&f.request.TimeoutSeconds, "timeout-seconds", 30, "how long COMMAND may run, in `SECONDS`, up to 3600")
	flags.IntVar(&f.request.TTLSeconds, "ttl-seconds", 600, "how long the machine may exist, in `SECONDS`, 60 to 3600")
	flags.StringVarP(&f.request.Dir, "workdir", "w", "", "the `DIRECTORY` in the machine that COMMAND starts in")
	flags.StringArrayVarP(&f.request.Env, "env-var", "e", nil, "set an environment variable, as `KEY=VALUE`, or as KEY to what it is here; may be repeated")
	flags.BoolVarP(&f.stdin, "interactive", "i", false, "pass standard input to COMMAND")
	flags.BoolVarP(&f.quiet, "quiet", "q", false, "print nothing of pyro's own but failures")
	return cmd
}

// check refuses what is out of range, a zero included: to the library that
// means the default, which the flags have already.
func (f *runFlags) check() error {
	r := pyro.Resources{VCPUCount: f.request.VCPUCount, MemMiB: f.request.MemMiB, TTLSeconds: f.request.TTLSeconds}
	if err := r.Validate(); err != nil {
		return err
	}
	return pyro.ValidateTimeout(f.request.TimeoutSeconds)
}

func (c *cli) run(ctx context.Context, f *runFlags, args []string) error {
	if err := f.check(); err != nil {
		return err
	}
	env, err := inherit(f.request.Env)
	if err != nil {
		return err
	}
	r := f.request
	r.Args, r.Env = args, env
	r.Backend = pyro.BackendName(f.backend)
	if f.stdin {
		r.Stdin = c.Stdin
	}
	if !c.json {
		r.Stdout, r.Stderr = c.Stdout, c.Stderr
	}
	ctx, signals, stop := c.follow(ctx)
	defer stop()
	r.Signals = signals

	m, err := pyro.Open(ctx, pyro.Options{Executable: c.Executable})
	if err != nil {
		return err
	}
	result, err := m.Run(ctx, r)
	if err := errors.Join(err, m.Close()); err != nil {
		return interrupted(ctx, err)
	}
	c.exit = result.Code
	switch {
	case c.json:
		return c.printJSON(result)
	case result.OOM && !f.quiet:
		fmt.Fprintf(c.Stderr, "pyro: the machine ran out of memory (%d MiB) and was killed\n", r.MemMiB)
	}
	return nil
}

// interruption is the cause of a context that ended because of a signal.
type interruption struct{ signal syscall.Signal }

func (i interruption) Error() string { return "by a signal (" + i.signal.String() + ")" }

// interrupted gives an error that came of a signal the exit code of one.
func interrupted(ctx context.Context, err error) error {
	var i interruption
	if errors.As(context.Cause(ctx), &i) {
		return exitError{err, 128 + int(i.signal)}
	}
	return err
}

// endTime is how long the end of everything may take before signals do what
// they do to any program: nothing may make pyro deaf.
const endTime = 3 * time.Second

// follow sorts the program's signals: the first goes to the command, a second
// ends everything, and so does a terminal that hangs up.
func (c *cli) follow(parent context.Context) (ctx context.Context, command <-chan syscall.Signal, stop func()) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan syscall.Signal, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		passed := false
		for {
			select {
			case s := <-c.Signals:
				sig, ok := s.(syscall.Signal)
				if !ok {
					continue
				}
				if passed || sig == syscall.SIGHUP {
					time.AfterFunc(endTime, c.StopSignals)
					cancel(interruption{sig})
					return
				}
				passed = true
				signals <- sig
			case <-ctx.Done():
				return
			}
		}
	}()
	return ctx, signals, func() { cancel(nil); <-done }
}

// inherit completes -e KEY, which stands for the caller's own value: so a
// secret need not be among pyro's arguments, where others can read it.
func inherit(env []string) ([]string, error) {
	full := make([]string, len(env))
	for i, kv := range env {
		full[i] = kv
		if kv == "" || strings.Contains(kv, "=") {
			continue
		}
		value, ok := os.LookupEnv(kv)
		if !ok {
			return nil, &pyro.Error{
				Code: pyro.CodeInvalidArgument, Message: fmt.Sprintf("there is no environment variable %q to pass on", kv),
				Hint: "set it, or give its value: -e KEY=VALUE",
			}
		}
		full[i] = kv + "=" + value
	}
	return full, nil
}
