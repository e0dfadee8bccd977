package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func TestResourcesValidate(t *testing.T) {
	good := Resources{VCPUCount: 1, MemMiB: 1024, TTLSeconds: 600}
	tests := []struct {
		name   string
		change func(*Resources)
		want   string // what the message holds; empty if all is well
	}{
		{"middle", func(*Resources) {}, ""},
		{"fewest processors", func(r *Resources) { r.VCPUCount = 1 }, ""},
		{"most processors", func(r *Resources) { r.VCPUCount = 8 }, ""},
		{"too few processors", func(r *Resources) { r.VCPUCount = 0 }, "vcpu_count must be between 1 and 8, not 0"},
		{"too many processors", func(r *Resources) { r.VCPUCount = 9 }, "vcpu_count must be between 1 and 8, not 9"},
		{"least memory", func(r *Resources) { r.MemMiB = 256 }, ""},
		{"most memory", func(r *Resources) { r.MemMiB = 32768 }, ""},
		{"too little memory", func(r *Resources) { r.MemMiB = 255 }, "mem_mib must be between 256 and 32768, not 255"},
		{"too much memory", func(r *Resources) { r.MemMiB = 32769 }, "mem_mib must be between 256 and 32768, not 32769"},
		{"shortest life", func(r *Resources) { r.TTLSeconds = 60 }, ""},
		{"longest life", func(r *Resources) { r.TTLSeconds = 3600 }, ""},
		{"too short a life", func(r *Resources) { r.TTLSeconds = 59 }, "ttl_seconds must be between 60 and 3600, not 59"},
		{"too long a life", func(r *Resources) { r.TTLSeconds = 3601 }, "ttl_seconds must be between 60 and 3600, not 3601"},
		{"all wrong: the contract's order", func(r *Resources) { *r = Resources{} }, "vcpu_count"},
		{"two wrong: the contract's order", func(r *Resources) { r.MemMiB, r.TTLSeconds = 1, 1 }, "mem_mib"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := good
			tt.change(&r)
			err := r.Validate()
			if tt.want == "" {
				if err != nil {
					t.Fatalf("Validate() = %v, want nil", err)
				}
				return
			}
			if !errors.Is(err, CodeInvalidArgument) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("Validate() = %v, want invalid_argument with %q", err, tt.want)
			}
		})
	}
}

func TestID(t *testing.T) {
	seen := map[ID]bool{}
	for range 1000 {
		id := NewID()
		if _, err := ParseID(string(id)); err != nil {
			t.Fatal(err)
		}
		if seen[id] {
			t.Fatalf("NewID gave %s twice", id)
		}
		seen[id] = true
	}
	for _, s := range []string{
		"", "0123456789a", "0123456789abc", "0123456789AB", "../../etc/pa", "-123456789ab",
		"0123456789a\x00", "0123456789aé", strings.Repeat("a", 1<<20), "0123456789a\n",
	} {
		if _, err := ParseID(s); !errors.Is(err, CodeInvalidArgument) {
			t.Errorf("ParseID(%.20q) = %v, want invalid_argument", s, err)
		} else if len(err.Error()) > 200 {
			t.Errorf("ParseID(%.20q) repeats %d bytes", s, len(err.Error()))
		}
	}
}

func TestTimeIsUnixSecondsWithAFraction(t *testing.T) {
	at := Time{time.UnixMicro(1795452995439209)}
	b, err := json.Marshal(at)
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != "1795452995.439209" {
		t.Errorf("marshalled as %s", b)
	}
	var back Time
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if !back.Equal(at.Time) {
		t.Errorf("%v came back as %v", at, back)
	}
	for _, s := range []string{`"now"`, `1e300`, `-1e13`, `{}`} {
		if err := json.Unmarshal([]byte(s), &back); err == nil {
			t.Errorf("%s passed for a time", s)
		}
	}
}

func TestVMHasTheContractsKeys(t *testing.T) {
	b, err := json.Marshal(VM{ID: "0123456789ab", Metadata: map[string]string{}})
	if err != nil {
		t.Fatal(err)
	}
	var keys map[string]any
	if err := json.Unmarshal(b, &keys); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"vm_id", "profile", "vcpu_count", "mem_mib", "ttl_seconds", "created_at", "expires_at", "state", "metadata"} {
		if _, ok := keys[k]; !ok {
			t.Errorf("a VM has no %s", k)
		}
	}
}

func TestErrors(t *testing.T) {
	cause := errors.New("no room")
	e := Errorf(CodeCapacityExceeded, "make a vm: %w", cause).WithHint("wait")
	wrapped := fmt.Errorf("run: %w", e)
	if !errors.Is(wrapped, CodeCapacityExceeded) || errors.Is(wrapped, CodeInternal) || !errors.Is(wrapped, cause) {
		t.Errorf("%v is not what it is made of", wrapped)
	}
	got := AsError(wrapped)
	if got.Code != CodeCapacityExceeded || got.Hint != "wait" || got.Message != "run: make a vm: no room" {
		t.Errorf("AsError lost something: %+v", got)
	}
	if got := AsError(cause); got.Code != CodeInternal || got.Message != "no room" {
		t.Errorf("AsError(%v) = %+v", cause, got)
	}
	if AsError(nil) != nil {
		t.Error("AsError(nil) is not nil")
	}
	joined := AsError(errors.Join(e, errors.New("and worse")))
	if joined.Code != CodeCapacityExceeded || !strings.Contains(joined.Message, "and worse") {
		t.Errorf("AsError lost part of a joined error: %+v", joined)
	}
}

func TestEveryCodeHasAnExitCode(t *testing.T) {
	want := map[Code]int{CodeCommandNotFound: 127, CodeCommandNotRunnable: 126}
	for c := range codeTable {
		w, ok := want[c]
		if !ok {
			w = 125
		}
		if got := c.ExitCode(); got != w {
			t.Errorf("%s exits with %d, want %d", c, got, w)
		}
	}
	if got := Code("from a newer pyro").ExitCode(); got != 125 {
		t.Errorf("an unknown code exits with %d", got)
	}
}

func TestCommandValidate(t *testing.T) {
	ok := Command{Args: []string{"ls"}, TimeoutSeconds: 1}
	tests := []struct {
		name   string
		change func(*Command)
		valid  bool
	}{
		{"plain", func(*Command) {}, true},
		{"no arguments", func(c *Command) { c.Args = nil }, false},
		{"empty program", func(c *Command) { c.Args = []string{""} }, false},
		{"empty argument", func(c *Command) { c.Args = []string{"ls", ""} }, true},
		{"NUL in an argument", func(c *Command) { c.Args = []string{"a\x00b"} }, false},
		{"not UTF-8", func(c *Command) { c.Args = append(c.Args, "\xff") }, false},
		{"not UTF-8 in the environment", func(c *Command) { c.Env = []string{"A=\xff"} }, false},
		{"100 KB of arguments", func(c *Command) { c.Args = append(c.Args, strings.Repeat("x", 100<<10)) }, true},
		{"3 MB of arguments", func(c *Command) { c.Args = append(c.Args, strings.Repeat("x", 3<<20)) }, false},
		{"too many arguments", func(c *Command) { c.Args = make([]string, MaxArgs+1); c.Args[0] = "ls" }, false},
		{"environment", func(c *Command) { c.Env = []string{"A=b", "C="} }, true},
		{"environment without a value", func(c *Command) { c.Env = []string{"A"} }, false},
		{"environment without a name", func(c *Command) { c.Env = []string{"=b"} }, false},
		{"NUL in the environment", func(c *Command) { c.Env = []string{"A=\x00"} }, false},
		{"absolute directory", func(c *Command) { c.Dir = "/tmp" }, true},
		{"relative directory", func(c *Command) { c.Dir = "tmp" }, false},
		{"no time", func(c *Command) { c.TimeoutSeconds = 0 }, false},
		{"negative time", func(c *Command) { c.TimeoutSeconds = -1 }, false},
		{"an hour", func(c *Command) { c.TimeoutSeconds = 3600 }, true},
		{"more than an hour", func(c *Command) { c.TimeoutSeconds = 3601 }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := ok
			tt.change(&c)
			err := c.Validate()
			if tt.valid != (err == nil) {
				t.Fatalf("Validate() = %v, want valid: %v", err, tt.valid)
			}
			if err != nil && !errors.Is(err, CodeInvalidArgument) {
				t.Fatalf("Validate() = %v, want invalid_argument", err)
			}
		})
	}
}

// FuzzCommandString asks a shell what it makes of a command's text.
func FuzzCommandString(f *testing.F) {
	for _, s := range []string{"plain", "two words", "it's", "", "$HOME `id` \\ \"q\"", "-n", "a\nb", "é", "*", "~"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, arg string) {
		if strings.IndexByte(arg, 0) >= 0 {
			return // no program can have such an argument
		}
		line := Command{Args: []string{"printf", "%s", arg}}.String()
		out, err := exec.Command("sh", "-c", line).Output()
		if err != nil {
			t.Fatalf("sh -c %q: %v", line, err)
		}
		if string(out) != arg {
			t.Fatalf("sh read %q as %q, want %q", line, out, arg)
		}
	})
}
