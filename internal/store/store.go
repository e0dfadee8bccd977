// Package store keeps the table of VMs in one SQLite database, <base>/state.db,
// the only state that pyro's processes share.
//
// # Ownership
//
// Any number of processes, and any number of Stores in one process, may have
// the database open at once; there is no server. The store owns three files,
// all of mode 0600: state.db, the write-ahead log state.db-wal and its index
// state.db-shm. The two latter stay after Close and belong to the first: who
// copies or moves one takes all three. The directory is the caller's.
//
// Nothing else in a process that uses this package may open those files.
// SQLite's locks are POSIX record locks, and a process loses all that it has
// on a file when it closes any descriptor of it.
//
// # Locking
//
// A write takes the database's one write lock when it begins, never halfway,
// so what it has read stays true until it commits; capacity is counted and
// taken that way. A writer waits up to five seconds for another. Reads see
// one consistent moment and neither wait for writers nor hold them up. Update
// runs its caller's function under the write lock: keep it short, and call
// nothing of the same Store in it.
//
// # What a crash leaves
//
// A process that is killed leaves either all of a write or nothing of it, and
// its locks go with it: the next process simply continues. After a loss of
// power the database is whole, but the last writes may be missing; they
// described VMs that the loss of power has ended as well. A database that was
// being made is finished by whoever opens it next. There is nothing to repair
// and no file to clean up.
package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"pyro/internal/vm"
)

// busyTimeout is how long a call waits for another process's write. Writes
// take microseconds, a checkpoint some milliseconds; who holds the lock for
// seconds is stuck.
const busyTimeout = 5 * time.Second

// OwnerRun is the owner of a VM that belongs to the process that made it and
// ends with it. The owner of a VM that stands alone is the empty string.
const OwnerRun = "run"

// Record is one VM as the database has it.
type Record struct {
	// VM is what callers see. Its times are kept to the microsecond; what is
	// finer is cut off.
	vm.VM
	// Owner is OwnerRun or empty.
	Owner string
	// BootID is the host's /proc/sys/kernel/random/boot_id when the VM was
	// made. A VM of another boot cannot run any more.
	BootID string
}

// Store is an open database. It is safe for concurrent use; calls on one Store
// take turns.
//
// Where no other code is named, errors carry vm.CodeStateUnavailable when the
// database cannot be used (disk full, read-only or failing, file damaged, lock
// held for too long), with a hint, and vm.CodeCanceled, with the context's
// error as its cause, when the context ended first. A write that was canceled
// may still have happened.
type Store struct {
	path string
	db   *sql.DB
}

// Open opens the database at path, making it if it is not there; its directory
// must exist. It brings an older database to the current schema. A database
// that a newer pyro wrote is refused and not changed.
func Open(ctx context.Context, path string) (*Store, error) {
	return open(ctx, path, busyTimeout, migrations())
}

// open is Open with a chosen schema and patience.
func open(ctx context.Context, path string, busy time.Duration, steps []string) (*Store, error) {
	path, err := filepath.Abs(path) // a later connection must not depend on the working directory
	if err != nil {
		return nil, fmt.Errorf("locate the state database: %w", err)
	}
	if err := create(path); err != nil {
		return nil, explain(ctx, path, err)
	}
	c, err := newConnector(path, busy)
	if err != nil {
		return nil, explain(ctx, path, err)
	}
	s := &Store{path: path, db: sql.OpenDB(c)}
	// A second connection would cost another opening and could do nothing at
	// the same time: there is one write lock, and reads take microseconds.
	s.db.SetMaxOpenConns(1)
	if err := s.prepare(ctx, busy, steps); err != nil {
		return nil, errors.Join(explain(ctx, path, err), s.db.Close())
	}
	return s, nil
}

// Close closes the database. Calls that are still running fail; the Store is
// of no use afterwards.
func (s *Store) Close() error {
	s.trim()
	return explain(context.Background(), s.path, s.db.Close())
}

// columns are those of a Record, in the order of fields.
const columns = `vm_id, profile, backend, isolation, vcpu_count, mem_mib, ttl_seconds,
	created_at, expires_at, state, metadata, owner, boot_id`

// Insert adds r, unless there are maxActive VMs or more already: then the error
// carries vm.CodeCapacityExceeded. Every row counts, whatever its state, so
// that concurrent callers never make more than maxActive. An ID that is there
// already is an error with vm.CodeInternal.
func (s *Store) Insert(ctx context.Context, r Record, maxActive int) error {
	args, err := fields(r)
	if err != nil {
		return err
	}
	// A statement alone is a transaction, and SQLite begins one that writes
	// with the write lock, as BEGIN IMMEDIATE does, before the count is read.
	res, err := s.db.ExecContext(ctx, `INSERT INTO vms (`+columns+`)
		SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ? WHERE (SELECT count(*) FROM vms) < ?`, append(args, maxActive)...)
	if err != nil {
		return explain(ctx, s.path, err)
	}
	n, err := res.RowsAffected()
	if err != nil {
		return explain(ctx, s.path, err)
	}
	if n == 0 {
		return vm.Errorf(vm.CodeCapacityExceeded, "max active VMs reached (%d); delete old VMs first", maxActive).
			WithHint("wait for one to end, or raise PYRO_MAX_ACTIVE_VMS")
	}
	return nil
}

// Get returns the VM named id, or an error with vm.CodeVMNotFound.
func (s *Store) Get(ctx context.Context, id vm.ID) (Record, error) {
	return s.one(ctx, s.db, id)
}

// List returns all VMs, the oldest first; VMs of the same microsecond are in
// the order of their IDs.
func (s *Store) List(ctx context.Context) ([]Record, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT `+columns+` FROM vms ORDER BY created_at, vm_id`)
	if err != nil {
		return nil, explain(ctx, s.path, err)
	}
	defer func() { _ = rows.Close() }() // reports nothing that Err does not
	var list []Record
	for rows.Next() {
		r, err := scan(rows)
		if err != nil {
			return nil, explain(ctx, s.path, err)
		}
		list = append(list, r)
	}
	return list, explain(ctx, s.path, rows.Err())
}

// Update lets change edit the VM named id and writes it back, in one
// transaction: nobody else writes in between. The error carries
// vm.CodeVMNotFound if there is no such VM. An error of change is returned as
// it is, and nothing is written. change must not touch the ID (the error
// carries vm.CodeInternal) nor use s, which would wait for itself.
func (s *Store) Update(ctx context.Context, id vm.ID, change func(*Record) error) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return explain(ctx, s.path, err)
	}
	defer func() { _ = tx.Rollback() }() // does nothing after Commit; before it, nothing has happened yet
	r, err := s.one(ctx, tx, id)
	if err != nil {
		return err
	}
	if err := change(&r); err != nil {
		return err
	}
	if r.ID != id {
		return vm.Errorf(vm.CodeInternal, "an update of VM %s changed its vm_id to %q", id, r.ID)
	}
	args, err := fields(r)
	if err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, `UPDATE vms SET (`+columns+`) = (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		WHERE vm_id = ?`, append(args, string(id))...); err != nil {
		return explain(ctx, s.path, err)
	}
	return explain(ctx, s.path, tx.Commit())
}

// Delete removes the VM named id and reports whether it was there. Of several
// callers at once, exactly one is told that it was.
func (s *Store) Delete(ctx context.Context, id vm.ID) (existed bool, err error) {
	res, err := s.db.ExecContext(ctx, `DELETE FROM vms WHERE vm_id = ?`, string(id))
	if err != nil {
		return false, explain(ctx, s.path, err)
	}
	n, err := res.RowsAffected()
	return n > 0, explain(ctx, s.path, err)
}

// queryer is a database or a transaction.
type queryer interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// one reads the VM named id through q.
func (s *Store) one(ctx context.Context, q queryer, id vm.ID) (Record, error) {
	r, err := scan(q.QueryRowContext(ctx, `SELECT `+columns+` FROM vms WHERE vm_id = ?`, string(id)))
	if errors.Is(err, sql.ErrNoRows) {
		return Record{}, vm.Errorf(vm.CodeVMNotFound, "VM %s not found", id).
			WithHint("it may have expired or been deleted; list the VMs to see those there are")
	}
	return r, explain(ctx, s.path, err)
}

// fields returns r as values for columns.
func fields(r Record) ([]any, error) {
	metadata := r.Metadata
	if metadata == nil {
		metadata = map[string]string{} // the contract's metadata is an object, never null
	}
	text, err := json.Marshal(metadata)
	if err != nil {
		return nil, fmt.Errorf("encode the metadata of VM %s: %w", r.ID, err)
	}
	return []any{
		string(r.ID), r.Profile, string(r.Backend), string(r.Isolation), r.VCPUCount, r.MemMiB, r.TTLSeconds,
		r.CreatedAt.UnixMicro(), r.ExpiresAt.UnixMicro(), string(r.State), string(text), r.Owner, r.BootID,
	}, nil
}

// scan reads one row of columns.
func scan(row interface{ Scan(...any) error }) (Record, error) {
	var r Record
	var created, expires int64
	var metadata []byte
	if err := row.Scan(
		&r.ID, &r.Profile, &r.Backend, &r.Isolation, &r.VCPUCount, &r.MemMiB, &r.TTLSeconds,
		&created, &expires, &r.State, &metadata, &r.Owner, &r.BootID,
	); err != nil {
		return Record{}, err
	}
	r.CreatedAt.Time = time.UnixMicro(created)
	r.ExpiresAt.Time = time.UnixMicro(expires)
	err := json.Unmarshal(metadata, &r.Metadata)
	if err == nil && r.Metadata == nil {
		err = errors.New("it is null")
	}
	if err != nil {
		return Record{}, &damage{fmt.Errorf("decode the metadata of VM %s: %w", r.ID, err)}
	}
	return r, nil
}
