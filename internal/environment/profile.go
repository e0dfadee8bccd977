package environment

import "pyro/internal/vm"

// HostProfile is the name of the profile that needs no image: see Host.
const HostProfile = "host"

// CheckProfile reports whether there is a profile of that name. The error's
// code is vm.CodeUnknownProfile.
func CheckProfile(name string) error {
	if name == HostProfile {
		return nil
	}
	shown := name
	if len(shown) > 64 {
		shown = shown[:64] + "…"
	}
	return vm.Errorf(vm.CodeUnknownProfile, "unknown profile %q", shown).
		WithHint("the profile there is: " + HostProfile + " (this machine's own programs)")
}
