package environment

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The modes of all that is copied. The host's are not taken over: what is
// inside is for anyone, and nothing is set-user-ID.
const (
	modeDir     = 0o755
	modeFile    = 0o644
	modeProgram = 0o755
)

// builder makes a root in a directory that does not exist yet. What it makes
// belongs to whoever runs it, which is root inside.
type builder struct {
	root string
	made map[string]bool // directories, by path below root
	late []entry         // directories whose times are set last
}

// begin makes the root with the directories that every root has.
func (b *builder) begin() error {
	b.made = map[string]bool{".": true}
	if err := makeDir(b.root, modeDir); err != nil {
		return err
	}
	for _, d := range hostDirs() {
		if err := b.mkdir(d.path, d.mode); err != nil {
			return err
		}
	}
	return nil
}

// add makes what stands for e inside.
func (b *builder) add(e entry) error {
	if err := b.parents(e.path); err != nil {
		return err
	}
	switch {
	case e.facts.is(unix.S_IFDIR):
		b.late = append(b.late, e)
		return b.mkdir(e.path, modeDir)
	case e.facts.is(unix.S_IFLNK):
		return b.symlink(e.path, e.target, e.facts)
	}
	content, err := read(e)
	if err != nil || e.place.certs && !public(content, e.foreign) {
		return ignoreAbsent(err)
	}
	mode := fs.FileMode(modeFile)
	if e.facts.mode&anyoneEnters != 0 {
		mode = modeProgram
	}
	return b.write(e.path, content, mode, e.facts)
}

// finish adds what is not of the host.
func (b *builder) finish(shell string) error {
	for _, l := range hostLinks() {
		if err := b.symlink(l.path, l.target, facts{}); err != nil {
			return err
		}
	}
	for _, f := range hostFiles(shell) {
		if err := b.write(f.path, []byte(f.text), modeFile, facts{}); err != nil {
			return err
		}
	}
	for _, e := range b.late {
		if err := setTimes(b.at(e.path), e.facts); err != nil {
			return err
		}
	}
	return nil
}

// at is where a path of the root is on the host.
func (b *builder) at(rel string) string { return filepath.Join(b.root, rel) }

// parents makes the directories above rel that are not there.
func (b *builder) parents(rel string) error {
	dir := path.Dir(rel)
	if b.made[dir] {
		return nil
	}
	if err := b.parents(dir); err != nil {
		return err
	}
	return b.mkdir(dir, modeDir)
}

// mkdir makes a directory of the root.
func (b *builder) mkdir(rel string, mode fs.FileMode) error {
	b.made[rel] = true
	return makeDir(b.at(rel), mode)
}

// makeDir makes a directory with just this mode, whatever the umask.
func makeDir(dir string, mode fs.FileMode) error {
	err := os.Mkdir(dir, 0o700)
	if err == nil {
		err = os.Chmod(dir, mode)
	}
	return stateError("make a directory", err)
}

// symlink makes a link of the root.
func (b *builder) symlink(rel, target string, f facts) error {
	if err := os.Symlink(target, b.at(rel)); err != nil {
		return stateError("make a link", err)
	}
	return setTimes(b.at(rel), f)
}

// write makes a file of the root.
func (b *builder) write(rel string, content []byte, mode fs.FileMode, f facts) error {
	file, err := os.OpenFile(b.at(rel), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return stateError("make a file", err)
	}
	_, err = file.Write(content)
	if err == nil {
		err = file.Chmod(mode)
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return stateError("make a file", err)
	}
	return setTimes(b.at(rel), f)
}

// setTimes gives what is at name the modification time in f, if there is one.
func setTimes(name string, f facts) error {
	if f.mtime == 0 {
		return nil
	}
	t := unix.NsecToTimespec(f.mtime)
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return stateError("set a time", &os.PathError{Op: "utimensat", Path: name, Err: err})
	}
	return nil
}

// read returns the content of the file e as its facts describe it, or
// errChanged. The file may have been replaced since they were read: opening it
// must neither follow a link nor wait for a fifo's other end.
func read(e entry) ([]byte, error) {
	fd, err := unix.Openat(e.dirFD, e.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: e.path, Err: err}
	}
	f := os.NewFile(uintptr(fd), e.path)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: e.path, Err: err}
	}
	if factsOf(&st) != e.facts {
		return nil, errChanged
	}
	content := make([]byte, e.facts.size)
	if _, err := io.ReadFull(f, content); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, errChanged
	} else if err != nil {
		return nil, err
	}
	return content, nil
}

// public reports whether a file in a place of certificates may be shown. A key
// may not, wherever somebody put it; and what lies elsewhere must at least be a
// certificate.
func public(content []byte, foreign bool) bool {
	if bytes.Contains(content, []byte("PRIVATE KEY-----")) {
		return false
	}
	return !foreign ||
		bytes.Contains(content, []byte("-----BEGIN CERTIFICATE-----")) ||
		bytes.Contains(content, []byte("-----BEGIN TRUSTED CERTIFICATE-----"))
}
