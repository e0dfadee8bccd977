// Package need is for tests alone: it lets a test say what it needs of the
// machine. Where the machine has not got it the test is skipped, with the
// reason, or fails if the environment variable PYRO_REQUIRE names the need (a
// list separated by commas: gvisor, cgroup, root). So that where things are meant
// to work, as in continuous integration, nothing is skipped unnoticed.
package need

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Need names something that not every machine has.
type Need string

// What tests may need.
const (
	// GVisor stands for all that sandboxes take: namespaces, and a /proc that
	// may be mounted in them.
	GVisor Need = "gvisor"
	// Cgroup is that the user may make control groups for every limit.
	Cgroup Need = "cgroup"
	// Root is the rights of the real root.
	Root Need = "root"
)

// Missing ends the test because the machine lacks n: as skipped, or as failed
// where n is required.
func Missing(t testing.TB, n Need, why string) {
	t.Helper()
	if slices.Contains(strings.Split(os.Getenv("PYRO_REQUIRE"), ","), string(n)) {
		t.Fatalf("PYRO_REQUIRE has %s, but %s", n, why)
	}
	t.Skipf("needs %s: %s", n, why)
}

// Namespaces returns the attributes of a child that is process 1 of namespaces
// like a shim's, and ends the test where the machine does not allow them.
func Namespaces(t testing.TB) *syscall.SysProcAttr {
	t.Helper()
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	if os.Geteuid() != 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	probe := exec.Command("sh", "-c", "mount --make-rprivate / && mount -t proc proc /proc")
	probe.SysProcAttr = attr
	if out, err := probe.CombinedOutput(); err != nil {
		Missing(t, GVisor, "a process namespace with its own /proc is refused: "+err.Error()+" "+string(out))
	}
	return attr
}

// RealRoot ends the test unless it runs with root's rights.
func RealRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, Root, "this is an ordinary user")
	}
}
