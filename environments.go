package pyro

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"pyro/internal/environment"
	"pyro/internal/shim"
	"pyro/internal/vm"
)

// environmentLink is the link in a VM's directory to the environment that it
// uses, which keeps that from being collected.
const environmentLink = "environment"

// hostAttempts is how often the environment may be collected between our
// finding it and our saying that we use it. That takes an upgrade of the
// machine's programs each time.
const hostAttempts = 3

// environment returns the environment of a VM's profile, held for as long as
// the VM's directory exists.
func (m *Manager) environment(ctx context.Context, c *shim.Claim, profile string) (environment.Root, error) {
	link := filepath.Join(c.Dir, environmentLink)
	for range hostAttempts {
		root, err := environment.Host(ctx, m.environmentsDir())
		if err != nil {
			return environment.Root{}, fmt.Errorf("prepare the environment %s: %w", profile, err)
		}
		if err := os.Symlink(root.Dir, link); err != nil {
			return environment.Root{}, vm.Errorf(vm.CodeStateUnavailable, "hold the environment %s: %w", profile, err).
				WithHint("free some space, or set PYRO_BASE_DIR to a directory that has room")
		}
		if _, err := os.Stat(root.Dir); err == nil {
			return root, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return environment.Root{}, fmt.Errorf("look at the environment %s: %w", profile, err)
		}
		if err := os.Remove(link); err != nil {
			return environment.Root{}, fmt.Errorf("let go of the environment %s: %w", profile, err)
		}
	}
	return environment.Root{}, vm.Errorf(vm.CodeInternal, "the environment %s changes too fast to be used", profile)
}

// collectEnvironments removes the environments that an upgrade of the machine's
// programs has left behind.
func (m *Manager) collectEnvironments() error {
	return environment.Collect(m.environmentsDir(), m.environmentInUse)
}

// environmentInUse reports whether a VM uses the environment in dir.
func (m *Manager) environmentInUse(dir string) bool {
	vms, err := os.ReadDir(m.vmsDir())
	if err != nil {
		return true // who cannot tell removes nothing
	}
	return slices.ContainsFunc(vms, func(v fs.DirEntry) bool {
		target, err := os.Readlink(filepath.Join(m.vmsDir(), v.Name(), environmentLink))
		return err == nil && target == dir
	})
}
