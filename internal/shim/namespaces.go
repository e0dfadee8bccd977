package shim

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// scratchName is the mount point of the VM's memory in its directory; what is
// mounted there is seen by the shim and its children alone.
const scratchName = "scratch"

// scratchSize bounds what a backend may keep in memory: descriptions and
// sockets, not data.
const scratchSize = "16m"

// enterNamespaces makes the shim's mount namespace its own in effect and gives
// it a /proc that shows its process namespace, which whatever starts children
// in further namespaces relies on.
func enterNamespaces() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return forbidden(fmt.Errorf("make mounts private: %w", err), readSetting)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return forbidden(fmt.Errorf("mount /proc: %w", err), readSetting)
	}
	return nil
}

// mountScratch gives the VM a private directory in memory.
func mountScratch(dir string) (string, error) {
	path := filepath.Join(dir, scratchName)
	if err := os.Mkdir(path, 0o700); err != nil {
		return "", fmt.Errorf("make the VM's scratch directory: %w", err)
	}
	if err := unix.Mount("pyro", path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700,size="+scratchSize); err != nil {
		return "", fmt.Errorf("mount the VM's scratch directory: %w", err)
	}
	return path, nil
}

// unmountScratch undoes mountScratch; a directory without one is no error.
func unmountScratch(dir string) error {
	err := unix.Unmount(filepath.Join(dir, scratchName), unix.MNT_DETACH)
	if err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unmount the VM's scratch directory: %w", err)
	}
	return nil
}
