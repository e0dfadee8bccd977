// Package quickstart makes pyro's processes start sooner.
package quickstart

import (
	"runtime/debug"
	"time"
)

// startTime is longer than any of pyro's processes takes to start.
const startTime = 2 * time.Second

// PostponeCollection keeps the garbage collector back while the process
// starts; call it first in main. Each of pyro's processes, and gVisor's most of
// all, starts by allocating a few megabytes that it needs for as long as it
// lives: collecting in between frees next to nothing, and costs a tenth of a
// run's processor time.
func PostponeCollection() {
	usual := debug.SetGCPercent(400)
	time.AfterFunc(startTime, func() { debug.SetGCPercent(usual) })
}
