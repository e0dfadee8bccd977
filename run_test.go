package pyro_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"pyro"
	"pyro/internal/shim"
	"pyro/internal/store"
	"pyro/internal/vm"
)

func TestRunReturnsWhatTheCommandDid(t *testing.T) {
	r := newRig(t, "")
	got := r.run(r.shell("echo out; echo err >&2; exit 3"))
	if _, err := vm.ParseID(string(got.ID)); err != nil {
		t.Errorf("its id: %v", err)
	}
	if got.DurationMS < 0 || got.DurationMS > patience.Milliseconds() {
		t.Errorf("it took %d ms", got.DurationMS)
	}
	for _, key := range []string{"limit_memory", "limit_cpu", "limit_tasks", "workdir"} {
		if got.Metadata[key] == "" {
			t.Errorf("the metadata lacks %s: %v", key, got.Metadata)
		}
	}
	expectNoCgroups(t, string(got.ID))
	want := &pyro.ExecResult{
		ID: got.ID, Command: "sh -c 'echo out; echo err >&2; exit 3'",
		Stdout: "out\n", Stderr: "err\n", StdoutBytes: 4, StderrBytes: 4,
		Exit:    vm.Exit{Code: 3, DurationMS: got.DurationMS},
		Cleanup: vm.Deletion{ID: got.ID, Deleted: true, Reason: "post_exec_cleanup"},
		Profile: "host", Backend: pyro.Mock, Isolation: "none", Metadata: got.Metadata,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if again := r.run(r.shell("exit 0")); again.ID == got.ID {
		t.Error("the next VM has the same id")
	}
}

func TestFailureOfTheCommandIsAResult(t *testing.T) {
	r := newRig(t, "")
	for line, want := range map[string]vm.Exit{
		"exit 1":        {Code: 1},
		"exit 125":      {Code: 125},
		"kill -KILL $$": {Code: 137, Signal: 9},
		"kill -SEGV $$": {Code: 139, Signal: 11},
	} {
		got := r.run(r.shell(line)).Exit
		got.DurationMS = 0
		if got != want {
			t.Errorf("%s: %+v, want %+v", line, got, want)
		}
	}
}

func TestCommandThatCannotStartIsAnError(t *testing.T) {
	r := newRig(t, "")
	for _, test := range []struct {
		name    string
		request pyro.RunRequest
		code    pyro.Code
	}{
		{"not there", pyro.RunRequest{Args: []string{"no-such-command"}}, pyro.CodeCommandNotFound},
		{"a directory", pyro.RunRequest{Args: []string{"/etc"}}, pyro.CodeCommandNotRunnable},
		{"not executable", pyro.RunRequest{Args: []string{"/etc/passwd"}}, pyro.CodeCommandNotRunnable},
		{"no working directory", pyro.RunRequest{Args: []string{"true"}, Dir: "/does/not/exist"}, pyro.CodeInvalidArgument},
	} {
		test.request.Backend = pyro.Mock
		result, err := r.Run(r.ctx(), test.request)
		expectCode(t, test.name, err, test.code)
		if result != nil {
			t.Errorf("%s: there is a result: %+v", test.name, result)
		}
		r.expectFreed()
	}
}

func TestEnvAndDirReachTheCommandAndNothingElseDoes(t *testing.T) {
	r := newRig(t, "")
	t.Setenv("PYRO_TEST_SECRET", "s3cret")
	dir := t.TempDir()
	q := r.shell("pwd; echo $A; env")
	q.Env, q.Dir = append(q.Env, "A=1", "A=b c"), dir
	out := r.run(q).Stdout
	if !strings.HasPrefix(out, dir+"\nb c\n") {
		t.Errorf("it printed %q", out)
	}
	if strings.Contains(out, "s3cret") {
		t.Errorf("the caller's environment is in it: %q", out)
	}
}

func TestZeroMeansTheContractsDefault(t *testing.T) {
	r := newRig(t, "")
	done := r.begin(r.ctx(), r.shell("touch '"+r.stage("here")+"'; while [ ! -e '"+r.stage("done")+"' ]; do sleep 0.01; done"))
	await(t, "the command runs", func() bool { return r.reached("here") })
	list := r.records()
	r.goOn("done")
	_, err := r.end(done)
	check(t, err)
	if len(list) != 1 {
		t.Fatalf("the store has %d VMs", len(list))
	}
	v := list[0]
	if v.Profile != "host" || v.VCPUCount != 1 || v.MemMiB != 1024 || v.TTLSeconds != 600 || v.Owner != store.OwnerRun {
		t.Errorf("the VM is %+v", v)
	}
	if life := v.ExpiresAt.Sub(v.CreatedAt.Time); life != 600*time.Second {
		t.Errorf("it lives for %v", life)
	}
	if age := time.Since(v.CreatedAt.Time); age < 0 || age > patience {
		t.Errorf("it was made %v ago", age)
	}
}

// occupy makes a VM that another process owns, as far as anybody can tell, and
// returns what ends it.
func (r *rig) occupy() (end func()) {
	r.Helper()
	c, err := shim.NewClaim(r.vms(), vm.NewID())
	check(r, err)
	s, err := store.Open(r.ctx(), filepath.Join(r.base, "state.db"))
	check(r, err)
	defer s.Close()
	now := vm.Time{Time: time.Now()}
	check(r, s.Insert(r.ctx(), store.Record{Owner: store.OwnerRun, VM: vm.VM{
		ID: c.ID, Profile: "host", Backend: vm.Mock, VCPUCount: 1, MemMiB: 256, TTLSeconds: 60,
		CreatedAt: now, ExpiresAt: now, State: vm.Created,
	}}, 1000))
	return func() { check(r, errors.Join(c.Reclaim(r.ctx()), c.Release())) }
}

func TestChecksComeInTheContractsOrder(t *testing.T) {
	r := newRig(t, "")
	full := r.open(1)
	end := r.occupy()
	// All is wrong; then one after the other is put right.
	q := pyro.RunRequest{
		VCPUCount: 9, MemMiB: 255, TTLSeconds: 59, TimeoutSeconds: -1,
		Profile: "nope", Backend: "nope", Dir: "relative", Env: []string{"nope"},
	}
	for _, step := range []struct {
		code    pyro.Code
		mention string
		repair  func()
	}{
		{pyro.CodeInvalidArgument, "vcpu_count", func() { q.VCPUCount = 8 }},
		{pyro.CodeInvalidArgument, "mem_mib", func() { q.MemMiB = 256 }},
		{pyro.CodeInvalidArgument, "ttl_seconds", func() { q.TTLSeconds = 60 }},
		{pyro.CodeUnknownProfile, "profile", func() { q.Profile = "host" }},
		{pyro.CodeInvalidArgument, "backend", func() { q.Backend = pyro.Mock }},
		{pyro.CodeInvalidArgument, "command", func() { q.Args = []string{"true"} }},
		{pyro.CodeInvalidArgument, "environment", func() { q.Env = nil }},
		{pyro.CodeInvalidArgument, "directory", func() { q.Dir = "/" }},
		{pyro.CodeInvalidArgument, "timeout_seconds", func() { q.TimeoutSeconds = 5 }},
		{pyro.CodeCapacityExceeded, "(1)", end},
	} {
		_, err := full.Run(r.ctx(), q)
		expectCode(t, step.mention, err, step.code)
		if err != nil && !strings.Contains(err.Error(), step.mention) {
			t.Errorf("the error is %q, want one about %s", err, step.mention)
		}
		step.repair()
	}
	_, err := full.Run(r.ctx(), q)
	check(t, err)
}

func TestEveryRefusalHasACodeAndFreesAll(t *testing.T) {
	r := newRig(t, "")
	for name, q := range map[string]pyro.RunRequest{
		"nothing":           {},
		"an empty program":  {Args: []string{""}},
		"a NUL byte":        {Args: []string{"a\x00b"}},
		"too many args":     {Args: make([]string, vm.MaxArgs+1)},
		"too long args":     {Args: []string{"echo", strings.Repeat("x", vm.MaxArgsBytes)}},
		"no CPU":            {Args: []string{"true"}, VCPUCount: -1},
		"too much memory":   {Args: []string{"true"}, MemMiB: 32769},
		"too long a life":   {Args: []string{"true"}, TTLSeconds: 3601},
		"too long a time":   {Args: []string{"true"}, TimeoutSeconds: 3601},
		"a negative time":   {Args: []string{"true"}, TimeoutSeconds: -30},
		"env without value": {Args: []string{"true"}, Env: []string{"A"}},
		"env without name":  {Args: []string{"true"}, Env: []string{"=A"}},
		"negative output":   {Args: []string{"true"}, MaxOutput: -1},
	} {
		q.Backend = pyro.Mock
		result, err := r.Run(r.ctx(), q)
		expectCode(t, name, err, pyro.CodeInvalidArgument)
		if result != nil {
			t.Errorf("%s: there is a result", name)
		}
		r.expectFreed()
	}
}

func TestErrorsAreOfTheirType(t *testing.T) {
	r := newRig(t, "")
	for name, q := range map[string]pyro.RunRequest{
		"refused":   {Args: []string{"true"}, VCPUCount: 99},
		"not there": {Args: []string{"no-such-command"}, Backend: pyro.Mock},
	} {
		_, err := r.Run(r.ctx(), q)
		if _, ok := err.(*pyro.Error); !ok {
			t.Errorf("%s: the error is a %T", name, err)
		}
	}
}

func TestUnknownBackendsAreNotReplaced(t *testing.T) {
	r := newRig(t, "")
	// The test's shim has mock alone.
	for _, backend := range []pyro.BackendName{pyro.Auto, "", pyro.Firecracker, pyro.GVisor} {
		_, err := r.Run(r.ctx(), pyro.RunRequest{Args: []string{"true"}, Backend: backend})
		expectCode(t, fmt.Sprintf("backend %q", backend), err, pyro.CodeBackendUnavailable)
		if e := pyro.AsError(err); e != nil && e.Hint == "" {
			t.Errorf("backend %q: there is no hint", backend)
		}
		r.expectFreed()
	}
}

func TestFailureInTheShimSaysWhyAndFreesAll(t *testing.T) {
	for _, op := range []string{"create", "start", "exec"} {
		t.Run(op, func(t *testing.T) {
			r := newRig(t, op+"=fail")
			_, err := r.Run(r.ctx(), r.shell("true"))
			e := pyro.AsError(err)
			if e == nil || e.Code != errScripted.Code || e.Hint != errScripted.Hint || !strings.Contains(e.Message, errScripted.Message) {
				t.Errorf("the error is %+v, want %+v", e, errScripted)
			}
		})
	}
}

func TestPanicInTheShimIsAFailedVMThatSaysWhy(t *testing.T) {
	for _, op := range []string{"create", "start", "exec"} {
		t.Run(op, func(t *testing.T) {
			r := newRig(t, op+"=panic")
			_, err := r.Run(r.ctx(), r.shell("true"))
			expectCode(t, op, err, pyro.CodeVMFailed)
			if err != nil && !strings.Contains(err.Error(), "panic: it was in the script") {
				t.Errorf("the error does not say why: %v", err)
			}
		})
	}
}

func TestResultIsReturnedThoughTheShimCannotDelete(t *testing.T) {
	for _, fault := range []string{"fail", "panic"} {
		t.Run(fault, func(t *testing.T) {
			r := newRig(t, "delete="+fault)
			got := r.run(r.shell("echo done"))
			if got.Stdout != "done\n" || !got.Cleanup.Deleted {
				t.Errorf("the result is %+v", got)
			}
		})
	}
}

func TestProgramThatIsNoShimIsAFailedVM(t *testing.T) {
	r := newRig(t, "")
	for name, commands := range map[string]string{"ends": "exit 3", "writes nonsense": "printf nonsense >&3"} {
		program := filepath.Join(t.TempDir(), "program")
		writeScript(t, program, commands)
		m, err := pyro.Open(r.ctx(), pyro.Options{BaseDir: r.base, Executable: program})
		check(t, err)
		_, err = m.Run(r.ctx(), r.shell("true"))
		expectCode(t, name, err, pyro.CodeVMFailed)
		check(t, m.Close())
	}
}

func TestCloseUnderARunLeavesARowThatItReports(t *testing.T) {
	r := newRig(t, "")
	m, err := pyro.Open(r.ctx(), pyro.Options{BaseDir: r.base, Executable: r.program})
	check(t, err)
	done := make(chan *pyro.ExecResult, 1)
	go func() {
		got, err := m.Run(r.ctx(), r.shell("touch '"+r.stage("here")+"'; while [ ! -e '"+r.stage("done")+"' ]; do sleep 0.01; done"))
		check(t, err)
		done <- got
	}()
	await(t, "the command runs", func() bool { return r.reached("here") })
	check(t, m.Close())
	r.goOn("done")
	if got := <-done; got == nil || got.Code != 0 || got.Cleanup.Deleted {
		t.Errorf("the result is %+v", got)
	}
	// The row is left, and counts for nobody.
	r.run(r.shell("true"))
}

func TestRunIsSafeForConcurrentUse(t *testing.T) {
	r := newRig(t, "")
	m := r.open(100)
	const n = 12
	errs := make(chan error, n)
	for i := range n {
		go func() {
			got, err := m.Run(r.ctx(), r.shell(fmt.Sprintf("echo %d", i)))
			if err == nil && got.Stdout != fmt.Sprintln(i) {
				err = fmt.Errorf("run %d printed %q", i, got.Stdout)
			}
			errs <- err
		}()
	}
	for range n {
		check(t, <-errs)
	}
}

func TestEndedContextRunsNothing(t *testing.T) {
	r := newRig(t, "")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := r.Run(ctx, r.shell("touch '"+r.stage("here")+"'"))
	expectCode(t, "run", err, pyro.CodeCanceled)
	if _, err := os.Stat(r.stage("here")); err == nil {
		t.Error("the command ran")
	}
}

func TestRelativeProgramIsTheCallers(t *testing.T) {
	r := newRig(t, "")
	t.Chdir(filepath.Dir(r.program))
	m, err := pyro.Open(r.ctx(), pyro.Options{BaseDir: r.base, Executable: "./pyro"})
	check(t, err)
	_, err = m.Run(r.ctx(), r.shell("true"))
	check(t, errors.Join(err, m.Close()))
}
