package limits

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pyro/internal/vm"
)

func TestAmounts(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		res  vm.Resources
		want amounts
	}{
		{vm.Resources{VCPUCount: 1, MemMiB: 256}, amounts{memory: (256 + 1 + 64) << 20, cpus: 1, tasks: 2304}},
		{vm.Resources{VCPUCount: 8, MemMiB: 32768}, amounts{memory: (32768 + 128 + 64) << 20, cpus: 8, tasks: 4096}},
	} {
		if got := amountsOf(c.res); got != c.want {
			t.Errorf("amountsOf(%+v) = %+v, want %+v", c.res, got, c.want)
		}
	}
}

// TestPickCPUs checks number and origin of the CPUs, and that VMs spread.
func TestPickCPUs(t *testing.T) {
	t.Parallel()
	var allowed unix.CPUSet
	for _, cpu := range []int{2, 3, 64, 65, 127} {
		allowed.Set(cpu)
	}
	within := cpuSet{allowed}
	uses := map[int]int{}
	for i := range 200 {
		id := vm.ID(fmt.Sprintf("%012x", i*7919))
		for n := 1; n <= 8; n++ {
			got := pickCPUs(allowed, n, id)
			if got.Count() != min(n, 5) || !within.covers(got.CPUSet) {
				t.Fatalf("pickCPUs(%d of 2,3,64,65,127) = %v", n, got)
			}
		}
		first := pickCPUs(allowed, 1, id)
		for cpu := range 128 {
			if first.IsSet(cpu) {
				uses[cpu]++
			}
		}
	}
	for cpu, n := range uses {
		if n < 20 || n > 60 {
			t.Errorf("CPU %d has %d of 200 VMs, want near to 40", cpu, n)
		}
	}
}

// TestPollAfter checks that no look comes after memory can be full, as far as
// that can be had.
func TestPollAfter(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		leftMiB int64
		quiet   time.Duration
		want    time.Duration
	}{
		{-5, 0, pollMin},
		{1, time.Hour, pollMin},
		{64, time.Hour, 15625 * time.Microsecond},
		{300, 0, pollBusy},
		{300, 900 * time.Millisecond, pollBusy},
		{256, time.Second, 62500 * time.Microsecond},
		{4096, time.Second, pollIdle},
	} {
		if got := pollAfter(c.leftMiB<<20, c.quiet); got != c.want {
			t.Errorf("pollAfter(%d MiB, %v) = %v, want %v", c.leftMiB, c.quiet, got, c.want)
		}
	}
}

func TestQuiet(t *testing.T) {
	t.Parallel()
	var q quiet
	begin := time.Now()
	for _, c := range []struct {
		value int64
		at    int // s
		want  int
	}{{5, 0, 0}, {5 + idleStep/2, 3, 3}, {5 + 2*idleStep, 4, 0}, {5, 5, 0}, {5 + idleStep, 7, 2}} {
		got := q.since(c.value, begin.Add(time.Duration(c.at)*time.Second))
		if got != time.Duration(c.want)*time.Second {
			t.Errorf("at %d s with %d: quiet for %v, want %d s", c.at, c.value, got, c.want)
		}
	}
}

func TestAtLeast(t *testing.T) {
	t.Parallel()
	for release, want := range map[string]bool{
		"5.13.19": false, "5.14.0-rc1": true, "5.9": false, "6.1.0-53-cloud-amd64\n": true, "4.18.0-553.el8": false, "odd": false,
	} {
		if got := atLeast(release, 5, 14); got != want {
			t.Errorf("atLeast(%q, 5, 14) = %v", release, got)
		}
	}
}

func TestParseMount(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"31 23 0:28 / /sys/fs/cgroup rw shared:9 - tmpfs tmpfs rw":                    "",
		"32 31 0:29 / /sys/fs/cgroup/cpu rw shared:9 master:1 - cgroup cgroup rw,cpu": "1 [cpu] /sys/fs/cgroup/cpu /",
		"33 31 0:30 /docker/c /c\\040g/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct": "1 [cpu] /c g/cpu,cpuacct /docker/c",
		"36 31 0:33 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices":           "",
		"41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate":      "2 [] /sys/fs/cgroup/unified /",
		"garbage": "",
	} {
		got := ""
		if tr, root, ok := parseMount(line); ok {
			got = fmt.Sprint(tr.version, " ", tr.controllers, " ", tr.mount, " ", root)
		}
		if got != want {
			t.Errorf("%s:\n%q, want %q", line, got, want)
		}
	}
}
