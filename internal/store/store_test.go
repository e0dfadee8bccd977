package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"pyro/internal/vm"
)

func TestRoundTrip(t *testing.T) {
	s := testStore(t)
	want := insert(t, s)
	check := func(got Record, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		if got.CreatedAt.UnixMicro() != want.CreatedAt.UnixMicro() || got.ExpiresAt.UnixMicro() != want.ExpiresAt.UnixMicro() {
			t.Errorf("times %v %v, want %v %v to the microsecond", got.CreatedAt, got.ExpiresAt, want.CreatedAt, want.ExpiresAt)
		}
		if got.CreatedAt.Nanosecond()%1000 != 0 {
			t.Errorf("creation time %v is finer than a microsecond", got.CreatedAt)
		}
		got.CreatedAt, got.ExpiresAt = want.CreatedAt, want.ExpiresAt
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
	}
	check(s.Get(t.Context(), want.ID))

	want.State, want.Owner, want.Metadata = vm.Started, "", map[string]string{}
	if err := s.Update(t.Context(), want.ID, func(r *Record) error {
		r.State, r.Owner, r.Metadata = vm.Started, "", nil
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	check(reopen(t, s.path).Get(t.Context(), want.ID))

	if err := s.Insert(t.Context(), want, 9); !errors.Is(err, vm.CodeInternal) {
		t.Errorf("insert the same ID again: %v, want code %s", err, vm.CodeInternal)
	}
	for _, there := range []bool{true, false} {
		if existed, err := s.Delete(t.Context(), want.ID); existed != there || err != nil {
			t.Errorf("delete: %v, %v, want %v", existed, err, there)
		}
	}
}

func TestNotFound(t *testing.T) {
	s := testStore(t)
	if _, err := s.Get(t.Context(), "0123456789ab"); !errors.Is(err, vm.CodeVMNotFound) {
		t.Errorf("get: %v, want code %s", err, vm.CodeVMNotFound)
	}
	err := s.Update(t.Context(), "0123456789ab", func(*Record) error {
		t.Error("there is nothing to change")
		return nil
	})
	if !errors.Is(err, vm.CodeVMNotFound) {
		t.Errorf("update: %v, want code %s", err, vm.CodeVMNotFound)
	}
}

func TestListOrder(t *testing.T) {
	s := testStore(t)
	if list, err := s.List(t.Context()); len(list) != 0 || err != nil {
		t.Errorf("list of nothing: %v, %v", list, err)
	}
	want := []vm.ID{"00000000000c", "00000000000a", "00000000000b"}
	micros := []int64{1_800_000_000_000_001, 1_800_000_000_000_002, 1_800_000_000_000_002}
	for _, i := range []int{2, 0, 1} {
		r := record()
		r.ID, r.CreatedAt.Time = want[i], time.UnixMicro(micros[i])
		if err := s.Insert(t.Context(), r, 3); err != nil {
			t.Fatal(err)
		}
	}
	list, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []vm.ID
	for _, r := range list {
		got = append(got, r.ID)
	}
	if !slices.Equal(got, want) {
		t.Errorf("order %v, want %v", got, want)
	}
}

func TestCapacity(t *testing.T) {
	s := testStore(t)
	first := record()
	if err := s.Insert(t.Context(), first, 1); err != nil {
		t.Fatal(err)
	}
	err := s.Insert(t.Context(), record(), 1)
	var e *vm.Error
	if !errors.As(err, &e) || e.Code != vm.CodeCapacityExceeded {
		t.Fatalf("one too many: %v, want code %s", err, vm.CodeCapacityExceeded)
	}
	if want := "max active VMs reached (1); delete old VMs first"; e.Message != want {
		t.Errorf("message %q, want %q", e.Message, want)
	}
	if want := "wait for one to end, or raise PYRO_MAX_ACTIVE_VMS"; e.Hint != want {
		t.Errorf("hint %q, want %q", e.Hint, want)
	}
	if _, err := s.Delete(t.Context(), first.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Insert(t.Context(), record(), 1); err != nil {
		t.Errorf("after a deletion: %v", err)
	}
}

func TestUpdateChangesNothingOnError(t *testing.T) {
	s := testStore(t)
	before := insert(t, s)
	own := errors.New("own error")
	for name, test := range map[string]struct {
		change func(*Record) error
		want   error
	}{
		"error of its own": {func(r *Record) error { r.State = vm.Stopped; return own }, own},
		"another ID":       {func(r *Record) error { r.ID = vm.NewID(); return nil }, vm.CodeInternal},
	} {
		if err := s.Update(t.Context(), before.ID, test.change); !errors.Is(err, test.want) {
			t.Errorf("%s: error %v, want %v", name, err, test.want)
		}
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("a panic got lost")
			}
		}()
		s.Update(t.Context(), before.ID, func(r *Record) error { r.State = vm.Stopped; panic("own panic") })
	}()
	list, err := s.List(t.Context())
	if err != nil || len(list) != 1 || list[0].ID != before.ID || list[0].State != before.State {
		t.Errorf("after updates that failed: %+v, %v, want only %+v", list, err, before)
	}
}

func TestBadMetadata(t *testing.T) {
	for _, text := range []string{"", "{", "null", "[]", `{"a":1}`, "\x00\xff"} {
		s := testStore(t)
		r := insert(t, s)
		if _, err := s.db.Exec("UPDATE vms SET metadata = ?", text); err != nil {
			t.Fatal(err)
		}
		_, err := s.Get(t.Context(), r.ID)
		wantUnavailable(t, err, s.path, "metadata of VM "+string(r.ID), "move "+s.path+" away")
		if list, err := s.List(t.Context()); err == nil {
			t.Errorf("list %+v with metadata %q", list, text)
		}
		if existed, err := s.Delete(t.Context(), r.ID); !existed || err != nil {
			t.Errorf("delete: %v, %v", existed, err)
		}
	}
}

func TestCanceled(t *testing.T) {
	s := testStore(t)
	r := insert(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, call := range map[string]func() error{
		"open":   func() error { _, err := Open(ctx, s.path); return err },
		"new":    func() error { _, err := Open(ctx, s.path+"2"); return err },
		"insert": func() error { return s.Insert(ctx, record(), 9) },
		"get":    func() error { _, err := s.Get(ctx, r.ID); return err },
		"list":   func() error { _, err := s.List(ctx); return err },
		"update": func() error { return s.Update(ctx, r.ID, func(*Record) error { return nil }) },
		"delete": func() error { _, err := s.Delete(ctx, r.ID); return err },
	} {
		if err := call(); !errors.Is(err, vm.CodeCanceled) || !errors.Is(err, context.Canceled) {
			t.Errorf("%s: error %v, want code %s and cause %v", name, err, vm.CodeCanceled, context.Canceled)
		}
	}

	ctx, cancel = context.WithCancel(t.Context())
	err := s.Update(ctx, r.ID, func(r *Record) error {
		r.State = vm.Stopped
		cancel()
		time.Sleep(10 * time.Millisecond) // for database/sql to roll back behind our back
		return nil
	})
	if !errors.Is(err, vm.CodeCanceled) || !errors.Is(err, context.Canceled) {
		t.Errorf("cancel inside an update: error %v, want code %s and cause %v", err, vm.CodeCanceled, context.Canceled)
	}
	if got, err := s.Get(t.Context(), r.ID); err != nil || got.State != vm.Created {
		t.Errorf("after a canceled update: %+v, %v", got, err)
	}
}

func TestLocked(t *testing.T) {
	holder := testStore(t)
	r := insert(t, holder)
	s, err := open(t.Context(), holder.path, 20*time.Millisecond, migrations())
	if err != nil {
		t.Fatal(err)
	}
	patient := reopen(t, holder.path)
	if err := holder.Update(t.Context(), r.ID, func(*Record) error {
		wantUnavailable(t, s.Insert(t.Context(), record(), 9), s.path, "is locked", "fuser "+s.path)
		if _, err := s.Get(t.Context(), r.ID); err != nil {
			t.Errorf("a reader waits for the writer: %v", err)
		}

		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if err := patient.Insert(ctx, record(), 9); !errors.Is(err, vm.CodeCanceled) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("deadline while waiting: error %v, want code %s and cause %v", err, vm.CodeCanceled, context.DeadlineExceeded)
		}
		return s.Close()
	}); err != nil {
		t.Fatal(err)
	}
	insert(t, patient)
}

func TestFiles(t *testing.T) {
	// Characters that have a meaning in a URI, where the path ends up.
	dir := filepath.Join(t.TempDir(), "a?b#c%20d&e=f g")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	s, err := Open(t.Context(), "state.db")
	if err != nil {
		t.Fatal(err)
	}
	insert(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%s %v", e.Name(), info.Mode()))
	}
	// That the log is here says that keepLog works.
	want := []string{"state.db -rw-------", "state.db-shm -rw-------", "state.db-wal -rw-------"}
	if !slices.Equal(got, want) {
		t.Errorf("after Close there are %q, want %q", got, want)
	}
}

func TestLogStaysShort(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	var longest, trimmed int64
	for range 150 {
		s, err := Open(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		r := insert(t, s)
		if existed, err := s.Delete(t.Context(), r.ID); !existed || err != nil {
			t.Fatalf("delete: %v, %v", existed, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path + "-wal")
		if err != nil {
			t.Fatal(err)
		}
		longest = max(longest, info.Size())
		if info.Size() == 0 {
			trimmed++
		}
	}
	if longest > logLimit || trimmed == 0 || trimmed > 5 {
		t.Errorf("the log grew to %d bytes and was trimmed %d times, want at most %d bytes and some 2 times", longest, trimmed, logLimit)
	}
}
