package limits

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"pyro/internal/vm"
)

// choose sets l up for each limit: in a cgroup where that works, else in the
// way that needs none.
func (l *Limits) choose(ctx context.Context, trees []tree, id vm.ID) error {
	l.enforced = map[string]string{}
	for _, limit := range []struct {
		key, controller string
		set             func(*group, amounts) (string, error)
		otherwise       func(id vm.ID) string
	}{
		{KeyMemory, ctlMemory, setMemory, func(vm.ID) string { return Watchdog }},
		{KeyCPU, ctlCPU, setCPU, l.chooseCPUs},
		{KeyTasks, ctlPids, setTasks, func(vm.ID) string { return l.chooseRlimit() }},
	} {
		if err := ctx.Err(); err != nil {
			return err
		}
		g, err := l.groupFor(ctx, trees, id, limit.controller)
		var how string
		if err == nil {
			how, err = limit.set(g, l.want)
		}
		if errors.Is(err, errInUse) {
			return err
		}
		if err != nil {
			how = limit.otherwise(id)
			l.log.Debug("a limit needs no cgroup or gets none", "op", "limits", "limit", limit.key, "way", how, "err", err)
		} else {
			g.used = true
		}
		if err == nil && limit.key == KeyMemory {
			l.memory = g
		}
		l.enforced[limit.key] = how
	}
	return l.dropUnused(ctx)
}

// dropUnused removes the cgroups that turned out to enforce nothing.
func (l *Limits) dropUnused(ctx context.Context) error {
	for i := len(l.groups) - 1; i >= 0; i-- {
		if l.groups[i].used {
			continue
		}
		if err := removeCgroup(ctx, l.sys, l.groups[i].dir); err != nil {
			return err
		}
		l.groups = slices.Delete(l.groups, i, i+1)
	}
	return nil
}

// groupFor returns the VM's cgroup that has a controller, and makes it unless
// it is made already: one cgroup may have several.
func (l *Limits) groupFor(ctx context.Context, trees []tree, id vm.ID, controller string) (*group, error) {
	p, err := findPlace(l.sys, trees, controller)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(p.dir, cgroupName(id))
	for _, g := range l.groups {
		if g.dir == dir {
			return g, nil
		}
	}
	// What is there already is from a shim of this VM that died.
	if err := removeCgroup(ctx, l.sys, dir); err != nil {
		return nil, err
	}
	g, err := p.make(l.sys, id)
	if err != nil {
		return nil, err
	}
	l.groups = append(l.groups, g)
	return g, nil
}

// setMemory limits memory and swap together, so that swap does not defeat the
// limit.
func setMemory(g *group, want amounts) (string, error) {
	limit := strconv.FormatInt(want.memory, 10)
	if g.version == 2 {
		return CgroupV2, errors.Join(
			g.set("memory.max", limit),
			g.setIfThere("memory.swap.max", "0"),  // not there without swap accounting
			g.setIfThere("memory.oom.group", "1")) // Linux 4.19
	}
	err := errors.Join(
		g.set("memory.limit_in_bytes", limit),
		g.setIfThere("memory.memsw.limit_in_bytes", limit), // after the other: it may not be lower
		// A parent's setting is inherited, and would leave the VM hanging
		// instead of killed.
		g.setIfThere("memory.oom_control", "0"))
	if _, missing := os.Stat(filepath.Join(g.dir, "memory.memsw.limit_in_bytes")); missing != nil {
		err = errors.Join(err, g.setIfThere("memory.swappiness", "0"))
	}
	return CgroupV1, err
}

// cpuPeriod is the kernel's default period of processor quotas, in µs.
const cpuPeriod = 100_000

func setCPU(g *group, want amounts) (string, error) {
	period, quota := strconv.Itoa(cpuPeriod), strconv.Itoa(want.cpus*cpuPeriod)
	if g.version == 2 {
		return CgroupV2, g.set("cpu.max", quota+" "+period)
	}
	if err := g.set("cpu.cfs_period_us", period); err != nil {
		return "", err
	}
	err := g.set("cpu.cfs_quota_us", quota)
	// Version 1 refuses a quota beyond an ancestor's, which holds anyway
	// (Documentation/scheduler/sched-bwc.rst).
	if errors.Is(err, syscall.EINVAL) {
		return CgroupV1Outer, nil
	}
	return CgroupV1, err
}

func setTasks(g *group, want amounts) (string, error) {
	return [...]string{1: CgroupV1, 2: CgroupV2}[g.version], g.set("pids.max", strconv.Itoa(want.tasks))
}

// set writes a control file of the cgroup.
func (g *group) set(file, value string) error {
	if err := g.sys.write(filepath.Join(g.dir, file), value); err != nil {
		return fmt.Errorf("set %s to %s: %w", file, value, err)
	}
	return nil
}

// setIfThere is set for a file that not every kernel has.
func (g *group) setIfThere(file, value string) error {
	if err := g.set(file, value); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
