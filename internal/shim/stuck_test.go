package shim

import (
	"context"
	"runtime"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"pyro/internal/backend"
	"pyro/internal/limits"
	"pyro/internal/vm"
)

// stuck is a machine, and a command in it, of which one operation and Delete do
// not return, whatever becomes of their contexts. When the test is over they
// end their goroutines: what a shim would do then it would do after its end.
type stuck struct {
	backend.Machine
	backend.Process
	in      string
	entered chan struct{} // closed when in is entered
	over    chan struct{}
}

func (s *stuck) enter(op string) error {
	if op == s.in {
		close(s.entered)
	}
	if op == s.in || op == "delete" {
		<-s.over
		runtime.Goexit()
	}
	return nil
}

func (s *stuck) Start(context.Context) error                  { return s.enter("start") }
func (s *stuck) Stop(context.Context) error                   { return s.enter("stop") }
func (s *stuck) Delete(context.Context) error                 { return s.enter("delete") }
func (s *stuck) KillAll(context.Context) error                { return s.enter("killall") }
func (s *stuck) Signal(context.Context, syscall.Signal) error { return s.enter("signal") }

func (s *stuck) Exec(context.Context, vm.Command, backend.Stdio) (backend.Process, error) {
	return s, s.enter("exec")
}

func (s *stuck) Wait(ctx context.Context) (syscall.WaitStatus, error) {
	<-ctx.Done()
	return 0, ctx.Err()
}

// TestServerThatIsToEndDoesSoWhateverIsStuck has the manager die, or the VM's
// time be up, while the driver is stuck. The clock is not the real one: it jumps
// as soon as all are at a standstill.
func TestServerThatIsToEndDoesSoWhateverIsStuck(t *testing.T) {
	for why, end := range map[string]func(ours *channel, s *server) error{
		"the manager died": func(ours *channel, s *server) error { return ours.conn.Close() },
		"its time is up":   func(ours *channel, s *server) error { s.expire(); return nil },
	} {
		for _, op := range []string{"start", "exec", "signal", "stop", "delete"} {
			t.Run(op+", "+why, func(t *testing.T) {
				ours, theirs := pair(t)
				requests := []request{
					{Op: opExec, Exec: &vm.Command{Args: []string{"x"}, TimeoutSeconds: 3600}},
					{Op: opSignal, Signal: &signalParams{Exec: 1, Signal: 15}},
					{Op: opStop},
				}
				if op == "start" {
					requests = []request{{Op: opStart}}
				}
				files := tempFiles(t, 3)
				for i, r := range requests {
					r.Seq = uint64(1 + i)
					n := 0
					if r.Op == opExec {
						n = 3
					}
					check(t, ours.send(r, files[:n]...))
				}
				synctest.Test(t, func(t *testing.T) {
					m := &stuck{in: op, entered: make(chan struct{}), over: make(chan struct{})}
					s := &server{channel: channel{conn: theirs.conn}, machine: m, limits: new(limits.Limits), started: true}
					var took time.Duration
					done := make(chan struct{})
					go func() {
						defer close(done)
						began := time.Now()
						s.serve()
						took = time.Since(began)
					}()
					if op != "delete" {
						<-m.entered
					}
					check(t, end(ours, s))
					<-done
					if took > teardownTime {
						t.Errorf("it ended after %v, want at most %v", took, teardownTime)
					}
					close(m.over)
				})
			})
		}
	}
}

// TestServerWithAFullQueueEnds has the manager send so much while the driver is
// stuck that its end could not be seen any more.
func TestServerWithAFullQueueEnds(t *testing.T) {
	ours, theirs := pair(t)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for ours.send(request{Op: opStart}) == nil {
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		m := &stuck{in: "start", entered: make(chan struct{}), over: make(chan struct{})}
		s := &server{channel: channel{conn: theirs.conn}, machine: m}
		s.serve()
		close(m.over)
	})
	check(t, theirs.conn.Close())
	<-sent
}
