package pyro_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pyro"
	"pyro/internal/need"
	"pyro/internal/shim"
	"pyro/internal/vm"
)

// A process of a test is told by these variables what Manager to open, and by
// its first argument what command to run.
const (
	baseVar    = "PYRO_TEST_BASE"
	programVar = "PYRO_TEST_PROGRAM"
)

// roles are what another process of this program can be told to do.
var roles = map[string]func() int{
	"run":  func() int { return inProcess(runOnce) },
	"many": func() int { return inProcess(runMany) },
	"reap": func() int { return inProcess(runWhenTold) },
}

// inProcess opens a Manager for do. What do returns is printed as JSON.
func inProcess(do func(*pyro.Manager) any) int {
	m, err := pyro.Open(context.Background(), pyro.Options{BaseDir: os.Getenv(baseVar), Executable: os.Getenv(programVar)})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	result := do(m)
	if err := m.Close(); err != nil {
		fmt.Println(err)
		return 1
	}
	out, err := json.Marshal(result)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(string(out))
	return 0
}

// request is the command that the process was told to run.
func request() pyro.RunRequest {
	return pyro.RunRequest{Args: []string{"sh", "-c", os.Args[1]}, Backend: pyro.Mock, Env: []string{os.Getenv(markVar)}}
}

// runOnce says when it begins.
func runOnce(m *pyro.Manager) any {
	fmt.Println("begin")
	_, err := m.Run(context.Background(), request())
	return pyro.AsError(err)
}

// runWhenTold runs a command when its input ends.
func runWhenTold(m *pyro.Manager) any {
	_, _ = bufio.NewReader(os.Stdin).ReadString(0)
	_, err := m.Run(context.Background(), request())
	return pyro.AsError(err)
}

// tally is what became of many runs: the highest number of VMs that one of them
// saw, how many ran, how many found no room, and what else went wrong.
type tally struct {
	Most, Ran, Refused int
	Other              []string
}

// The numbers of goroutines and of the runs of each in a process that runs many.
const (
	goroutines = 3
	runsOfEach = 3
)

func runMany(m *pyro.Manager) any {
	var mu sync.Mutex
	var sum tally
	var running sync.WaitGroup
	for range goroutines {
		running.Go(func() {
			for range runsOfEach {
				result, err := m.Run(context.Background(), request())
				mu.Lock()
				sum.count(result, err)
				mu.Unlock()
			}
		})
	}
	running.Wait()
	return sum
}

// count adds one run, whose command prints how many there are.
func (s *tally) count(result *pyro.ExecResult, err error) {
	var n int
	switch {
	case errors.Is(err, pyro.CodeCapacityExceeded):
		s.Refused++
	case err != nil:
		s.Other = append(s.Other, err.Error())
	default:
		if _, err := fmt.Sscan(result.Stdout, &n); err != nil || result.Code != 0 {
			s.Other = append(s.Other, fmt.Sprintf("%+v", result))
		}
		s.Ran++
		s.Most = max(s.Most, n)
	}
}

// process returns another process that uses the same base directory.
func (r *rig) process(role, line string, env ...string) *exec.Cmd {
	r.Helper()
	cmd := exec.CommandContext(context.WithoutCancel(r.Context()), os.Args[0], line)
	cmd.Env = append(os.Environ(), roleVar+"="+role, baseVar+"="+r.base, programVar+"="+r.program,
		markVar+"="+r.inside, "GORACE="+gorace())
	cmd.Env = append(cmd.Env, env...)
	return cmd
}

func TestThereAreNeverMoreVMsThanConfigured(t *testing.T) {
	needNamespaces(t)
	expectNothingLeft(t)
	r := newSharedRig(t, "", 2)
	here := r.stage("alive")
	check(t, os.Mkdir(here, 0o700))
	// A VM is there for longer than its command; so this sees no more than
	// there are, and those that overlap for some time see each other.
	line := fmt.Sprintf("cd '%s' && me=$(mktemp here.XXXXXXXX) && sleep 0.05 && ls | wc -l && rm $me", here)
	const processes = 3
	var cmds []*exec.Cmd
	var outs [processes]bytes.Buffer
	for i := range processes {
		cmd := r.process("many", line, "PYRO_MAX_ACTIVE_VMS=2")
		cmd.Stdout = &outs[i]
		check(t, cmd.Start())
		cmds = append(cmds, cmd)
	}
	var sum tally
	for i, cmd := range cmds {
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, &outs[i])
		}
		var one tally
		check(t, json.Unmarshal(outs[i].Bytes(), &one))
		sum.Most, sum.Ran, sum.Refused = max(sum.Most, one.Most), sum.Ran+one.Ran, sum.Refused+one.Refused
		sum.Other = append(sum.Other, one.Other...)
	}
	t.Logf("%+v", sum)
	if sum.Most > 2 || sum.Ran == 0 || sum.Refused == 0 || len(sum.Other) > 0 || sum.Ran+sum.Refused != processes*goroutines*runsOfEach {
		t.Errorf("of %d runs: %+v", processes*goroutines*runsOfEach, sum)
	}
}

// TestRunsOfAProcessThatIsKilledEndWithIt kills processes from before they run
// a command to when it runs. There is room for one VM, so a leftover that is
// counted would be noticed.
func TestRunsOfAProcessThatIsKilledEndWithIt(t *testing.T) {
	needNamespaces(t)
	expectNothingLeft(t)
	const workers, times = 3, 10
	for range workers {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			r := newSharedRig(t, "", 1)
			for range times {
				killAndGoOn(r, rand.N(60*time.Millisecond))
			}
		})
	}
}

func killAndGoOn(r *rig, delay time.Duration) {
	r.Helper()
	cmd := r.process("run", "trap '' TERM HUP INT; (setsid sleep 300 &); mkdir -p a/b; sleep 300")
	out, err := cmd.StdoutPipe()
	check(r, err)
	check(r, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if line != "begin\n" {
		r.Fatalf("it says %q, %v", line, err)
	}
	time.Sleep(delay) // the moment is what is tested
	check(r, cmd.Process.Kill())
	_ = cmd.Wait() // that it was killed
	var alive []string
	for deadline := time.Now().Add(3 * time.Second); ; time.Sleep(time.Millisecond) {
		if alive = append(r.alive(), r.owned()...); len(alive) == 0 {
			break
		}
		if time.Now().After(deadline) {
			r.Fatalf("3 s after its manager was killed at %v these are alive: %v", delay, alive)
		}
	}
	if _, err := r.Run(r.ctx(), r.shell("true")); err != nil {
		r.Errorf("the run after one that was killed at %v: %v", delay, err)
	}
	r.expectFreed()
}

// owned returns the locks that somebody holds: a process that is ending has them
// for a moment longer than its name and its environment.
func (r *rig) owned() []string {
	r.Helper()
	locks, err := filepath.Glob(filepath.Join(r.vms(), "*.lock"))
	check(r, err)
	return slices.DeleteFunc(locks, func(lock string) bool {
		f, err := os.Open(lock)
		if err != nil {
			return true
		}
		defer f.Close()
		return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
	})
}

func TestKilledShimIsReclaimedByTheRunItself(t *testing.T) {
	r := newRig(t, "")
	var out recorder
	q := r.shell("trap '' TERM HUP INT; (setsid sleep 300 &); echo $PPID; readlink /proc/self/ns/pid; sleep 300")
	q.Stdout = &out
	done := r.begin(r.ctx(), q)
	await(t, "the command runs", func() bool { return strings.Count(out.String(), "\n") == 2 })
	killed := 0
	for pid := range processes() {
		environ, _ := os.ReadFile("/proc/" + pid + "/environ")
		if r.before[pid] || !bytes.Contains(environ, []byte(r.mark)) {
			continue
		}
		n := 0
		fmt.Sscan(pid, &n)
		p, err := os.FindProcess(n)
		check(t, err)
		check(t, errors.Join(p.Kill(), p.Release()))
		killed++
	}
	result, err := r.end(done)
	expectCode(t, "run", err, pyro.CodeVMFailed)
	if killed != 1 || result != nil {
		t.Errorf("%d shims were killed; the result is %+v", killed, result)
	}
	r.expectFreed()
}

// orphan makes what a dead process leaves: a directory, a lock and a row.
func (r *rig) orphan() {
	r.Helper()
	id := vm.NewID()
	c, err := shim.NewClaim(r.vms(), id)
	check(r, err)
	check(r, os.MkdirAll(filepath.Join(c.Dir, "workdir", "a"), 0o700))
	// What is not reclaimed stays, under a lock that nobody holds.
	check(r, c.Release())
}

func TestManyReapersFreeEachOrphanOnce(t *testing.T) {
	needNamespaces(t)
	expectNothingLeft(t)
	r := newSharedRig(t, "", 100)
	for range 30 {
		r.orphan()
	}
	const reapers = 3
	var outs [reapers]bytes.Buffer
	var cmds []*exec.Cmd
	start, release, err := os.Pipe()
	check(t, err)
	for i := range reapers {
		cmd := r.process("reap", "true", "PYRO_MAX_ACTIVE_VMS=100")
		cmd.Stdin, cmd.Stdout = start, &outs[i]
		check(t, cmd.Start())
		cmds = append(cmds, cmd)
	}
	check(t, errors.Join(start.Close(), release.Close()))
	r.run(r.shell("true"))
	for i, cmd := range cmds {
		if err := cmd.Wait(); err != nil || outs[i].String() != "null\n" {
			t.Errorf("reaper %d: %v, %s", i, err, &outs[i])
		}
	}
}

func TestOrphanIsReclaimedBeforeItsRoomIsCounted(t *testing.T) {
	r := newRig(t, "")
	m := r.open(1)
	end := r.occupy() // by somebody who lives
	for range 3 {
		r.orphan()
	}
	_, err := m.Run(r.ctx(), r.shell("true"))
	expectCode(t, "run", err, pyro.CodeCapacityExceeded)
	if left := names(t, r.vms()); len(left) != 2 {
		t.Errorf("there are %v", left)
	}
	end()
	r.run(r.shell("true"))
}

func TestOrphanThatCannotBeFreedFailsNoOtherRun(t *testing.T) {
	need.RealRoot(t)
	r := newRig(t, "")
	stuck := r.unfreeable()
	_, err := r.Run(r.ctx(), r.shell("true"))
	if err != nil {
		t.Errorf("%s, code %s", err, pyro.AsError(err).Code)
	}
	stuck()
	r.run(r.shell("true"))
}

// unfreeable makes an orphan that even root cannot remove, and returns what
// makes it one that can be.
func (r *rig) unfreeable() (free func()) {
	r.Helper()
	c, err := shim.NewClaim(r.vms(), vm.NewID())
	check(r, err)
	file := filepath.Join(c.Dir, "file")
	check(r, os.WriteFile(file, nil, 0o600))
	check(r, c.Release())
	set := func(flags int) error {
		f, err := os.Open(file)
		check(r, err)
		defer f.Close()
		return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags)
	}
	const immutable = 0x10 // FS_IMMUTABLE_FL, Linux's include/uapi/linux/fs.h
	if err := set(immutable); err != nil {
		need.Missing(r, need.Root, "it may not make files immutable: "+err.Error())
	}
	return func() { check(r, set(0)) }
}
