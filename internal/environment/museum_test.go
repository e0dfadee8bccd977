package environment

import (
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// canary is in all that must stay outside.
const canary = "CANARY"

// certificate is what a certificate looks like.
const certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"

// long ago is when the files of a tree were made.
var longAgo = time.Unix(1_600_000_000, 123456789)

// tree is a directory that stands for a host's root.
type tree struct {
	t    testing.TB
	root string
}

func newTree(t testing.TB) tree { return tree{t, t.TempDir()} }

func (h tree) host() hostTree { return hostTree{root: h.root, boot: "boot"} }

// prepare makes the environment of h in a cache of its own.
func (h tree) prepare() Root {
	h.t.Helper()
	r, err := h.host().prepare(h.t.Context(), h.t.TempDir())
	check(h.t, err)
	return r
}

func (h tree) at(path string) string { return filepath.Join(h.root, path) }

func (h tree) parents(path string) {
	check(h.t, os.MkdirAll(filepath.Dir(h.at(path)), 0o755))
}

func (h tree) dir(path string, mode fs.FileMode) {
	h.parents(path)
	check(h.t, os.MkdirAll(h.at(path), 0o755))
	check(h.t, os.Chmod(h.at(path), mode))
	h.t.Cleanup(func() { os.Chmod(h.at(path), 0o755) })
}

func (h tree) file(path, content string, mode fs.FileMode) {
	h.parents(path)
	check(h.t, os.WriteFile(h.at(path), []byte(content), 0o600))
	check(h.t, os.Chmod(h.at(path), mode))
	check(h.t, os.Chtimes(h.at(path), longAgo, longAgo))
}

func (h tree) link(path, target string) {
	h.parents(path)
	check(h.t, os.Symlink(target, h.at(path)))
}

// node makes a file that is none, and reports whether this user may.
func (h tree) node(path string, mode uint32, device int) bool {
	h.parents(path)
	err := unix.Mknod(h.at(path), mode, device)
	if err == unix.EPERM {
		return false
	}
	check(h.t, err)
	return true
}

// debian makes the usual part of a merged Debian.
func (h tree) debian() tree {
	h.file("usr/bin/bash", "", 0o755)
	h.dir("usr/sbin", 0o755)
	h.dir("usr/lib64", 0o755)
	h.link("bin", "usr/bin")
	h.link("sbin", "/usr/sbin")
	h.dir("usr/lib", 0o755)
	h.link("lib", "usr/lib")
	h.link("lib64", "usr/lib64")
	h.link("libx32", "old/libx32") // leads out
	h.file("lib32", "no directory", 0o644)
	h.file("etc/ld.so.cache", "cache", 0o644)
	h.file("etc/ld.so.conf.d/libc.conf", "/usr/local/lib\n", 0o640|anyoneReads)
	h.link("etc/alternatives/awk", "/usr/bin/mawk")
	h.link("etc/localtime", "/usr/share/zoneinfo/Etc/UTC")
	h.link("etc/os-release", "../usr/lib/os-release")
	h.file("etc/ssl/openssl.cnf", "config", 0o644)
	h.file("etc/ssl/certs/ca-certificates.crt", certificate, 0o644)
	h.link("etc/ssl/certs/A.pem", "/usr/share/ca-certificates/mozilla/A.crt")
	h.link("etc/ssl/certs/0a.0", "A.pem")
	return h
}

// secrets puts what must stay outside beside what is copied.
func (h tree) secrets() tree {
	for _, path := range []string{
		"etc/shadow", "etc/shadow-", "etc/gshadow", "etc/ssh/ssh_host_rsa_key", "etc/ssl/private/key.pem",
		"etc/passwd", "etc/group", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/machine-id",
		"etc/nsswitch.conf", "etc/profile", "etc/profile.d/x.sh", "etc/bash.bashrc", "etc/environment",
		"etc/gitconfig", "etc/pip.conf", "etc/npmrc", "etc/maven/settings.xml", "etc/R/Renviron.site",
		"etc/pki/tls/private/k.pem", "etc/pki/entitlement/1.pem", "etc/unknown", "etc/ssl/unknown",
		"etc/javax", "etc/pam.d/su", "etc/pam.d/other", "etc/locale.conf", "etc/default/locale",
		"home/alice/.ssh/id", "root/.bashrc", "root/.netrc", "tmp/x", "var/lib/secret", "var/log/syslog",
		"var/tmp/x", "run/secrets/token", "opt/app/config", "srv/www", "mnt/disk", "proc/1/environ",
		"dev/sda", "sys/x", "unlisted", "boot/grub", "usr/share/x",
	} {
		h.file(path, canary+" "+certificate, 0o644)
	}
	return h
}

// listing tells what is below dir: mode, path, and where links lead.
func listing(t testing.TB, dir string) string {
	var b strings.Builder
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		name := fmt.Sprintf("%q", rel)
		fmt.Fprintf(&b, "%v %s", info.Mode(), name[1:len(name)-1])
		if info.Mode()&fs.ModeSymlink != 0 {
			target, err := os.Readlink(path)
			check(t, err)
			fmt.Fprintf(&b, " -> %s", target)
		}
		b.WriteByte('\n')
		return nil
	}))
	return b.String()
}

// noCanary fails the test if a canary is anywhere below dir.
func noCanary(t testing.TB, dir string) {
	t.Helper()
	if list := listing(t, dir); strings.Contains(list, canary) {
		t.Errorf("a canary is in a name or a link:\n%s", list)
	}
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		if bytes.Contains(content, []byte(canary)) {
			t.Errorf("a canary is in %s", path)
		}
		return err
	}))
}

// same compares a listing with the lines that it should have, in any order.
func same(t testing.TB, got string, want ...string) {
	t.Helper()
	lines := map[string]int{}
	for line := range strings.Lines(got) {
		lines[line]++
	}
	for line := range strings.Lines(strings.Join(want, "")) {
		lines[line]--
	}
	for _, line := range slices.Sorted(maps.Keys(lines)) {
		switch n := lines[line]; {
		case n > 0:
			t.Errorf("unexpected: %s", line)
		case n < 0:
			t.Errorf("missing: %s", line)
		}
	}
}
