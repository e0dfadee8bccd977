package shim

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pyro/internal/environment"
	"pyro/internal/need"
	"pyro/internal/vm"
)

func TestEverySettingThatForbidsNamespacesIsNamed(t *testing.T) {
	for _, blamed := range settings {
		name, _, _ := strings.Cut(blamed.sysctl, "=")
		// The sysctl is the file's name.
		if want := "/proc/sys/" + strings.ReplaceAll(name, ".", "/"); blamed.path != want {
			t.Errorf("%s is read from %s, want %s", name, blamed.path, want)
		}
		err := vm.AsError(forbidden(unix.EPERM, func(path string) string {
			for _, s := range settings {
				switch {
				case path == blamed.path:
					return blamed.forbids
				case path == s.path:
					return "4711"
				}
			}
			return ""
		}))
		expectCode(t, name, err, vm.CodeBackendUnavailable)
		if !errors.Is(err, unix.EPERM) {
			t.Errorf("%s: the cause is not in %v", name, err)
		}
		if !strings.Contains(err.Message, name+" is "+blamed.forbids) {
			t.Errorf("%s is not blamed in %q", name, err.Message)
		}
		if !strings.Contains(err.Hint, "sysctl -w "+blamed.sysctl) {
			t.Errorf("%s: the hint %q does not say how to allow it", name, err.Hint)
		}
	}
}

func TestMostTellingSettingIsNamedWhereSeveralForbid(t *testing.T) {
	everything := map[string]string{}
	for _, s := range settings {
		everything[s.path] = s.forbids
	}
	err := vm.AsError(forbidden(unix.ENOSPC, func(path string) string { return everything[path] }))
	if !strings.Contains(err.Message, "user.max_user_namespaces is 0") {
		t.Errorf("the message is %q", err.Message)
	}
}

func TestContainerIsSuspectedWhereNoSettingForbids(t *testing.T) {
	err := vm.AsError(forbidden(unix.EPERM, func(string) string { return "" }))
	expectCode(t, "forbidden", err, vm.CodeBackendUnavailable)
	if !strings.Contains(err.Hint, "container") {
		t.Errorf("the hint is %q", err.Hint)
	}
}

func TestSettingsAreReadWithoutTheirNewline(t *testing.T) {
	path := t.TempDir() + "/setting"
	check(t, os.WriteFile(path, []byte("0\n"), 0o600))
	if got := readSetting(path); got != "0" {
		t.Errorf("got %q", got)
	}
	if got := readSetting(path + "x"); got != "" {
		t.Errorf("of a setting that does not exist, got %q", got)
	}
}

func TestOrdinaryUserIsRootInANamespaceOfItsOwn(t *testing.T) {
	attr := namespaces(false)
	if attr.Cloneflags&unix.CLONE_NEWUSER == 0 || len(attr.UidMappings) != 1 || len(attr.GidMappings) != 1 {
		t.Fatalf("got %+v", attr)
	}
	u, g := attr.UidMappings[0], attr.GidMappings[0]
	if u.ContainerID != 0 || u.HostID != os.Geteuid() || u.Size != 1 || g.ContainerID != 0 || g.HostID != os.Getegid() || g.Size != 1 {
		t.Errorf("users %+v, groups %+v", u, g)
	}
	if attr := namespaces(true); attr.Cloneflags != unix.CLONE_NEWPID|unix.CLONE_NEWNS || attr.UidMappings != nil {
		t.Errorf("with privilege got %+v", attr)
	}
}

func TestProgramThatIsMissingIsNamed(t *testing.T) {
	needNamespaces(t)
	expectNothingLeft(t)
	c := newClaim(t, t.TempDir())
	defer free(t, c)
	_, err := Spawn("/does/not/exist", c)
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "/does/not/exist") {
		t.Errorf("the error is %v", err)
	}
}

// callAll makes the calls that a manager makes, and returns their errors.
func callAll(t *testing.T, c *Client, claim *Claim) []error {
	t.Helper()
	creation, createErr := c.Create(claim.ID, vm.Mock, resources(60), environment.Root{})
	if createErr == nil {
		_, createErr = creation.Wait(background(t))
	}
	starting, startErr := c.Start()
	if startErr == nil {
		_, startErr = starting.Wait(background(t))
	}
	null, err := os.Open(os.DevNull)
	check(t, err)
	defer null.Close()
	exec, execErr := c.Exec(vm.Command{Args: []string{"true"}, TimeoutSeconds: 1}, null, null, null)
	if execErr == nil {
		_, execErr = exec.Wait(background(t))
	}
	return []error{createErr, startErr, execErr, c.Delete(background(t))}
}

func TestProgramThatIsNoShimFailsEveryCall(t *testing.T) {
	needNamespaces(t)
	for name, commands := range map[string]string{
		"ends at once":                  "exit 0",
		"fails at once":                 "exit 3",
		"is killed":                     "kill -9 $$; exit 1",
		"closes the connection":         "exec 3>&-",
		"prints":                        "echo hello",
		"writes nonsense":               `printf 'nonsense and more of it' >&3`,
		"writes half a length":          `printf '\000\000' >&3`,
		"writes half a message":         `printf '\000\000\000\100{' >&3`,
		"writes an oversized message":   `printf '\377\377\377\377' >&3`,
		"answers what nobody asked for": `printf '\000\000\000\012{"seq":99}' >&3`,
	} {
		t.Run(name, func(t *testing.T) {
			expectNothingLeft(t)
			parent := t.TempDir()
			claim := newClaim(t, parent)
			defer free(t, claim)
			c, err := Spawn(program(t, commands+"\n"), claim)
			check(t, err)
			defer c.Close()
			for i, err := range callAll(t, c, claim) {
				expectCode(t, []string{"create", "start", "exec", "delete"}[i], err, vm.CodeVMFailed)
			}
		})
	}
}

func TestAnswerOfTheWrongKindIsAnError(t *testing.T) {
	needNamespaces(t)
	expectNothingLeft(t)
	claim := newClaim(t, t.TempDir())
	defer free(t, claim)
	c, err := Spawn(program(t, `for seq in 1 2 3 4; do
		dd bs=65536 count=1 <&3 >/dev/null 2>&1
		printf '\000\000\000\011{"seq":'$seq'}' >&3
	done
`), claim)
	check(t, err)
	defer c.Close()
	for i, err := range callAll(t, c, claim)[:3] {
		if err == nil {
			t.Errorf("call %d succeeded", i)
		}
	}
}

func TestCloseEndsAProgramThatIgnoresItsConnection(t *testing.T) {
	needNamespaces(t)
	for name, commands := range map[string]string{
		"says nothing":     "exec sleep 300",
		"writes nonsense":  `printf 'nonsense' >&3; exec sleep 300`,
		"ignores signals":  `trap '' TERM INT HUP; sleep 300 & wait`,
		"has its own tree": `(setsid sleep 300 &) ; setsid sleep 300`,
	} {
		t.Run(name, func(t *testing.T) {
			expectNothingLeft(t)
			claim := newClaim(t, t.TempDir())
			defer free(t, claim)
			c, err := Spawn(program(t, commands+"\n"), claim)
			check(t, err)
			began := time.Now()
			check(t, c.Close())
			if took := time.Since(began); took > teardownTime/2 {
				t.Errorf("it took %v", took)
			}
			select {
			case <-c.Done():
			default:
				t.Error("it is not done")
			}
			check(t, c.Close()) // again
			if _, err := c.Start(); !errors.Is(err, vm.CodeVMFailed) {
				t.Errorf("a call after Close: error is %v", err)
			}
		})
	}
}

func TestPendingCallEndsWithItsContext(t *testing.T) {
	needNamespaces(t)
	expectNothingLeft(t)
	claim := newClaim(t, t.TempDir())
	defer free(t, claim)
	c, err := Spawn(program(t, "exec sleep 300\n"), claim)
	check(t, err)
	defer c.Close()
	creation, err := c.Create(claim.ID, vm.Mock, resources(60), environment.Root{})
	check(t, err)
	ctx := canceled(t)
	if _, err := creation.Wait(ctx); !errors.Is(err, ctx.Err()) {
		t.Errorf("create: error is %v", err)
	}
	if err := c.Delete(ctx); !errors.Is(err, ctx.Err()) {
		t.Errorf("delete: error is %v", err)
	}
}

func TestProgramThatWritesNonsenseFailsEveryCall(t *testing.T) {
	needNamespaces(t)
	expectNothingLeft(t)
	claim := newClaim(t, t.TempDir())
	defer free(t, claim)
	c, err := Spawn(program(t, "printf 'nonsense' >&3; exec sleep 300\n"), claim)
	check(t, err)
	defer c.Close()
	began := time.Now()
	creation, err := c.Create(claim.ID, vm.Mock, resources(60), environment.Root{})
	if err == nil {
		_, err = creation.Wait(background(t))
	}
	expectCode(t, "create", err, vm.CodeVMFailed)
	if took := time.Since(began); took > teardownTime/2 {
		t.Errorf("it took %v, as if it could be a shim", took)
	}
}

func TestProgramThatIsNotExecutableIsNotBlamedOnTheSystem(t *testing.T) {
	needNamespaces(t)
	claim := newClaim(t, t.TempDir())
	defer free(t, claim)
	path := filepath.Join(t.TempDir(), "pyro")
	check(t, os.WriteFile(path, nil, 0o600))
	_, err := Spawn(path, claim)
	if err == nil || errors.Is(err, vm.CodeBackendUnavailable) {
		t.Errorf("error is %v with hint %q", err, vm.AsError(err).Hint)
	}
}

func TestShimThatNobodySpawnedTouchesNothing(t *testing.T) {
	ownNamespaces := need.Namespaces(t)
	for name, test := range map[string]struct {
		attr *syscall.SysProcAttr
		lock bool // there is one, and it is another file than descriptor 4
	}{
		"by a user":                     {nil, true},
		"as process 1":                  {ownNamespaces, false},
		"as process 1 beside some lock": {ownNamespaces, true},
	} {
		t.Run(name, func(t *testing.T) {
			expectNothingLeft(t)
			conn, theirs, err := socketPair()
			check(t, err)
			check(t, conn.Close())
			dir := t.TempDir()
			precious, other := filepath.Join(dir, "home", "precious"), filepath.Join(dir, "other")
			check(t, os.MkdirAll(precious, 0o700))
			const text = "something long enough to be written over"
			check(t, os.WriteFile(other, []byte(text), 0o600))
			if test.lock {
				check(t, os.WriteFile(filepath.Join(dir, "home"+lockSuffix), nil, 0o600))
			}
			f, err := os.OpenFile(other, os.O_RDWR, 0)
			check(t, err)
			defer f.Close()
			cmd := exec.CommandContext(background(t), os.Args[0], role, filepath.Join(dir, "home"))
			cmd.ExtraFiles = []*os.File{theirs, f}
			cmd.SysProcAttr = test.attr
			cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
			err = cmd.Run()
			check(t, theirs.Close())
			if err == nil {
				t.Error("it reports success")
			}
			if _, err := os.Stat(precious); err != nil {
				t.Errorf("the directory: %v", err)
			}
			if b, err := os.ReadFile(other); string(b) != text {
				t.Errorf("the file: %q, %v", b, err)
			}
		})
	}
}
