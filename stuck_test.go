package pyro_test

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pyro"
)

// TestShimThatIsStoppedFailsTheRun: it cannot keep the command's time, so the
// caller does.
func TestShimThatIsStoppedFailsTheRun(t *testing.T) {
	t.Parallel() // most of it is waiting
	r := newSharedRig(t, "", 4)
	q := r.shell("touch '" + r.stage("here") + "'; sleep 300")
	q.TimeoutSeconds = 1
	done := r.begin(r.ctx(), q)
	await(t, "the command runs", func() bool { return r.reached("here") })
	for _, lock := range r.owned() {
		shim, err := os.ReadFile(lock)
		check(t, err)
		pid, err := strconv.Atoi(strings.Fields(string(shim))[0])
		check(t, err)
		check(t, unix.Kill(pid, unix.SIGSTOP))
	}
	began := time.Now()
	_, err := r.end(done)
	expectCode(t, "run", err, pyro.CodeVMFailed)
	if took := time.Since(began); took > 18*time.Second {
		t.Errorf("it took %v", took)
	}
}
