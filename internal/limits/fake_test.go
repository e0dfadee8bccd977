package limits

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// fake is a made-up machine: directories that look like /proc and
// /sys/fs/cgroup, and system calls that treat them as the kernel would. Rlimits
// and affinity are not made up: only where every limit is a cgroup may Confine
// be called.
type fake struct {
	t         *testing.T
	dir       string // the cgroup mounts are below it
	proc      string
	closed    []string // paths that cannot be written to, with what is below
	open      []string // exceptions from closed, with what is below
	delegated string
	killed    int
}

// newFake makes a machine whose caller is in the cgroups of ownCgroups, as
// /proc/self/cgroup shows them. mounts are lines of mountinfo where DIR is the
// directory of the fake.
func newFake(t *testing.T, ownCgroups string, mounts ...string) *fake {
	t.Helper()
	f := &fake{t: t, dir: t.TempDir()}
	f.proc = filepath.Join(f.dir, "proc")
	f.file("proc/self/cgroup", ownCgroups)
	var info strings.Builder
	for i, m := range mounts {
		fmt.Fprintf(&info, "%d 1 0:%d %s\n", 30+i, 30+i, strings.ReplaceAll(m, "DIR", f.dir))
	}
	f.file("proc/self/mountinfo", "22 27 0:21 / /proc rw - proc proc rw\n"+info.String())
	f.file("proc/self/uid_map", "         0       1000          1\n")
	f.file("proc/sys/kernel/osrelease", "6.12.1-test\n")
	return f
}

func (f *fake) file(name, content string) {
	f.t.Helper()
	name = filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

// v2 makes a cgroup of version 2. The root of the machine's hierarchy has no
// type and no limits.
func (f *fake) v2(path, available, enabled, procs string) {
	f.t.Helper()
	f.file(path+"/cgroup.controllers", available+"\n")
	f.file(path+"/cgroup.subtree_control", enabled+"\n")
	f.file(path+"/cgroup.procs", procs)
}

func (f *fake) v2Child(path, available, enabled, procs string) {
	f.t.Helper()
	f.v2(path, available, enabled, procs)
	f.file(path+"/cgroup.type", "domain\n")
	for _, c := range strings.Fields(available) {
		for _, name := range map[string][]string{
			"memory": {"memory.max", "memory.swap.max", "memory.oom.group"}, "cpu": {"cpu.max"}, "pids": {"pids.max"},
		}[c] {
			f.file(path+"/"+name, "max\n")
		}
		if c == "memory" {
			f.file(path+"/memory.events", "oom 0\noom_kill 0\n")
		}
	}
}

// v1 makes a cgroup of version 1 with the files of controllers.
func (f *fake) v1(path string, controllers ...string) {
	f.t.Helper()
	f.file(path+"/cgroup.procs", "")
	f.file(path+"/cgroup.event_control", "")
	for _, c := range controllers {
		for name, content := range map[string]map[string]string{
			"memory": {"memory.limit_in_bytes": "-1", "memory.memsw.limit_in_bytes": "-1", "memory.oom_control": "oom_kill_disable 0\noom_kill 0\n"},
			"cpu":    {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "-1"},
			"pids":   {"pids.max": "max"},
		}[c] {
			f.file(path+"/"+name, content)
		}
	}
}

// system is the fake as the code under test sees it. The calling process is
// number 1.
func (f *fake) system() system {
	return system{
		proc: f.proc, pid: 1,
		kill:      func() error { f.killed++; return nil },
		mkdir:     f.mkdir,
		rmdir:     f.rmdir,
		write:     f.write,
		writable:  f.writable,
		delegated: func(dir string) bool { return f.delegated != "" && dir == filepath.Join(f.dir, f.delegated) },
	}
}

func (f *fake) writable(path string) bool {
	below := func(dirs []string) bool {
		return slices.ContainsFunc(dirs, func(d string) bool {
			d = filepath.Join(f.dir, d)
			return path == d || strings.HasPrefix(path, d+"/")
		})
	}
	return !below(f.closed) || below(f.open)
}

// mkdir makes a cgroup with the control files that its parent calls for.
func (f *fake) mkdir(dir string) error {
	if !f.writable(dir) {
		return syscall.EACCES
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	parent, rel := filepath.Dir(dir), strings.TrimPrefix(dir, f.dir+"/")
	if _, err := os.Stat(parent + "/cgroup.subtree_control"); err == nil {
		f.v2Child(rel, strings.Join(readWords(parent+"/cgroup.subtree_control"), " "), "", "")
		return nil
	}
	var controllers []string
	for c, file := range map[string]string{"memory": "memory.limit_in_bytes", "cpu": "cpu.cfs_quota_us", "pids": "pids.max"} {
		if _, err := os.Stat(filepath.Join(parent, file)); err == nil {
			controllers = append(controllers, c)
		}
	}
	f.v1(rel, controllers...)
	return nil
}

// rmdir removes a cgroup with no processes.
func (f *fake) rmdir(dir string) error {
	if _, err := os.Stat(dir); err != nil {
		return err
	}
	if len(readWords(dir+"/cgroup.procs")) > 0 {
		return syscall.EBUSY
	}
	return os.RemoveAll(dir)
}

// write is an order to the kernel.
func (f *fake) write(name, value string) error {
	old, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	switch base := filepath.Base(name); base {
	case "cgroup.subtree_control":
		c := strings.TrimPrefix(value, "+")
		if !slices.Contains(readWords(filepath.Dir(name)+"/cgroup.controllers"), c) {
			return syscall.ENOENT
		}
		value = string(old) + c + " "
	case "cgroup.procs":
		value = string(old) + value + "\n"
	case "cpu.cfs_quota_us":
		// A quota of the parent below 200000 refuses more.
		outer, err := os.ReadFile(filepath.Join(filepath.Dir(name), "..", base))
		if err == nil && len(outer) == len("100000") && string(outer) < value {
			return syscall.EINVAL
		}
	}
	return os.WriteFile(name, []byte(value), 0o644)
}

// read returns a control file's content; empty if it is not there.
func (f *fake) read(name string) string {
	b, _ := os.ReadFile(filepath.Join(f.dir, name))
	return strings.TrimSpace(string(b))
}
