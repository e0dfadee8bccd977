package limits

import "pyro/internal/vm"

// How much a VM's processes may take on the host. What a VM may use is mem_mib;
// the sandbox around it needs memory of its own.
//
// Measured with the gVisor version in go.mod: the sandbox process, its gofer
// and a handful of stub processes hold 25 to 40 MiB, kernel memory included.
// overheadMiB is that and a margin for a guest with many processes, each of
// which costs the sandbox heap and the kernel two stub tasks. The page tables
// that map guest memory come on top: 8 bytes for each 4 KiB page, in the
// sandbox and in the stub that runs the program, which is 1/overheadShare.
//
// So a program can get past mem_mib by what its sandbox leaves unused, some
// 30 MiB, before it is killed. The other way round, a program would be killed
// that keeps within mem_mib.
const (
	overheadMiB   = 64
	overheadShare = 256
)

// How many host tasks (threads count) a VM may have. gVisor makes, for each
// process of the guest, one stub task for system calls and up to one for each
// CPU (pkg/sentry/platform/systrap, maxSysmsgThreads), so what suffices for the
// same work grows with vcpu_count. 2048 lets a guest have some 1,000 processes,
// and is 1/16 of Linux's default pid_max: a VM that uses all of it does not keep
// the host, or the other VMs, from starting processes. A gVisor sandbox that
// reaches the limit crashes, with the VM; so the limit is no economy measure.
const (
	baseTasks    = 2048
	tasksPerVCPU = 256
)

// amounts is what is enforced, in the kernel's units.
type amounts struct {
	memory int64 // bytes
	cpus   int   // CPUs' worth of time
	tasks  int   // threads
}

func amountsOf(res vm.Resources) amounts {
	return amounts{
		memory: int64(res.MemMiB+res.MemMiB/overheadShare+overheadMiB) << 20,
		cpus:   res.VCPUCount,
		tasks:  baseTasks + tasksPerVCPU*res.VCPUCount,
	}
}
