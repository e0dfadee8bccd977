package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"pyro/internal/vm"
)

// The allow-lists of what a VM of the environment host has, apart from the
// programs in /usr: patterns of path.Match.
var (
	allowedRoot = []string{
		"bin", "dev", "etc", "home", "lib", "lib32", "lib64", "libx32", "mnt", "opt", "proc", "root", "run", "sbin", "srv", "sys", "tmp", "usr", "var",
	}
	allowedEtc = []string{
		// Written by pyro.
		"bash.bashrc", "group", "hostname", "hosts", "mtab", "nsswitch.conf", "pam.d", "passwd", "profile", "resolv.conf",
		// Copied from the host, as the packages made it.
		"R", "alpine-release", "alternatives", "arch-release", "ca-certificates", "ca-certificates.conf", "crypto-policies", "debian_version",
		"fedora-release", "fonts", "inputrc", "java", "java-*", "ld-musl-*.path", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "locale.alias",
		"localtime", "lsb-release", "man_db.conf", "manpath.config", "maven", "mime.types", "os-release", "pki", "protocols", "python3*",
		"redhat-release", "services", "ssl", "system-release", "terminfo", "timezone",
	}
	allowedSSL = []string{"certs", "cert.pem", "ca-bundle.pem", "openssl.cnf"}
	allowedPAM = []string{"other"}
	allowedVar = []string{
		"/var/cache", "/var/lib", "/var/lock", "/var/log", "/var/run", "/var/tmp",
		"/var/lib/ca-certificates", "/var/lib/ca-certificates/*", "/var/lib/ca-certificates/*/*", // public certificates
	}
	allowedDev = []string{"char", "fd", "full", "fuse", "net", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"}
	allowedEnv = []string{"HOME", "LANG", "LOGNAME", "PATH", "PWD", "SHELL", "USER", "_", "OLDPWD", "SHLVL"}
)

// survey prints what is inside, a section for each question. NUL separates
// where names may hold anything.
const survey = `
section() { printf '\n\001=== %s\n' "$1"; }
section root; ls -A /
section etc; ls -A /etc
section ssl; ls -A /etc/ssl
section pam; ls -A /etc/pam.d
section dev; ls -A /dev
section shm; ls -A /dev/shm
section empty; find /home /root /tmp /mnt /opt /srv /run -mindepth 1
section var; find /var -mindepth 1
section passwd; cut -d: -f1 /etc/passwd
section missing; ls -d /etc/shadow /etc/gshadow /etc/ssh /etc/sudoers /etc/machine-id /etc/fstab /etc/crontab /etc/ssl/private /var/run/docker.sock /sys/fs/cgroup/memory.max /boot /media /lost+found /proc/kcore 2>/dev/null
section setuid; find /etc /home /root /var /run /tmp -perm /6000
section env; env -0 | tr '\n\0' '?\n' | cut -d= -f1
section uname; uname -n; cat /etc/hostname /proc/sys/kernel/hostname
section processes; for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline; echo; done
section descriptors; ls /proc/self/fd
section network; cat /proc/net/dev
section sockets; cat /proc/net/unix /proc/net/tcp /proc/net/tcp6 2>/dev/null
section mounts; cat /proc/self/mountinfo
section everything
find / \( -path /usr -o -path '/proc/[0-9]*/task' \) -prune -o -print
find /etc /home /root /var /run /tmp /opt /srv /mnt -type f -exec cat {} +
cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline /proc/[0-9]*/maps /proc/[0-9]*/cgroup /proc/[0-9]*/mounts /proc/cmdline /proc/mounts
ls -l /proc/[0-9]*/exe /proc/[0-9]*/cwd /proc/[0-9]*/root /proc/[0-9]*/fd
`

// TestInside: of the host's files, users, processes, variables and sockets
// nothing shows inside but what the lists above allow, and nothing outside can
// be reached or changed.
func TestInside(t *testing.T) { inside(newWorld(t)) }

func inside(w *world) {
	t := w.t
	canary := fmt.Sprintf("canary-%016x", rand.Uint64())
	port := plantCanaries(w, canary)
	r := w.run("--", "sh", "-c", survey)
	if r.code != 0 {
		t.Logf("the survey ended with %d, stderr %.1000q", r.code, r.stderr)
	}
	sections := map[string][]string{}
	for _, s := range strings.Split(r.stdout, "\n\x01=== ")[1:] {
		name, text, _ := strings.Cut(s, "\n")
		sections[name] = strings.FieldsFunc(text, func(r rune) bool { return r == '\n' })
	}
	if len(sections) != strings.Count(survey, "section ") {
		t.Fatalf("%d sections; stdout %.2000q, stderr %.1000q", len(sections), r.stdout, r.stderr)
	}
	for section, allowed := range map[string][]string{
		"root": allowedRoot, "etc": allowedEtc, "ssl": allowedSSL, "pam": allowedPAM, "dev": allowedDev, "shm": nil, "var": allowedVar,
		"empty": {"/run/lock"}, "passwd": {"root", "user", "nobody"}, "missing": nil, "setuid": nil, "env": allowedEnv,
		"descriptors": {"0", "1", "2", "3"}, // 3 is the directory that is listed
	} {
		for _, name := range sections[section] {
			if !matchesAny(name, allowed) {
				t.Errorf("%s shows %q", section, name)
			}
		}
	}
	for _, name := range []string{"bin", "etc", "proc", "tmp", "usr"} {
		if !slices.Contains(sections["root"], name) {
			t.Errorf("the survey of / lacks %s: %q", name, sections["root"])
		}
	}
	noHost(w, r.stdout, canary)
	for _, line := range sections["processes"] {
		if !regexp.MustCompile(`^( *|pyro-init.*|sh -c (?s:.)*|.*section .*|tr .*)$`).MatchString(line) && !strings.Contains(survey, strings.TrimSpace(line)) {
			t.Errorf("process %q", line)
		}
	}
	for _, line := range sections["network"][2:] {
		if !strings.HasPrefix(strings.TrimSpace(line), "lo:") {
			t.Errorf("network device %q", line)
		}
	}
	if id, err := vm.ParseID(sections["uname"][0]); sections["uname"][0] != "pyro" && err != nil {
		t.Errorf("the host's name is %q: %v", id, err)
	}
	noWayOut(w, port)
}

// noHost looks for words of the host's in what the survey found.
func noHost(w *world, found, canary string) {
	host, err := os.Hostname()
	check(w.t, err)
	words := []string{canary, filepath.Base(nest), w.base, "PYRO_"}
	if len(host) > 3 { // a short one is part of other words
		words = append(words, host)
	}
	for _, word := range words {
		if at := strings.Index(found, word); at >= 0 {
			w.t.Errorf("%q shows: %q", word, found[max(0, at-200):min(len(found), at+200)])
		}
	}
}

// matchesAny reports whether name matches one of the patterns.
func matchesAny(name string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		ok, err := path.Match(pattern, name)
		return ok && err == nil
	})
}

// plantCanaries puts a word in as many places of the host as this user may, and
// returns a port that a server listens on.
func plantCanaries(w *world, canary string) int {
	t := w.t
	w.setenv("PYRO_CANARY="+canary, "AWS_SECRET_ACCESS_KEY="+canary)
	planted := 0
	dirs := []string{w.home, w.tmp, "/tmp", "/var/tmp", "/run", "/dev/shm", "/etc", "/srv", "/opt", "/mnt", "/home", "/var/lib", "/"}
	if home, err := os.UserHomeDir(); err == nil {
		dirs = append(dirs, home)
	}
	for _, dir := range dirs {
		file := filepath.Join(dir, canary)
		if os.WriteFile(file, []byte(canary), 0o644) != nil {
			continue // not this user's
		}
		planted++
		t.Cleanup(func() {
			if err := os.Remove(file); err != nil {
				t.Error(err)
			}
		})
	}
	if planted < 4 {
		t.Errorf("only %d files could be planted", planted)
	}
	for _, name := range []string{filepath.Join(w.dir, canary), "@" + canary} {
		l, err := net.Listen("unix", name)
		check(t, err)
		t.Cleanup(func() { l.Close() })
	}
	neighbour := exec.CommandContext(t.Context(), "sleep", "1000")
	neighbour.Args[0] = canary
	check(t, neighbour.Start())
	t.Cleanup(func() {
		neighbour.Process.Kill()
		neighbour.Wait()
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { l.Close() })
	return l.Addr().(*net.TCPAddr).Port
}

// noWayOut tries to reach and to change things outside.
func noWayOut(w *world, port int) {
	t := w.t
	began := time.Now()
	program := statOf(t, "/usr/bin/env")
	script := fmt.Sprintf(`
for address in 127.0.0.1/%d 192.0.2.1/80 1.1.1.1/53; do
	if (exec 3<>/dev/tcp/$address) 2>/dev/null; then echo "reached $address"; fi
done
n=pyro-test-$$
for dir in /usr /usr/bin /bin /lib /sbin; do
	if touch $dir/$n 2>/dev/null; then echo "wrote to $dir"; fi
done
mount -o remount,rw /usr 2>/dev/null; mount -o remount,rw,bind /usr 2>/dev/null
if touch /usr/$n 2>/dev/null; then echo "wrote to a remounted /usr"; fi
if rm -f /usr/bin/env 2>/dev/null && ! [ -e /usr/bin/env ]; then echo "removed /usr/bin/env"; fi
chmod 777 /usr/bin/env 2>/dev/null; chown 1:1 /usr/bin/env 2>/dev/null; touch /usr/bin/env 2>/dev/null
if echo x 2>/dev/null >>/usr/bin/env; then echo "appended to /usr/bin/env"; fi
if mknod /tmp/disk b 8 0 2>/dev/null && head -c 1 /tmp/disk 2>/dev/null; then echo "opened a disk"; fi
if echo 1 2>/dev/null >/proc/sysrq-trigger; then :; fi
for dir in /etc /root /home /var /run /opt /srv /mnt /; do
	echo inside >$dir/$n || echo "cannot write to $dir"
done
date -s '2001-01-01 00:00:00' >/dev/null 2>&1
hostname %s 2>/dev/null
echo done`, port, "pyro-test-host")
	w.run("--", "bash", "-c", script).ok("done\n")
	for _, dir := range []string{"/usr", "/usr/bin", "/etc", "/root", "/home", "/var", "/run", "/opt", "/srv", "/mnt", "/"} {
		for _, name := range leftFiles(dir, "pyro-test-*") {
			t.Errorf("the VM has written %s", name)
		}
	}
	if now := statOf(t, "/usr/bin/env"); now != program {
		t.Errorf("/usr/bin/env was %v and is %v", program, now)
	}
	if host, _ := os.Hostname(); host == "pyro-test-host" || time.Since(began) > time.Hour || time.Now().Year() == 2001 {
		t.Error("the VM has changed the host's name or clock")
	}
	// Nothing of it is in the next VM.
	w.run("--", "sh", "-c", "find / -xdev -name 'pyro-test-*' -not -path '/proc/*'; ls -A /root").ok("")
}

// statOf returns what changes about a file when anything does.
func statOf(t testing.TB, name string) (st struct {
	Mode, UID, GID uint32
	Size           int64
	Ctim           syscall.Timespec
}) {
	t.Helper()
	var s syscall.Stat_t
	check(t, syscall.Stat(name, &s))
	st.Mode, st.UID, st.GID, st.Size, st.Ctim = s.Mode, s.Uid, s.Gid, s.Size, s.Ctim
	return st
}

// TestHostnameResolves: a VM knows the address of its own name, as programs
// expect that look it up.
func TestHostnameResolves(t *testing.T) {
	w := newWorld(t)
	r := w.run("--", "sh", "-c", `getent hosts "$(hostname)"`)
	if r.code != 0 || !strings.Contains(r.stdout, "127.0.0.1") && !strings.Contains(r.stdout, "::1") {
		t.Errorf("exit code %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
	}
}

// TestInheritedDescriptors: what else is open in the program that starts pyro
// reaches neither the VM nor the processes that serve it, which would be the
// first to be taken over from inside.
func TestInheritedDescriptors(t *testing.T) {
	w := newWorld(t)
	secret, err := os.CreateTemp(t.TempDir(), "secret")
	check(t, err)
	defer secret.Close()
	cmd := w.command(t.Context(), "run", "-i", "--", "sh", "-c", "echo ready; (cat <&7) 2>/dev/null || echo closed; read go")
	for range 5 { // descriptors 3 to 7
		cmd.ExtraFiles = append(cmd.ExtraFiles, secret)
	}
	p := launch(t, cmd)
	p.says("ready\nclosed\n")
	for _, q := range w.processes() {
		for _, fd := range leftFiles(fmt.Sprintf("/proc/%d/fd", q.pid), "*") {
			if target, _ := os.Readlink(fd); target == secret.Name() && !q.is("pyro") {
				t.Errorf("%s of %s is open on the caller's file", fd, q)
			}
		}
	}
	p.stdin.Close()
	p.wait(patience)
}
