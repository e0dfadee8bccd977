package limits

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"pyro/internal/need"
	"pyro/internal/vm"
)

// The test binary plays three parts: the tests; a shim, process 1 of new
// namespaces, which runs one scenario; and the VM's processes.
const (
	envScenario = "PYRO_TEST_LIMITS_SCENARIO"
	envWorker   = "PYRO_TEST_LIMITS_WORKER"
)

func TestMain(m *testing.M) {
	if s := os.Getenv(envScenario); s != "" {
		os.Exit(shimMain(s))
	}
	if w := os.Getenv(envWorker); w != "" {
		os.Exit(workerMain(w))
	}
	goleak.VerifyTestMain(m)
}

// missing skips the test, unless it is required, where err says that the
// machine lacks something.
func missing(t *testing.T, what need.Need, err error) {
	t.Helper()
	if err != nil {
		need.Missing(t, what, err.Error())
	}
}

// needCgroup skips the test unless cgroups can be made here for every limit.
func needCgroup(t *testing.T) {
	t.Helper()
	missing(t, need.Cgroup, func() error {
		trees, err := readTrees("/proc")
		if err != nil {
			return err
		}
		sys := realSystem()
		for _, c := range []string{ctlMemory, ctlCPU, ctlPids} {
			if _, err := findPlace(sys, trees, c); err != nil {
				return err
			}
		}
		return nil
	}())
}

// realSystem is host without its demand to be process 1, and unable to kill.
func realSystem() system {
	return system{
		proc: "/proc", pid: os.Getpid(), kill: func() error { panic("the tests must not kill") },
		mkdir: func(d string) error { return os.Mkdir(d, 0o755) }, rmdir: unix.Rmdir, write: writeFile,
		writable:  func(p string) bool { return unix.Access(p, unix.W_OK) == nil },
		delegated: isDelegated,
	}
}

// scenario is what a shim is told to do.
type scenario struct {
	Name     string
	ID       vm.ID
	Want     wantJSON
	NoCgroup bool // pretend that no cgroup is writable
	Eat      int  // MiB
	Memfd    bool // eat memory of a file, as gVisor does
	Nested   bool // the VM's processes have a user namespace of their own
}

type wantJSON struct {
	MiB, CPUs, Tasks int
}

// report is what a shim found.
type report struct {
	Err      string
	Enforced map[string]string
	OOM      bool    // before Close
	OOMAfter bool    // after Close
	Killed   []bool  // by SIGKILL, for each worker
	CPUs     float64 // CPUs' worth of time used
	Tasks    int     // most seen at once
	Outside  int     // processes that the limits do not hold
	Sizes    []int   // MiB that a meter saw
	Took     time.Duration
}

// shim is a running fake shim.
type shim struct {
	cmd *exec.Cmd
	out *json.Decoder
}

// startShim starts a fake shim. An ordinary user's has a user namespace with a
// single user in it; when the tests run as root they lend it to another one.
func startShim(t *testing.T, user bool, s scenario) *shim {
	t.Helper()
	arg, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	// The race detector would have every process linger for a second.
	cmd.Env = append(os.Environ(), envScenario+"="+string(arg), "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if user {
		uid, gid := os.Geteuid(), os.Getegid()
		if uid == 0 {
			uid, gid = 12345, 12345
		}
		asUser(cmd.SysProcAttr, uid, gid)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		if user {
			missing(t, need.GVisor, err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("shim's log:\n%s", stderr.String())
		}
		if err := Reclaim(context.WithoutCancel(t.Context()), s.ID); err != nil {
			t.Error(err)
		}
	})
	return &shim{cmd: cmd, out: json.NewDecoder(stdout)}
}

// asUser puts a command into a user namespace where uid and gid are root.
func asUser(attr *syscall.SysProcAttr, uid, gid int) {
	attr.Cloneflags |= syscall.CLONE_NEWUSER
	attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: gid, Size: 1}}
	attr.Credential = &syscall.Credential{NoSetGroups: true}
}

// report reads the shim's next report.
func (s *shim) report(t *testing.T) report {
	t.Helper()
	var r report
	if err := s.out.Decode(&r); err != nil {
		t.Fatalf("read the shim's report: %v", err)
	}
	if r.Err != "" {
		t.Fatalf("shim: %s", r.Err)
	}
	return r
}

// runShim runs a scenario to its end and checks that no cgroup is left.
func runShim(t *testing.T, user bool, s scenario) report {
	t.Helper()
	s.ID = vm.NewID()
	sh := startShim(t, user, s)
	r := sh.report(t)
	if err := sh.cmd.Wait(); err != nil {
		t.Errorf("shim: %v", err)
	}
	wantNoCgroup(t, s.ID)
	return r
}

// wantNoCgroup checks that no cgroup of a VM is anywhere.
func wantNoCgroup(t *testing.T, id vm.ID) {
	t.Helper()
	for _, dir := range cgroupsOf(t, id) {
		t.Errorf("cgroup %s is left", dir)
	}
}

func cgroupsOf(t *testing.T, id vm.ID) []string {
	t.Helper()
	trees, err := readTrees("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var dirs []string
	for _, tr := range trees {
		dir, err := findCgroup(t.Context(), tr, cgroupName(id))
		if err != nil {
			t.Fatal(err)
		}
		if dir != "" {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// testLog logs to a test, or a shim's stderr.
func testLog(w interface{ Write([]byte) (int, error) }) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
