package pyro_test

import (
	"database/sql"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pyro"
)

// expectHint checks that err carries code, and a hint about something.
func expectHint(t testing.TB, what string, err error, code pyro.Code, hint string) {
	t.Helper()
	expectCode(t, what, err, code)
	if e := pyro.AsError(err); e != nil && !strings.Contains(e.Hint, hint) {
		t.Errorf("%s: the hint %q does not mention %s", what, e.Hint, hint)
	}
}

// tryOpen opens a Manager with o, and closes it.
func tryOpen(t testing.TB, o pyro.Options) error {
	t.Helper()
	m, err := pyro.Open(t.Context(), o)
	if (m == nil) != (err != nil) {
		t.Errorf("there is a Manager: %v, and the error is %v", m != nil, err)
	}
	if m != nil {
		check(t, m.Close())
	}
	return err
}

func TestOpenMakesAPrivateDirectoryForItsState(t *testing.T) {
	expectNothingLeft(t)
	base := filepath.Join(t.TempDir(), "a", "b")
	for range 2 { // and again, when all is there
		check(t, tryOpen(t, pyro.Options{BaseDir: base}))
	}
	check(t, filepath.WalkDir(base, func(path string, d fs.DirEntry, err error) error {
		check(t, err)
		info, err := d.Info()
		check(t, err)
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s is %v", path, info.Mode())
		}
		return nil
	}))
	if got, want := names(t, base), []string{"environments", "state.db", "vms"}; !slices.Equal(slices.DeleteFunc(got, func(name string) bool {
		return strings.HasPrefix(name, "state.db-")
	}), want) {
		t.Errorf("there are %v, want %v", got, want)
	}
}

func TestOpenTightensADirectoryThatIsTooOpen(t *testing.T) {
	expectNothingLeft(t)
	for _, mode := range []fs.FileMode{0o755, 0o775, 0o750, 0o701} {
		base := t.TempDir()
		check(t, os.Chmod(base, mode))
		check(t, tryOpen(t, pyro.Options{BaseDir: base}))
		info, err := os.Stat(base)
		check(t, err)
		if info.Mode().Perm() != 0o700 {
			t.Errorf("%v becomes %v", mode, info.Mode())
		}
	}
}

func TestOpenRefusesADirectoryThatIsSomebodyElses(t *testing.T) {
	expectNothingLeft(t)
	base := "/usr" // root's
	if os.Geteuid() == 0 {
		base = t.TempDir()
		check(t, os.Chown(base, 65534, 65534))
		check(t, os.Chmod(base, 0o755))
	}
	before, err := os.Stat(base)
	check(t, err)
	expectHint(t, "open", tryOpen(t, pyro.Options{BaseDir: base}), pyro.CodeStateUnavailable, "PYRO_BASE_DIR")
	after, err := os.Stat(base)
	check(t, err)
	if before.Mode() != after.Mode() || before.ModTime() != after.ModTime() {
		t.Error("it was changed")
	}
}

func TestOpenRefusesWhatCannotBeADirectory(t *testing.T) {
	expectNothingLeft(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	check(t, os.WriteFile(file, []byte("mine"), 0o644))
	dangling := filepath.Join(dir, "dangling")
	check(t, os.Symlink("/does/not/exist", dangling))
	// Not even root can make a directory there.
	readOnly := "/proc/self/pyro"
	if os.Geteuid() != 0 {
		check(t, os.Mkdir(filepath.Join(dir, "closed"), 0o500))
		readOnly = filepath.Join(dir, "closed", "base")
	}
	for name, base := range map[string]string{
		"a file": file, "below a file": filepath.Join(file, "base"), "a dangling link": dangling, "read-only": readOnly,
	} {
		expectHint(t, name, tryOpen(t, pyro.Options{BaseDir: base}), pyro.CodeStateUnavailable, "PYRO_BASE_DIR")
	}
	if b, err := os.ReadFile(file); string(b) != "mine" || err != nil {
		t.Errorf("the file is %q now, %v", b, err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o644 {
		t.Errorf("the file is %v now, %v", info.Mode(), err)
	}
}

func TestOpenRefusesTheStateOfANewerPyro(t *testing.T) {
	expectNothingLeft(t)
	base := t.TempDir()
	check(t, tryOpen(t, pyro.Options{BaseDir: base}))
	db, err := sql.Open("sqlite", filepath.Join(base, "state.db"))
	check(t, err)
	_, err = db.Exec("PRAGMA user_version = 4711")
	check(t, errors.Join(err, db.Close()))
	err = tryOpen(t, pyro.Options{BaseDir: base})
	expectHint(t, "open", err, pyro.CodeStateUnavailable, "newer pyro")
}

func TestOpenRefusesStateThatIsDamaged(t *testing.T) {
	expectNothingLeft(t)
	base := t.TempDir()
	check(t, os.WriteFile(filepath.Join(base, "state.db"), []byte(strings.Repeat("not a database\n", 1000)), 0o600))
	expectHint(t, "open", tryOpen(t, pyro.Options{BaseDir: base}), pyro.CodeStateUnavailable, "move")
}

func TestMostVMsAtOnceMustBeANumber(t *testing.T) {
	expectNothingLeft(t)
	base := t.TempDir()
	for _, s := range []string{"four", "0", "-1", "1.5", "4 ", "99999999999999999999"} {
		t.Setenv("PYRO_MAX_ACTIVE_VMS", s)
		expectCode(t, s, tryOpen(t, pyro.Options{BaseDir: base}), pyro.CodeInvalidArgument)
		// What the program asks for counts before that.
		check(t, tryOpen(t, pyro.Options{BaseDir: base, MaxActiveVMs: 1}))
	}
	t.Setenv("PYRO_MAX_ACTIVE_VMS", "2")
	check(t, tryOpen(t, pyro.Options{BaseDir: base}))
	expectCode(t, "-1", tryOpen(t, pyro.Options{BaseDir: base, MaxActiveVMs: -1}), pyro.CodeInvalidArgument)
}

func TestMostVMsAtOnceIsFourUnlessConfigured(t *testing.T) {
	r := newRig(t, "")
	for _, test := range []struct {
		option int
		env    string
		want   int
	}{{0, "", 4}, {0, "2", 2}, {3, "2", 3}} {
		t.Setenv("PYRO_MAX_ACTIVE_VMS", test.env)
		m, err := pyro.Open(r.ctx(), pyro.Options{BaseDir: r.base, Executable: r.program, MaxActiveVMs: test.option})
		check(t, err)
		var ends []func()
		for range test.want - 1 {
			ends = append(ends, r.occupy())
		}
		if _, err := m.Run(r.ctx(), r.shell("true")); err != nil {
			t.Errorf("%+v: the last one: %v", test, err)
		}
		ends = append(ends, r.occupy())
		_, err = m.Run(r.ctx(), r.shell("true"))
		expectHint(t, "one more", err, pyro.CodeCapacityExceeded, "PYRO_MAX_ACTIVE_VMS")
		for _, end := range ends {
			end()
		}
		r.run(r.shell("true")) // the rows go
		check(t, m.Close())
	}
}

func TestMissingProgramIsAHint(t *testing.T) {
	expectNothingLeft(t)
	t.Setenv("PATH", t.TempDir())
	base := t.TempDir()
	expectHint(t, "open", tryOpen(t, pyro.Options{BaseDir: base}), pyro.CodeInvalidArgument, "PATH")
	if left := names(t, base); len(left) > 0 {
		t.Errorf("it made %v", left)
	}
	check(t, tryOpen(t, pyro.Options{BaseDir: base, Executable: "/proc/self/exe"}))
}

func TestBaseDirComesFromTheEnvironmentUnlessItIsGiven(t *testing.T) {
	expectNothingLeft(t)
	option, variable, xdg := t.TempDir(), t.TempDir(), t.TempDir()
	t.Setenv("PYRO_BASE_DIR", variable)
	t.Setenv("XDG_STATE_HOME", xdg)
	check(t, tryOpen(t, pyro.Options{BaseDir: option}))
	if left := names(t, variable); len(left) > 0 {
		t.Errorf("in PYRO_BASE_DIR there are %v", left)
	}
	check(t, tryOpen(t, pyro.Options{}))
	if len(names(t, option)) == 0 || len(names(t, variable)) == 0 {
		t.Error("nothing was made there")
	}
	if os.Geteuid() != 0 { // whose state is in a place of its own
		t.Setenv("PYRO_BASE_DIR", "")
		check(t, tryOpen(t, pyro.Options{}))
		if len(names(t, filepath.Join(xdg, "pyro"))) == 0 {
			t.Error("nothing was made in XDG_STATE_HOME")
		}
	}
}

func TestRelativeBaseDirDoesNotMoveWithTheProcess(t *testing.T) {
	needNamespaces(t)
	expectNothingLeft(t)
	dir := t.TempDir()
	t.Chdir(dir)
	m, err := pyro.Open(t.Context(), pyro.Options{BaseDir: "base"})
	check(t, err)
	t.Chdir(t.TempDir())
	_, err = m.Run(t.Context(), pyro.RunRequest{Args: []string{"true"}, Backend: pyro.Mock})
	check(t, errors.Join(err, m.Close()))
	if got := names(t, filepath.Join(dir, "base", "vms")); len(got) > 0 {
		t.Errorf("left: %v", got)
	}
}

func TestRowsOfVMsThatAreGoneDoNotCount(t *testing.T) {
	r := newRig(t, "")
	m := r.open(1)
	end := r.occupy()
	_, err := m.Run(r.ctx(), r.shell("true"))
	expectCode(t, "while it exists", err, pyro.CodeCapacityExceeded)
	// As when its shim has freed it, and its manager was dead by then.
	end()
	_, err = m.Run(r.ctx(), r.shell("true"))
	check(t, err)
}

func TestOpenRefusesADirectoryThatAnybodyMayWrite(t *testing.T) {
	expectNothingLeft(t)
	for _, mode := range []fs.FileMode{0o777, 0o702, 0o777 | fs.ModeSticky} {
		base := t.TempDir()
		check(t, os.Chmod(base, mode))
		expectHint(t, mode.String(), tryOpen(t, pyro.Options{BaseDir: base}), pyro.CodeStateUnavailable, "yours alone")
		info, err := os.Stat(base)
		check(t, err)
		if info.Mode()&^fs.ModeDir != mode {
			t.Errorf("%v becomes %v", mode, info.Mode())
		}
	}
}

func TestWrongProgramIsTheCallersMistake(t *testing.T) {
	r := newRig(t, "")
	m, err := pyro.Open(r.ctx(), pyro.Options{BaseDir: r.base, Executable: "/does/not/exist"})
	if err == nil {
		_, err = m.Run(r.ctx(), r.shell("true"))
		check(t, m.Close())
	}
	expectHint(t, "run", err, pyro.CodeInvalidArgument, "pyro")
}

func TestOpenRefusesAFileInTheWay(t *testing.T) {
	base := t.TempDir()
	check(t, os.WriteFile(filepath.Join(base, "vms"), nil, 0o600))
	expectCode(t, "open", tryOpen(t, pyro.Options{BaseDir: base}), pyro.CodeStateUnavailable)
}

func TestDirectoryThatIsNotPyrosIsNotChanged(t *testing.T) {
	for _, mode := range []os.FileMode{0o755, 0o777 | os.ModeSticky} {
		base := t.TempDir()
		check(t, os.WriteFile(filepath.Join(base, "precious"), nil, 0o644))
		check(t, os.Chmod(base, mode))
		expectHint(t, mode.String(), tryOpen(t, pyro.Options{BaseDir: base}), pyro.CodeStateUnavailable, "PYRO_BASE_DIR")
		info, err := os.Stat(base)
		check(t, err)
		if info.Mode()&^os.ModeDir != mode || len(names(t, base)) != 1 {
			t.Errorf("%v: it is %v now, and has %v", mode, info.Mode(), names(t, base))
		}
	}
}
