// Package bench holds no code: its benchmarks compare pyro, as users run it,
// with raw runsc out of the same binary, in turn within one run, because
// machines are noisy.
//
//	go test -run '^$' -bench . -benchtime 30x ./bench
//
// The number of iterations is the number of pairs. Figures are medians; "ratio"
// is the median over the pairs of pyro's time by runsc's.
package bench

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"pyro/internal/need"
)

// rig is a built pyro with a base directory of its own.
type rig struct {
	*testing.B
	pyro string
	env  []string
}

func newRig(b *testing.B) *rig {
	b.Helper()
	need.Namespaces(b)
	dir := b.TempDir()
	pyro := filepath.Join(dir, "pyro")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", pyro, "pyro/cmd/pyro")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	return &rig{b, pyro, append(os.Environ(), "PYRO_BASE_DIR="+filepath.Join(dir, "base"), "PYRO_MAX_ACTIVE_VMS=64")}
}

// command returns pyro with the arguments.
func (r *rig) command(args ...string) *exec.Cmd {
	cmd := exec.Command(r.pyro, args...)
	cmd.Env = r.env
	cmd.Dir = "/"
	return cmd
}

// run is a whole pyro run; raw is what it is compared with.
func (r *rig) run() *exec.Cmd { return r.command("run", "--", "true") }
func (r *rig) raw() *exec.Cmd {
	args := []string{"runsc", "--network=none", "--ignore-cgroups"}
	if os.Geteuid() != 0 {
		args = append(args, "--rootless")
	}
	return r.command(append(args, "do", "true")...)
}

// timed returns how long n processes at once take, in milliseconds.
func (r *rig) timed(n int, command func() *exec.Cmd) float64 {
	r.Helper()
	var wg sync.WaitGroup
	failures := make([]error, n)
	began := time.Now()
	for i := range n {
		wg.Go(func() {
			if out, err := command().CombinedOutput(); err != nil {
				failures[i] = fmt.Errorf("%w: %s", err, out)
			}
		})
	}
	wg.Wait()
	took := float64(time.Since(began).Microseconds()) / 1000
	for _, err := range failures {
		if err != nil {
			r.Fatal(err)
		}
	}
	return took
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}

// compare runs n at once of each, in turn.
func compare(b *testing.B, n int) {
	r := newRig(b)
	r.timed(1, r.run) // prepares the environment
	r.timed(1, r.raw)
	var ours, theirs, ratios []float64
	for b.Loop() {
		mine, raw := r.timed(n, r.run), r.timed(n, r.raw)
		ours, theirs, ratios = append(ours, mine), append(theirs, raw), append(ratios, mine/raw)
	}
	b.ReportMetric(0, "ns/op") // says nothing: it is the time of a pair
	b.ReportMetric(median(ours), "pyro-ms")
	b.ReportMetric(median(theirs), "runsc-ms")
	b.ReportMetric(median(ratios), "ratio")
}

// BenchmarkRun is `pyro run -- true` against `runsc do true`.
func BenchmarkRun(b *testing.B) { compare(b, 1) }

// BenchmarkRun20 is twenty of each at once.
func BenchmarkRun20(b *testing.B) { compare(b, 20) }

// BenchmarkIdleMemory is what one idle VM holds: the private memory of its
// processes, in KiB.
func BenchmarkIdleMemory(b *testing.B) {
	r := newRig(b)
	roles := map[string]string{"shim": "/proc/self/exe\x00shim\x00", "sandbox": "runsc-sandbox\x00", "gofer": "runsc-gofer\x00"}
	private := map[string][]float64{}
	for b.Loop() {
		cmd := r.command("run", "-i", "--", "sh", "-c", "echo ready; cat")
		in, err := cmd.StdinPipe()
		if err != nil {
			b.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			b.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 64)); err != nil {
			b.Fatal(err)
		}
		for role, start := range roles {
			private[role] = append(private[role], r.privateMemory(cmd.Process.Pid, start))
		}
		in.Close()
		if err := cmd.Wait(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(0, "ns/op")
	for role, values := range private {
		b.ReportMetric(median(values), role+"-KiB")
	}
}

// privateMemory returns the private dirty memory, in KiB, of the descendant of
// parent whose command line starts so.
func (r *rig) privateMemory(parent int, start string) float64 {
	r.Helper()
	for _, pid := range descendants(parent) {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil || !strings.HasPrefix(string(line), start) {
			continue
		}
		rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			r.Fatal(err)
		}
		for line := range bytes.Lines(rollup) {
			if fields := strings.Fields(string(line)); fields[0] == "Private_Dirty:" {
				kib, err := strconv.ParseFloat(fields[1], 64)
				if err != nil {
					r.Fatal(err)
				}
				return kib
			}
		}
	}
	r.Fatalf("no process that starts with %q", start)
	return 0
}

// descendants returns the processes below pid.
func descendants(pid int) []int {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	var all []int
	for _, f := range files {
		b, _ := os.ReadFile(f)
		for _, s := range strings.Fields(string(b)) {
			if child, err := strconv.Atoi(s); err == nil {
				all = append(append(all, child), descendants(child)...)
			}
		}
	}
	return all
}
