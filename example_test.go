package pyro_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"strings"

	"pyro"
)

func ExampleOpen() {
	m, err := pyro.Open(context.Background(), pyro.Options{MaxActiveVMs: 8})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()
	fmt.Println("ready")
	// Output: ready
}

func ExampleManager_Run() {
	ctx := context.Background()
	m, err := pyro.Open(ctx, pyro.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()

	result, err := m.Run(ctx, pyro.RunRequest{
		Args: []string{"sh", "-c", "echo $((6 * 7)); exit 3"},
		// This backend isolates nothing and is for tests. Leave it out.
		Backend: pyro.Mock,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(result.Stdout)
	fmt.Println("exit code", result.Code)
	// Output:
	// 42
	// exit code 3
}

// The command's input and output are streams; with Stdout set, its output is
// delivered as it is printed.
func ExampleManager_Run_streams() {
	ctx := context.Background()
	m, err := pyro.Open(ctx, pyro.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()

	var sorted bytes.Buffer
	_, err = m.Run(ctx, pyro.RunRequest{
		Args:    []string{"sort"},
		Backend: pyro.Mock,
		Stdin:   strings.NewReader("pear\napple\n"),
		Stdout:  &sorted,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(sorted.String())
	// Output:
	// apple
	// pear
}

func ExampleError() {
	ctx := context.Background()
	m, err := pyro.Open(ctx, pyro.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()

	_, err = m.Run(ctx, pyro.RunRequest{Args: []string{"true"}, Profile: "windows"})
	if errors.Is(err, pyro.CodeUnknownProfile) {
		fmt.Println(err)
		fmt.Println(pyro.AsError(err).Code)
	}
	// Output:
	// unknown profile "windows"
	// unknown_profile
}
