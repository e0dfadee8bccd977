package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"pyro/internal/vm"
)

// shared is the VM that several processes change.
const shared vm.ID = "0123456789ab"

func roleOpen(ctx context.Context, path string) error {
	s, err := Open(ctx, path)
	if err != nil {
		return err
	}
	return errors.Join(s.Insert(ctx, record(), 100), s.Close())
}

func TestOpenAtOnce(t *testing.T) {
	const n = 6
	for name, test := range map[string]struct {
		rounds int
		open   func(t *testing.T, path string)
	}{
		"processes": {3, func(t *testing.T, path string) { processes(t, n, "open", path) }},
		// These meet in the switch to write-ahead logging far more often.
		"stores": {50, func(t *testing.T, path string) {
			var group sync.WaitGroup
			for range n {
				group.Go(func() {
					if err := roleOpen(t.Context(), path); err != nil {
						t.Error(err)
					}
				})
			}
			group.Wait()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			for range test.rounds {
				path := filepath.Join(t.TempDir(), "state.db")
				test.open(t, path)
				if list, err := reopen(t, path).List(t.Context()); len(list) != n || err != nil {
					t.Errorf("%d VMs, %v, want %d", len(list), err, n)
				}
			}
		})
	}
}

// roleInsert makes VMs until there is no room, and prints how many.
func roleInsert(ctx context.Context, path string) error {
	for made := 0; ; made++ {
		s, err := Open(ctx, path)
		if err != nil {
			return err
		}
		err = errors.Join(s.Insert(ctx, record(), 7), s.Close())
		if errors.Is(err, vm.CodeCapacityExceeded) {
			fmt.Print(made)
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func TestCapacityAcrossProcesses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	sum := 0
	for _, made := range processes(t, 8, "insert", path) {
		n, err := strconv.Atoi(made)
		if err != nil {
			t.Error(err)
		}
		sum += n
	}
	list, err := reopen(t, path).List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 7 || sum != 7 {
		t.Errorf("%d VMs are there and %d were made, want 7 of both", len(list), sum)
	}
}

// roleUpdate counts up in the metadata of the shared VM.
func roleUpdate(ctx context.Context, path string) error {
	s, err := Open(ctx, path)
	if err != nil {
		return err
	}
	for range 25 {
		if err := s.Update(ctx, shared, func(r *Record) error {
			n, err := strconv.Atoi(r.Metadata["count"])
			r.Metadata["count"] = strconv.Itoa(n + 1)
			return err
		}); err != nil {
			return err
		}
	}
	return s.Close()
}

func TestUpdateIsAtomic(t *testing.T) {
	s := testStore(t)
	r := record()
	r.ID, r.Metadata = shared, map[string]string{"count": "0"}
	if err := s.Insert(t.Context(), r, 1); err != nil {
		t.Fatal(err)
	}
	processes(t, 4, "update", s.path)
	got, err := s.Get(t.Context(), shared)
	if err != nil || got.Metadata["count"] != "100" {
		t.Errorf("count %q, %v, want 100", got.Metadata["count"], err)
	}
}

// roleHang stays in the middle of an update until it is killed.
func roleHang(ctx context.Context, path string) error {
	s, err := Open(ctx, path)
	if err != nil {
		return err
	}
	if err := s.Update(ctx, shared, func(r *Record) error {
		r.State = vm.Started
		return nil
	}); err != nil {
		return err
	}
	return s.Update(ctx, shared, func(r *Record) error {
		r.State = vm.Stopped
		fmt.Println("here")
		time.Sleep(time.Minute)
		return nil
	})
}

func TestKilled(t *testing.T) {
	s := testStore(t)
	r := record()
	r.ID = shared
	if err := s.Insert(t.Context(), r, 1); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], s.path)
	cmd.Env = environ(roleVar + "=hang")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Errorf("the process said %q, %v", line, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("the process ended by itself: %v", err)
	}

	// Its finished update is there, the other is not, and its lock is gone.
	if err := s.Update(t.Context(), shared, func(r *Record) error {
		if r.State != vm.Started {
			t.Errorf("state %s, want %s", r.State, vm.Started)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// roleLocks prints whether another process holds a lock on the file at path.
func roleLocks(_ context.Context, path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	lock := syscall.Flock_t{Type: syscall.F_WRLCK} // from the start of the file, without an end
	if err := syscall.FcntlFlock(f.Fd(), syscall.F_GETLK, &lock); err != nil {
		return err
	}
	fmt.Print(lock.Type != syscall.F_UNLCK)
	return f.Close()
}

// A process that closes any descriptor of a file loses its locks on it, so
// opening a Store must not open the file and close it again. Other programs
// delete the log of a database that nobody locks.
func TestStoresOfOneProcessKeepLocks(t *testing.T) {
	s := testStore(t)
	insert(t, s)
	for _, step := range []struct {
		do   func() error
		want string
	}{
		{func() error { return reopen(t, s.path).Close() }, "true"},
		{s.Close, "false"},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if locked := processes(t, 1, "locks", s.path)[0]; locked != step.want {
			t.Errorf("another process finds the database locked: %s, want %s", locked, step.want)
		}
	}
}
