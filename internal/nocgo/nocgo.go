// Package nocgo keeps a plain `go run` and `go test` working on machines that
// have a C compiler.
//
// A sandbox's process executes its own program again inside an empty root
// directory, so that program must be linked statically. Go does that whenever
// cgo is off, as it is on a machine without a C compiler and in every release
// of pyro; with a C compiler at hand it uses cgo for package net unless told
// otherwise, and nothing in a module can tell it. So a program that was built
// with cgo builds itself once more without, keeps that in the user's cache
// directory, and becomes it. In a build without cgo the functions do nothing.
package nocgo
