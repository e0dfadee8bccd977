// Package vm holds pyro's domain: what a VM is, the limits it must keep, the
// states it passes through, and the failures every part of pyro can report.
//
// It is the bottom of the import graph: it imports nothing of pyro's, does no
// I/O, and every other package may import it. All its values are plain data
// and safe to copy; none of its functions share state.
package vm

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"math"
	"strconv"
	"time"
)

// The contract's limits. Each range includes both ends.
const (
	MinVCPUs      = 1
	MaxVCPUs      = 8
	MinMemMiB     = 256
	MaxMemMiB     = 32768
	MinTTLSeconds = 60
	MaxTTLSeconds = 3600
)

// The contract's defaults, used where a caller names no value.
const (
	DefaultVCPUs          = 1
	DefaultMemMiB         = 1024
	DefaultTTLSeconds     = 600
	DefaultTimeoutSeconds = 30
	DefaultMaxActiveVMs   = 4
)

// MaxTimeoutSeconds is the longest a command may ask to run. A VM lives at
// most MaxTTLSeconds, so a longer timeout could never be reached.
const MaxTimeoutSeconds = MaxTTLSeconds

// State is where a VM is in its life.
type State string

// A VM is made Created, runs commands while Started, and may be started again
// once Stopped. Deleting it ends it from any state.
const (
	Created State = "created"
	Started State = "started"
	Stopped State = "stopped"
)

// BackendName says which program isolates a VM.
type BackendName string

// The backends there are. Auto is a request, never a VM's backend: the best
// real isolation that works on this machine, or an error. It never chooses
// Mock.
const (
	Auto        BackendName = "auto"
	Firecracker BackendName = "firecracker"
	GVisor      BackendName = "gvisor"
	Mock        BackendName = "mock"
)

// ParseBackendName returns the backend that s names; the empty string means
// Auto. The error's code is CodeInvalidArgument.
func ParseBackendName(s string) (BackendName, error) {
	switch b := BackendName(s); b {
	case "":
		return Auto, nil
	case Auto, Firecracker, GVisor, Mock:
		return b, nil
	}
	return "", &Error{
		Code:    CodeInvalidArgument,
		Message: fmt.Sprintf("unknown backend %q", s),
		Hint:    "use auto, gvisor, firecracker or mock",
	}
}

// Isolation is what a backend promises about the code inside a VM.
type Isolation string

// What can be promised. IsolationNone means that commands are ordinary
// processes of the host: only the mock backend gives it.
const (
	IsolationMicroVM Isolation = "microvm"
	IsolationGVisor  Isolation = "gvisor"
	IsolationNone    Isolation = "none"
)

// ID names a VM: 12 lower-case hexadecimal digits. Every host resource that a
// VM takes is named after it.
type ID string

// NewID returns a fresh random ID.
func NewID() ID {
	var b [6]byte
	rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return ID(hex.EncodeToString(b[:]))
}

// ParseID returns s as an ID, or an error with CodeInvalidArgument. It is the
// only way in for an ID from outside, so that no path, option or control
// character can pass for one.
func ParseID(s string) (ID, error) {
	ok := len(s) == 12
	for i := 0; ok && i < len(s); i++ {
		ok = s[i] >= '0' && s[i] <= '9' || s[i] >= 'a' && s[i] <= 'f'
	}
	if !ok {
		shown := s
		if len(shown) > 32 {
			shown = shown[:32] + "…"
		}
		return "", &Error{
			Code:    CodeInvalidArgument,
			Message: fmt.Sprintf("%q is not a vm_id", shown),
			Hint:    "a vm_id is 12 lower-case hexadecimal digits",
		}
	}
	return ID(s), nil
}

// Time is a moment as the contract writes it: unix seconds with a fraction.
type Time struct{ time.Time }

// MarshalJSON writes t as unix seconds with microseconds.
func (t Time) MarshalJSON() ([]byte, error) {
	return strconv.AppendFloat(nil, float64(t.UnixMicro())/1e6, 'f', 6, 64), nil
}

// UnmarshalJSON reads unix seconds with an optional fraction.
func (t *Time) UnmarshalJSON(b []byte) error {
	f, err := strconv.ParseFloat(string(b), 64)
	if err != nil || math.IsNaN(f) || math.Abs(f) > 1e12 {
		return fmt.Errorf("parse time %q: not unix seconds", b)
	}
	t.Time = time.UnixMicro(int64(math.Round(f * 1e6)))
	return nil
}

// Resources is what a caller asks for when a VM is made. The zero value of a
// field is out of range; callers fill in defaults before Validate.
type Resources struct {
	VCPUCount  int `json:"vcpu_count"`  // MinVCPUs to MaxVCPUs
	MemMiB     int `json:"mem_mib"`     // MinMemMiB to MaxMemMiB, in MiB
	TTLSeconds int `json:"ttl_seconds"` // MinTTLSeconds to MaxTTLSeconds
}

// Validate checks the contract's limits in the contract's order and returns
// the first that fails, with CodeInvalidArgument.
func (r Resources) Validate() error {
	for _, l := range []struct {
		name            string
		value, min, max int
		usual           int
	}{
		{"vcpu_count", r.VCPUCount, MinVCPUs, MaxVCPUs, DefaultVCPUs},
		{"mem_mib", r.MemMiB, MinMemMiB, MaxMemMiB, DefaultMemMiB},
		{"ttl_seconds", r.TTLSeconds, MinTTLSeconds, MaxTTLSeconds, DefaultTTLSeconds},
	} {
		if l.value < l.min || l.value > l.max {
			return Errorf(CodeInvalidArgument, "%s must be between %d and %d, not %d", l.name, l.min, l.max, l.value).
				WithHint(fmt.Sprintf("ask for %d to %d, or leave it out for the default of %d", l.min, l.max, l.usual))
		}
	}
	return nil
}

// ValidateTimeout checks a command's timeout in seconds, which must be
// positive and at most MaxTimeoutSeconds. The error's code is
// CodeInvalidArgument.
func ValidateTimeout(seconds int) error {
	var e *Error
	switch {
	case seconds <= 0:
		e = Errorf(CodeInvalidArgument, "timeout_seconds must be positive, not %d", seconds)
	case seconds > MaxTimeoutSeconds:
		e = Errorf(CodeInvalidArgument, "timeout_seconds must be at most %d, not %d", MaxTimeoutSeconds, seconds)
	default:
		return nil
	}
	return e.WithHint(fmt.Sprintf("ask for 1 to %d, or leave it out for the default of %d", MaxTimeoutSeconds, DefaultTimeoutSeconds))
}

// VM is one disposable machine as every front end shows it. The JSON keys down
// to metadata are the contract's and keep their names and types.
type VM struct {
	ID         ID                `json:"vm_id"`
	Profile    string            `json:"profile"`
	VCPUCount  int               `json:"vcpu_count"`
	MemMiB     int               `json:"mem_mib"`
	TTLSeconds int               `json:"ttl_seconds"`
	CreatedAt  Time              `json:"created_at"`
	ExpiresAt  Time              `json:"expires_at"`
	State      State             `json:"state"`
	Metadata   map[string]string `json:"metadata"`

	Backend   BackendName `json:"backend"`
	Isolation Isolation   `json:"isolation"`
}

// Deletion is the result of deleting a VM.
type Deletion struct {
	ID      ID     `json:"vm_id"`
	Deleted bool   `json:"deleted"`
	Reason  string `json:"reason"`
}

// The reasons that pyro itself gives for a deletion.
const (
	ReasonExplicit = "explicit_delete"
	ReasonPostExec = "post_exec_cleanup"
)
