package backendtest

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// footprint is what this process held at a moment. Its goroutines are in an
// option of goleak's.
type footprint struct {
	descriptors map[string]string // what each is open on
	processes   map[string]process
	goroutines  goleak.Option
}

// process is a process as /proc shows it.
type process struct {
	parent  string
	started string // together with its number, this names it for all time
	name    string
	state   string
}

// takeFootprint notes what this process holds.
func takeFootprint(t *testing.T) footprint {
	t.Helper()
	var err error
	f := footprint{goroutines: goleak.IgnoreCurrent()}
	if f.descriptors, err = openDescriptors(); err != nil {
		t.Fatal(err)
	}
	if f.processes, err = allProcesses(); err != nil {
		t.Fatal(err)
	}
	return f
}

// check waits, not long, until nothing is held but what was before. Processes
// that carry mark are held as well as descendants.
func (f footprint) check(t *testing.T, mark string) {
	t.Helper()
	deadline := time.Now().Add(promptly)
	for {
		left, err := f.growth(mark)
		if err != nil {
			t.Error(err)
			return
		}
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("%d things left behind: %s", len(left), strings.Join(left[:min(len(left), 10)], "; "))
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	// It has a patience of its own.
	if err := goleak.Find(f.goroutines); err != nil {
		t.Error(err)
	}
}

// growth describes what is held now and was not before.
func (f footprint) growth(mark string) ([]string, error) {
	var left []string
	descriptors, err := openDescriptors()
	if err != nil {
		return nil, err
	}
	for _, fd := range slices.Sorted(maps.Keys(descriptors)) {
		if target := descriptors[fd]; f.descriptors[fd] != target {
			left = append(left, fmt.Sprintf("descriptor %s of %s", fd, target))
		}
	}
	processes, err := allProcesses()
	if err != nil {
		return nil, err
	}
	self := strconv.Itoa(os.Getpid())
	for _, pid := range slices.Sorted(maps.Keys(processes)) {
		p := processes[pid]
		if f.processes[pid].started != p.started && (descends(processes, pid, self) || carries(pid, mark)) {
			left = append(left, fmt.Sprintf("process %s %s (state %s)", pid, p.name, p.state))
		}
	}
	return left, nil
}

// openDescriptors returns this process' open descriptors.
func openDescriptors() (map[string]string, error) {
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list descriptors: %w", err)
	}
	open := map[string]string{}
	for _, e := range entries {
		// The one that listed them is closed by now.
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			open[e.Name()] = target
		}
	}
	return open, nil
}

// allProcesses returns the processes of this process namespace.
func allProcesses() (map[string]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	all := map[string]process{}
	for _, e := range entries {
		pid := e.Name()
		if _, err := strconv.Atoi(pid); err != nil {
			continue // not a process
		}
		stat, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
		if err != nil {
			continue // it has ended
		}
		// proc_pid_stat(5): the name is in parentheses and may hold anything;
		// the state is the third field, the parent the fourth, the time of the
		// start the twenty-second.
		end := bytes.LastIndexByte(stat, ')')
		fields := strings.Fields(string(stat[end+1:]))
		if end < 0 || len(fields) < 20 {
			return nil, fmt.Errorf("parse the stat of process %s: %q", pid, stat)
		}
		_, name, _ := bytes.Cut(stat[:end], []byte("("))
		all[pid] = process{
			parent: fields[1], started: fields[19], name: string(name), state: fields[0],
		}
	}
	return all, nil
}

// descends reports whether ancestor is above pid.
func descends(all map[string]process, pid, ancestor string) bool {
	for range len(all) { // parents may have changed into a circle meanwhile
		p, ok := all[pid]
		if !ok {
			return false
		}
		if p.parent == ancestor {
			return true
		}
		pid = p.parent
	}
	return false
}

// carries reports whether entry is in the environment of pid.
func carries(pid, entry string) bool {
	// It is empty for what has ended, and unreadable for what is another
	// user's.
	environ, err := os.ReadFile("/proc/" + pid + "/environ")
	return err == nil && entry != "" && slices.Contains(strings.Split(string(environ), "\x00"), entry)
}
