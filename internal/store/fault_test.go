package store

import (
	"bytes"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"pyro/internal/vm"
)

func TestMigrations(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	steps := migrations()
	s := reopen(t, path)
	r := insert(t, s)

	// A step that fails halfway leaves nothing of itself.
	bad := append(steps, `CREATE TABLE half (a); CREATE TABLE vms (a)`)
	if _, err := open(t.Context(), path, busyTimeout, bad); err == nil || !strings.Contains(err.Error(), "migrate to schema version 2") {
		t.Errorf("error %v, want one that names the version", err)
	}
	good := append(steps, `CREATE TABLE half (a)`, `ALTER TABLE vms ADD COLUMN note TEXT NOT NULL DEFAULT 'none'`)
	newer, err := open(t.Context(), path, busyTimeout, good)
	if err != nil {
		t.Fatal(err)
	}
	var note string
	if err := newer.db.QueryRow("SELECT note FROM vms").Scan(&note); err != nil || note != "none" {
		t.Errorf("new column holds %q, %v", note, err)
	}
	if err := newer.Close(); err != nil {
		t.Fatal(err)
	}

	// The old process goes on; another old one does not begin.
	if _, err := s.Get(t.Context(), r.ID); err != nil {
		t.Error(err)
	}
	insert(t, s)
	_, err = Open(t.Context(), path)
	wantUnavailable(t, err, path, "schema version 3, this pyro knows 1", "use that newer pyro")
}

func TestSchema(t *testing.T) {
	s := testStore(t)
	for pragma, want := range map[string]string{
		"user_version": "1", "journal_mode": "wal", "synchronous": "1", "busy_timeout": "5000", "foreign_keys": "1", "integrity_check": "ok",
	} {
		var got string
		if err := s.db.QueryRow("PRAGMA " + pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %q, %v, want %q", pragma, got, err, want)
		}
	}
}

func TestNewerIsUntouched(t *testing.T) {
	t.Run("version in the log", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "state.db")
		newer, err := open(t.Context(), path, busyTimeout, append(migrations(), `CREATE TABLE other (a)`))
		if err != nil {
			t.Fatal(err)
		}
		if err := newer.Close(); err != nil {
			t.Fatal(err)
		}
		wantRefused(t, path, path, path+"-wal")
	})
	t.Run("no log", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "state.db")
		db, err := sql.Open("sqlite", path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := db.Exec("CREATE TABLE other (a); PRAGMA user_version = 99"); err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		wantRefused(t, path, path)
	})
}

// wantRefused checks that the database at path is refused as too new, and that
// the bytes of files stay as they are.
func wantRefused(t *testing.T, path string, files ...string) {
	t.Helper()
	var before [][]byte
	for _, f := range files {
		before = append(before, read(t, f))
	}
	_, err := Open(t.Context(), path)
	wantUnavailable(t, err, path, "written by a newer pyro", "use that newer pyro")
	for i, f := range files {
		if !bytes.Equal(read(t, f), before[i]) {
			t.Errorf("%s has changed", f)
		}
	}
}

func TestDamaged(t *testing.T) {
	t.Run("not a database", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "state.db")
		write(t, path, bytes.Repeat([]byte("These are not the bytes of a database.\n"), 300))
		_, err := Open(t.Context(), path)
		wantUnavailable(t, err, path, "is damaged", "move "+path+" away")
	})
	damage := func(t *testing.T, edit func([]byte) []byte) string {
		s := testStore(t)
		for range 20 {
			insert(t, s)
		}
		if _, err := s.db.Exec("PRAGMA wal_checkpoint(TRUNCATE)"); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		write(t, s.path, edit(read(t, s.path)))
		return s.path
	}
	for name, edit := range map[string]func([]byte) []byte{
		"page overwritten": func(b []byte) []byte {
			copy(b[4096:], bytes.Repeat([]byte{0xa5}, 4096))
			return b
		},
		"end cut off": func(b []byte) []byte { return b[:4096] },
	} {
		t.Run(name, func(t *testing.T) {
			path := damage(t, edit)
			s, err := Open(t.Context(), path)
			if err == nil {
				_, err = s.List(t.Context())
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
			wantUnavailable(t, err, path, "is damaged", "move "+path+" away")
		})
	}
	t.Run("version", func(t *testing.T) {
		path := damage(t, func(b []byte) []byte {
			b[60] = 0xff // the highest byte of user_version, at offset 60 of the header (sqlite.org/fileformat.html)
			return b
		})
		_, err := Open(t.Context(), path)
		wantUnavailable(t, err, path, "is damaged", "move "+path+" away")
	})
	t.Run("log", func(t *testing.T) {
		// A log whose bytes are not what was written ends there: that is what
		// a loss of power leaves.
		s := testStore(t)
		insert(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		b := read(t, s.path+"-wal")
		write(t, s.path+"-wal", b[:len(b)-100])
		list, err := reopen(t, s.path).List(t.Context())
		if len(list) != 0 || err != nil {
			t.Errorf("list %v, %v, want none", list, err)
		}
	})
}

func TestUnusablePath(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "file"), nil)
	if err := os.Mkdir(filepath.Join(dir, "directory"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"below a file":     filepath.Join(dir, "file", "state.db"),
		"no directory":     filepath.Join(dir, "none", "state.db"),
		"is a directory":   filepath.Join(dir, "directory"),
		"not a filesystem": "/proc/self/state.db",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Open(t.Context(), path)
			wantUnavailable(t, err, path, "cannot be opened for writing", "PYRO_BASE_DIR")
		})
	}
}

func TestReadOnly(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	dir := mount(t, 1024)
	path := filepath.Join(dir, "state.db")
	s, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	insert(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), filepath.Join(dir, "other.db"))
	wantUnavailable(t, err, dir, "read-only file system", "mounted for writing")

	if s, err = Open(t.Context(), path); err == nil {
		err = errors.Join(s.Insert(t.Context(), record(), 9), s.Close())
	}
	wantUnavailable(t, err, path, "cannot be opened for writing", "mounted for writing")
}

func TestDiskFull(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	dir := mount(t, 128)
	path := filepath.Join(dir, "state.db")
	s := reopen(t, path)
	made := 0
	var err error
	for ; err == nil && made < 1000; made++ {
		err = s.Insert(t.Context(), record(), 1000)
	}
	made--
	wantUnavailable(t, err, path, "the disk is full", "free some space")
	if list, err := s.List(t.Context()); len(list) != made || err != nil {
		t.Errorf("%d VMs, %v, want all %d that were made", len(list), err, made)
	}
	_, err = Open(t.Context(), filepath.Join(dir, "other.db"))
	wantUnavailable(t, err, dir, "the disk is full", "free some space")

	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT, "size=1024k"); err != nil {
		t.Fatal(err)
	}
	insert(t, s)
}

func TestDatabaseFull(t *testing.T) {
	s := testStore(t)
	// SQLite reports the same for its own limit as for the disk's.
	if _, err := s.db.Exec("PRAGMA max_page_count = 3"); err != nil {
		t.Fatal(err)
	}
	var err error
	for i := 0; err == nil && i < 1000; i++ {
		err = s.Insert(t.Context(), record(), 1000)
	}
	wantUnavailable(t, err, s.path, "the disk is full", "free some space")
	if _, err := s.List(t.Context()); err != nil {
		t.Error(err)
	}
}

// A database that is deleted while it is open must not come back empty.
func TestDeletedWhileOpen(t *testing.T) {
	s := testStore(t)
	if err := os.RemoveAll(filepath.Dir(s.path)); err != nil {
		t.Fatal(err)
	}
	s.db.SetMaxIdleConns(0) // makes the next call connect again, as after a cancellation
	_, err := s.List(t.Context())
	wantUnavailable(t, err, s.path, "unable to open database file", "its directory must exist")
	if err := os.MkdirAll(filepath.Dir(s.path), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := s.List(t.Context()); !errors.Is(err, vm.CodeStateUnavailable) {
		t.Errorf("error %v, want code %s", err, vm.CodeStateUnavailable)
	}
}

func TestClosed(t *testing.T) {
	s := testStore(t)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.List(t.Context()); !errors.Is(err, vm.CodeInternal) {
		t.Errorf("error %v, want code %s", err, vm.CodeInternal)
	}
}

// read returns the bytes of a file.
func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// write makes a file of b.
func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
