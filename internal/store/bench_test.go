package store

import (
	"path/filepath"
	"testing"
)

// BenchmarkRun is what one command that makes a VM and deletes it does with an
// existing database, alone.
func BenchmarkRun(b *testing.B) {
	path := filepath.Join(b.TempDir(), "state.db")
	for b.Loop() {
		s, err := Open(b.Context(), path)
		if err != nil {
			b.Fatal(err)
		}
		r := record()
		if err := s.Insert(b.Context(), r, 4); err != nil {
			b.Fatal(err)
		}
		if _, err := s.Delete(b.Context(), r.ID); err != nil {
			b.Fatal(err)
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
