package limits

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pyro/internal/vm"
)

const (
	mountV2    = "/ DIR/cg rw - cgroup2 cgroup2 rw,nsdelegate"
	testID     = vm.ID("0123456789ab")
	testName   = "pyro-0123456789ab"
	allEnabled = "cpuset cpu io memory pids"
)

func enforced(memory, cpu, tasks string) map[string]string {
	return map[string]string{KeyMemory: memory, KeyCPU: cpu, KeyTasks: tasks}
}

// TestLayouts opens limits on machines of many kinds.
func TestLayouts(t *testing.T) {
	t.Parallel()
	const scope = "cg/user.slice/user-1000.slice/user@1000.service/app.slice/app-term-1.scope"
	for _, c := range []struct {
		name  string
		fake  func(t *testing.T) *fake
		where []string // the cgroups that are made
		want  map[string]string
	}{
		{
			"v2, an ordinary user's terminal under systemd: no cpu controller there",
			func(t *testing.T) *fake {
				f := systemd(t, "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-term-1.scope\n")
				f.closed, f.open = []string{"cg"}, []string{"cg/user.slice/user-1000.slice/user@1000.service"}
				f.v2Child(scope, "memory pids", "", "1\n")
				return f
			},
			[]string{filepath.Dir(scope)},
			enforced(CgroupV2, Affinity, CgroupV2),
		},
		{
			"v2, an ordinary user over ssh: systemd's session scope is root's",
			func(t *testing.T) *fake {
				f := systemd(t, "0::/user.slice/user-1000.slice/session-3.scope\n")
				f.closed, f.open = []string{"cg"}, []string{"cg/user.slice/user-1000.slice/user@1000.service"}
				f.v2Child("cg/user.slice/user-1000.slice/session-3.scope", allEnabled, "", "1\n")
				return f
			},
			nil,
			enforced(Watchdog, Affinity, Rlimit),
		},
		{
			"v2, a service with Delegate=yes and DelegateSubgroup=",
			func(t *testing.T) *fake {
				f := systemd(t, "0::/system.slice/pyro.service/supervisor\n")
				f.v2Child("cg/system.slice", allEnabled, "memory pids cpu", "")
				f.v2Child("cg/system.slice/pyro.service", "cpu memory pids", "", "")
				f.v2Child("cg/system.slice/pyro.service/supervisor", "", "", "1\n")
				f.closed, f.open = []string{"cg"}, []string{"cg/system.slice/pyro.service"}
				f.delegated = "cg/system.slice/pyro.service"
				return f
			},
			[]string{"cg/system.slice/pyro.service"},
			enforced(CgroupV2, CgroupV2, CgroupV2),
		},
		{
			"v2, a service with Delegate=yes that shares its cgroup with the caller",
			func(t *testing.T) *fake {
				f := systemd(t, "0::/system.slice/pyro.service\n")
				f.v2Child("cg/system.slice", allEnabled, "memory pids cpu", "")
				f.v2Child("cg/system.slice/pyro.service", "cpu memory pids", "", "1\n")
				f.closed, f.open = []string{"cg"}, []string{"cg/system.slice/pyro.service"}
				f.delegated = "cg/system.slice/pyro.service"
				return f
			},
			nil,
			enforced(Watchdog, Affinity, Rlimit),
		},
		{
			"v2, root under systemd: the nearest slice",
			func(t *testing.T) *fake {
				f := systemd(t, "0::/user.slice/user-0.slice/session-1.scope\n")
				f.v2Child("cg/user.slice/user-0.slice", "memory pids", "memory pids", "")
				f.v2Child("cg/user.slice/user-0.slice/session-1.scope", "memory pids", "", "1\n")
				return f
			},
			[]string{"cg/user.slice/user-0.slice"},
			enforced(CgroupV2, Affinity, CgroupV2),
		},
		{
			"v2, root in a container whose processes are in the root of its namespace",
			func(t *testing.T) *fake {
				f := newFake(t, "0::/\n", mountV2)
				f.v2Child("cg", allEnabled, "", "1\n7\n")
				return f
			},
			nil,
			enforced(Watchdog, Affinity, Rlimit),
		},
		{
			"v2, root in a container that keeps its processes in a child",
			func(t *testing.T) *fake {
				f := newFake(t, "0::/init\n", mountV2)
				f.v2Child("cg", allEnabled, allEnabled, "")
				f.v2Child("cg/init", allEnabled, "", "1\n7\n")
				return f
			},
			[]string{"cg"},
			enforced(CgroupV2, CgroupV2, CgroupV2),
		},
		{
			"v2, a container with its cgroups mounted read-only",
			func(t *testing.T) *fake {
				f := newFake(t, "0::/\n", mountV2)
				f.v2Child("cg", allEnabled, allEnabled, "")
				f.closed = []string{"cg"}
				return f
			},
			nil,
			enforced(Watchdog, Affinity, Rlimit),
		},
		{
			"v2, the whole machine with nobody managing it",
			func(t *testing.T) *fake {
				f := newFake(t, "0::/\n", mountV2)
				f.v2("cg", allEnabled, "", "1\n2\n3\n")
				return f
			},
			[]string{"cg"},
			enforced(CgroupV2, CgroupV2, CgroupV2),
		},
		{
			"v2, the whole machine, managed: what is off stays off",
			func(t *testing.T) *fake {
				f := newFake(t, "0::/\n", mountV2)
				f.v2("cg", allEnabled, "pids", "1\n2\n3\n")
				return f
			},
			[]string{"cg"},
			enforced(Watchdog, Affinity, CgroupV2),
		},
		{
			"v2, the caller's cgroup is outside its namespace",
			func(t *testing.T) *fake {
				f := newFake(t, "0::/../other\n", mountV2)
				f.v2Child("cg", allEnabled, allEnabled, "")
				return f
			},
			nil,
			enforced(Watchdog, Affinity, Rlimit),
		},
		{
			"v1 with systemd's hybrid layout: processor controllers share a hierarchy",
			func(t *testing.T) *fake {
				f := newFake(t, "4:memory:/a\n3:cpu,cpuacct:/\n2:pids:/a/b\n1:name=systemd:/x\n0::/x\n",
					"/ DIR/cg/memory rw - cgroup cgroup rw,memory", "/ DIR/cg/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
					"/ DIR/cg/pids rw - cgroup cgroup rw,pids", "/ DIR/cg/unified rw - cgroup2 cgroup2 rw")
				f.v1("cg/memory/a", "memory")
				f.v1("cg/cpu,cpuacct", "cpu")
				f.v1("cg/pids/a/b", "pids")
				f.v2("cg/unified", "", "", "")
				f.v2Child("cg/unified/x", "", "", "1\n")
				return f
			},
			[]string{"cg/memory/a", "cg/cpu,cpuacct", "cg/pids/a/b"},
			enforced(CgroupV1, CgroupV1, CgroupV1),
		},
		{
			"v1 in a container that sees its own part, with a tight quota",
			func(t *testing.T) *fake {
				f := newFake(t, "4:memory:/docker/c1\n3:cpu:/docker/c1\n",
					"/docker/c1 DIR/cg/memory rw - cgroup cgroup rw,memory", "/docker/c1 DIR/cg/cpu rw - cgroup cgroup rw,cpu")
				f.v1("cg/memory", "memory")
				f.v1("cg/cpu", "cpu")
				f.file("cg/cpu/cpu.cfs_quota_us", "100000")
				return f
			},
			[]string{"cg/memory", "cg/cpu"},
			enforced(CgroupV1, CgroupV1Outer, Rlimit),
		},
		{
			"v1 and v2 mixed: memory in v2",
			func(t *testing.T) *fake {
				f := newFake(t, "3:cpu:/\n2:pids:/\n0::/\n",
					"/ DIR/cg/cpu rw - cgroup cgroup rw,cpu", "/ DIR/cg/pids rw - cgroup cgroup rw,pids", "/ DIR/cg/unified rw - cgroup2 cgroup2 rw")
				f.v1("cg/cpu", "cpu")
				f.v1("cg/pids", "pids")
				f.v2("cg/unified", "memory", "memory", "1\n")
				return f
			},
			[]string{"cg/unified", "cg/cpu", "cg/pids"},
			enforced(CgroupV2, CgroupV1, CgroupV1),
		},
		{
			"no cgroups, real root",
			func(t *testing.T) *fake {
				f := newFake(t, "")
				f.file("proc/self/uid_map", "0 0 4294967295\n")
				return f
			},
			nil,
			enforced(Watchdog, Affinity, "none: RLIMIT_NPROC needs a user namespace for the VM alone"),
		},
		{
			"no cgroups, an old kernel",
			func(t *testing.T) *fake {
				f := newFake(t, "")
				f.file("proc/sys/kernel/osrelease", "5.10.0-30-amd64\n")
				return f
			},
			nil,
			enforced(Watchdog, Affinity, "none: Linux before 5.14 counts tasks per user, not per VM"),
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			f := c.fake(t)
			want := amountsOf(vm.Resources{VCPUCount: 2, MemMiB: 256})
			l, err := open(t.Context(), f.system(), testID, want, testLog(t.Output()))
			if err != nil {
				t.Fatal(err)
			}
			if got := l.Enforced(); !maps.Equal(got, c.want) {
				t.Errorf("enforced %v, want %v", got, c.want)
			}
			for _, dir := range c.where {
				f.wantLimits(dir+"/"+testName, want)
			}
			if len(l.groups) != len(c.where) {
				t.Errorf("made %d cgroups, want %v", len(l.groups), c.where)
			}
			if err := l.Close(t.Context()); err != nil {
				t.Error(err)
			}
			if left, _ := filepath.Glob(f.dir + "/cg/*" + testName); left != nil {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// wantLimits checks the files that a cgroup has for limits.
func (f *fake) wantLimits(dir string, want amounts) {
	f.t.Helper()
	if _, err := os.Stat(filepath.Join(f.dir, dir)); err != nil {
		f.t.Error(err)
	}
	for file, value := range map[string]string{
		"memory.limit_in_bytes": "336592896", "memory.memsw.limit_in_bytes": "336592896",
		"memory.max": "336592896", "memory.swap.max": "0", "memory.oom.group": "1",
		"cpu.max": "200000 100000", "pids.max": "2560",
	} {
		if got := f.read(dir + "/" + file); got != "" && got != value {
			f.t.Errorf("%s/%s is %q, want %q", dir, file, got, value)
		}
	}
}

// systemd is a machine with systemd and cgroups of version 2 alone.
func systemd(t *testing.T, own string) *fake {
	f := newFake(t, own, mountV2)
	f.v2("cg", allEnabled, allEnabled, "")
	f.v2Child("cg/user.slice", allEnabled, allEnabled, "")
	f.v2Child("cg/user.slice/user-1000.slice", allEnabled, "cpu memory pids", "")
	user := "cg/user.slice/user-1000.slice/user@1000.service"
	f.v2Child(user, "cpu memory pids", "cpu memory pids", "")
	f.v2Child(user+"/app.slice", "cpu memory pids", "memory pids", "")
	return f
}

// TestUnusableGroup checks that a cgroup which turns out to be unusable is
// removed, and that the limits fall back one by one.
func TestUnusableGroup(t *testing.T) {
	t.Parallel()
	f := newFake(t, "0::/\n", mountV2)
	f.v2("cg", allEnabled, allEnabled, "")
	sys := f.system()
	sys.write = func(name, value string) error {
		if strings.HasSuffix(name, "memory.max") {
			return errInUse
		}
		return f.write(name, value)
	}
	sys.writable = f.writable
	_, err := open(t.Context(), sys, testID, amounts{memory: 1 << 30, cpus: 1, tasks: 9}, testLog(t.Output()))
	if err == nil {
		t.Error("a cgroup in use is taken over")
	}
	if f.read("cg/"+testName+"/cgroup.controllers") != "" {
		t.Error("the cgroup is left")
	}

	f = newFake(t, "0::/\n", mountV2)
	f.v2("cg", allEnabled, allEnabled, "")
	sys = f.system()
	sys.mkdir = func(dir string) error {
		err := f.mkdir(dir)
		f.file("cg/"+testName+"/cgroup.type", "domain invalid\n")
		return err
	}
	l, err := open(t.Context(), sys, testID, amounts{memory: 1 << 30, cpus: 1, tasks: 9}, testLog(t.Output()))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close(t.Context())
	if got, want := l.Enforced(), enforced(Watchdog, Affinity, Rlimit); !maps.Equal(got, want) {
		t.Errorf("enforced %v, want %v", got, want)
	}
	if f.read("cg/"+testName+"/cgroup.type") != "" {
		t.Error("the threaded cgroup is left")
	}
}

// TestConfineV2 moves processes of a made-up /proc.
func TestConfineV2(t *testing.T) {
	t.Parallel()
	f := newFake(t, "0::/\n", mountV2)
	f.v2("cg", allEnabled, allEnabled, "")
	for pid, stat := range map[string]string{
		"1": "1 (shim) S", "7": "7 (a) b) Z) R", "8": "8 (gone) Z", "9": "9 (sandbox) S",
	} {
		f.file("proc/"+pid+"/stat", stat+strings.Repeat(" 0", 16)+" 1 0\n")
	}
	l, err := open(t.Context(), f.system(), testID, amounts{memory: 1 << 30, cpus: 1, tasks: 9}, testLog(t.Output()))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Confine(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := f.read("cg/" + testName + "/cgroup.procs"); got != "7\n9" && got != "9\n7" {
		t.Errorf("in the cgroup: %q, want 7 and 9", got)
	}
	if l.OOM() {
		t.Error("OOM before anything happened")
	}
	f.file("cg/"+testName+"/memory.events", "oom 1\noom_kill 2\n")
	if !l.OOM() {
		t.Error("no OOM after the kernel's kill")
	}
	f.file("cg/"+testName+"/cgroup.procs", "")
	if err := l.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if !l.OOM() {
		t.Error("OOM is forgotten after Close")
	}
}
