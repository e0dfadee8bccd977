package vm

import (
	"errors"
	"fmt"
)

// Code names a kind of failure. Codes are part of the contract: they are never
// renamed, and every front end shows the same one for the same failure.
type Code string

// The failures there are. Their meaning for each front end stands in one
// table, at codeTable.
const (
	CodeInvalidArgument    Code = "invalid_argument"
	CodeUnknownProfile     Code = "unknown_profile"
	CodeCapacityExceeded   Code = "capacity_exceeded"
	CodeVMNotFound         Code = "vm_not_found"
	CodeVMExpired          Code = "vm_expired"
	CodeVMFailed           Code = "vm_failed"
	CodeInvalidState       Code = "invalid_state"
	CodeBackendUnavailable Code = "backend_unavailable"
	CodeArtifactsMissing   Code = "artifacts_missing"
	CodeStateUnavailable   Code = "state_unavailable"
	CodeCommandNotFound    Code = "command_not_found"
	CodeCommandNotRunnable Code = "command_not_executable"
	CodeCanceled           Code = "canceled"
	CodeInternal           Code = "internal"
)

// Exit codes of the command line for failures of pyro itself, as env(1) and
// other programs that run a command use them. A command's own exit code is
// passed on as it is.
const (
	ExitTimedOut      = 124
	ExitFailure       = 125
	ExitNotExecutable = 126
	ExitNotFound      = 127
	ExitSignalBase    = 128 // plus the signal's number
)

// codeTable is the one table from code to front ends. So far the command line
// is the only front end that needs more than the code itself: its exit code.
var codeTable = map[Code]int{
	CodeInvalidArgument:    ExitFailure,
	CodeUnknownProfile:     ExitFailure,
	CodeCapacityExceeded:   ExitFailure,
	CodeVMNotFound:         ExitFailure,
	CodeVMExpired:          ExitFailure,
	CodeVMFailed:           ExitFailure,
	CodeInvalidState:       ExitFailure,
	CodeBackendUnavailable: ExitFailure,
	CodeArtifactsMissing:   ExitFailure,
	CodeStateUnavailable:   ExitFailure,
	CodeCommandNotFound:    ExitNotFound,
	CodeCommandNotRunnable: ExitNotExecutable,
	CodeCanceled:           ExitFailure,
	CodeInternal:           ExitFailure,
}

// ExitCode is the command line's exit code for a failure with code c.
func (c Code) ExitCode() int {
	if exit, ok := codeTable[c]; ok {
		return exit
	}
	return ExitFailure
}

// Error makes a bare code usable with errors.Is: errors.Is(err,
// vm.CodeVMExpired) holds for every error that carries that code.
func (c Code) Error() string { return string(c) }

// Error is a failure that a person or a program can act on.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
	// Hint says what to do about it; empty where nobody can do anything.
	Hint string `json:"hint,omitempty"`
	// Err is the cause, if any. It is part of Message already where it helps.
	Err error `json:"-"`
}

// Errorf returns an *Error whose message is formatted as by fmt.Errorf; an
// argument under %w is its cause.
func Errorf(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Err: errors.Unwrap(err)}
}

// WithHint returns a copy of e that carries hint.
func (e *Error) WithHint(hint string) *Error {
	c := *e
	c.Hint = hint
	return &c
}

// Error returns the message alone: the code and the hint are shown apart.
func (e *Error) Error() string { return e.Message }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is e's code.
func (e *Error) Is(target error) bool {
	c, ok := target.(Code)
	return ok && c == e.Code
}

// AsError returns err as an *Error: the one it wraps, with the words that were
// wrapped around it, or else a new one with CodeInternal. It returns nil for
// nil.
func AsError(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if !errors.As(err, &e) {
		return &Error{Code: CodeInternal, Message: err.Error(), Err: err}
	}
	if e.Message == err.Error() {
		return e
	}
	return &Error{Code: e.Code, Message: err.Error(), Hint: e.Hint, Err: err}
}
