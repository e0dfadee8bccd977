// Package environment makes the root filesystems that VMs start from.
//
// An environment is made once, never changed afterwards, and shared by all the
// VMs that start from it: what a VM writes goes to the VM's own overlay. So
// starting a VM costs no copy, and a VM cannot leave anything behind for the
// next one.
//
// The one environment that needs no download is made by Host: the programs of
// this machine, without anything that belongs to this machine or its users. Its
// rule is that everything inside is there because a list says so. Nothing is
// copied and then removed, because what nobody thought of must stay outside;
// and nothing is shown that an ordinary user of the machine could not read, so
// that it makes no difference whether root prepared it.
package environment

// Root is an environment's root filesystem, read-only and shared by all VMs
// that use it.
type Root struct {
	// Dir is a prepared directory on the host.
	Dir string `json:"dir"`
	// Binds are further host directories, seen read-only inside at the same
	// path, with what is mounted below them.
	Binds []string `json:"binds,omitempty"`
	// Env is the environment of every command, as KEY=VALUE.
	Env []string `json:"env,omitempty"`
	// WorkingDir is where commands start; an absolute path inside.
	WorkingDir string `json:"working_dir,omitempty"`
}
