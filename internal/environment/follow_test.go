package environment

import (
	"math/rand/v2"
	"path"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"pyro/internal/need"
)

// randomTree makes directories, files and links that lead anywhere, and returns
// the links.
func randomTree(h tree, r *rand.Rand) (links []string) {
	names := []string{"a", "b", "c", "d"}
	random := func() string {
		var p []string
		for range 1 + r.IntN(2) {
			p = append(p, names[r.IntN(len(names))])
		}
		return strings.Join(p, "/")
	}
	for _, dir := range names[:2] {
		h.dir(dir, 0o755)
		h.dir(dir+"/"+dir, 0o755)
	}
	for range 30 {
		rel := random()
		var st unix.Stat_t
		if unix.Lstat(h.at(path.Dir(rel)), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR || unix.Lstat(h.at(rel), &st) == nil {
			continue
		}
		if r.IntN(3) == 0 {
			h.file(rel, rel, 0o644)
			continue
		}
		target := strings.Repeat("../", r.IntN(3)) + random()
		if r.IntN(3) == 0 {
			target = "/" + target
		}
		if r.IntN(4) == 0 {
			target = "./" + strings.ReplaceAll(target, "/b", "//b/..")
		}
		h.link(rel, target)
		links = append(links, rel)
	}
	return links
}

// TestFollowGoesWhereTheKernelGoes compares follow with the kernel's own walk
// below a root.
func TestFollowGoesWhereTheKernelGoes(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	ends := 0
	for range 25 {
		h := newTree(t)
		links := randomTree(h, r)
		root, err := openDir(unix.AT_FDCWD, h.root)
		check(t, err)
		s := &scan{root: root}
		for _, link := range links {
			target, err := readlink(entry{dirFD: root, name: link, path: link})
			check(t, err)
			got, err := s.follow(path.Dir(link), target)
			check(t, err)
			want := kernelEnd(t, root, link)
			if got.dirFD < 0 || !got.facts.is(unix.S_IFREG) {
				got.facts = facts{}
			}
			if got.facts != want {
				t.Errorf("%s -> %s: at %q, not where the kernel is, in\n%s", link, target, got.path, listing(t, h.root))
			}
			if want != (facts{}) {
				ends++
			}
			if got.dirFD >= 0 {
				check(t, unix.Close(got.dirFD))
			}
		}
		check(t, unix.Close(root))
	}
	t.Logf("%d links led to files", ends)
	if ends == 0 {
		t.Error("no link led to a file")
	}
}

// kernelEnd is the file to which the kernel follows a link below root, if it
// comes to one.
func kernelEnd(t *testing.T, root int, link string) facts {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	fd, err := unix.Openat2(root, link, &how)
	for err == unix.EAGAIN { // somebody renames something, anywhere
		fd, err = unix.Openat2(root, link, &how)
	}
	if err == unix.ENOSYS || err == unix.EPERM {
		need.Missing(t, need.GVisor, "this machine has no openat2")
	}
	if err != nil {
		return facts{}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	check(t, unix.Fstat(fd, &st))
	if end := factsOf(&st); end.is(unix.S_IFREG) {
		return end
	}
	return facts{}
}
