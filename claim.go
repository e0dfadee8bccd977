package pyro

import (
	"context"
	"errors"
	"io/fs"
	"syscall"
	"time"

	"pyro/internal/shim"
	"pyro/internal/store"
	"pyro/internal/vm"
)

// claim takes a fresh vm_id and what is named after it.
func (m *Manager) claim() (*shim.Claim, error) {
	// A random id of 48 bits is hardly ever taken, and a lock is hardly ever
	// lost to a reaper; neither is worth failing for.
	var err error
	for range 3 {
		var c *shim.Claim
		if c, err = shim.NewClaim(m.vmsDir(), vm.NewID()); err == nil {
			return c, nil
		}
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, fs.ErrPermission) {
			break
		}
	}
	return nil, vm.Errorf(vm.CodeStateUnavailable, "make room for a vm in %s: %w", m.baseDir, err).
		WithHint("free some space, or set PYRO_BASE_DIR to a directory that is writable and has room")
}

// release frees what is left of a VM whose processes are gone: its control
// groups and its directory, then its row, for until then it counts, and last
// its lock, under which whoever comes after a crash finds all the rest.
func (m *Manager) release(ctx context.Context, c *shim.Claim) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupTime)
	defer cancel()
	err := c.Reclaim(ctx)
	if err == nil {
		_, err = m.store.Delete(ctx, c.ID)
	}
	return errors.Join(err, c.Release())
}

// reapTime bounds what one orphan may cost somebody else's run. What takes
// longer is left for a later one.
const reapTime = 500 * time.Millisecond

// reap frees what dead processes left, VMs without an owner and rows without a
// VM, and environments that nothing needs any more.
func (m *Manager) reap(ctx context.Context) error {
	orphans, err := shim.Orphans(m.vmsDir())
	if err != nil {
		return err
	}
	for _, c := range orphans {
		m.log.Info("reclaim an orphaned vm", "vm", c.ID)
		// One that cannot be freed stays an orphan, and is nothing that a new
		// VM should fail for.
		reclaim, cancel := context.WithTimeout(ctx, reapTime)
		err := m.release(reclaim, c)
		cancel()
		if err != nil {
			m.log.Warn("reclaim an orphaned vm", "vm", c.ID, "err", err)
		}
	}
	records, err := m.store.List(ctx)
	if err != nil {
		return err
	}
	for _, r := range records {
		if err := m.forget(ctx, r); err != nil {
			return err
		}
	}
	if err := m.collectEnvironments(); err != nil {
		m.log.Warn("remove environments that nothing needs", "err", err)
	}
	return nil
}

// forget removes the row of a VM whose shim has freed it after the manager was
// gone. The claim exists before the row does, so a row without a claim is one
// of those.
func (m *Manager) forget(ctx context.Context, r store.Record) error {
	exists, err := shim.Exists(m.vmsDir(), r.VM.ID)
	if err != nil || exists {
		return err
	}
	_, err = m.store.Delete(ctx, r.VM.ID)
	return err
}
