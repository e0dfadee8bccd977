package gvisor

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// lend makes host directories read-only in this process's mount namespace, with
// all that is mounted below them. gVisor makes only the top of a bind
// read-only, and its own side of that root inside may lift: what keeps the
// host's files from being written is this. A directory may be lent again.
func lend(dirs []string) error {
	for _, dir := range dirs {
		if err := lendOne(dir); err != nil {
			return fmt.Errorf("lend %s read-only: %w", dir, err)
		}
	}
	return nil
}

func lendOne(dir string) error {
	if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	err := unix.MountSetattr(unix.AT_FDCWD, dir, unix.AT_RECURSIVE, attr)
	if !errors.Is(err, unix.ENOSYS) {
		return err
	}
	// Before Linux 5.12 each mount has to be told by itself.
	mounts, err := mountsAt(dir)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err := unix.Mount("", m, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
			return fmt.Errorf("remount %s: %w", m, err)
		}
	}
	return nil
}

// mountsAt lists the mount points at dir and below it: field 5 of
// /proc/self/mountinfo, see proc(5).
func mountsAt(dir string) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []string
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for lines := bufio.NewScanner(f); ; {
		if !lines.Scan() {
			return found, lines.Err()
		}
		if fields := strings.Fields(lines.Text()); len(fields) > 4 {
			if at := unescape.Replace(fields[4]); at == dir || strings.HasPrefix(at, dir+"/") {
				found = append(found, at)
			}
		}
	}
}
