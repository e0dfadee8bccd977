package environment

import (
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"pyro/internal/need"
)

// realHost skips a test where the machine that it runs on has no /usr.
func realHost(t testing.TB) {
	if info, err := os.Stat("/usr"); err != nil || !info.IsDir() {
		need.Missing(t, need.GVisor, "this machine has no /usr")
	}
}

// expected reports whether something at rel may be in a root, by the lists.
func expected(rel string) bool {
	dirs := []string{}
	for _, d := range hostDirs() {
		dirs = append(dirs, d.path)
	}
	for _, p := range hostPlaces() {
		if p.listed(rel) {
			return true
		}
		for dir := p.dir; dir != "."; dir = path.Dir(dir) {
			dirs = append(dirs, dir)
		}
	}
	return slices.Contains(append(dirs, usrLinks()...), rel) ||
		slices.ContainsFunc(hostFiles(""), func(f madeFile) bool { return f.path == rel }) ||
		slices.ContainsFunc(hostLinks(), func(l madeLink) bool { return l.path == rel })
}

// TestHostOfThisMachine checks all that is inside of the environment that is
// made here.
func TestHostOfThisMachine(t *testing.T) {
	realHost(t)
	r, err := Host(t.Context(), t.TempDir())
	check(t, err)
	check(t, filepath.WalkDir(r.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == r.Dir {
			return err
		}
		rel, _ := filepath.Rel(r.Dir, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if !expected(rel) {
			t.Errorf("/%s is not on any list", rel)
		}
		if st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 || int(st.Uid) != os.Geteuid() {
			t.Errorf("/%s has mode %o and owner %d", rel, st.Mode, st.Uid)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
		case unix.S_IFREG:
			if st.Mode&0o7777 != modeFile && st.Mode&0o7777 != modeProgram {
				t.Errorf("/%s has mode %o", rel, st.Mode)
			}
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			check(t, err)
			leads := resolved(rel, target)
			if !under(leads, append(usrLinks(), "usr", "run", "proc/self/mounts")) && !expected(leads) {
				t.Errorf("/%s leads to /%s", rel, leads)
			}
		default:
			t.Errorf("/%s is a special file: mode %o", rel, st.Mode)
		}
		return nil
	}))
	noSecrets(t, r.Dir)
}

// noSecrets looks for what root alone can read on this machine, in case root
// runs the test.
func noSecrets(t *testing.T, dir string) {
	shadow, _ := os.ReadFile("/etc/shadow")
	id, _ := os.ReadFile("/etc/machine-id")
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		for line := range strings.Lines(string(shadow) + string(id)) {
			if line = strings.TrimSpace(line); len(line) > 8 && strings.Contains(string(content), line) {
				t.Errorf("%s holds a line of a secret file", path)
			}
		}
		if strings.Contains(string(content), "PRIVATE KEY-----") {
			t.Errorf("%s holds a private key", path)
		}
		return err
	}))
}

// BenchmarkHostPrepared measures what every command pays: finding out that the
// environment is prepared.
func BenchmarkHostPrepared(b *testing.B) {
	realHost(b)
	dir := b.TempDir()
	_, err := Host(b.Context(), dir)
	check(b, err)
	for b.Loop() {
		_, err := Host(b.Context(), dir)
		check(b, err)
	}
}

// BenchmarkHostPrepare measures what the first command after a change pays.
// ext4 takes up to ten times as long where the directory's block group has
// many inodes that were freed within the last seconds; tmpfs does not.
func BenchmarkHostPrepare(b *testing.B) {
	realHost(b)
	dir := b.TempDir()
	for b.Loop() {
		r, err := Host(b.Context(), dir)
		check(b, err)
		b.StopTimer()
		check(b, removeTree(r.Dir))
		b.StartTimer()
	}
}
