package gvisor

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"gvisor.dev/gvisor/runsc/specutils"

	"pyro/internal/backend"
	"pyro/internal/environment"
)

// ociSpec describes a machine in the terms of the OCI runtime specification,
// which is what gVisor takes.
func ociSpec(spec backend.Spec) *specs.Spec {
	oci := &specs.Spec{
		Version:  specs.Version,
		Hostname: environment.Hostname,
		Root:     &specs.Root{Path: spec.Root.Dir},
		Process: &specs.Process{
			Args: []string{"pyro-init"},
			Cwd:  "/",
			// All capabilities of gVisor's own kernel: root inside is root
			// over the machine and nothing else.
			Capabilities: specutils.AllCapabilities(),
		},
		Mounts: []specs.Mount{
			{Type: "proc", Destination: "/proc", Source: "proc"},
			{Type: "sysfs", Destination: "/sys", Source: "sysfs", Options: []string{"ro"}},
		},
		Linux: &specs.Linux{
			// An empty network namespace: with --network=none gVisor has a
			// loopback device and no way out.
			Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace}},
		},
	}
	for _, dir := range spec.Root.Binds {
		oci.Mounts = append(oci.Mounts, specs.Mount{
			Type: "bind", Source: dir, Destination: dir, Options: []string{"rbind", "ro"},
		})
	}
	return oci
}

// writeBundle writes the directory that gVisor reads a machine from.
func writeBundle(dir string, oci *specs.Spec, boot bootArgs) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the bundle: %w", err)
	}
	b, err := json.Marshal(oci)
	if err != nil {
		return fmt.Errorf("encode the bundle's config: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600); err != nil {
		return fmt.Errorf("write the bundle's config: %w", err)
	}
	return boot.write(dir)
}
