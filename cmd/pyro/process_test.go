package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// process is a process of this machine as /proc shows it. What may not be read
// is empty.
type process struct {
	pid, parent int
	state       byte
	args        []string
	exe, cwd    string
}

// processes lists those that are alive: what has ended and only waits to be
// collected has neither a program nor a directory.
func processes() []process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		panic(err)
	}
	var all []process
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			if p, ok := look(pid); ok {
				all = append(all, p)
			}
		}
	}
	return all
}

// look reads what /proc has of a process, and reports whether it is alive.
func look(pid int) (process, bool) {
	dir := "/proc/" + strconv.Itoa(pid)
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return process{}, false
	}
	// proc_pid_stat(5): after the name, which is in parentheses and may hold
	// anything, come the state and the parent.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	p := process{pid: pid, state: fields[0][0]}
	p.parent, _ = strconv.Atoi(fields[1])
	p.exe, _ = os.Readlink(dir + "/exe")
	p.cwd, _ = os.Readlink(dir + "/cwd")
	if cmdline, err := os.ReadFile(dir + "/cmdline"); err == nil && len(cmdline) > 0 {
		p.args = strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
	}
	return p, p.state != 'Z' && p.state != 'X'
}

// runsBelow reports whether the process runs a program, or is in a directory,
// below dir. A sandbox sees other roots than we do: what counts is how the path
// goes on after dir's own name.
func (p process) runsBelow(dir string) bool {
	mark := "/" + filepath.Base(dir) + "/"
	if filepath.Dir(dir) == nest {
		mark = "/" + filepath.Base(nest) + mark
	}
	return strings.Contains(p.exe, mark) || strings.Contains(p.cwd+"/", mark)
}

// is reports whether the process plays a part: pyro's own, shim, runsc-sandbox
// or runsc-gofer.
func (p process) is(part string) bool {
	switch {
	case len(p.args) == 0:
		return false
	case part == "shim":
		return len(p.args) == 3 && p.args[1] == "shim"
	}
	return filepath.Base(p.args[0]) == part
}

// String describes the process for a failure.
func (p process) String() string {
	return fmt.Sprintf("process %d (parent %d, state %c) %q of %s in %s", p.pid, p.parent, p.state, p.args, p.exe, p.cwd)
}

// find returns the processes of the world that play a part.
func (w *world) find(part string) []process {
	var found []process
	for _, p := range w.processes() {
		if p.is(part) {
			found = append(found, p)
		}
	}
	return found
}

// processes lists all processes of the world.
func (w *world) processes() []process {
	var ours []process
	for _, p := range processes() {
		if p.runsBelow(w.dir) {
			ours = append(ours, p)
		}
	}
	return ours
}

// status returns a line of /proc/<pid>/status, in words; none for a process
// that is gone.
func (p process) status(key string) []string {
	for _, line := range readLines(fmt.Sprintf("/proc/%d/status", p.pid)) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.Fields(value)
		}
	}
	return nil
}

// statusKiB returns a size of /proc/<pid>/status, such as RssAnon.
func (p process) statusKiB(key string) int {
	if value := p.status(key); len(value) == 2 {
		n, _ := strconv.Atoi(value[0])
		return n
	}
	return 0
}

// linesWith returns the lines of a file that hold part, with its name.
func linesWith(name, part string) []string {
	var with []string
	for _, line := range readLines(name) {
		if strings.Contains(line, part) {
			with = append(with, name+": "+line)
		}
	}
	return with
}

// readLines returns the lines of a file; none where it cannot be read.
func readLines(name string) []string {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
}
