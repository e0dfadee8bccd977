package pyro

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pyro/internal/vm"
)

// TestVMThatEndedAfterItsTimeHasExpired is of the one part of a VM's expiry that
// a test need not wait a minute for; package shim has the others.
func TestVMThatEndedAfterItsTimeHasExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed := vm.Errorf(vm.CodeVMFailed, "it ended")
		v := vm.VM{ID: "0123456789ab", TTLSeconds: 60, ExpiresAt: vm.Time{Time: time.Now().Add(time.Minute)}}
		var m Manager
		time.Sleep(time.Minute - time.Nanosecond)
		if err := m.explain(v, failed); !errors.Is(err, CodeVMFailed) {
			t.Errorf("before its time: %v", err)
		}
		time.Sleep(time.Nanosecond)
		for _, cause := range []error{failed, fmt.Errorf("delete: %w", failed)} {
			err := AsError(m.explain(v, cause))
			if err.Code != CodeVMExpired || err.Hint == "" || !strings.Contains(err.Message, "0123456789ab expired after 60 s") {
				t.Errorf("after its time: %+v", err)
			}
		}
		// What did not come of its end is told as it is.
		other := vm.Errorf(vm.CodeCommandNotFound, "no such command")
		if err := m.explain(v, other); err != error(other) {
			t.Errorf("another failure: %v", err)
		}
	})
}

func TestEnvironmentInUseIsSeenWhateverTheBaseDirectoryIsCalled(t *testing.T) {
	m := &Manager{baseDir: filepath.Join(t.TempDir(), "a[b]*")}
	dir := filepath.Join(m.vmsDir(), "0123456789ab")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/the/environment", filepath.Join(dir, environmentLink)); err != nil {
		t.Fatal(err)
	}
	if !m.environmentInUse("/the/environment") {
		t.Error("it is not seen")
	}
}
