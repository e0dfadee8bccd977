package limits

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// shimMain is the fake shim: process 1 in namespaces of its own.
func shimMain(arg string) int {
	var s scenario
	r, err := func() (report, error) {
		if err := json.Unmarshal([]byte(arg), &s); err != nil {
			return report{}, err
		}
		os.Unsetenv(envScenario)
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return report{}, fmt.Errorf("make mounts private: %w", err)
		}
		if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
			return report{}, fmt.Errorf("mount /proc: %w", err)
		}
		return runScenario(s)
	}()
	if err != nil {
		r.Err = err.Error()
	}
	json.NewEncoder(os.Stdout).Encode(r)
	if r.Err != "" {
		return 1
	}
	return 0
}

// runScenario opens limits, runs the scenario under them and closes them.
func runScenario(s scenario) (r report, err error) {
	ctx := context.Background()
	sys, err := host()
	if err != nil {
		return r, err
	}
	if s.NoCgroup {
		sys.writable = func(string) bool { return false }
	}
	want := amounts{memory: int64(s.Want.MiB) << 20, cpus: s.Want.CPUs, tasks: s.Want.Tasks}
	l, err := open(ctx, sys, s.ID, want, testLog(os.Stderr))
	if err != nil {
		return r, err
	}
	r.Enforced = l.Enforced()
	run, ok := map[string]func(context.Context, scenario, *Limits, *report) error{
		"memory": eatMemory, "cpu": burnCPU, "bomb": forkBomb, "churn": churn, "hold": hold, "handover": handOver,
	}[s.Name]
	if !ok {
		return r, fmt.Errorf("no scenario %q", s.Name)
	}
	err = run(ctx, s, l, &r)
	r.OOM = l.OOM()
	if kerr := unix.Kill(-1, unix.SIGKILL); kerr != nil && !gone(kerr) {
		err = errors.Join(err, kerr)
	}
	err = errors.Join(err, l.Close(ctx), l.Close(ctx))
	r.OOMAfter = l.OOM()
	return r, err
}

// guest is one of the VM's processes, waiting to be told to go.
type guest struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// startGuest starts a process of the VM that reads a line before it does
// anything.
func startGuest(s scenario, name string, args ...string) (*guest, error) {
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if s.Nested {
		asUser(cmd.SysProcAttr, 0, 0)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	return &guest{cmd: cmd, in: in, out: bufio.NewReader(out)}, cmd.Start()
}

func startWorker(s scenario, work string) (*guest, error) {
	os.Setenv(envWorker, work)
	defer os.Unsetenv(envWorker)
	return startGuest(s, "/proc/self/exe")
}

func (g *guest) tell() error { _, err := g.in.Write([]byte("go\n")); return err }

// eatMemory has one process take memory beside another that takes none.
func eatMemory(ctx context.Context, s scenario, l *Limits, r *report) error {
	kind := "anon"
	if s.Memfd {
		kind = "memfd"
	}
	eater, err := startWorker(s, fmt.Sprintf("eat %s %d", kind, s.Eat))
	if err != nil {
		return err
	}
	bystander, err := startWorker(s, "eat anon 0")
	if err != nil {
		return err
	}
	if err := l.Confine(ctx); err != nil {
		return err
	}
	for _, g := range []*guest{bystander, eater} {
		if err := g.tell(); err != nil {
			return err
		}
		g.out.ReadString('\n') // "done", or its death
	}
	// Enough for the watchdog to look, and for all to die of it.
	time.Sleep(250 * time.Millisecond)
	for _, g := range []*guest{eater, bystander} {
		g.in.Close() // ends those that are alive
		g.cmd.Wait()
		ws := g.cmd.ProcessState.Sys().(syscall.WaitStatus)
		r.Killed = append(r.Killed, ws.Signaled() && ws.Signal() == syscall.SIGKILL)
	}
	return nil
}

// burnCPU has a process of four threads use all the processor it can get.
func burnCPU(ctx context.Context, s scenario, l *Limits, r *report) error {
	const burn = time.Second
	w, err := startWorker(s, fmt.Sprintf("burn %d", burn.Milliseconds()))
	if err != nil {
		return err
	}
	if err := l.Confine(ctx); err != nil {
		return err
	}
	if err := w.tell(); err != nil {
		return err
	}
	begin := time.Now()
	err = w.cmd.Wait()
	st := w.cmd.ProcessState
	r.CPUs = (st.UserTime() + st.SystemTime()).Seconds() / time.Since(begin).Seconds()
	return err
}

// forkBomb has a shell start processes that stay, many times the limit.
func forkBomb(ctx context.Context, s scenario, l *Limits, r *report) error {
	// A shell, and not Go: it needs one task for each process.
	sh, err := startGuest(s, "sh", "-c", fmt.Sprintf(
		"read x; i=0; while [ $i -lt %d ]; do sleep 20 </dev/null >/dev/null 2>&1 & i=$((i+1)); done; echo done", 4*s.Want.Tasks))
	if err != nil {
		return err
	}
	if err := l.Confine(ctx); err != nil {
		return err
	}
	if err := sh.tell(); err != nil {
		return err
	}
	// The shell gives up at the first fork that fails.
	done, _ := sh.out.ReadString('\n')
	pids, err := l.sys.processes()
	if err != nil {
		return err
	}
	r.Tasks = len(pids)
	if done != "" {
		return nil
	}
	return startThreads(30) // while the VM has all that it may have
}

// startThreads makes sure that the calling process can still start n threads: a
// Go program aborts when it cannot.
func startThreads(n int) error {
	ready, stop := make(chan int), make(chan struct{})
	for range n {
		go func() {
			runtime.LockOSThread()
			ready <- unix.Gettid()
			<-stop
		}()
	}
	seen := map[int]bool{}
	for range n {
		seen[<-ready] = true
	}
	close(stop)
	if len(seen) != n {
		return fmt.Errorf("%d threads instead of %d", len(seen), n)
	}
	return nil
}

// churn confines processes that start others all the time.
func churn(ctx context.Context, s scenario, l *Limits, r *report) error {
	for range 3 {
		sh, err := startGuest(s, "sh", "-c", "while :; do sleep 0.02 & sleep 0.01; done")
		if err != nil {
			return err
		}
		defer sh.in.Close()
	}
	l.Warm()
	time.Sleep(60 * time.Millisecond)
	begin := time.Now()
	if err := l.Confine(ctx); err != nil {
		return err
	}
	r.Took = time.Since(begin)
	// Longer than it takes to settle.
	time.Sleep(700 * time.Millisecond)
	pids, err := l.sys.processes()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if !l.sys.dead(pid) && !held(l, pid) {
			r.Outside++
		}
	}
	return nil
}

// held reports whether a process is under the limits, or has ended.
func held(l *Limits, pid int) bool {
	for _, g := range l.groups {
		if in, err := g.members(); err != nil || !in[pid] && !l.sys.dead(pid) {
			return false
		}
	}
	n, err := l.confineProcess(pid)
	return n == 0 && err == nil
}

// handOver lets two processes hold one file in memory, of which first one and
// then the other ends, and reports what a meter sees.
func handOver(ctx context.Context, s scenario, l *Limits, r *report) error {
	const size = 64 << 20
	fd, err := unix.MemfdCreate("shared", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	if err := unix.Fallocate(fd, 0, 0, size); err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), "shared")
	var cmds []*exec.Cmd
	for range 2 {
		cmd := exec.Command("sleep", "20")
		cmd.ExtraFiles = []*os.File{file}
		if err := cmd.Start(); err != nil {
			return err
		}
		cmds = append(cmds, cmd)
	}
	if err := file.Close(); err != nil {
		return err
	}
	m, now := newMeter(l.sys), time.Now()
	for i := range 3 {
		// The second look is for what the first found gone.
		for range 2 {
			if _, err := m.usage(now); err != nil {
				return err
			}
		}
		used, err := m.usage(now)
		if err != nil {
			return err
		}
		r.Sizes = append(r.Sizes, int(used>>20))
		if i < len(cmds) {
			cmds[i].Process.Kill()
			cmds[i].Wait()
		}
	}
	return m.blind
}

// hold confines a process and waits for its own death.
func hold(ctx context.Context, s scenario, l *Limits, r *report) error {
	if _, err := startWorker(s, "eat anon 0"); err != nil {
		return err
	}
	if err := l.Confine(ctx); err != nil {
		return err
	}
	json.NewEncoder(os.Stdout).Encode(r)
	time.Sleep(15 * time.Second)
	return errors.New("nobody killed the shim")
}

// workerMain is a process of the VM. It waits for a line, works, says so and
// waits for the end of its input.
func workerMain(work string) int {
	in := bufio.NewReader(os.Stdin)
	if _, err := in.ReadString('\n'); err != nil {
		return 0
	}
	f := strings.Fields(work)
	switch f[0] {
	case "eat":
		mib, _ := strconv.Atoi(f[2])
		if err := eat(f[1] == "memfd", mib<<20); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	case "burn":
		ms, _ := strconv.Atoi(f[1])
		end := time.Now().Add(time.Duration(ms) * time.Millisecond)
		for range 3 {
			go spin(end)
		}
		spin(end)
		return 0
	}
	fmt.Println("done")
	io.Copy(io.Discard, in)
	return 0
}

func spin(end time.Time) {
	for time.Now().Before(end) {
	}
}

// eat takes n bytes of memory and keeps them.
func eat(memfd bool, n int) error {
	if n == 0 {
		return nil
	}
	fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS
	if memfd {
		var err error
		if fd, err = unix.MemfdCreate("runsc-memory", unix.MFD_CLOEXEC); err != nil {
			return err
		}
		if err := unix.Ftruncate(fd, int64(n)); err != nil {
			return err
		}
		flags = unix.MAP_SHARED
	}
	b, err := unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return err
	}
	for i := 0; i < n; i += 4096 {
		b[i] = 1
	}
	return nil
}
