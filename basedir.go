package pyro

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"unicode/utf8"

	"pyro/internal/vm"
)

// databaseName is the file in the base directory that tells that it is pyro's.
const databaseName = "state.db"

// openBaseDir makes the directory that pyro's state lives in, if need be, sees
// to it that nobody else can get into it, and returns its path without
// symbolic links: gVisor follows none.
func openBaseDir(option string) (string, error) {
	dir, err := baseDir(option)
	if err != nil {
		return "", err
	}
	if !utf8.ValidString(dir) {
		return "", baseDirError(dir, errors.New("its name is not UTF-8"))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", baseDirError(dir, err)
	}
	resolved, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", baseDirError(dir, err)
	}
	if err := makePrivate(resolved); err != nil {
		return "", baseDirError(resolved, err)
	}
	return resolved, nil
}

// baseDirError says that dir cannot be the base directory.
func baseDirError(dir string, err error) error {
	return vm.Errorf(vm.CodeStateUnavailable, "use %s for pyro's state: %w", dir, err).
		WithHint("set PYRO_BASE_DIR to a directory that is yours alone, writable, and has room")
}

// baseDir returns the directory that is asked for, or the usual one.
func baseDir(option string) (string, error) {
	for _, dir := range []string{option, os.Getenv("PYRO_BASE_DIR")} {
		if dir != "" {
			abs, err := filepath.Abs(dir)
			if err != nil {
				return "", fmt.Errorf("resolve the base directory: %w", err)
			}
			return abs, nil
		}
	}
	if os.Geteuid() == 0 {
		return "/var/lib/pyro", nil
	}
	// The XDG base directory specification has relative paths ignored.
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "pyro"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", vm.Errorf(vm.CodeStateUnavailable, "find a place for pyro's state: %w", err).
			WithHint("set PYRO_BASE_DIR to a directory of your own")
	}
	return filepath.Join(home, ".local", "state", "pyro"), nil
}

// makePrivate closes dir to others. It changes only what is pyro's, or nobody's
// yet: somebody who names /tmp or a home directory by mistake must not lose it.
func makePrivate(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return errors.New("it is not a directory")
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("it belongs to user %d, not to you (%d)", st.Uid, os.Geteuid())
	}
	switch perm := info.Mode().Perm(); {
	case perm&0o077 == 0:
		return nil
	case perm&0o002 != 0:
		return fmt.Errorf("anybody may write in it (mode %v)", info.Mode())
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	_, err = os.Lstat(filepath.Join(dir, databaseName))
	if len(entries) > 0 && err != nil {
		return fmt.Errorf("others may enter it (mode %v), and there are files in it that are not pyro's", info.Mode())
	}
	return os.Chmod(dir, 0o700)
}

// makeDirs makes the directories in the base directory.
func makeDirs(dirs ...string) error {
	for _, dir := range dirs {
		err := os.Mkdir(dir, 0o700)
		if errors.Is(err, fs.ErrExist) {
			var info os.FileInfo
			if info, err = os.Stat(dir); err == nil && !info.IsDir() {
				err = fmt.Errorf("%s is in the way", dir)
			}
		}
		if err != nil {
			return baseDirError(filepath.Dir(dir), err)
		}
	}
	return nil
}
