package shim

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"pyro/internal/vm"
)

// newClaim takes a fresh id below parent.
func newClaim(t testing.TB, parent string) *Claim {
	t.Helper()
	c, err := NewClaim(parent, vm.NewID())
	check(t, err)
	return c
}

// abandon makes c an orphan, as the death of its process does.
func abandon(t testing.TB, c *Claim) {
	t.Helper()
	check(t, c.lock.Close())
}

// free does what is to be done about an orphan.
func free(t testing.TB, c *Claim) {
	t.Helper()
	check(t, errors.Join(c.Reclaim(background(t)), c.Release()))
}

// orphans returns the ids of those that there are, and lets go of them.
func orphans(t testing.TB, parent string) []vm.ID {
	t.Helper()
	claims, err := Orphans(parent)
	check(t, err)
	var ids []vm.ID
	for _, c := range claims {
		ids = append(ids, c.ID)
		check(t, c.lock.Close())
	}
	return ids
}

func TestClaimIsADirectoryAndALockOfTheOwnersAlone(t *testing.T) {
	expectNothingLeft(t)
	parent := t.TempDir()
	c := newClaim(t, parent)
	if want := filepath.Join(parent, string(c.ID)); c.Dir != want {
		t.Errorf("the directory is %s, want %s", c.Dir, want)
	}
	dir, err := os.Lstat(c.Dir)
	check(t, err)
	lock, err := os.Lstat(c.Dir + lockSuffix)
	check(t, err)
	if dir.Mode() != os.ModeDir|0o700 || lock.Mode() != 0o600 {
		t.Errorf("the directory is %v, the lock %v", dir.Mode(), lock.Mode())
	}
	if exists, err := Exists(parent, c.ID); !exists || err != nil {
		t.Errorf("it exists: %v, error %v", exists, err)
	}
	free(t, c)
	if left := names(t, parent); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if exists, err := Exists(parent, c.ID); exists || err != nil {
		t.Errorf("afterwards it exists: %v, error %v", exists, err)
	}
}

func TestIDThatIsClaimedCannotBeClaimedAgain(t *testing.T) {
	expectNothingLeft(t)
	parent := t.TempDir()
	first := newClaim(t, parent)
	if _, err := NewClaim(parent, first.ID); !errors.Is(err, os.ErrExist) {
		t.Errorf("the error is %v, want that it exists", err)
	}
	// The first is as it was.
	if found := orphans(t, parent); found != nil {
		t.Errorf("orphans: %v", found)
	}
	if got, want := names(t, parent), []string{string(first.ID), string(first.ID) + lockSuffix}; !slices.Equal(got, want) {
		t.Errorf("there are %v, want %v", got, want)
	}
	free(t, first)
}

func TestClaimOverADirectoryWithoutALockFailsAndLeavesNoLock(t *testing.T) {
	expectNothingLeft(t)
	parent := t.TempDir()
	id := vm.NewID()
	check(t, os.Mkdir(filepath.Join(parent, string(id)), 0o700))
	if _, err := NewClaim(parent, id); !errors.Is(err, os.ErrExist) {
		t.Errorf("the error is %v, want that it exists", err)
	}
	if got, want := names(t, parent), []string{string(id)}; !slices.Equal(got, want) {
		t.Errorf("there are %v, want %v", got, want)
	}
}

func TestClaimWhereNothingCanBeMadeFails(t *testing.T) {
	expectNothingLeft(t)
	if _, err := NewClaim(filepath.Join(t.TempDir(), "missing"), vm.NewID()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the error is %v, want that it does not exist", err)
	}
	if _, err := Orphans(filepath.Join(t.TempDir(), "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("orphans: the error is %v, want that it does not exist", err)
	}
}

func TestOnlyWhatHasNoOwnerIsAnOrphan(t *testing.T) {
	expectNothingLeft(t)
	parent := t.TempDir()
	alive, dead := newClaim(t, parent), newClaim(t, parent)
	abandon(t, dead)
	if found := orphans(t, parent); !slices.Equal(found, []vm.ID{dead.ID}) {
		t.Errorf("orphans: %v, want %v alone", found, dead.ID)
	}
	abandon(t, alive)
	if found := orphans(t, parent); len(found) != 2 {
		t.Errorf("orphans: %v, want both", found)
	}
}

func TestCopyOfTheLockKeepsAVMFromBeingAnOrphan(t *testing.T) {
	expectNothingLeft(t)
	parent := t.TempDir()
	c := newClaim(t, parent)
	// What a shim gets.
	inherited, err := unix.Dup(int(c.lock.Fd()))
	check(t, err)
	abandon(t, c)
	if found := orphans(t, parent); found != nil {
		t.Errorf("orphans: %v", found)
	}
	check(t, unix.Close(inherited))
	if found := orphans(t, parent); !slices.Equal(found, []vm.ID{c.ID}) {
		t.Errorf("then orphans: %v, want %v", found, c.ID)
	}
}

func TestOrphanIsOfferedAgainIfItIsNotReclaimed(t *testing.T) {
	expectNothingLeft(t)
	parent := t.TempDir()
	abandon(t, newClaim(t, parent))
	for range 2 {
		claims, err := Orphans(parent)
		check(t, err)
		if len(claims) != 1 {
			t.Fatalf("%d orphans, want 1", len(claims))
		}
		if found := orphans(t, parent); found != nil {
			t.Errorf("somebody else is told of it meanwhile: %v", found)
		}
		check(t, claims[0].Release())
	}
	if left := names(t, parent); len(left) != 2 {
		t.Errorf("there are %v, want the lock and the directory", left)
	}
}

func TestReclaimMayBeRepeated(t *testing.T) {
	expectNothingLeft(t)
	parent := t.TempDir()
	c := newClaim(t, parent)
	check(t, os.MkdirAll(filepath.Join(c.Dir, "a", "b"), 0o700))
	check(t, os.WriteFile(filepath.Join(c.Dir, "a", "f"), nil, 0o400))
	check(t, os.Symlink("/", filepath.Join(c.Dir, "a", "link")))
	for range 3 {
		check(t, c.Reclaim(background(t)))
	}
	check(t, c.Release())
	if left := names(t, parent); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestReclaimingWhatIsGoneAlreadyIsNoError(t *testing.T) {
	expectNothingLeft(t)
	parent := t.TempDir()
	c := newClaim(t, parent)
	check(t, errors.Join(removeDir(c.Dir), removeLock(c.Dir))) // as a shim does in order
	free(t, c)
}

func TestWhatIsNotOursIsLeftAlone(t *testing.T) {
	expectNothingLeft(t)
	parent := t.TempDir()
	var want []string
	for _, name := range []string{
		"README", ".lock", "lock", "notes.lock", "0123456789AB.lock", "0123456789a.lock", "0123456789abc.lock",
		"0123456789ab.lock.lock", "0123456789ab.lock~", "0123456789zz.lock",
	} {
		check(t, os.WriteFile(filepath.Join(parent, name), []byte("mine"), 0o600))
		want = append(want, name)
	}
	for _, name := range []string{"0123456789ab", "dir", "111111111111.lock"} {
		check(t, os.Mkdir(filepath.Join(parent, name), 0o700))
		want = append(want, name)
	}
	if found := orphans(t, parent); found != nil {
		t.Errorf("orphans: %v", found)
	}
	slices.Sort(want)
	if got := names(t, parent); !slices.Equal(got, want) {
		t.Errorf("there are %v, want %v", got, want)
	}
}

func TestEachOrphanIsHandedToOneReaper(t *testing.T) {
	expectNothingLeft(t)
	parent := t.TempDir()
	const vms, reapers = 80, 6
	for range vms {
		abandon(t, newClaim(t, parent))
	}
	var mu sync.Mutex
	handed := map[vm.ID]int{}
	start := make(chan struct{})
	var reaping sync.WaitGroup
	for range reapers {
		reaping.Go(func() {
			<-start
			// The others' are freed while this one looks.
			for left := vms; left > 0; {
				claims, err := Orphans(parent)
				for _, c := range claims {
					mu.Lock()
					handed[c.ID]++
					mu.Unlock()
					err = errors.Join(err, removeDir(c.Dir), c.Release())
				}
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				left = vms - len(handed)
				mu.Unlock()
			}
		})
	}
	close(start)
	reaping.Wait()
	for id, n := range handed {
		if n != 1 {
			t.Errorf("%s was handed out %d times", id, n)
		}
	}
	if left := names(t, parent); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestReaperNeverTakesAClaimThatWasMade has reapers look all the time while
// claims are made: where a lock has a name before it is locked, they may come in
// between.
func TestReaperNeverTakesAClaimThatWasMade(t *testing.T) {
	for name, makeLock := range map[string]func(string) (*os.File, error){"locked first": newLock, "named first": lockInPlace} {
		t.Run(name, func(t *testing.T) {
			expectNothingLeft(t)
			parent := t.TempDir()
			stop := reapAllTheTime(t, parent)
			made, lost := 0, 0
			for range 150 {
				c := &Claim{ID: vm.NewID()}
				c.Dir = filepath.Join(parent, string(c.ID))
				var err error
				c.lock, err = makeLock(c.Dir + lockSuffix)
				if errors.Is(err, errLost) || errors.Is(err, unix.EWOULDBLOCK) {
					lost++
					continue
				}
				check(t, errors.Join(err, os.Mkdir(c.Dir, 0o700)))
				made++
				// So that a reaper looks at it.
				names(t, parent)
				if _, err := os.Lstat(c.Dir); err != nil || unlinked(c.lock) {
					t.Errorf("a claim has lost its directory (%v) or its lock", err)
				}
				check(t, errors.Join(removeDir(c.Dir), c.Release()))
			}
			stop()
			t.Logf("%d claims made, %d lost to a reaper", made, lost)
			if made == 0 || lost > 0 && name == "locked first" && canHideFiles(parent) {
				t.Error("these are not the numbers to expect")
			}
			if left := names(t, parent); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// canHideFiles reports whether a file in dir can be made without a name.
func canHideFiles(dir string) bool {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	return err == nil
}

// reapAllTheTime frees orphans until stop is called.
func reapAllTheTime(t *testing.T, parent string) (stop func()) {
	done := make(chan struct{})
	var reaping sync.WaitGroup
	for range 2 {
		reaping.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				claims, err := Orphans(parent)
				if err != nil {
					t.Error(err)
				}
				for _, c := range claims {
					if err := errors.Join(removeDir(c.Dir), c.Release()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	return func() { close(done); reaping.Wait() }
}

func TestOrphanWithReadOnlyDirectoriesIsReclaimed(t *testing.T) {
	if os.Geteuid() == 0 {
		inUser(t)
		return
	}
	parent := t.TempDir()
	c := newClaim(t, parent)
	dir := filepath.Join(c.Dir, "workdir", "d")
	check(t, os.MkdirAll(dir, 0o700))
	check(t, os.WriteFile(filepath.Join(dir, "f"), nil, 0o600))
	check(t, os.Chmod(dir, 0o500))
	free(t, c)
	if left := names(t, parent); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func inUser(t *testing.T) {
	t.Helper()
	self, err := os.Executable()
	check(t, err)
	dir, err := os.MkdirTemp("/tmp", "shim-test")
	check(t, err)
	defer os.RemoveAll(dir)
	check(t, os.Chmod(dir, 0o777))
	binary := filepath.Join(dir, "test")
	check(t, exec.Command("cp", self, binary).Run())
	cmd := exec.Command(binary, "-test.run=^"+t.Name()+"$")
	cmd.Env, cmd.Dir = append(os.Environ(), "TMPDIR="+dir), dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
