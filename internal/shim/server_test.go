package shim

import (
	"context"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"pyro/internal/backend"
	"pyro/internal/vm"
)

// serve runs a server in this process, which is enough for all that comes
// before a VM is made. It returns the manager's end of its connection, and what
// is closed when the server has ended.
func serve(t *testing.T, s *server) (*channel, <-chan struct{}) {
	t.Helper()
	ours, theirs := pair(t)
	s.channel.conn = theirs.conn
	s.execs = map[uint64]*execution{}
	done := make(chan struct{})
	go func() { defer close(done); s.serve() }()
	t.Cleanup(func() { ours.conn.Close(); <-done })
	return ours, done
}

// ask sends a request and returns its answer.
func ask(t *testing.T, c *channel, r request, files ...*os.File) response {
	t.Helper()
	check(t, c.send(r, files...))
	return answer(t, c)
}

func answer(t *testing.T, c *channel) response {
	t.Helper()
	var got response
	files, err := c.receive(&got)
	check(t, err)
	if len(files) > 0 {
		t.Errorf("an answer came with %d files", len(files))
	}
	return got
}

func TestRequestsWithoutAVMAreRefused(t *testing.T) {
	expectNothingLeft(t)
	files := tempFiles(t, 3)
	cmd := &vm.Command{Args: []string{"true"}, TimeoutSeconds: 1}
	for _, test := range []struct {
		name    string
		request request
		files   []*os.File
		code    vm.Code
	}{
		{"unknown", request{Op: "explode"}, nil, vm.CodeInvalidArgument},
		{"nothing", request{}, nil, vm.CodeInvalidArgument},
		{"create what?", request{Op: opCreate}, nil, vm.CodeInvalidArgument},
		{"exec what?", request{Op: opExec}, files, vm.CodeInvalidArgument},
		{"exec without files", request{Op: opExec, Exec: cmd}, nil, vm.CodeInvalidArgument},
		{"exec with two files", request{Op: opExec, Exec: cmd}, files[:2], vm.CodeInvalidArgument},
		{"exec before create", request{Op: opExec, Exec: cmd}, files, vm.CodeInvalidState},
		{"start before create", request{Op: opStart}, nil, vm.CodeInvalidState},
		{"stop before create", request{Op: opStop}, nil, vm.CodeInvalidState},
		{"signal whom?", request{Op: opSignal}, nil, vm.CodeInvalidArgument},
		{"signal 0", request{Op: opSignal, Signal: &signalParams{Exec: 1}}, nil, vm.CodeInvalidArgument},
		{"signal -1", request{Op: opSignal, Signal: &signalParams{Exec: 1, Signal: -1}}, nil, vm.CodeInvalidArgument},
		{"signal 65", request{Op: opSignal, Signal: &signalParams{Exec: 1, Signal: 65}}, nil, vm.CodeInvalidArgument},
	} {
		t.Run(test.name, func(t *testing.T) {
			expectNothingLeft(t)
			c, _ := serve(t, &server{})
			test.request.Seq = 41
			got := ask(t, c, test.request, test.files...)
			if got.Seq != 41 || got.Error == nil || got.Error.Code != test.code {
				t.Errorf("got %+v with error %+v, want code %s", got, got.Error, test.code)
			}
			// It goes on serving.
			if got := ask(t, c, request{Seq: 42, Op: opDelete}); !reflect.DeepEqual(got, response{Seq: 42}) {
				t.Errorf("then delete: got %+v with error %+v", got, got.Error)
			}
		})
	}
}

func TestRequestsAreAnsweredInTheirOrder(t *testing.T) {
	expectNothingLeft(t)
	c, _ := serve(t, &server{})
	const n = 50
	go func() {
		for i := range uint64(n) {
			if c.send(request{Seq: i, Op: opSignal, Signal: &signalParams{Exec: 1000, Signal: 9}}) != nil {
				return // answer fails too
			}
		}
	}()
	for i := range uint64(n) {
		if got := answer(t, c); !reflect.DeepEqual(got, response{Seq: i}) {
			t.Errorf("answer %d is %+v", i, got)
		}
	}
}

func TestGarbageEndsTheServer(t *testing.T) {
	expectNothingLeft(t)
	c, done := serve(t, &server{})
	c.write(t, frame("nonsense"), tempFiles(t, 3)...)
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("it serves on")
	}
}

func TestShimWithoutNamespacesSaysSoAndFreesWhatTheManagerMade(t *testing.T) {
	expectNothingLeft(t)
	parent := t.TempDir()
	claim, err := NewClaim(parent, vm.NewID())
	check(t, err)
	refused := forbidden(errors.New("mount /proc: operation not permitted"), func(string) string { return "" })
	c, _ := serve(t, &server{setup: refused, dir: claim.Dir})
	got := ask(t, c, request{Seq: 1, Op: opCreate, Create: &createParams{Protocol: protocol, ID: claim.ID, Resources: resources(60)}})
	want := vm.AsError(refused)
	if got.Error == nil || got.Error.Code != want.Code || got.Error.Message != want.Message || got.Error.Hint != want.Hint {
		t.Errorf("got error %+v, want %+v", got.Error, want)
	}
	if got := ask(t, c, request{Seq: 2, Op: opDelete}); got.Error != nil {
		t.Errorf("delete: %+v", got.Error)
	}
	if left := names(t, parent); len(left) > 0 {
		t.Errorf("left of the VM: %v", left)
	}
	check(t, claim.Release())
}

// kind is a driver that works or does not.
type kind struct {
	name  vm.BackendName
	fails error
}

func (k kind) Describe() backend.Description { return backend.Description{Name: k.name} }
func (k kind) Probe(context.Context) error   { return k.fails }
func (k kind) Create(context.Context, backend.Spec) (backend.Machine, error) {
	return nil, errors.ErrUnsupported
}

func TestBackendIsTheOneThatWasNamedOrTheBestThatWorks(t *testing.T) {
	broken := func(name string) error {
		return vm.Errorf(vm.CodeBackendUnavailable, "no %s", name).WithHint("repair " + name)
	}
	fc, brokenFC := kind{vm.Firecracker, nil}, kind{vm.Firecracker, broken("firecracker")}
	gv, brokenGV := kind{vm.GVisor, nil}, kind{vm.GVisor, broken("gvisor")}
	mock := kind{vm.Mock, nil}
	for _, test := range []struct {
		name    string
		drivers []backend.Driver
		ask     vm.BackendName
		want    vm.BackendName // "" where there is none
		hint    string
	}{
		{"first of two", []backend.Driver{fc, gv, mock}, vm.Auto, vm.Firecracker, ""},
		{"second where the first is broken", []backend.Driver{brokenFC, gv, mock}, vm.Auto, vm.GVisor, ""},
		{"never mock by itself", []backend.Driver{mock}, vm.Auto, "", "--backend"},
		{"never mock for a broken one", []backend.Driver{brokenGV, mock}, vm.Auto, "", "repair gvisor"},
		{"never mock for broken ones", []backend.Driver{brokenFC, brokenGV, mock}, vm.Auto, "", ""},
		{"mock by its name", []backend.Driver{fc, gv, mock}, vm.Mock, vm.Mock, ""},
		{"the named one and no better", []backend.Driver{fc, gv, mock}, vm.GVisor, vm.GVisor, ""},
		{"the named one and no other", []backend.Driver{fc, brokenGV, mock}, vm.GVisor, "", "repair gvisor"},
		{"not built in", []backend.Driver{gv, mock}, vm.Firecracker, "", "--backend"},
	} {
		t.Run(test.name, func(t *testing.T) {
			d, err := choose(t.Context(), test.drivers, test.ask)
			if test.want == "" {
				expectCode(t, "choose", err, vm.CodeBackendUnavailable)
				if e := vm.AsError(err); e != nil && !strings.Contains(e.Hint, test.hint) {
					t.Errorf("the hint is %q, want one with %q", e.Hint, test.hint)
				}
				return
			}
			check(t, err)
			if got := d.Describe().Name; got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

// TestOtherVersionIsRefused: a field that one side does not know could be a
// restriction.
func TestOtherVersionIsRefused(t *testing.T) {
	expectNothingLeft(t)
	c, _ := serve(t, &server{})
	for _, version := range []int{0, protocol + 1} {
		got := ask(t, c, request{Seq: 1, Op: opCreate, Create: &createParams{Protocol: version, ID: vm.NewID(), Resources: resources(60)}})
		if got.Error == nil || got.Error.Code != vm.CodeBackendUnavailable || got.Error.Hint == "" {
			t.Errorf("version %d: %+v", version, got.Error)
		}
	}
}
