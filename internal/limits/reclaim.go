package limits

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"pyro/internal/vm"
)

// Reclaim removes the cgroups that a dead shim of the VM id has left, wherever
// in the visible trees they are. It may be called by any process that may
// remove them, inside or outside the shim's namespaces, any number of times;
// nothing to remove is no error. It never kills: while processes are in a
// cgroup, those of a shim that lives after all, the error says so, after a
// bounded wait for processes that are about to end.
func Reclaim(ctx context.Context, id vm.ID) error {
	return reclaim(ctx, system{proc: "/proc", rmdir: unix.Rmdir}, id)
}

func reclaim(ctx context.Context, sys system, id vm.ID) error {
	trees, err := readTrees(sys.proc)
	if err != nil {
		return fmt.Errorf("reclaim cgroups of VM %s: %w", id, err)
	}
	var errs []error
	for _, t := range trees {
		if err := removeFrom(ctx, sys, t, cgroupName(id)); err != nil {
			errs = append(errs, fmt.Errorf("reclaim cgroups of VM %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// removeFrom removes all cgroups with a name from a hierarchy: a VM whose shim
// died and was started again elsewhere may have left more than one.
func removeFrom(ctx context.Context, sys system, t tree, name string) error {
	for {
		dir, err := findCgroup(ctx, t, name)
		if err != nil || dir == "" {
			return err
		}
		if err := removeCgroup(ctx, sys, dir); err != nil {
			return err
		}
	}
}

// findCgroup returns a directory with a name in a hierarchy, or an empty
// string. It looks first where a shim of the same origin as the caller puts it,
// then everywhere. A tree of 1,000 cgroups takes some 30 ms.
func findCgroup(ctx context.Context, t tree, name string) (string, error) {
	for dir := t.own; dir != ""; dir = filepath.Dir(dir) {
		if st, err := os.Lstat(filepath.Join(dir, name)); err == nil && st.IsDir() {
			return filepath.Join(dir, name), nil
		}
		if dir == t.mount || len(dir) <= 1 {
			break
		}
	}
	queue := []string{t.mount}
	for len(queue) > 0 {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		dir := queue[0]
		queue = queue[1:]
		entries, _ := os.ReadDir(dir) // what is gone or closed to the caller has none of his
		for _, e := range entries {
			switch {
			case !e.IsDir():
			case e.Name() == name:
				return filepath.Join(dir, name), nil
			default:
				queue = append(queue, filepath.Join(dir, e.Name()))
			}
		}
	}
	return "", nil
}
