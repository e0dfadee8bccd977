package vm

import (
	"path"
	"strings"
	"unicode/utf8"
)

// The most that one command may carry in. They keep every message that holds a
// command small enough to be read whole.
const (
	MaxArgs      = 65536
	MaxArgsBytes = 2 << 20 // arguments and environment together; Linux's own limit is near
)

// Command is one program to run in a VM.
type Command struct {
	// Args is the program and its arguments; the program is looked up in the
	// PATH inside the VM. At least one; like Env and Dir, all are UTF-8 without
	// NUL bytes, because they and the result that repeats them travel as JSON.
	Args []string `json:"args"`
	// Env is added to the environment that the VM's profile defines, as
	// KEY=VALUE; a later entry wins.
	Env []string `json:"env,omitempty"`
	// Dir is an absolute directory inside the VM; empty means the profile's.
	Dir string `json:"dir,omitempty"`
	// TimeoutSeconds is how long the command may run.
	TimeoutSeconds int `json:"timeout_seconds"`
}

// Validate checks that c can be run at all. The error's code is
// CodeInvalidArgument.
func (c Command) Validate() error {
	if len(c.Args) == 0 || c.Args[0] == "" {
		return Errorf(CodeInvalidArgument, "the command is empty").WithHint("give the program to run after --, as in: pyro run -- ls -l")
	}
	if len(c.Args) > MaxArgs {
		return Errorf(CodeInvalidArgument, "the command has %d arguments; the most is %d", len(c.Args), MaxArgs).
			WithHint("pass long lists on stdin (-i), as xargs takes them")
	}
	size := 0
	for _, s := range c.Args {
		size += len(s) + 1
		if !isText(s) {
			return Errorf(CodeInvalidArgument, "an argument of the command is not UTF-8 text, or holds a NUL byte").
				WithHint("pass other bytes on stdin (-i), or have a shell in the VM make them with printf")
		}
	}
	for _, s := range c.Env {
		size += len(s) + 1
		if !isText(s) || strings.IndexByte(s, '=') <= 0 {
			return Errorf(CodeInvalidArgument, "an environment entry is not KEY=VALUE in UTF-8").
				WithHint("use -e KEY=VALUE, with a name and without NUL bytes")
		}
	}
	if size > MaxArgsBytes {
		return Errorf(CodeInvalidArgument, "arguments and environment take %d bytes; the most is %d", size, MaxArgsBytes).
			WithHint("pass large input on stdin (-i)")
	}
	if c.Dir != "" && (!path.IsAbs(c.Dir) || !isText(c.Dir)) {
		return Errorf(CodeInvalidArgument, "the working directory %q is not an absolute path", c.Dir).
			WithHint("give a path inside the VM that begins with /")
	}
	return ValidateTimeout(c.TimeoutSeconds)
}

// isText reports whether s survives JSON and exec(2).
func isText(s string) bool { return utf8.ValidString(s) && strings.IndexByte(s, 0) < 0 }

// String returns the command as a line that a shell would read back as the
// same arguments.
func (c Command) String() string {
	quoted := make([]string, len(c.Args))
	for i, a := range c.Args {
		quoted[i] = quote(a)
	}
	return strings.Join(quoted, " ")
}

// quote returns s as one word of a POSIX shell.
func quote(s string) string {
	plain := s != "" && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./=:,@%+", r))
	}) < 0
	if plain {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// Exit is how a command ended.
type Exit struct {
	// Code is the command's exit code; 128 + Signal where a signal ended it;
	// ExitTimedOut where TimedOut.
	Code int `json:"exit_code"`
	// Signal is the signal that ended the command, or 0.
	Signal int `json:"signal,omitempty"`
	// TimedOut says that the command was killed because its time was up.
	TimedOut bool `json:"timed_out,omitempty"`
	// OOM says that the VM ran out of the memory it was given, which killed
	// the command.
	OOM bool `json:"oom,omitempty"`
	// DurationMS is how long the command ran, in milliseconds.
	DurationMS int64 `json:"duration_ms"`
}

// ExecResult is the contract's result of a command.
type ExecResult struct {
	ID      ID     `json:"vm_id"`
	Command string `json:"command"`
	// Stdout and Stderr are what the command printed, as text where it is
	// valid UTF-8, else base64; the encoding fields tell which.
	Stdout         string `json:"stdout"`
	Stderr         string `json:"stderr"`
	StdoutEncoding string `json:"stdout_encoding,omitempty"` // "" is text, else "base64"
	StderrEncoding string `json:"stderr_encoding,omitempty"`
	Exit
	// Truncated says that a stream was longer than what was kept of it; the
	// byte counts are of all that was printed.
	Truncated   bool     `json:"truncated,omitempty"`
	StdoutBytes int64    `json:"stdout_bytes"`
	StderrBytes int64    `json:"stderr_bytes"`
	Cleanup     Deletion `json:"cleanup"`

	Profile   string            `json:"profile"`
	Backend   BackendName       `json:"backend"`
	Isolation Isolation         `json:"isolation"`
	Metadata  map[string]string `json:"metadata"`
}

// Base64 marks a stream that is not valid UTF-8.
const Base64 = "base64"
