package environment

import "io/fs"

// hostPath is where programs are looked for.
const hostPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// madeDir is a directory that is not copied.
type madeDir struct {
	path string
	mode fs.FileMode
}

// hostDirs are the directories that every root has, parents first.
func hostDirs() []madeDir {
	return []madeDir{
		{"dev", 0o755},
		{"etc", 0o755},
		{"etc/pam.d", 0o755},
		{"home", 0o755},
		{"mnt", 0o755},
		{"opt", 0o755},
		{"proc", 0o755},
		{"root", 0o700},
		{"run", 0o755},
		{"run/lock", 0o777 | fs.ModeSticky},
		{"srv", 0o755},
		{"sys", 0o755},
		{"tmp", 0o777 | fs.ModeSticky},
		{"usr", 0o755},
		{"var", 0o755},
		{"var/cache", 0o755},
		{"var/lib", 0o755},
		{"var/log", 0o755},
		{"var/tmp", 0o777 | fs.ModeSticky},
	}
}

// madeLink is a symbolic link that is not copied.
type madeLink struct{ path, target string }

// hostLinks are the links that programs expect everywhere.
func hostLinks() []madeLink {
	return []madeLink{
		{"etc/mtab", "../proc/self/mounts"},
		{"var/lock", "../run/lock"},
		{"var/run", "../run"},
	}
}

// madeFile is a file that is not copied.
type madeFile struct{ path, text string }

// hostFiles are the files that pyro writes itself, because the host's say who
// its users are and how it is set up. No name is on the allow-list.
//
//   - passwd, group: root, who runs commands; user, for programs that refuse to
//     be root; nobody, to whom /usr seems to belong in a user namespace.
//   - pam.d: lets root become another user with su, and nobody else.
//   - profile, bash.bashrc: a login shell keeps the environment that it was
//     given; the distributions' would set PATH again.
//   - resolv.conf is empty because there is no network.
func hostFiles(shell string) []madeFile {
	return []madeFile{
		{"etc/bash.bashrc", `[ -n "$PS1" ] && PS1='\u@\h:\w\$ '` + "\n"},
		{"etc/group", `root:x:0:
tty:x:5:
users:x:100:
user:x:1000:
nogroup:x:65534:
`},
		{"etc/hostname", Hostname + "\n"},
		{"etc/hosts", `127.0.0.1 localhost ` + Hostname + `
::1 localhost ip6-localhost ip6-loopback
`},
		{"etc/nsswitch.conf", `passwd: files
group: files
shadow: files
hosts: files dns
networks: files
protocols: files
services: files
ethers: files
rpc: files
`},
		{"etc/pam.d/other", `auth sufficient pam_rootok.so
auth required pam_deny.so
account required pam_permit.so
password required pam_deny.so
session required pam_permit.so
`},
		{"etc/passwd", `root:x:0:0:root:/root:` + shell + `
user:x:1000:1000:user:/home/user:` + shell + `
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
`},
		{"etc/profile", `: "${PATH:=` + hostPath + `}"
export PATH
if [ -n "$BASH_VERSION" ] && [ -n "$PS1" ] && [ -r /etc/bash.bashrc ]; then
	. /etc/bash.bashrc
fi
`},
		{"etc/resolv.conf", ""},
	}
}
