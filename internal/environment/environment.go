// Package environment makes the root filesystems that VMs start from.
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
