//go:build bugs

package shim

// The promises in this file are not kept yet: each test shows a defect that was
// reported and fails until it is repaired. Run them with -tags bugs; move a
// test among the others when it passes.

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// BUG 51: a shim that was not spawned, but called by somebody whose descriptor 3
// happens to be a socket, removes the directory that it is given and writes over
// the file that descriptor 4 happens to be.
func TestShimThatNobodySpawnedTouchesNothing(t *testing.T) {
	expectNothingLeft(t)
	conn, theirs, err := socketPair()
	check(t, err)
	check(t, conn.Close())
	dir := t.TempDir()
	precious, other := filepath.Join(dir, "home", "precious"), filepath.Join(dir, "other")
	check(t, os.MkdirAll(precious, 0o700))
	check(t, os.WriteFile(other, []byte("something long enough to be written over"), 0o600))
	f, err := os.OpenFile(other, os.O_RDWR, 0)
	check(t, err)
	defer f.Close()
	cmd := exec.CommandContext(background(t), os.Args[0], role, filepath.Dir(precious))
	cmd.ExtraFiles = []*os.File{theirs, f}
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	err = cmd.Run()
	check(t, theirs.Close())
	if err == nil {
		t.Error("it reports success")
	}
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("the directory: %v", err)
	}
	if b, err := os.ReadFile(other); string(b) != "something long enough to be written over" {
		t.Errorf("the file: %q, %v", b, err)
	}
}
