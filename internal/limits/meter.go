package limits

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// meter adds up the memory that the processes of the namespace hold:
//
//   - RssAnon of each process (proc_pid_status(5));
//   - what is allocated in each file in memory that has no name and that one of
//     them holds open. gVisor keeps all guest memory in such a file, a memfd
//     named runsc-memory (runsc/boot/loader.go), which its stub processes map.
//
// The files are found among the open descriptors in /proc/<pid>/fd and then
// asked for their size alone, which takes a few µs however much memory they
// hold. That, and the memory of the few processes that have much of their own
// (of a sandbox, one), is looked at each time. The other processes and all
// descriptors are gone through bit by bit, so that a guest with many processes
// neither costs much nor delays the rest. The size of a file counts what is
// swapped out, too.
//
// What the meter leaves out: page tables and other kernel memory, and files in
// memory that are mapped but no longer open. Anonymous memory that two
// processes share counts twice.
type meter struct {
	sys   system
	procs map[int]*process
	large []int             // processes looked at each time
	files map[fileID]string // a descriptor's name in /proc

	small    int64 // bytes of the other processes
	todo     []int // processes still to go through
	listed   time.Time
	spent    time.Duration // on going through those listed last
	lastPID  string        // when they were listed
	nextScan time.Time     // when the first search of descriptors is due
	blind    error         // why some file may be unknown
}

// process is what the meter remembers about a process.
type process struct {
	anon  int64 // bytes in meter.small
	large bool
	// The descriptors are searched when the process is new, then after ever
	// longer waits: processes open what they live on early.
	scanWait time.Duration
	scanAt   time.Time
}

type fileID struct{ dev, ino uint64 }

// How often the meter lists and goes through all processes, chunk of them at a
// time: at least every listAtMost; sooner if there are new ones or a search of
// descriptors is due, but not before listEvery, nor so often that it takes more than 1/listShare of the time.
// scanFirst and scanAtMost are the waits between searches of a process's
// descriptors.
const (
	listEvery  = 100 * time.Millisecond
	listAtMost = 2 * time.Second
	listShare  = 100
	chunk      = 32
	scanFirst  = 100 * time.Millisecond
	scanAtMost = 2 * time.Second
)

// What makes a process large: at least largeBytes, and among the first maxLarge.
const (
	largeBytes = 1 << 20
	maxLarge   = 16
)

func newMeter(sys system) *meter {
	return &meter{sys: sys, procs: map[int]*process{}, files: map[fileID]string{}}
}

// usage returns the bytes in use at the time now, which never goes back.
func (m *meter) usage(now time.Time) (int64, error) {
	if len(m.todo) == 0 && m.mustList(now) {
		if err := m.list(now); err != nil {
			return 0, err
		}
	}
	if len(m.todo) > 0 {
		begin := time.Now()
		for range min(chunk, len(m.todo)) {
			m.goThrough(m.todo[0], now)
			m.todo = m.todo[1:]
		}
		m.spent += time.Since(begin)
	}
	sum := m.small
	for _, pid := range m.large {
		sum += m.anonOf(pid)
	}
	return sum + m.sizeFiles(), nil
}

// mustList reports whether it is time to list the processes again.
func (m *meter) mustList(now time.Time) bool {
	if now.Sub(m.listed) >= listAtMost {
		return true
	}
	return now.Sub(m.listed) >= max(listEvery, listShare*m.spent) &&
		(!now.Before(m.nextScan) || m.newestPID() != m.lastPID)
}

// newestPID returns the ID given last in the caller's process namespace, which
// is the last word of /proc/loadavg (proc_loadavg(5)). It changes with each new
// process or thread, and is cheaper to read than a list.
func (m *meter) newestPID() string {
	var buf [128]byte
	b, err := readInto(filepath.Join(m.sys.proc, "loadavg"), buf[:])
	if err != nil {
		return "unknown"
	}
	return string(b[bytes.LastIndexByte(b, ' ')+1:])
}

// refresh makes the next usage begin to look at everything anew.
func (m *meter) refresh() {
	m.todo, m.listed = nil, time.Time{}
	for _, p := range m.procs {
		p.scanAt, p.scanWait = time.Time{}, scanFirst
	}
}

// list finds out which processes there are, and forgets those that are gone.
func (m *meter) list(now time.Time) error {
	begin := time.Now()
	m.lastPID = m.newestPID() // before the list: once too often does no harm
	pids, err := m.sys.processes()
	if err != nil {
		return err
	}
	alive := make(map[int]*process, len(pids))
	for _, pid := range pids {
		if alive[pid] = m.procs[pid]; alive[pid] == nil {
			alive[pid] = &process{scanWait: scanFirst}
		}
	}
	for pid, p := range m.procs {
		if alive[pid] == nil {
			m.small -= p.anon
		}
	}
	m.large = slices.DeleteFunc(m.large, func(pid int) bool { return alive[pid] == nil })
	m.procs, m.todo = alive, pids
	m.listed, m.spent, m.nextScan = now, time.Since(begin), now.Add(scanAtMost)
	return nil
}

// goThrough looks at one process, and at its descriptors if they are due.
func (m *meter) goThrough(pid int, now time.Time) {
	p := m.procs[pid]
	if !p.large {
		anon := m.anonOf(pid)
		if anon >= largeBytes && len(m.large) < maxLarge {
			m.large = append(m.large, pid)
			p.large, anon = true, 0
		}
		m.small += anon - p.anon
		p.anon = anon
	}
	if !now.Before(p.scanAt) {
		m.findFiles(pid)
		p.scanAt = now.Add(p.scanWait)
		p.scanWait = min(2*p.scanWait, scanAtMost)
	}
	if p.scanAt.Before(m.nextScan) {
		m.nextScan = p.scanAt
	}
}

// sizeFiles adds up the known files. When one is no longer where it was found,
// another process may still hold it, and so all descriptors are searched anew.
func (m *meter) sizeFiles() int64 {
	var sum int64
	for id, name := range m.files {
		st, ok := unnamedFile(name)
		if !ok || idOf(st) != id {
			delete(m.files, id)
			m.refresh()
			continue
		}
		sum += st.Blocks * 512
	}
	return sum
}

// anonOf returns a process's anonymous memory in bytes; 0 if it has ended.
func (m *meter) anonOf(pid int) int64 {
	resident, shared := m.pagesOf(pid)
	return max(resident-shared, 0) * int64(unix.Getpagesize())
}

// pagesOf returns the second and third number of a process's statm: its pages,
// and those of files and of shared memory among them (proc_pid_statm(5)). Both
// are 0 once it has let go of its memory. This costs a third of what its status
// does, which has the numbers with their names.
func (m *meter) pagesOf(pid int) (resident, shared int64) {
	var buf [128]byte
	b, err := readInto(filepath.Join(m.sys.proc, strconv.Itoa(pid), "statm"), buf[:])
	if err != nil {
		return 0, 0
	}
	f := bytes.Fields(b)
	if len(f) < 3 {
		return 0, 0
	}
	resident, err1 := strconv.ParseInt(string(f[1]), 10, 64)
	shared, err2 := strconv.ParseInt(string(f[2]), 10, 64)
	if err1 != nil || err2 != nil {
		return 0, 0
	}
	return resident, shared
}

// findFiles adds the unnamed files in memory that a process holds open.
func (m *meter) findFiles(pid int) {
	dir := filepath.Join(m.sys.proc, strconv.Itoa(pid), "fd")
	names, err := readNames(dir)
	if err != nil {
		// A process that is ending belongs to nobody, and so its descriptors
		// are closed to all but the machine's root.
		if resident, _ := m.pagesOf(pid); resident > 0 && !gone(err) {
			m.blind = fmt.Errorf("search the open files of process %d: %w", pid, err)
		}
		return
	}
	for _, n := range names {
		name := dir + "/" + n
		var link [256]byte
		// The name alone rules most of them out, and asking for it never
		// waits for a file system.
		k, err := unix.Readlink(name, link[:])
		if err != nil || k < len(link) && !strings.HasSuffix(string(link[:k]), " (deleted)") {
			continue
		}
		var fs unix.Statfs_t
		if st, ok := unnamedFile(name); ok && unix.Statfs(name, &fs) == nil && fs.Type == unix.TMPFS_MAGIC {
			if _, known := m.files[idOf(st)]; !known {
				m.files[idOf(st)] = name
			}
		}
	}
}

// unnamedFile returns the facts about a regular file that has no name left.
func unnamedFile(name string) (*unix.Stat_t, bool) {
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return nil, false
	}
	return &st, st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink == 0
}

func idOf(st *unix.Stat_t) fileID { return fileID{dev: uint64(st.Dev), ino: st.Ino} }

// readInto reads a small file of the kernel's, without what os.ReadFile does
// for files that may be large or slow.
func readInto(name string, buf []byte) ([]byte, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	n, err := unix.Read(fd, buf)
	return buf[:max(n, 0)], errors.Join(err, unix.Close(fd))
}
