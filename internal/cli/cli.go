// Package cli is pyro's command line. It knows the library and nothing below
// it: every command is a translation between arguments, the Manager and text.
//
// What a command produces goes to standard output, everything else to standard
// error. With --json both results and failures are JSON on standard output,
// with the contract's keys.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"pyro"
)

// Program is what the command line needs of the program that it is in.
type Program struct {
	// Executable is run as the shim of a VM.
	Executable string
	// Version is shown by pyro --version.
	Version string

	Args           []string // without the program's name
	Stdin          *os.File
	Stdout, Stderr io.Writer
	// Signals delivers what the user's terminal or supervisor sends, until
	// StopSignals is called: from then on a signal does what it always does.
	Signals     <-chan os.Signal
	StopSignals func()
}

// Main runs the command that p.Args names and returns the exit code.
func Main(ctx context.Context, p Program) int {
	c := &cli{Program: p}
	root := c.rootCommand()
	root.SetArgs(p.Args)
	root.SetIn(p.Stdin)
	root.SetOut(p.Stdout)
	root.SetErr(p.Stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return c.exit
	}
	c.json = c.json || asksForJSON(p.Args)
	return c.fail(err)
}

// asksForJSON reports whether --json is among the flags of args, which a flag
// that could not be read may have kept from being seen.
func asksForJSON(args []string) bool {
	for _, a := range args {
		switch a {
		case "--":
			return false
		case "--json":
			return true
		}
	}
	return false
}

// cli is one invocation.
type cli struct {
	Program

	json bool
	exit int // the exit code of a command that did not fail
}

func (c *cli) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "pyro",
		Short: "Disposable machines: run anything, keep nothing",
		Long: `pyro runs commands in disposable machines: a fresh, isolated computer in a
fraction of a second, a command run in it, and nothing left behind.

There is no daemon, no account and nothing to set up. Without an image, a
machine has this computer's own programs (/usr, read-only) and none of its
data.`,
		Version:       c.Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(fmt.Errorf("unknown command %q", args[0]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().BoolVar(&c.json, "json", false, "print the result, or the failure, as JSON on standard output")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	root.AddCommand(c.runCommand())
	return root
}

// usage marks an error as one of the command line's words.
func usage(err error) error {
	return &pyro.Error{
		Code: pyro.CodeInvalidArgument, Message: err.Error(),
		Hint: "pyro --help, or pyro COMMAND --help, shows how", Err: err,
	}
}

// fail reports err and returns the exit code for it.
func (c *cli) fail(err error) int {
	e := pyro.AsError(err)
	if !c.json || c.printJSON(map[string]*pyro.Error{"error": e}) != nil {
		fmt.Fprintf(c.Stderr, "pyro: %s (%s)\n", e.Message, e.Code)
		if e.Hint != "" {
			fmt.Fprintf(c.Stderr, "pyro: hint: %s\n", e.Hint)
		}
	}
	var exit exitError
	if errors.As(err, &exit) {
		return exit.code
	}
	return e.Code.ExitCode()
}

// printJSON writes v to standard output. Where nobody reads that any more
// there is nobody to tell, which is no error.
func (c *cli) printJSON(v any) error {
	encoder := json.NewEncoder(c.Stdout)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(v); err != nil && !errors.Is(err, syscall.EPIPE) {
		return &pyro.Error{
			Code: pyro.CodeInternal, Message: "write the result: " + err.Error(),
			Hint: "standard output has no room, or is closed", Err: err,
		}
	}
	return nil
}

// exitError is a failure with an exit code of its own.
type exitError struct {
	error
	code int
}

func (e exitError) Unwrap() error { return e.error }
