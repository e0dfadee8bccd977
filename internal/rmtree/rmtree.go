// Package rmtree removes directory trees that others have filled.
package rmtree

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// Remove removes path and all below it, as os.RemoveAll does, and also where
// directories lack their owner's permission to be read, entered or emptied: a
// program can leave such, and an ordinary user cannot remove what is in them
// otherwise. A path that does not exist is no error. Symbolic links below the
// directory that holds path are removed, never followed.
func Remove(path string) error {
	root, err := os.OpenRoot(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	name := filepath.Base(path)
	err = root.RemoveAll(name)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	// A directory's own entry comes before it is read, and opens it up; what
	// fails here shows in the end.
	_ = fs.WalkDir(root.FS(), name, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			_ = root.Chmod(p, 0o700)
		}
		return nil
	})
	return root.RemoveAll(name)
}
