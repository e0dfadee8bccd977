package main

import (
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestWhatIsLentCannotBeWritten: not where a filesystem is mounted below /usr,
// and not after root inside has remounted what it can.
func TestWhatIsLentCannotBeWritten(t *testing.T) {
	w := newWorld(t)
	r := w.onDisk(`mount -t tmpfs none /usr/games
		echo original >/usr/games/file
		"$0" run -- sh -c '
			for m in /usr /usr/games; do mount -o remount,rw $m; mount -o remount,rw,bind $m; done
			echo changed >>/usr/games/file
			echo new >/usr/games/new
			echo new >/usr/new
			chmod 777 /usr/games/file
			true' 2>/dev/null
		cat /usr/games/file
		stat -c %a /usr/games/file
		ls /usr/games /usr/new 2>/dev/null || :`)
	if want := "original\n644\n/usr/games:\nfile\n"; r.code != 0 || r.stdout != want {
		t.Errorf("exit code %d, on the host is %q, want %q; %s", r.code, r.stdout, want, r.stderr)
	}
}

// TestGuestHoldsNoFileOfTheHosts: what process 1 inside has open is no file
// that could be filled, least of all the shim's log.
func TestGuestHoldsNoFileOfTheHosts(t *testing.T) {
	w := newWorld(t)
	p := w.start("--", "sh", "-c", `for f in /proc/1/fd/*; do dd if=/dev/zero of=$f bs=1M count=8 2>/dev/null; done; echo ready; `+loop)
	p.says("ready\n")
	err := filepath.WalkDir(filepath.Join(w.base, "vms"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Size() > 4096 {
			t.Errorf("%s has %d bytes", strings.TrimPrefix(path, w.base), info.Size())
		}
		return err
	})
	check(t, err)
	p.signal(syscall.SIGHUP)
	p.wait(endTime)
}
