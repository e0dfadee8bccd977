// Package layout holds no code: its tests keep the shape of the module.
package layout

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"strings"
	"testing"
)

// layers are pyro's packages from the top down. A package imports only from
// layers below its own. A new package needs a place here.
var layers = [][]string{
	{"cmd/pyro"},
	{"internal/cli"},
	{"."},
	{"internal/shim", "internal/backend/gvisor", "internal/backend/mock", "internal/backend/backendtest"},
	{"internal/backend"},
	{"internal/environment", "internal/limits", "internal/store"},
	{"internal/vm", "internal/need", "internal/nocgo", "internal/quickstart", "internal/rmtree"},
}

// gvisorPackage alone imports gVisor, which is large and changes daily.
const gvisorPackage = "pyro/internal/backend/gvisor"

// pkg is what go list tells of a package.
type pkg struct {
	ImportPath, Doc                      string
	Imports, TestImports, XTestImports   []string
	GoFiles, TestGoFiles, IgnoredGoFiles []string
}

func list(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Doc,Imports,TestImports,XTestImports,GoFiles,TestGoFiles", "pyro/...").Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestImportsPointDownwards(t *testing.T) {
	layerOf := map[string]int{}
	for i, layer := range layers {
		for _, name := range layer {
			layerOf[path.Join("pyro", name)] = i
		}
	}
	for _, p := range list(t) {
		if len(p.GoFiles) == 0 {
			continue // tests alone may look at anything
		}
		at, ok := layerOf[p.ImportPath]
		if !ok {
			t.Errorf("%s has no place in layers", p.ImportPath)
			continue
		}
		for _, imported := range p.Imports {
			below, ours := layerOf[imported]
			if ours && below <= at {
				t.Errorf("%s imports %s, which is not below it", p.ImportPath, imported)
			}
		}
	}
}

func TestOnlyOnePackageImportsGVisor(t *testing.T) {
	found := false
	for _, p := range list(t) {
		for _, imported := range append(append(p.Imports, p.TestImports...), p.XTestImports...) {
			if !strings.HasPrefix(imported, "gvisor.dev/") {
				continue
			}
			found = true
			if p.ImportPath != gvisorPackage {
				t.Errorf("%s imports %s", p.ImportPath, imported)
			}
		}
	}
	if !found {
		t.Errorf("%s imports no gVisor: this test looks at nothing", gvisorPackage)
	}
}

func TestPackagesAreDocumented(t *testing.T) {
	for _, p := range list(t) {
		if len(p.GoFiles) > 0 && p.Doc == "" {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}
