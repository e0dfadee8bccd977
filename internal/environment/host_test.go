package environment

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"pyro/internal/vm"
)

// always is what every root holds, whatever the host.
const always = `drwxr-xr-x dev
drwxr-xr-x etc
-rw-r--r-- etc/bash.bashrc
-rw-r--r-- etc/group
-rw-r--r-- etc/hostname
-rw-r--r-- etc/hosts
Lrwxrwxrwx etc/mtab -> ../proc/self/mounts
-rw-r--r-- etc/nsswitch.conf
drwxr-xr-x etc/pam.d
-rw-r--r-- etc/pam.d/other
-rw-r--r-- etc/passwd
-rw-r--r-- etc/profile
-rw-r--r-- etc/resolv.conf
drwxr-xr-x home
drwxr-xr-x mnt
drwxr-xr-x opt
drwxr-xr-x proc
drwx------ root
drwxr-xr-x run
dtrwxrwxrwx run/lock
drwxr-xr-x srv
drwxr-xr-x sys
dtrwxrwxrwx tmp
drwxr-xr-x usr
drwxr-xr-x var
drwxr-xr-x var/cache
drwxr-xr-x var/lib
Lrwxrwxrwx var/lock -> ../run/lock
drwxr-xr-x var/log
Lrwxrwxrwx var/run -> ../run
dtrwxrwxrwx var/tmp
`

// debianFiles is what is copied of tree.debian.
const debianFiles = `Lrwxrwxrwx bin -> usr/bin
drwxr-xr-x etc/alternatives
Lrwxrwxrwx etc/alternatives/awk -> /usr/bin/mawk
-rw-r--r-- etc/ld.so.cache
drwxr-xr-x etc/ld.so.conf.d
-rw-r--r-- etc/ld.so.conf.d/libc.conf
Lrwxrwxrwx etc/localtime -> /usr/share/zoneinfo/Etc/UTC
Lrwxrwxrwx etc/os-release -> ../usr/lib/os-release
drwxr-xr-x etc/ssl
drwxr-xr-x etc/ssl/certs
Lrwxrwxrwx etc/ssl/certs/0a.0 -> A.pem
Lrwxrwxrwx etc/ssl/certs/A.pem -> /usr/share/ca-certificates/mozilla/A.crt
-rw-r--r-- etc/ssl/certs/ca-certificates.crt
-rw-r--r-- etc/ssl/openssl.cnf
Lrwxrwxrwx lib -> usr/lib
Lrwxrwxrwx lib64 -> usr/lib64
Lrwxrwxrwx sbin -> /usr/sbin
`

func TestHostCopiesTheAllowListOnly(t *testing.T) {
	h := newTree(t).debian().secrets()
	r := h.prepare()
	same(t, listing(t, r.Dir), always, debianFiles)
	noCanary(t, r.Dir)
	if want := []string{"/usr"}; !slices.Equal(r.Binds, want) {
		t.Errorf("binds %v, want %v", r.Binds, want)
	}
	if r.WorkingDir != "/root" {
		t.Errorf("working directory %q", r.WorkingDir)
	}
	for path, want := range map[string]string{
		"etc/ld.so.cache": "cache", "etc/hostname": "pyro\n", "etc/resolv.conf": "",
		"etc/passwd": "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:user:/home/user:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
	} {
		if got, err := os.ReadFile(filepath.Join(r.Dir, path)); err != nil || string(got) != want {
			t.Errorf("%s holds %q, %v", path, got, err)
		}
	}
	info, err := os.Stat(filepath.Join(r.Dir, "etc/ld.so.cache"))
	check(t, err)
	if !info.ModTime().Equal(longAgo) {
		t.Errorf("modification time %v, want %v", info.ModTime(), longAgo)
	}
}

func TestHostEnvironmentIsItsOwn(t *testing.T) {
	t.Setenv("AWS_SECRET_ACCESS_KEY", canary)
	t.Setenv("TERM", canary)
	h := newTree(t).debian()
	want := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/bash", "LANG=C.UTF-8",
	}
	if got := h.prepare().Env; !slices.Equal(got, want) {
		t.Errorf("environment %q, want %q", got, want)
	}
	check(t, os.Remove(h.at("usr/bin/bash")))
	want[4] = "SHELL=/bin/sh"
	if got := h.prepare().Env; !slices.Equal(got, want) {
		t.Errorf("environment %q, want %q", got, want)
	}
}

// TestHostTraps fills the allow-listed directories with what must not be
// copied, not be followed and not hang anybody.
func TestHostTraps(t *testing.T) {
	h := newTree(t).debian().secrets()
	h.file("etc/ssl/certs/root-only.pem", canary+certificate, 0o640)
	h.file("etc/ssl/certs/server.pem", certificate+"-----BEGIN RSA PRIVATE KEY-----\n"+canary, 0o644)
	h.file("etc/ssl/certs/setuid.pem", certificate, 0o755)
	check(t, unix.Chmod(h.at("etc/ssl/certs/setuid.pem"), 0o6755))
	h.file("etc/ssl/certs/with\nnew\tline.pem", certificate, 0o644)
	h.file("etc/ssl/certs/\xff\xfe.pem", certificate, 0o644)
	h.file("etc/ssl/certs/huge.pem", canary, 0o644)
	check(t, os.Truncate(h.at("etc/ssl/certs/huge.pem"), maxHostFile+1))
	h.file("etc/ssl/certs/largest.pem", "", 0o644)
	check(t, os.Truncate(h.at("etc/ssl/certs/largest.pem"), maxHostFile))
	h.node("etc/ssl/certs/fifo.pem", unix.S_IFIFO|0o644, 0)
	h.node("etc/ssl/certs/socket.pem", unix.S_IFSOCK|0o644, 0)
	h.node("etc/ssl/certs/device.pem", unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5)))
	h.node("etc/mime.types", unix.S_IFIFO|0o644, 0)
	h.file("etc/java-99/closed/x", canary, 0o644)
	h.dir("etc/java-99/closed", 0o700)
	h.dir("etc/java-99/unlistable", 0o711)
	h.dir("etc/java-99/nothing", 0)
	h.dir("etc/java-99/empty", 0o777)
	h.file("etc/services/is/a/tree", "x", 0o644)
	deep := "etc/fonts" + strings.Repeat("/d", maxHostDepth+2)
	h.file(deep+"/x", canary, 0o644)

	r := h.prepare()
	depth := ""
	for i := range maxHostDepth {
		depth += "drwxr-xr-x etc/fonts" + strings.Repeat("/d", i) + "\n"
	}
	same(t, listing(t, r.Dir), always, debianFiles, depth, `drwxr-xr-x etc/java-99
drwxr-xr-x etc/java-99/empty
drwxr-xr-x etc/services
drwxr-xr-x etc/services/is
drwxr-xr-x etc/services/is/a
-rw-r--r-- etc/services/is/a/tree
-rw-r--r-- etc/ssl/certs/\xff\xfe.pem
-rw-r--r-- etc/ssl/certs/largest.pem
-rwxr-xr-x etc/ssl/certs/setuid.pem
-rw-r--r-- etc/ssl/certs/with\nnew\tline.pem
`)
	noCanary(t, r.Dir)
}

func TestHostLinks(t *testing.T) {
	h := newTree(t).debian().secrets()
	h.file("opt/corp/v1/ca.pem", certificate, 0o644)
	h.link("opt/corp/current", "v1")
	h.link("opt/corp/up.pem", "current/../v1/./ca.pem")
	h.file("opt/corp/both.pem", certificate+"-----BEGIN PRIVATE KEY-----"+canary, 0o644)
	h.file("opt/corp/group.pem", certificate+canary, 0o640)
	h.file("opt/corp/text", canary, 0o644)
	h.file("opt/hidden/ca.pem", certificate+canary, 0o644)
	h.dir("opt/hidden", 0o700)
	h.link("opt/loop", "loop")
	h.file("usr/local/share/local.crt", certificate, 0o644)
	h.file("home/alice/ca.pem", certificate+canary, 0o644)
	h.node("opt/fifo", unix.S_IFIFO|0o644, 0)
	for name, target := range map[string]string{
		// Copied, as their targets are certificates that anyone can read.
		"copy-absolute": "/opt/corp/v1/ca.pem",
		"copy-through":  "/opt/corp/current/ca.pem",
		"copy-up":       "/opt/corp/up.pem",
		"copy-relative": "../../../opt/corp/v1/ca.pem",
		"copy-above":    "../../../../../../../opt/corp/v1/ca.pem",
		"copy-local":    "/usr/local/share/local.crt",
		// Kept, as what they lead to is inside or nowhere.
		"keep-sibling": "copy-absolute", "keep-usr": "/bin/x", "keep-loop-a": "keep-loop-b", "keep-loop-b": "./keep-loop-a",
		// Dropped.
		"drop-shadow": "/etc/shadow", "drop-shadow-relative": "../../shadow", "drop-id": "../../machine-id",
		"drop-key": "/etc/ssl/private/key.pem", "drop-home": "/home/alice/ca.pem", "drop-root": "/root/.netrc",
		"drop-hidden": "/opt/hidden/ca.pem", "drop-group": "/opt/corp/group.pem", "drop-both": "/opt/corp/both.pem",
		"drop-text": "/opt/corp/text", "drop-dir": "/opt/corp", "drop-loop": "/opt/loop", "drop-fifo": "/opt/fifo",
		"drop-none": "/opt/none", "drop-not-dir": "/opt/corp/text/x", "drop-slash": "/", "drop-proc": "/proc/1/environ",
		"drop-dev": "/dev/sda", "drop-run": "/run/secrets/token", "drop-above": "../../../../../..", "drop-tmp": "/tmp/x",
	} {
		h.link("etc/ssl/certs/"+name, target)
	}
	h.link("etc/alternatives/local", "/usr/local/bin/x")
	h.link("etc/alternatives/drop", "/opt/corp/v1/ca.pem") // certificates only
	h.link("etc/java-98", "/root")                         // a link on the list itself
	h.link("etc/java-99/certs", "/etc/ssl/certs")
	h.link("etc/crypto-policies", "/usr/share/crypto-policies")
	check(t, os.RemoveAll(h.at("etc/pki")))
	h.link("etc/pki", "ssl") // a link above a place
	check(t, os.WriteFile(h.at("etc/machine-id"), []byte(canary), 0o644))
	check(t, os.Chmod(h.at("etc/shadow"), 0o640))
	check(t, os.Chmod(h.at("etc/ssl/private"), 0o710))

	r := h.prepare()
	same(t, listing(t, r.Dir), always, debianFiles, `Lrwxrwxrwx etc/alternatives/local -> /usr/local/bin/x
Lrwxrwxrwx etc/crypto-policies -> /usr/share/crypto-policies
drwxr-xr-x etc/java-99
Lrwxrwxrwx etc/java-99/certs -> /etc/ssl/certs
-rw-r--r-- etc/ssl/certs/copy-above
-rw-r--r-- etc/ssl/certs/copy-absolute
-rw-r--r-- etc/ssl/certs/copy-local
-rw-r--r-- etc/ssl/certs/copy-relative
-rw-r--r-- etc/ssl/certs/copy-through
-rw-r--r-- etc/ssl/certs/copy-up
Lrwxrwxrwx etc/ssl/certs/keep-loop-a -> keep-loop-b
Lrwxrwxrwx etc/ssl/certs/keep-loop-b -> ./keep-loop-a
Lrwxrwxrwx etc/ssl/certs/keep-sibling -> copy-absolute
Lrwxrwxrwx etc/ssl/certs/keep-usr -> /bin/x
`)
	noCanary(t, r.Dir)
}

func TestHostNotMerged(t *testing.T) {
	h := newTree(t)
	for _, dir := range []string{"usr", "bin", "sbin", "lib"} {
		h.dir(dir, 0o755)
	}
	h.file("bin/bash", canary, 0o755)
	h.link("lib64", "lib")
	r := h.prepare()
	same(t, listing(t, r.Dir), always, `drwxr-xr-x bin
drwxr-xr-x lib
Lrwxrwxrwx lib64 -> lib
drwxr-xr-x sbin
`)
	if want := []string{"/usr", "/bin", "/lib", "/sbin"}; !slices.Equal(r.Binds, want) {
		t.Errorf("binds %v, want %v", r.Binds, want)
	}
	if !slices.Contains(r.Env, "SHELL=/bin/bash") {
		t.Errorf("environment %v", r.Env)
	}
}

func TestHostWithAlmostNothing(t *testing.T) {
	h := newTree(t)
	h.dir("usr", 0o755)
	same(t, listing(t, h.prepare().Dir), always)
}

func TestHostWithoutUsr(t *testing.T) {
	h := newTree(t)
	cacheDir := filepath.Join(t.TempDir(), "cache")
	for range 2 {
		_, err := h.host().prepare(t.Context(), cacheDir)
		if e := vm.AsError(err); e == nil || e.Code != vm.CodeArtifactsMissing || e.Hint == "" {
			t.Fatalf("error %v", err)
		}
		h.file("usr", "no directory", 0o644)
	}
	if _, err := os.Stat(cacheDir); err == nil {
		t.Error("a cache was made for nothing")
	}
}

// TestReadOnlyWhatWasSeen replaces a file after its facts were read.
func TestReadOnlyWhatWasSeen(t *testing.T) {
	for name, replace := range map[string]func(h tree, path string){
		"other":     func(h tree, path string) { h.file(path, "other", 0o644) },
		"fifo":      func(h tree, path string) { h.node(path, unix.S_IFIFO|0o644, 0) },
		"socket":    func(h tree, path string) { h.node(path, unix.S_IFSOCK|0o644, 0) },
		"directory": func(h tree, path string) { h.dir(path, 0o755) },
		"link":      func(h tree, path string) { h.link(path, "kept") },
		"nothing":   func(tree, string) {},
	} {
		t.Run(name, func(t *testing.T) {
			h := newTree(t)
			h.file("file", "first", 0o644)
			root, err := openDir(unix.AT_FDCWD, h.root)
			check(t, err)
			defer unix.Close(root)
			e := entry{dirFD: root, name: "file", path: "file"}
			e.facts, err = stat(root, e.name)
			check(t, err)
			content, err := read(e)
			check(t, err)
			if string(content) != "first" {
				t.Errorf("read %q", content)
			}
			check(t, os.Rename(h.at("file"), h.at("kept")))
			replace(h, "file")
			if content, err := read(e); err == nil {
				t.Errorf("read %q of what replaced the file", content)
			}
		})
	}
}
