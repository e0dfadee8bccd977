//go:build !cgo

package nocgo

// Program does nothing: this build is free of cgo.
func Program() {}

// Test does nothing: this build is free of cgo.
func Test() {}
