package shim

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// deadline calls a function once a time has passed, counting the time that the
// machine was asleep: Go's own timers stop with it.
type deadline struct {
	timer *os.File
	ended chan struct{}
}

// newDeadline starts a deadline. expired is called from a goroutine of the
// deadline's own, which stop waits for; it must not call stop.
func newDeadline(after time.Duration, expired func()) (*deadline, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make the VM's deadline: %w", err)
	}
	timer := os.NewFile(uintptr(fd), "deadline")
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(max(after, 1).Nanoseconds())}
	if err := unix.TimerfdSettime(fd, 0, &spec, nil); err != nil {
		timer.Close()
		return nil, fmt.Errorf("set the VM's deadline: %w", err)
	}
	d := &deadline{timer: timer, ended: make(chan struct{})}
	go func() {
		defer close(d.ended)
		var expirations [8]byte
		if _, err := d.timer.Read(expirations[:]); err == nil {
			expired()
		}
	}()
	return d, nil
}

// stop ends the deadline, whether it has passed or not.
func (d *deadline) stop() {
	d.timer.Close()
	<-d.ended
}
