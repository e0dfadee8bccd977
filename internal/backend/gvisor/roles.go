package gvisor

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"gvisor.dev/gvisor/runsc/cli/maincli"

	"pyro/internal/quickstart"
)

// Role runs the program as whatever part of gVisor args asks for and never
// returns then; it returns at once where args are pyro's own. main calls it
// with os.Args before anything else.
//
// gVisor's own executions are told by the program's name (runsc-sandbox,
// runsc-gofer) or, for the helper that unmounts the sandbox's /proc, by the
// word umount and the descriptor it is handed. `pyro runsc …` is runsc as it
// comes, for debugging and for comparing against.
func Role(args []string) {
	switch {
	case strings.HasPrefix(filepath.Base(args[0]), "runsc"):
		args = prepare(args)
	case len(args) > 2 && args[1] == "umount" && strings.HasPrefix(args[2], "--sync-fd="):
	case len(args) > 1 && args[1] == "runsc":
		args = append([]string{"runsc"}, args[2:]...)
	default:
		return
	}
	os.Args = args
	maincli.Main()
	os.Exit(0)
}

// bootArgs is what a sandbox must be told that runsc would take from control
// groups.
type bootArgs struct {
	CPUs   int    `json:"cpus"`
	Memory uint64 `json:"memory"` // bytes
}

const bootArgsFile = "pyro-boot.json"

// write leaves a in the bundle, where the sandbox's process finds it.
func (a bootArgs) write(bundle string) error {
	b, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("encode the sandbox's arguments: %w", err)
	}
	if err := os.WriteFile(filepath.Join(bundle, bootArgsFile), b, 0o600); err != nil {
		return fmt.Errorf("write the sandbox's arguments: %w", err)
	}
	return nil
}

// prepare makes this process ready to be the sandbox or the gofer of one of
// pyro's machines, if args say that it is one, and returns args with what the
// machine's bundle adds to them.
func prepare(args []string) []string {
	bundle := bundleOf(args)
	if bundle == "" {
		return args
	}
	b, err := os.ReadFile(filepath.Join(bundle, bootArgsFile))
	if err != nil {
		return args // a bundle of `pyro runsc`, which stays as it comes
	}
	quickstart.PostponeCollection()
	if filepath.Base(args[0]) != "runsc-sandbox" {
		return args
	}
	var boot bootArgs
	if err := json.Unmarshal(b, &boot); err != nil {
		fmt.Fprintln(os.Stderr, "read the sandbox's arguments:", err)
		os.Exit(1)
	}
	installPrecompiled()
	// In front of the last argument, the container's name, they win over
	// runsc's own.
	last := len(args) - 1
	with := append([]string{}, args[:last]...)
	with = append(with,
		"--cpu-num="+strconv.Itoa(boot.CPUs),
		"--total-memory="+strconv.FormatUint(boot.Memory, 10))
	return append(with, args[last])
}

// bundleOf returns the bundle that gVisor names in args, in either of the two
// ways in which it does, or "".
func bundleOf(args []string) string {
	for i, a := range args {
		if dir, ok := strings.CutPrefix(a, "--bundle="); ok {
			return dir
		}
		if a == "--bundle" && i+1 < len(args) {
			return args[i+1]
		}
	}
	return ""
}
