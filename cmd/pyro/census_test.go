package main

import (
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pyro/internal/store"
	"pyro/internal/vm"
)

// censusTime is how long a VM whose owner was killed may take to vanish: the
// promise is 3 s.
const censusTime = 3 * time.Second

// census fails the test unless nothing is left of any VM that the world ever
// had. After a failure, whose runs were killed, only what lives counts.
func (w *world) census() {
	w.t.Helper()
	find := w.left
	if w.t.Failed() {
		find = func() []string { return w.leftRunning(w.born.all()) }
	}
	if left := poll(censusTime, find); len(left) > 0 {
		w.t.Errorf("%d things left behind: %s", len(left), strings.Join(left[:min(len(left), 10)], "; "))
	}
}

// left lists what is there of VMs: processes, mounts, sockets, control groups,
// files and rows.
func (w *world) left() []string {
	ids := w.born.all()
	left := w.leftRunning(ids)
	for _, id := range ids {
		left = append(left, cgroups("pyro-"+id)...)
	}
	left = append(left, leftFiles(filepath.Join(w.base, "vms"), "*")...)
	left = append(left, leftFiles(w.home, "*")...)
	left = append(left, leftFiles(w.tmp, "*")...)
	for _, id := range ids {
		for _, dir := range []string{"/tmp", "/run", "/var/run", "/dev/shm", "/var/tmp"} {
			left = append(left, leftFiles(dir, "*"+id+"*")...)
		}
	}
	if len(left) == 0 { // nobody is at the database any more
		left = w.rows()
	}
	return left
}

// leftRunning lists what is there of VMs in the kernel, control groups aside.
func (w *world) leftRunning(ids []string) []string {
	var left []string
	for _, p := range w.processes() {
		left = append(left, p.String())
	}
	left = append(left, linesWith("/proc/self/mountinfo", w.dir+"/")...)
	left = append(left, linesWith("/proc/net/unix", w.dir+"/")...)
	for _, id := range ids {
		left = append(left, linesWith("/proc/net/unix", id)...)
		left = append(left, linesWith("/proc/self/mountinfo", id)...)
	}
	return left
}

// leftFiles lists what matches in a directory that may be missing.
func leftFiles(dir, pattern string) []string {
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil {
		panic(err)
	}
	return found
}

// rows lists the VMs in the database.
func (w *world) rows() []string {
	path := filepath.Join(w.base, "state.db")
	if _, err := os.Stat(path); err != nil {
		return nil
	}
	s, err := store.Open(context.Background(), path)
	if err != nil {
		return []string{err.Error()}
	}
	records, err := s.List(context.Background())
	if err = errors.Join(err, s.Close()); err != nil {
		return []string{err.Error()}
	}
	var rows []string
	for _, r := range records {
		rows = append(rows, "row of vm "+string(r.ID))
	}
	return rows
}

// cgroups lists the control groups with a name, in all hierarchies.
func cgroups(name string) []string {
	var found []string
	filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == name {
			found = append(found, path)
		}
		return nil // what vanishes meanwhile is not it
	})
	return found
}

// idWatch knows the VMs that were ever made in a directory.
type idWatch struct {
	fd  int
	ids *[]string
}

// watchIDs watches a directory of VMs until the test ends.
func watchIDs(t testing.TB, dir string) idWatch {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	_, err = unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO)
	check(t, err)
	return idWatch{fd, new([]string)}
}

// all returns the VMs that there were.
func (w idWatch) all() []string {
	var buf [64 << 10]byte
	for {
		n, err := unix.Read(w.fd, buf[:])
		if n <= 0 || err != nil {
			return *w.ids
		}
		// inotify(7): watch, mask, cookie and the length of the name, four
		// bytes each; then the name, padded with zeros.
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:16]))
			name := strings.TrimRight(string(b[unix.SizeofInotifyEvent:end]), "\x00")
			if id, err := vm.ParseID(name); err == nil {
				*w.ids = append(*w.ids, string(id))
			}
			b = b[end:]
		}
	}
}

// TestCensus: the census sees all parts of a VM that is there, so that it can be
// believed when it sees none.
func TestCensus(t *testing.T) {
	w := newWorld(t)
	metadata := w.run("--json", "--", "true").json().Metadata
	p := w.start("--", "sh", "-c", "echo ready; "+loop)
	p.says("ready\n")
	found := strings.Join(append(w.left(), w.rows()...), "\n")
	parts := []string{`"shim"`, `"runsc-sandbox"`, `"runsc-gofer"`, filepath.Join(w.base, "vms") + "/", "row of vm "}
	if strings.HasPrefix(metadata["limit_memory"], "cgroup") {
		parts = append(parts, "/pyro-")
	}
	for _, part := range parts {
		if !strings.Contains(found, part) {
			t.Errorf("the census of a VM that runs lacks %s:\n%s", part, found)
		}
	}
	p.signal(unix.SIGINT)
	p.wait(endTime)
}
