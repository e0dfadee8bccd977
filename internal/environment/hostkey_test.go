package environment

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"pyro/internal/vm"
)

// key is the key of h's state.
func (h tree) key() string {
	h.t.Helper()
	s, err := h.host().scan(h.t.Context(), nil)
	check(h.t, err)
	return s.key
}

func TestKeyFollowsTheHost(t *testing.T) {
	h := newTree(t).debian().secrets()
	h.file("opt/corp/ca.pem", certificate, 0o644)
	h.link("etc/ssl/certs/corp.pem", "/opt/corp/ca.pem")
	h.file("etc/ssl/certs/closed.pem", certificate, 0o600)
	touch := func(path string) func() {
		return func() {
			info, err := os.Stat(h.at(path))
			check(t, err)
			later := info.ModTime().Add(1)
			check(t, os.Chtimes(h.at(path), later, later))
		}
	}
	relink := func(path, target string) func() {
		return func() {
			check(t, os.Remove(h.at(path)))
			h.link(path, target)
		}
	}
	seen := map[string]string{h.key(): "the start"}
	for _, change := range []struct {
		name string
		do   func()
	}{
		{"a file is touched", touch("etc/ld.so.cache")},
		{"a file below is touched", touch("etc/ssl/certs/ca-certificates.crt")},
		{"a file is opened to all", func() { check(t, os.Chmod(h.at("etc/ssl/certs/closed.pem"), 0o644)) }},
		{"a file is made", func() { h.file("etc/ld.so.conf.d/new.conf", "", 0o644) }},
		{"a file is removed", func() { check(t, os.Remove(h.at("etc/ld.so.conf.d/new.conf"))) }},
		{"a file is renamed", func() {
			check(t, os.Rename(h.at("etc/ld.so.conf.d/libc.conf"), h.at("etc/ld.so.conf.d/libd.conf")))
		}},
		{"a link leads elsewhere", relink("etc/alternatives/awk", "/usr/bin/gawk")},
		{"a pattern matches", func() { h.dir("etc/java-21", 0o755) }},
		{"a linked certificate is touched", touch("opt/corp/ca.pem")},
		{"a linked certificate is gone", func() { check(t, os.Remove(h.at("opt/corp/ca.pem"))) }},
		{"a name in / is no link any more", func() {
			check(t, os.Remove(h.at("lib64")))
			h.dir("lib64", 0o755)
		}},
		{"a name in / leads elsewhere", relink("sbin", "usr/bin")},
		{"the shell is another", func() { check(t, os.Remove(h.at("usr/bin/bash"))) }},
	} {
		change.do()
		key := h.key()
		if before, ok := seen[key]; ok {
			t.Errorf("%s: the key is that of %s", change.name, before)
		}
		seen[key] = change.name
	}
	before := h.key()
	h.secrets()
	h.file("etc/another", "", 0o644)
	h.file("usr/bin/tool", "", 0o755)
	h.file("lib64/lib.so", "", 0o755)
	if h.key() != before {
		t.Error("the key follows what is not copied")
	}
	other := hostTree{root: h.root, boot: "another boot"}
	if s, err := other.scan(t.Context(), nil); err != nil || s.key == before {
		t.Errorf("the key is the same after a restart: %v", err)
	}
}

func TestKeyIsTheSameWithAndWithoutCopying(t *testing.T) {
	h := newTree(t).debian().secrets()
	h.file("opt/ca.pem", certificate, 0o644)
	h.link("etc/ssl/certs/corp.pem", "/opt/ca.pem")
	copied, err := h.host().scan(t.Context(), func(entry) error { return nil })
	check(t, err)
	if copied.key != h.key() {
		t.Error("the keys differ")
	}
}

// changing returns a context under which change is called in the middle of
// copying, as often as times says.
func changing(ctx context.Context, cacheDir string, times int, change func(n int)) context.Context {
	var mu sync.Mutex
	seen := ""
	return hookContext{ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		info, err := os.Stat(filepath.Join(cacheDir, stagingName, "etc/ld.so.cache"))
		if err != nil || times == 0 {
			return
		}
		if made := fmt.Sprint(info.Sys()); made != seen { // once for each attempt
			seen = made
			times--
			change(times)
		}
	}}
}

func TestHostChangesWhileItIsCopied(t *testing.T) {
	for _, test := range []struct {
		times int
		ok    bool
	}{{stageAttempts - 1, true}, {1000, false}} {
		t.Run(fmt.Sprint(test.times), func(t *testing.T) {
			h, cacheDir := newTree(t).debian(), t.TempDir()
			// The walk has listed alternatives' parent but not what is in ssl.
			ctx := changing(t.Context(), cacheDir, test.times, func(n int) {
				h.file("etc/ssl/openssl.cnf", strings.Repeat("x", n+1), 0o644)
				h.file("etc/alternatives/new"+fmt.Sprint(n), "", 0o644)
			})
			r, err := h.host().prepare(ctx, cacheDir)
			if !test.ok {
				if !errors.Is(err, errChanged) || vm.AsError(err).Hint == "" {
					t.Errorf("error %v", err)
				}
				same(t, listing(t, cacheDir), "-rw------- host.lock\n")
				return
			}
			check(t, err)
			if want := (cache{dir: cacheDir}).published(h.key()); r.Dir != want {
				t.Errorf("published %s, want %s", r.Dir, want)
			}
			got, err := os.ReadFile(filepath.Join(r.Dir, "etc/ssl/openssl.cnf"))
			check(t, err)
			if want, _ := os.ReadFile(h.at("etc/ssl/openssl.cnf")); string(got) != string(want) {
				t.Errorf("copied %q, want %q", got, want)
			}
		})
	}
}

func TestHostStopsWithItsContext(t *testing.T) {
	h, cacheDir := newTree(t).debian(), t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	_, err := h.host().prepare(changing(ctx, cacheDir, 1, func(int) { cancel() }), cacheDir)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	same(t, listing(t, cacheDir), "-rw------- host.lock\n")
}

// fillWith makes n files in dir that are as large as they may be.
func fillWith(h tree, dir string, n int) {
	for i := range n {
		path := fmt.Sprintf("%s/%d", dir, i)
		h.file(path, "", 0o644)
		check(h.t, os.Truncate(h.at(path), maxHostFile))
	}
}

func TestHostTotals(t *testing.T) {
	for name, fill := range map[string]func(h tree){
		"bytes": func(h tree) {
			fillWith(h, "etc/fonts", maxHostTotal/maxHostFile+1)
		},
		"bytes in several places": func(h tree) {
			fillWith(h, "etc/fonts", maxHostTotal/maxHostFile/2)
			fillWith(h, "etc/ssl/certs", maxHostTotal/maxHostFile/2)
		},
		"files": func(h tree) {
			h.file("etc/fonts/0", "", 0o644)
			for i := range maxHostEntries { // links to one file: quicker made
				check(t, os.Link(h.at("etc/fonts/0"), h.at(fmt.Sprintf("etc/fonts/x%d", i))))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			h, cacheDir := newTree(t).debian(), t.TempDir()
			fill(h)
			_, err := h.host().prepare(t.Context(), cacheDir)
			if e := vm.AsError(err); e == nil || e.Hint == "" || !strings.Contains(e.Message, "too much") {
				t.Errorf("error %v", err)
			}
			same(t, listing(t, cacheDir), "")
		})
	}
}
