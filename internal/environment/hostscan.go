package environment

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"path"

	"golang.org/x/sys/unix"

	"pyro/internal/vm"
)

// hostFormat is part of every key. It is raised when the same files of a host
// give another root: when a rule for copying them changes, or the directories
// of the root do.
const hostFormat = 1

// The bounds of what is taken from the host. A file that is too large is left
// out: nothing on the allow-list is, so it is something else. The totals stop
// a tree that was never meant to be copied, and say so.
const (
	maxHostFile    = 4 << 20
	maxHostTotal   = 64 << 20
	maxHostEntries = 20000
	maxHostDepth   = 32 // directories within one another; each holds a descriptor
)

// What anybody on the host may do, by the mode of a file or a directory. Root
// can do more, but takes no more.
const (
	anyoneReads  = 0o004
	anyoneEnters = 0o001
	anyoneLists  = anyoneReads | anyoneEnters
)

// scan looks at all that the environment is made of and tells keep of what
// goes into it, parents first. It may fail with errChanged.
//
// Without a keep only the state is wanted, which every use of the environment
// waits for; so what does not matter to the state is not read. The facts of
// every file do matter, not only those of the directories, because files are
// also changed in place. Those of links do not.
func (t hostTree) scan(ctx context.Context, keep func(entry) error) (hostState, error) {
	root, err := openDir(unix.AT_FDCWD, t.root)
	if err != nil {
		return hostState{}, fmt.Errorf("open the host's root: %w", err)
	}
	defer unix.Close(root)
	s := &scan{
		root: root, places: hostPlaces(), lent: append(usrLinks(), "usr"), keep: keep,
		hash: sha256.New(), list: make([]byte, 16<<10),
	}
	state, err := s.system(t.boot)
	if err != nil {
		return hostState{}, err
	}
	for _, p := range s.places {
		if err := s.place(ctx, p); err != nil {
			return hostState{}, fmt.Errorf("read the host's /%s: %w", p.dir, err)
		}
	}
	state.key = hex.EncodeToString(s.hash.Sum(nil)[:16])
	return state, nil
}

// scan is one look at a host. Everything that it looks at goes into hash: what
// is kept, but also what is left out and may be kept after a change.
type scan struct {
	root   int // descriptor of the host's root directory
	places []place
	lent   []string // what is shown as it is, as paths below the root
	keep   func(entry) error

	hash  hash.Hash
	buf   []byte // for what goes into hash
	list  []byte // for what readDir reads
	count int    // entries so far
	size  int64  // of the files so far
}

// note puts a path and what is known of it into the hash.
func (s *scan) note(path string, f facts, more string) {
	s.buf = f.append(appendText(s.buf[:0], path))
	s.buf = appendText(s.buf, more)
	s.hash.Write(s.buf)
}

// system looks at what is not copied: /usr, the names in / that lead there,
// and whether there is a bash.
func (s *scan) system(boot string) (hostState, error) {
	var usr unix.Stat_t
	if err := unix.Fstatat(s.root, "usr", &usr, 0); err != nil || !factsOf(&usr).is(unix.S_IFDIR) {
		return hostState{}, vm.Errorf(vm.CodeArtifactsMissing, "this machine has no /usr to lend to a VM").
			WithHint("use an image")
	}
	state := hostState{binds: []string{"/usr"}, shell: "/bin/sh"}
	for _, name := range usrLinks() {
		bound, err := s.usrLink(name)
		if err != nil {
			return hostState{}, err
		}
		if bound {
			state.binds = append(state.binds, "/"+name)
		}
	}
	for _, bash := range []string{"usr/bin/bash", "bin/bash"} {
		if _, err := stat(s.root, bash); err == nil {
			state.shell = "/bin/bash"
		}
	}
	s.note("", facts{mode: hostFormat}, boot)
	for _, f := range hostFiles(state.shell) {
		s.note(f.path, facts{}, f.text)
	}
	return state, nil
}

// usrLink looks at a name in / that stands for a directory of programs, and
// reports whether it is one itself.
func (s *scan) usrLink(name string) (bound bool, err error) {
	e := entry{dirFD: s.root, name: name, path: name}
	f, err := stat(s.root, name)
	switch {
	case err != nil:
		return false, ignoreAbsent(err)
	case f.is(unix.S_IFDIR):
		// What it holds is not copied, so only that it is there counts.
		e.facts = facts{mode: unix.S_IFDIR}
		s.note(e.path, e.facts, "")
		return true, s.offer(e)
	case f.is(unix.S_IFLNK):
		e.facts = f
		if e.target, err = readlink(e); err != nil {
			return false, err
		}
		s.note(e.path, e.facts, e.target)
		if under(resolved(e.path, e.target), s.lent) {
			return false, s.offer(e)
		}
	}
	return false, nil
}

// place looks at a part of the allow-list. What the host does not have is not
// missed.
func (s *scan) place(ctx context.Context, p place) error {
	dir, err := s.openPath(p.dir)
	if err != nil || dir < 0 {
		return err
	}
	defer unix.Close(dir)
	names := p.names
	if p.patterns() {
		all, err := readDir(dir, s.list)
		if err != nil {
			return err
		}
		names = nil
		for _, d := range all {
			if p.match(d.name) {
				names = append(names, d.name)
			}
		}
	}
	for _, name := range names {
		e := entry{dirFD: dir, name: name, path: path.Join(p.dir, name), place: p}
		if err := s.entry(ctx, e, maxHostDepth); err != nil {
			return err
		}
	}
	return nil
}

// entry looks at a name on the allow-list, or at one below it, which may have
// facts already.
func (s *scan) entry(ctx context.Context, e entry, depth int) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	if e.facts == (facts{}) {
		if e.facts, err = stat(e.dirFD, e.name); err != nil {
			return ignoreAbsent(err)
		}
	}
	s.count++
	if err := s.checkTotals(); err != nil {
		return err
	}
	switch {
	case e.facts.is(unix.S_IFLNK):
		return s.link(e)
	case e.facts.is(unix.S_IFREG):
		return s.file(e, "")
	case e.facts.is(unix.S_IFDIR):
		return s.dir(ctx, e, depth)
	}
	s.note(e.path, e.facts, "") // left out
	return nil
}

// file takes a file that anyone may read; more tells how it was found.
func (s *scan) file(e entry, more string) error {
	s.note(e.path, e.facts, more)
	if e.facts.mode&anyoneReads == 0 || e.facts.size > maxHostFile {
		return nil
	}
	s.size += e.facts.size
	if err := s.checkTotals(); err != nil {
		return err
	}
	return s.offer(e)
}

// dir takes a directory that anyone may list, with what is in it.
func (s *scan) dir(ctx context.Context, e entry, depth int) error {
	s.note(e.path, e.facts, "")
	if e.facts.mode&anyoneLists != anyoneLists || depth == 0 {
		return nil
	}
	fd, err := openDir(e.dirFD, e.name)
	if err != nil {
		return ignoreAbsent(err)
	}
	defer unix.Close(fd)
	if err := s.offer(e); err != nil {
		return err
	}
	all, err := readDir(fd, s.list)
	if err != nil {
		return err
	}
	for _, d := range all {
		below := entry{dirFD: fd, name: d.name, path: e.path + "/" + d.name, place: e.place}
		if d.link {
			// Nothing about a link can change without a change of the
			// directory, whose facts are known: another link has another inode.
			below.facts = facts{mode: unix.S_IFLNK, inode: d.inode}
		}
		if err := s.entry(ctx, below, depth-1); err != nil {
			return err
		}
	}
	return nil
}

// offer tells keep of e.
func (s *scan) offer(e entry) error {
	if s.keep == nil {
		return nil
	}
	return s.keep(e)
}

// checkTotals returns an error if what is taken from the host is too much.
func (s *scan) checkTotals() error {
	if s.count <= maxHostEntries && s.size <= maxHostTotal {
		return nil
	}
	return vm.Errorf(vm.CodeInternal, "there is too much to copy: at most %d files with %d MiB are copied", maxHostEntries, maxHostTotal>>20).
		WithHint("move away the large tree that is no configuration, or use an image")
}
