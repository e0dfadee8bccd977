package gvisor

import (
	"bytes"
	_ "embed"
	"encoding/gob"
	_ "unsafe" // for go:linkname

	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/runsc/boot/filter"
)

// gVisor confines its sandbox process with system call filters and can take
// them compiled ahead, but as a Go module it comes without: it then compiles
// them at every start, for 20 to 30 ms. filters.gob holds the compiled
// programs for the options that pyro uses. A program is found under a key that
// spells those options out, so after a change of either one that is missing
// is compiled as before; TestFilters says when to generate them again.
//
//go:embed filters.gob
var filters []byte

// precompiled is the table that gVisor looks its programs up in. It has no
// setter: gVisor's own build fills it from a generated file.
//
//go:linkname precompiled gvisor.dev/gvisor/runsc/boot/filter.precompiledPrograms
var precompiled map[string]precompiledseccomp.Program

// installPrecompiled puts the compiled filters into gVisor's table. What
// cannot be decoded is left out: gVisor then compiles its own.
func installPrecompiled() {
	var programs []precompiledseccomp.Program
	if gob.NewDecoder(bytes.NewReader(filters)).Decode(&programs) != nil {
		return
	}
	// The first look-up makes the table.
	filter.GetPrecompiled("")
	for _, p := range programs {
		precompiled[p.Name] = p
	}
}
