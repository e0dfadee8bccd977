package store

import (
	"context"
	"fmt"
	"time"

	"pyro/internal/vm"
)

// migrations returns the steps that lead from an empty database to the current
// schema: step i takes version i to version i+1. Steps that were released are
// never edited, and a step only adds, with defaults for what it adds: an older
// pyro that has the database open goes on writing to it.
func migrations() []string {
	return []string{
		// WITHOUT ROWID: one b-tree instead of two, so a write is one page.
		`CREATE TABLE vms (
			vm_id       TEXT PRIMARY KEY,
			profile     TEXT NOT NULL,
			backend     TEXT NOT NULL,
			isolation   TEXT NOT NULL,
			vcpu_count  INTEGER NOT NULL,
			mem_mib     INTEGER NOT NULL,
			ttl_seconds INTEGER NOT NULL,
			created_at  INTEGER NOT NULL, -- unix microseconds
			expires_at  INTEGER NOT NULL, -- unix microseconds
			state       TEXT NOT NULL,
			metadata    TEXT NOT NULL,    -- a JSON object of strings
			owner       TEXT NOT NULL,    -- 'run', or '' for a VM that stands alone
			boot_id     TEXT NOT NULL     -- /proc/sys/kernel/random/boot_id
		) STRICT, WITHOUT ROWID`,
	}
}

// prepare brings the database to the schema that steps lead to. On one that is
// there already it costs one query.
func (s *Store) prepare(ctx context.Context, busy time.Duration, steps []string) error {
	version, err := s.version(ctx, s.db, steps)
	if err != nil || version == len(steps) {
		return err
	}
	if version == 0 {
		if err := s.useLog(ctx, busy); err != nil {
			return err
		}
	}
	for version < len(steps) {
		if version, err = s.step(ctx, steps); err != nil {
			return err
		}
	}
	return nil
}

// version reads the schema's version through q. It refuses one that steps do
// not lead to.
func (s *Store) version(ctx context.Context, q queryer, steps []string) (int, error) {
	var version int
	if err := q.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return 0, err
	}
	if version < 0 {
		return 0, &damage{fmt.Errorf("its schema version is %d", version)}
	}
	if version > len(steps) {
		return 0, vm.Errorf(vm.CodeStateUnavailable,
			"the state database %s was written by a newer pyro: it has schema version %d, this pyro knows %d", s.path, version, len(steps)).
			WithHint("use that newer pyro, or set PYRO_BASE_DIR to another directory")
	}
	return version, nil
}

// step takes the next step, if any, and returns the version reached. It reads
// the version again under the write lock: another process may have been
// faster.
func (s *Store) step(ctx context.Context, steps []string) (int, error) {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer func() { _ = tx.Rollback() }() // does nothing after Commit
	version, err := s.version(ctx, tx, steps)
	if err != nil || version == len(steps) {
		return version, err
	}
	if _, err := tx.ExecContext(ctx, steps[version]); err != nil {
		return 0, fmt.Errorf("migrate to schema version %d: %w", version+1, err)
	}
	version++
	if _, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", version)); err != nil {
		return 0, fmt.Errorf("migrate to schema version %d: %w", version, err)
	}
	return version, tx.Commit()
}

// useLog switches a new database to write-ahead logging, which the file then
// remembers. SQLite does not wait for other processes that do the same at the
// same time but reports a lock at once, so waiting is done here.
func (s *Store) useLog(ctx context.Context, busy time.Duration) error {
	for deadline := time.Now().Add(busy); ; {
		var mode string
		err := s.db.QueryRowContext(ctx, "PRAGMA journal_mode = wal").Scan(&mode)
		switch {
		case err == nil && mode != "wal":
			return vm.Errorf(vm.CodeStateUnavailable,
				"the state database %s is on a filesystem that processes cannot share memory through", s.path).
				WithHint("set PYRO_BASE_DIR to a directory on a local disk")
		case !isBusy(err) || time.Now().After(deadline):
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}
