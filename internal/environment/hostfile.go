package environment

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// facts tell two states of a file apart. The change time alone nearly would:
// it moves with content, mode and name, and no one can set it.
type facts struct {
	mode         uint32
	size         int64
	inode        uint64
	mtime, ctime int64 // nanoseconds
}

// factsOf returns st's facts. The device is not among them: its number may be
// another after a restart.
func factsOf(st *unix.Stat_t) facts {
	return facts{st.Mode, st.Size, st.Ino, st.Mtim.Nano(), st.Ctim.Nano()}
}

// is reports whether the facts are of a file of the type format, as S_IFREG.
func (f facts) is(format uint32) bool { return f.mode&unix.S_IFMT == format }

// append appends the facts to b.
func (f facts) append(b []byte) []byte {
	for _, n := range [...]uint64{uint64(f.mode), uint64(f.size), f.inode, uint64(f.mtime), uint64(f.ctime)} {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	return b
}

// appendText appends text to b such that its end is known.
func appendText(b []byte, text string) []byte {
	return append(binary.LittleEndian.AppendUint64(b, uint64(len(text))), text...)
}

// entry is a file, a directory or a symbolic link of the host. It is named by
// an open directory, because a path could lead elsewhere by the time it is
// opened.
type entry struct {
	dirFD int
	name  string
	path  string // below the root, in the host and inside
	facts facts
	// target is where a link that is kept leads.
	target string
	// foreign marks a file that a link at path led to and that stands there
	// inside.
	foreign bool
	place   place
}

// stat reads the facts of name in dirFD, not following a link.
func stat(dirFD int, name string) (facts, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dirFD, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return facts{}, &os.PathError{Op: "lstat", Path: name, Err: err}
	}
	return factsOf(&st), nil
}

// readlink reads the target of the link e.
func readlink(e entry) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(e.dirFD, e.name, buf)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		return "", errChanged // it was a link a moment ago
	}
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: e.path, Err: err}
	}
	return string(buf[:n]), nil
}

// openDir opens a directory that is not a link.
func openDir(dirFD int, name string) (int, error) {
	fd, err := unix.Openat(dirFD, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return fd, nil
}

// openPath opens the directory at a clean path below the root. It returns -1
// where there is none that anyone may enter, or a link on the way.
func (s *scan) openPath(rel string) (int, error) {
	fd, err := openDir(s.root, ".")
	if err != nil {
		return -1, err
	}
	for _, name := range splitPath(rel) {
		f, err := stat(fd, name)
		if err != nil || !f.is(unix.S_IFDIR) || f.mode&anyoneEnters == 0 {
			return -1, ignoreAbsent(errors.Join(err, unix.Close(fd)))
		}
		next, err := openDir(fd, name)
		if err = errors.Join(err, unix.Close(fd)); err != nil {
			return -1, ignoreAbsent(err)
		}
		fd = next
	}
	return fd, nil
}

// dirent is what a directory says of a name in it.
type dirent struct {
	name  string
	inode uint64
	link  bool // a symbolic link; false where the directory does not tell
}

// readDir returns what is in an open directory that was not read yet, by name,
// so that the key does not depend on the order of the disk. It reads into buf.
func readDir(dirFD int, buf []byte) ([]dirent, error) {
	var all []dirent
	for {
		n, err := unix.ReadDirent(dirFD, buf)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, fmt.Errorf("list a directory: %w", err)
		case n == 0:
			slices.SortFunc(all, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
			return all, nil
		default:
			all = appendDirents(all, buf[:n])
		}
	}
}

// appendDirents appends what the kernel wrote to b, a row of struct
// linux_dirent64 (see getdents(2)).
func appendDirents(all []dirent, b []byte) []dirent {
	const lengthAt, typeAt, nameAt = 16, 18, 19
	for len(b) > nameAt {
		d := b[:binary.NativeEndian.Uint16(b[lengthAt:])]
		b = b[len(d):]
		name, _, _ := bytes.Cut(d[nameAt:], []byte{0})
		if s := string(name); s != "." && s != ".." {
			all = append(all, dirent{s, binary.NativeEndian.Uint64(d), d[typeAt] == unix.DT_LNK})
		}
	}
	return all
}

// ignoreAbsent returns nil for an error that says that there is nothing to
// read, or nothing for this user.
func ignoreAbsent(err error) error {
	for _, absent := range []error{unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.ENXIO, unix.EACCES, unix.EPERM} {
		if errors.Is(err, absent) {
			return nil
		}
	}
	return err
}

// resolved is where a link at a path without links leads if there are none on
// its way either: a clean path below the root.
func resolved(link, target string) string {
	if !path.IsAbs(target) {
		target = "/" + path.Dir(link) + "/" + target
	}
	return path.Clean(target)[1:]
}
