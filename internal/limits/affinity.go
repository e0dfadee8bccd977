package limits

import (
	"fmt"
	"hash/fnv"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"pyro/internal/vm"
)

// cpuSet is a set of CPUs.
type cpuSet struct{ unix.CPUSet }

// chooseCPUs takes as many CPUs as the VM has out of those that the caller may
// use itself. They begin at a place that depends on the vm_id, so that VMs
// spread over the machine with no record of who is where. As a limit this is
// coarser than a quota: VMs that share a CPU also share its time.
func (l *Limits) chooseCPUs(id vm.ID) string {
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return fmt.Sprintf("none: read the allowed CPUs: %v", err)
	}
	set := pickCPUs(allowed, l.want.cpus, id)
	l.cpus = &set
	return Affinity
}

// pickCPUs picks n consecutive ones of the allowed CPUs, going around at the
// end: neighbours in number are on most machines different cores that share a
// cache, and the second threads of the cores have the upper half of the numbers.
func pickCPUs(allowed unix.CPUSet, n int, id vm.ID) cpuSet {
	var cpus []int
	for cpu := range len(allowed) * strconv.IntSize {
		if allowed.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	h := fnv.New32a()
	h.Write([]byte(id))
	var set cpuSet
	for i := range min(n, len(cpus)) {
		set.Set(cpus[(int(h.Sum32())+i)%len(cpus)])
	}
	return set
}

// pin makes every thread of a process run on the set's CPUs only, and returns
// how many did not before. A thread that one of them starts meanwhile may be
// missed; the next call finds it.
func (s *cpuSet) pin(sys system, pid int) (int, error) {
	tids, err := readNames(filepath.Join(sys.proc, strconv.Itoa(pid), "task"))
	if gone(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("list the threads of process %d: %w", pid, err)
	}
	changed := 0
	for _, name := range tids {
		tid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		var now unix.CPUSet
		err = unix.SchedGetaffinity(tid, &now)
		if err == nil && !s.covers(now) {
			changed++
			err = unix.SchedSetaffinity(tid, &s.CPUSet)
		}
		if err != nil && !gone(err) {
			return changed, fmt.Errorf("set the CPUs of thread %d: %w", tid, err)
		}
	}
	return changed, nil
}

// covers reports whether all CPUs of o are in the set.
func (s *cpuSet) covers(o unix.CPUSet) bool {
	for i, mask := range o {
		if mask&^s.CPUSet[i] != 0 {
			return false
		}
	}
	return true
}
