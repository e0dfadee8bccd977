package backendtest

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// isolation is what a machine does not see. A driver that isolates nothing is
// excused.
func isolation() []subtest {
	only := func(run func(f *fixture)) func(f *fixture) {
		return func(f *fixture) {
			if !f.Isolated {
				f.Skip("this driver isolates nothing")
			}
			run(f)
		}
	}
	return []subtest{
		{"files of another machine", only(otherFiles)},
		{"files of the host", only(hostFiles)},
		{"commands of another machine", only(otherCommands)},
		{"changes to the root stay inside", only(rootUnchanged)},
	}
}

func otherFiles(f *fixture) {
	one, other := f.started(), f.started()
	f.output(one, shell("echo secret > /tmp/suite-file; echo secret > suite-file"))
	f.output(one, shell("test -s /tmp/suite-file && test -s suite-file"))
	f.output(other, shell("test ! -e /tmp/suite-file && test ! -e suite-file"))
}

func hostFiles(f *fixture) {
	m := f.started()
	f.output(m, shell(`test ! -e "$1"`, f.hostFile("secret")))
}

func otherCommands(f *fixture) {
	one, other := f.started(), f.started()
	secret := rand.Text()
	r := f.begin(one, shell("cat; exit 0", secret), piped)
	f.expectRunning(r)
	seen := f.output(other, shell("cat /proc/[0-9]*/cmdline 2>/dev/null || :"))
	if strings.Contains(seen, secret) {
		f.Errorf("a machine sees the commands of another")
	}
	// Process numbers are a machine's own: no signal reaches the other's.
	f.run(other, shell(`i=2; while [ $i -lt "$1" ]; do [ $i = $$ ] || kill -KILL $i; i=$((i + 1)); done 2>/dev/null`, strconv.Itoa(200)), nil)
	f.expectRunning(r)
}

func rootUnchanged(f *fixture) {
	const name = "suite-file"
	s := f.spec()
	one, other := f.createdFrom(s), f.started()
	f.start(one)
	// Whether it can write there is the environment's affair.
	f.run(one, shell(`echo changed > "/bin/$1"`, name), nil)
	f.output(other, shell(`test ! -e "/bin/$1"`, name))
	if _, err := os.Lstat(filepath.Join(s.Root.Dir, "bin", name)); !errors.Is(err, fs.ErrNotExist) {
		f.Errorf("a machine changed its root filesystem: %v", err)
	}
}
