package limits

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// The controllers that limits are made of, by the kernel's names.
const (
	ctlMemory = "memory"
	ctlCPU    = "cpu"
	ctlPids   = "pids"
)

// tree is one mounted cgroup hierarchy.
type tree struct {
	version     int      // 1 or 2
	controllers []string // version 1: what it is mounted with
	mount       string   // where the visible part of it is mounted
	own         string   // directory of the caller's own cgroup; empty if it is not visible
}

// readTrees lists the mounted hierarchies in which cgroups for the limits could
// be: each of version 1 that has one of our controllers, and that of version 2.
// A machine may have both ("hybrid"); each controller is in one of them.
func readTrees(proc string) ([]tree, error) {
	paths, err := readOwnPaths(filepath.Join(proc, "self", "cgroup"))
	if err != nil {
		return nil, err
	}
	name := filepath.Join(proc, "self", "mountinfo")
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("find where cgroups are mounted: %w", err)
	}
	defer f.Close()
	var trees []tree
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20) // overlay mounts have long lines
	for lines.Scan() {
		t, root, ok := parseMount(lines.Text())
		if !ok {
			continue
		}
		for key, path := range paths {
			if t.has(key) {
				t.own = ownDir(root, t.mount, path)
			}
		}
		if !slices.ContainsFunc(trees, t.same) {
			trees = append(trees, t)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return trees, nil
}

// has reports whether the hierarchy is the one that /proc/self/cgroup lists
// with key: a controller of version 1, or nothing for version 2.
func (t tree) has(key string) bool {
	return key == "" && t.version == 2 || slices.Contains(t.controllers, key)
}

// same reports whether o is a second mount of t's hierarchy at no better place.
func (t tree) same(o tree) bool {
	return t.version == o.version && slices.Equal(t.controllers, o.controllers) && (t.own == "" || o.own != "")
}

// readOwnPaths reads /proc/self/cgroup: for each controller of version 1, and
// under the empty string for version 2, the caller's path in that hierarchy.
func readOwnPaths(name string) (map[string]string, error) {
	b, err := os.ReadFile(name)
	if os.IsNotExist(err) {
		return nil, nil // a kernel without cgroups
	}
	if err != nil {
		return nil, fmt.Errorf("find the caller's cgroups: %w", err)
	}
	paths := map[string]string{}
	for line := range strings.Lines(string(b)) {
		// hierarchy-ID:controllers:path, cgroups(7)
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		for key := range strings.SplitSeq(f[1], ",") {
			paths[key] = f[2]
		}
	}
	return paths, nil
}

// parseMount reads a line of /proc/self/mountinfo (proc_pid_mountinfo(5)) and
// reports whether it is a hierarchy that matters here, with the cgroup that is
// the root of what this mount shows.
func parseMount(line string) (t tree, root string, ok bool) {
	front, back, found := strings.Cut(line, " - ")
	f, b := strings.Fields(front), strings.Fields(back)
	if !found || len(f) < 6 || len(b) < 3 {
		return tree{}, "", false
	}
	t.mount, root = unescape(f[4]), unescape(f[3])
	switch b[0] {
	case "cgroup2":
		t.version = 2
		return t, root, true
	case "cgroup":
		t.version = 1
		for opt := range strings.SplitSeq(b[2], ",") {
			if opt == ctlMemory || opt == ctlCPU || opt == ctlPids {
				t.controllers = append(t.controllers, opt)
			}
		}
		return t, root, len(t.controllers) > 0
	}
	return tree{}, "", false
}

// ownDir is the directory that shows the cgroup path in a mount at mount whose
// root is the cgroup root, or empty if it shows none: a container may see only
// its own part of the hierarchy, at most.
func ownDir(root, mount, path string) string {
	// A path that climbs lies outside the caller's cgroup namespace.
	if path == "" || strings.HasPrefix(path, "/..") || strings.HasPrefix(root, "/..") {
		return ""
	}
	rel, err := filepath.Rel(root, path)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return ""
	}
	dir := filepath.Join(mount, rel)
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return ""
	}
	return dir
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
