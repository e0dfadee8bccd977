package store

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"net/url"
	"os"
	"reflect"
	"syscall"
	"time"

	"modernc.org/libc"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// logLimit is the size of the write-ahead log, in bytes, from which Close moves
// it into the database. A checkpoint costs three fsyncs, 3 to 15 ms on an
// SSD; reading the log when the database is opened costs 1.5 µs a page. At
// some 120 pages, which is 60 VMs made and deleted, the two weigh the same.
const logLimit = 512 << 10

// trimTimeout bounds the checkpoint in Close.
const trimTimeout = 2 * time.Second

// create makes an empty file for the database if nothing is at path, which
// SQLite takes for an empty database. SQLite would let others read it, and
// would give its log and index the same mode. mknod(2) makes a regular file
// without opening it: closing a descriptor of the database would drop the
// locks of other Stores in this process.
func create(path string) error {
	err := syscall.Mknod(path, syscall.S_IFREG|0o600, 0)
	if err == nil || errors.Is(err, syscall.EEXIST) {
		return nil
	}
	return fmt.Errorf("create it: %w", err)
}

// connector makes connections to one database.
type connector struct{ driver.Connector }

// newConnector returns a connector for the database at path, an absolute path.
func newConnector(path string, busy time.Duration) (connector, error) {
	dsn := url.URL{
		Scheme: "file", OmitHost: true, Path: path,
		RawQuery: "mode=rw" + // never make the file: see create
			"&_txlock=immediate" +
			fmt.Sprintf("&_pragma=busy_timeout(%d)", busy.Milliseconds()) +
			"&_pragma=foreign_keys(1)" +
			"&_pragma=synchronous(normal)",
	}
	c, err := sqlite.NewConnector(dsn.String())
	return connector{c}, err
}

// Connect opens one connection.
func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	keepLog(conn)
	return conn, nil
}

// keepLog tells SQLite to leave the write-ahead log as it is when the last
// connection closes, instead of moving it into the database and deleting it.
// Most commands are alone, so each would pay for a checkpoint: 3 to 15 ms on
// an SSD, against 1 ms for everything else. The next one to open the database
// reads the log, which trim keeps short.
//
// The driver offers no way to set this option of SQLite's, so its handle is
// read out of the driver's connection. Should a later driver hide it, every
// Close is slower and nothing else changes; a test tells.
func keepLog(conn driver.Conn) {
	fields := reflect.Indirect(reflect.ValueOf(conn))
	if fields.Kind() != reflect.Struct {
		return
	}
	handle := fields.FieldByName("db")
	if handle.Kind() != reflect.Uintptr || handle.IsZero() {
		return
	}
	tls := libc.NewTLS()
	defer tls.Close()
	args := libc.Xmalloc(tls, 16) // two variadic arguments
	if args == 0 {
		return
	}
	defer libc.Xfree(tls, args)
	sqlite3.Xsqlite3_db_config(tls, uintptr(handle.Uint()), sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE,
		libc.VaList(args, int32(1), uintptr(0)))
}

// trim moves a long write-ahead log into the database and empties it. SQLite
// does so itself after 1000 pages, for processes that keep the database open;
// processes that live for one command would leave it all to the one that
// happens to pass that mark, and make every opening slow on the way there.
//
// It fails where others are reading or the disk is full, and that costs
// nothing: the log holds all that it held, and the next Close tries again.
func (s *Store) trim() {
	info, err := os.Stat(s.path + "-wal")
	if err != nil || info.Size() < logLimit {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), trimTimeout)
	defer cancel()
	_, _ = s.db.ExecContext(ctx, "PRAGMA busy_timeout = 0; PRAGMA wal_checkpoint(TRUNCATE)")
}
