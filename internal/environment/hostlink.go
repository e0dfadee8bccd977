package environment

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// maxHops is how many links are followed to a certificate, as in the kernel.
const maxHops = 40

// link takes a symbolic link. It stays one where it leads to something that is
// inside as well: the VM follows it there, never on the host. A place of
// certificates may also link to a file elsewhere, which then stands inside in
// the link's stead.
func (s *scan) link(e entry) error {
	s.note(e.path, e.facts, "")
	if s.keep == nil && !e.place.certs {
		return nil // a link never changes its target: another link has other facts
	}
	target, err := readlink(e)
	if err != nil {
		return err
	}
	if s.inside(e, target) {
		e.target = target
		return s.offerLink(e)
	}
	if e.place.certs {
		return s.foreign(e, target)
	}
	return nil
}

// offerLink tells keep of the link e with all of its facts.
func (s *scan) offerLink(e entry) (err error) {
	if s.keep == nil {
		return nil
	}
	if e.facts, err = stat(e.dirFD, e.name); err != nil || !e.facts.is(unix.S_IFLNK) {
		return errChanged
	}
	return s.keep(e)
}

// inside reports whether a link's target is on the allow-list or in what is
// shown as it is. For certificates, /usr/local is not: it often is a file
// system or a link of its own, and programs in a VM should trust what they
// trust outside.
func (s *scan) inside(e entry, target string) bool {
	rel := resolved(e.path, target)
	if e.place.certs && under(rel, []string{"usr/local"}) {
		return false
	}
	if e.place.listed(rel) || under(rel, s.lent) { // nearly all
		return true
	}
	return slices.ContainsFunc(s.places, func(p place) bool { return p.listed(rel) })
}

// foreign takes the file that a link at e leads to, if it is in one of
// certificateHomes and anyone can get there.
func (s *scan) foreign(e entry, target string) error {
	found, err := s.follow(path.Dir(e.path), target)
	if err != nil || found.dirFD < 0 {
		return err
	}
	defer unix.Close(found.dirFD)
	if !found.facts.is(unix.S_IFREG) || !under(found.path, certificateHomes()) {
		return nil
	}
	source := found.path
	found.path, found.place, found.foreign = e.path, e.place, true
	return s.file(found, source)
}

// follow walks from the directory at a clean path to a link's target as the
// kernel would, but stays below the tree's root and enters only directories
// that anyone may enter. It returns where it ended, or an entry with dirFD -1
// where it cannot go on. The caller closes dirFD.
func (s *scan) follow(dir, target string) (entry, error) {
	at, todo := splitPath(dir), []string{} // at holds directories, never links
	for hops := 0; hops < maxHops; hops++ {
		if path.IsAbs(target) {
			at = nil
		}
		todo = append(splitPath(target), todo...)
		e, err := s.step(&at, &todo)
		if err != nil || e.dirFD < 0 || !e.facts.is(unix.S_IFLNK) {
			return e, err
		}
		target, err = readlink(e)
		if err = errors.Join(err, unix.Close(e.dirFD)); err != nil {
			return entry{dirFD: -1}, err
		}
	}
	return entry{dirFD: -1}, nil
}

// step walks todo from the directory at, up to a link or to the end. It returns
// where it ended and leaves in todo what is beyond.
func (s *scan) step(at, todo *[]string) (entry, error) {
	for len(*todo) > 0 {
		name := (*todo)[0]
		*todo = (*todo)[1:]
		fd, err := s.openPath(path.Join(*at...)) // also before .., which needs a directory
		if err != nil || fd < 0 {
			return entry{dirFD: -1}, err
		}
		if name == ".." {
			*at = (*at)[:max(len(*at)-1, 0)]
		} else {
			*at = append(*at, name)
			e := entry{dirFD: fd, name: name, path: path.Join(*at...)}
			if e.facts, err = stat(fd, name); err != nil {
				return entry{dirFD: -1}, ignoreAbsent(errors.Join(err, unix.Close(fd)))
			}
			if e.facts.is(unix.S_IFLNK) || len(*todo) == 0 {
				*at = (*at)[:len(*at)-1]
				return e, nil
			}
		}
		if err := unix.Close(fd); err != nil {
			return entry{dirFD: -1}, fmt.Errorf("close a directory: %w", err)
		}
	}
	return entry{dirFD: -1}, nil
}

// splitPath returns the names of a path.
func splitPath(p string) []string {
	names := strings.Split(p, "/")
	return slices.DeleteFunc(names, func(name string) bool { return name == "" || name == "." })
}
