package environment

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pyro/internal/vm"
)

// childEnv makes the test binary a child process of a test: it holds the
// child's role, and the arguments are the host's root and the cache.
const childEnv = "PYRO_ENVIRONMENT_TEST_CHILD"

func TestMain(m *testing.M) {
	if role := os.Getenv(childEnv); role != "" {
		os.Exit(child(role, os.Args[1], os.Args[2]))
	}
	goleak.VerifyTestMain(m)
}

// child prepares the environment in a process of its own and prints what came
// of it as JSON.
func child(role, root, cacheDir string) int {
	ctx := context.Background()
	switch role {
	case "racer":
		fmt.Println("ready")
		bufio.NewReader(os.Stdin).ReadString('\n') // all start at once
	case "stuck":
		ctx = hookContext{ctx, func() {
			if _, err := os.Stat(filepath.Join(cacheDir, stagingName, "etc/alternatives")); err == nil {
				fmt.Println("staging")
				time.Sleep(time.Hour)
			}
		}}
	case "small disk":
		if err := syscall.Mount("tmpfs", cacheDir, "tmpfs", 0, "size=64k"); err != nil {
			fmt.Println(err)
			return 2
		}
	case "read-only disk":
		if err := syscall.Mount("tmpfs", cacheDir, "tmpfs", syscall.MS_RDONLY, ""); err != nil {
			fmt.Println(err)
			return 2
		}
	}
	r, err := hostTree{root: root, boot: "boot"}.prepare(ctx, cacheDir)
	if err != nil {
		out, _ := json.Marshal(vm.AsError(err))
		fmt.Println(string(out))
		return 1
	}
	fmt.Println(r.Dir)
	return 0
}

// childCommand is a child process of this test.
func childCommand(t *testing.T, role, root, cacheDir string) *exec.Cmd {
	exe, err := os.Executable()
	check(t, err)
	cmd := exec.CommandContext(t.Context(), exe, root, cacheDir)
	cmd.Env = append(os.Environ(), childEnv+"="+role)
	return cmd
}

// hookContext calls hook whenever the code under test looks whether it should
// go on, which it does at every file.
type hookContext struct {
	context.Context
	hook func()
}

func (c hookContext) Err() error {
	c.hook()
	return c.Context.Err()
}

// waitContext calls hook whenever the code under test waits.
type waitContext struct {
	context.Context
	hook func()
}

func (c waitContext) Done() <-chan struct{} {
	c.hook()
	return c.Context.Done()
}

// check ends the test on an error.
func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
