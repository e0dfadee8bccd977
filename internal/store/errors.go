package store

import (
	"context"
	"database/sql"
	"errors"
	"syscall"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"pyro/internal/vm"
)

// damage is an error that only a damaged database gives and that SQLite itself
// cannot see.
type damage struct{ error }

func (d *damage) Unwrap() error { return d.error }

// result returns SQLite's primary result code of err, or 0.
func result(err error) int { return extended(err) & 0xff }

// extended returns SQLite's extended result code of err, or 0.
func extended(err error) int {
	var e *sqlite.Error
	if errors.As(err, &e) {
		return e.Code()
	}
	return sqlite3.SQLITE_OK
}

// isBusy reports whether err says that another connection holds a lock.
func isBusy(err error) bool { return result(err) == sqlite3.SQLITE_BUSY }

// explain turns an error of the database at path, met under ctx, into one with
// a code, and with a hint where a person can act. It returns nil for nil, and
// an error that has a code already as it is.
func explain(ctx context.Context, path string, err error) error {
	var known *vm.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	code := result(err)
	// Once the context has ended, database/sql rolls back by itself and SQLite
	// stops where it is: both then report the effect and not the cause.
	if ctx.Err() != nil && (errors.Is(err, sql.ErrTxDone) || code == sqlite3.SQLITE_INTERRUPT) {
		err = ctx.Err()
	}
	unavailable := func(what, hint string) error {
		return vm.Errorf(vm.CodeStateUnavailable, "the state database %s %s: %w", path, what, err).WithHint(hint)
	}
	var damaged *damage
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return vm.Errorf(vm.CodeCanceled, "stopped using the state database %s: %w", path, err)
	case errors.As(err, &damaged), code == sqlite3.SQLITE_CORRUPT, code == sqlite3.SQLITE_NOTADB:
		return unavailable("is damaged", "move "+path+" away, with the files of the same name ending in -wal and -shm: pyro then starts with an empty one, "+
			"and VMs that are still running end when their time is up")
	case code == sqlite3.SQLITE_FULL, extended(err) == sqlite3.SQLITE_IOERR_SHMSIZE, errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return unavailable("cannot grow, the disk is full", "free some space on the disk or quota that it is on")
	case code == sqlite3.SQLITE_BUSY, code == sqlite3.SQLITE_LOCKED, code == sqlite3.SQLITE_PROTOCOL:
		return unavailable("is locked by another process", "try again; if this lasts, `fuser "+path+"` names the processes that have it open")
	case code == sqlite3.SQLITE_IOERR:
		return unavailable("cannot be read or written", "if the disk that it is on is full (df), free some space; if it fails, dmesg says how")
	case code == sqlite3.SQLITE_READONLY, code == sqlite3.SQLITE_CANTOPEN, code == sqlite3.SQLITE_PERM, isErrno(err):
		return unavailable("cannot be opened for writing",
			"its directory must exist, be yours and be on a disk that is mounted for writing; PYRO_BASE_DIR sets another")
	}
	return vm.Errorf(vm.CodeInternal, "use the state database %s: %w", path, err)
}

// isErrno reports whether the operating system gave err.
func isErrno(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno)
}
