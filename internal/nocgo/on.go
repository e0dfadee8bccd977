//go:build cgo

package nocgo

import (
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Program replaces this process by the same program built without cgo. main
// calls it first. It never returns; where the program cannot be built again it
// says how to.
func Program() {
	become(func(out string) *exec.Cmd {
		cmd := exec.Command("go", "build", "-o", out, "./cmd/pyro")
		cmd.Dir = moduleDir()
		return cmd
	})
}

// Test replaces this process by the same test built without cgo. TestMain
// calls it first. It never returns.
func Test() {
	become(func(out string) *exec.Cmd { return exec.Command("go", "test", "-c", "-o", out, ".") })
}

// become executes what build builds.
func become(build func(out string) *exec.Cmd) {
	program, err := built(build)
	if err == nil {
		err = syscall.Exec(program, os.Args, os.Environ())
	}
	fmt.Fprintf(os.Stderr, "pyro: built with cgo, which gVisor's sandbox cannot be: %v\n", err)
	fmt.Fprintln(os.Stderr, "pyro: hint: build it with CGO_ENABLED=0 go build ./cmd/pyro")
	os.Exit(125)
}

// built returns the path of the program without cgo, built now or before.
func built(build func(out string) *exec.Cmd) (string, error) {
	key, err := buildID()
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "pyro-nocgo")
	program := filepath.Join(dir, key)
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	// Published by renaming: others may be at it too.
	staged, err := os.MkdirTemp(dir, "build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(staged)
	cmd := build(filepath.Join(staged, "program"))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	fmt.Fprintln(os.Stderr, "pyro: built with cgo; building once more without (CGO_ENABLED=0 saves this)")
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	if err := os.Rename(filepath.Join(staged, "program"), program); err != nil {
		return "", err
	}
	return program, prune(dir)
}

// kept is how many programs stay in the cache; each is some 90 MB.
const kept = 4

// prune removes all but the newest programs. One that runs keeps running.
func prune(dir string) error {
	programs, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	age := map[string]time.Time{}
	programs = slices.DeleteFunc(programs, func(e fs.DirEntry) bool {
		info, err := e.Info()
		if err != nil || e.IsDir() {
			return true // gone, or a build of somebody's under way
		}
		age[e.Name()] = info.ModTime()
		return false
	})
	slices.SortFunc(programs, func(a, b fs.DirEntry) int { return age[b.Name()].Compare(age[a.Name()]) })
	for i := kept; i < len(programs); i++ {
		if err := os.Remove(filepath.Join(dir, programs[i].Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// buildID returns a name for this very build.
func buildID() (string, error) {
	f, err := elf.Open("/proc/self/exe")
	if err != nil {
		return "", err
	}
	defer f.Close()
	note := f.Section(".note.go.buildid")
	if note == nil {
		return "", errors.New("this program has no build ID")
	}
	b, err := note.Data()
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16]), nil
}

// moduleDir returns the directory of pyro's source, as far as the program
// knows it.
func moduleDir() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}
