package limits

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"pyro/internal/vm"
)

// group is one of the VM's cgroups.
type group struct {
	sys     system
	dir     string
	version int
	home    string // the caller's own cgroup in the same hierarchy
	used    bool   // it enforces something
}

// cgroupName names a VM's cgroup in every hierarchy.
func cgroupName(id vm.ID) string { return "pyro-" + string(id) }

// place is a cgroup below which the VM's may be made, with the controllers that
// it would have there.
type place struct {
	tree
	dir         string
	controllers []string
	missing     []string // those of controllers that have to be switched on first
}

// findPlace looks for the hierarchy that has a controller and for the place in
// it. The error says why there is none.
func findPlace(sys system, trees []tree, controller string) (place, error) {
	err := errors.New("no cgroups are mounted")
	for _, t := range trees {
		switch {
		case t.version == 1 && !t.has(controller):
			continue
		case t.own == "":
			err = fmt.Errorf("the caller's own cgroup is not visible below %s", t.mount)
			continue
		case t.version == 2:
			p, ok := findPlaceV2(sys, t)
			if ok && slices.Contains(p.controllers, controller) {
				return p, nil
			}
			err = fmt.Errorf("no cgroup from %s upwards offers the %s controller to the caller", t.own, controller)
			continue
		case !sys.writable(t.own) || !sys.writable(filepath.Join(t.own, "cgroup.procs")):
			err = fmt.Errorf("%s is not writable", t.own)
			continue
		}
		return place{tree: t, dir: t.own, controllers: t.controllers}, nil
	}
	return place{}, err
}

// findPlaceV2 chooses the nearest ancestor of the caller's cgroup, or itself,
// that can limit the memory of a new child, else the nearest that can limit
// anything. Going up further for one more controller would leave limits behind
// that someone has set in between.
//
// What makes a place (cgroup-v2.rst, "Delegation Containment" and "No Internal
// Process Constraint"): the caller can make directories in it; it can write to
// its cgroup.procs, as the common ancestor of where a process comes from and
// where it goes; and the controller is in its cgroup.subtree_control, or may be
// put there.
func findPlaceV2(sys system, t tree) (place, bool) {
	var best place
	for dir := t.own; ; dir = filepath.Dir(dir) {
		if sys.writable(dir) && sys.writable(filepath.Join(dir, "cgroup.procs")) {
			p := offers(sys, t, dir)
			if slices.Contains(p.controllers, ctlMemory) {
				return p, true
			}
			if best.dir == "" && len(p.controllers) > 0 {
				best = p
			}
		}
		if dir == t.mount || len(dir) <= 1 {
			return best, best.dir != ""
		}
	}
}

// offers finds the controllers that a new child of dir would have.
func offers(sys system, t tree, dir string) place {
	p := place{tree: t, dir: dir}
	on := readWords(filepath.Join(dir, "cgroup.subtree_control"))
	mayEnable := mayEnable(sys, t, dir, on)
	available := readWords(filepath.Join(dir, "cgroup.controllers"))
	for _, c := range []string{ctlMemory, ctlCPU, ctlPids} {
		switch {
		case slices.Contains(on, c):
			p.controllers = append(p.controllers, c)
		case mayEnable && slices.Contains(available, c):
			p.controllers = append(p.controllers, c)
			p.missing = append(p.missing, c)
		}
	}
	return p
}

// mayEnable reports whether switching on further controllers for the children
// of dir is ours to do. Elsewhere it would change how the processor is shared
// among other people's cgroups, or keep processes out of a cgroup that its owner
// wants to put there. It is ours in two cases: systemd has delegated dir, and no
// process is in it (the caller's is in a child then); or dir is the true root of
// the machine's hierarchy, which may have processes and children both, and
// nobody has divided it up.
func mayEnable(sys system, t tree, dir string, on []string) bool {
	// Only the true root lacks this file: the root of a container's cgroup
	// namespace has it.
	if _, err := os.Stat(filepath.Join(dir, "cgroup.type")); os.IsNotExist(err) {
		return len(on) == 0
	}
	return dir != t.own && sys.delegated(dir) && len(readWords(filepath.Join(dir, "cgroup.procs"))) == 0
}

// make makes the VM's cgroup at the place.
func (p place) make(sys system, id vm.ID) (*group, error) {
	for _, c := range p.missing {
		// One by one, for the others' sake. A controller that stays off shows
		// when its limit is set: its files are not there.
		_ = sys.write(filepath.Join(p.dir, "cgroup.subtree_control"), "+"+c)
	}
	g := &group{sys: sys, dir: filepath.Join(p.dir, cgroupName(id)), version: p.version, home: p.own}
	if err := sys.mkdir(g.dir); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	// A child of a threaded cgroup comes to be "domain invalid", and takes no
	// processes.
	if typ := readWords(filepath.Join(g.dir, "cgroup.type")); len(typ) > 0 && !slices.Equal(typ, []string{"domain"}) {
		return nil, errors.Join(fmt.Errorf("cgroup %s is of type %q", g.dir, strings.Join(typ, " ")), sys.rmdir(g.dir))
	}
	return g, nil
}

// readWords returns the words of a control file; none if it cannot be read.
func readWords(name string) []string {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil
	}
	var words []string
	for w := range bytes.FieldsSeq(b) {
		words = append(words, string(w))
	}
	return words
}
