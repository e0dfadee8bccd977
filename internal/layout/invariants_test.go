package layout

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestInvariantsNameTestsThatExist keeps docs/INVARIANTS.md true: each test or
// script that it names is there.
func TestInvariantsNameTestsThatExist(t *testing.T) {
	root := moduleRoot(t)
	text, err := os.ReadFile(filepath.Join(root, "docs", "INVARIANTS.md"))
	if err != nil {
		t.Fatal(err)
	}
	dirs := map[string]string{
		"pyro": ".", "cmd/pyro": "cmd/pyro", "mock": "internal/backend/mock", "gvisor": "internal/backend/gvisor",
	}
	named := regexp.MustCompile("`([a-z/]+)\\.(Test\\w+)`").FindAllStringSubmatch(string(text), -1)
	if len(named) < 20 {
		t.Fatalf("only %d tests are named: this test reads the page wrongly", len(named))
	}
	for _, n := range named {
		dir, ok := dirs[n[1]]
		if !ok {
			dir = filepath.Join("internal", n[1])
		}
		if !declares(t, filepath.Join(root, dir), n[2]) {
			t.Errorf("%s has no %s", dir, n[2])
		}
	}
	for _, n := range regexp.MustCompile("script `(\\w+\\.txtar)`").FindAllStringSubmatch(string(text), -1) {
		if _, err := os.Stat(filepath.Join(root, "cmd/pyro/testdata/script", n[1])); err != nil {
			t.Error(err)
		}
	}
}

// declares reports whether a test file in dir declares the function name.
func declares(t *testing.T, dir, name string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "\nfunc "+name+"(") {
			return true
		}
	}
	return false
}

func moduleRoot(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Dir(strings.TrimSpace(string(out)))
}
