package environment

import (
	"path"
	"slices"
	"strings"
)

// place is a part of the allow-list: some names in one directory of the host.
// A directory under such a name is taken with all below it.
type place struct {
	dir   string   // below the root, without links
	names []string // a name with a * is as for path.Match
	certs bool     // certificates, which are public wherever they lie
}

// hostPlaces is the allow-list: all that is copied from the host. A name is on
// it when programs in /usr do not work, or work differently, without it; when
// packages install it and not people; and when it is no usual place for
// credentials. So these are missing on purpose: gitconfig, pip.conf, npmrc,
// wgetrc, apt, maven/settings.xml, R's *.site files (credentials);
// environment, profile.d, locale.conf, default (this machine's settings; Root
// has the environment); ssl/private, ssh, machine-id (secrets).
func hostPlaces() []place {
	return []place{
		{dir: "etc", names: []string{
			// The loader, glibc's and musl's, and what /usr/bin links to.
			"ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ld-musl-*.path", "alternatives",
			// Which distribution this is: tools choose their ways by it.
			"os-release", "lsb-release", "debian_version", "alpine-release", "arch-release",
			"fedora-release", "redhat-release", "system-release",
			// Tables that libraries read.
			"mime.types", "services", "protocols", "locale.alias", "localtime", "timezone",
			// Terminals, fonts, and man, which stops without its file.
			"inputrc", "terminfo", "fonts", "manpath.config", "man_db.conf",
			// Language runtimes keep files here to which /usr links.
			"java", "java-*", "python3*",
			// Which ciphers and certificates are trusted.
			"crypto-policies", "ca-certificates.conf",
		}},
		{dir: "etc/maven", names: []string{"m2.conf", "logging"}},
		{dir: "etc/R", names: []string{"Makeconf", "Renviron", "ldpaths", "repositories", "javaconf"}},
		{dir: "etc/ssl", names: []string{"openssl.cnf"}},
		{dir: "etc/pki/tls", names: []string{"openssl.cnf"}},
		// Certificates: Debian, Alpine and SUSE; Fedora; Arch; SUSE.
		{dir: "etc/ssl", names: []string{"certs", "cert.pem", "ca-bundle.pem"}, certs: true},
		{dir: "etc/pki/tls", names: []string{"certs", "cert.pem"}, certs: true},
		{dir: "etc/pki/ca-trust", names: []string{"extracted"}, certs: true},
		{dir: "etc/pki/java", names: []string{"cacerts"}, certs: true},
		{dir: "etc/ca-certificates", names: []string{"extracted"}, certs: true},
		{dir: "var/lib/ca-certificates", names: []string{"pem", "openssl", "ca-bundle.pem", "java-cacerts"}, certs: true},
	}
}

// usrLinks are the names that stand in / for directories in /usr. On a host
// that is not merged they are directories of their own, which belong to the
// programs just as /usr does.
func usrLinks() []string {
	return []string{"bin", "lib", "lib32", "lib64", "libx32", "sbin"}
}

// certificateHomes are where administrators keep the certificates that they
// link to from a place of certificates. Other targets of such a link are not
// read: not homes, whose owners share nothing by it, nor what is no disk.
func certificateHomes() []string {
	return []string{"etc", "opt", "usr/local", "var/lib"}
}

// listed reports whether the name at rel, a clean path below the root, is at
// or below a name of p's.
func (p place) listed(rel string) bool {
	below, ok := strings.CutPrefix(rel, p.dir+"/")
	if !ok {
		return false
	}
	name, _, _ := strings.Cut(below, "/")
	return p.match(name)
}

// match reports whether name is on p's list.
func (p place) match(name string) bool {
	return slices.ContainsFunc(p.names, func(pattern string) bool {
		if !isPattern(pattern) {
			return pattern == name
		}
		ok, err := path.Match(pattern, name)
		return ok && err == nil
	})
}

// patterns reports whether p's names are not all literal, so that its directory
// has to be read.
func (p place) patterns() bool { return slices.ContainsFunc(p.names, isPattern) }

// isPattern reports whether a name of a place stands for several.
func isPattern(name string) bool { return strings.Contains(name, "*") }

// under reports whether rel is at or below one of dirs.
func under(rel string, dirs []string) bool {
	for _, dir := range dirs {
		if rel == dir || strings.HasPrefix(rel, dir+"/") {
			return true
		}
	}
	return false
}
