package backendtest

import (
	"bytes"
	"fmt"
	"strings"
)

// arguments is that every argument arrives as it was given.
func arguments() []subtest {
	return []subtest{
		{"odd characters", func(f *fixture) {
			expectArgs(f, "", " ", "a b", "  a\tb  ", "'", `"`, `\`, "`date`", "$HOME", "$(date)", "*", "-n", "--", "a\nb\n", "\r", "ünï 世界 🔥", "\x01\x7f", "=", "a=b", "")
		}},
		{"none", func(f *fixture) { expectArgs(f) }},
		{"one of 100 KiB", func(f *fixture) { expectArgs(f, strings.Repeat("0123456789abcdef", 100<<10/16)) }},
		{"5000", func(f *fixture) {
			var many []string
			for i := range 5000 {
				many = append(many, fmt.Sprintf("argument %d", i))
			}
			expectArgs(f, many...)
		}},
	}
}

// expectArgs checks that a command gets args.
func expectArgs(f *fixture, args ...string) {
	m := f.started()
	want := fmt.Appendf(nil, "%d", len(args))
	for _, a := range args {
		want = fmt.Appendf(want, "<%s>", a)
	}
	r := f.run(m, shell(`printf %d "$#"; for a; do printf "<%s>" "$a"; done`, args...), nil)
	f.expectExit(r.status, 0)
	f.expectBytes("the arguments", bytes.TrimSpace(r.stdout), bytes.TrimSpace(want))
}
