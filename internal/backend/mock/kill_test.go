package mock

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"pyro/internal/vm"
)

// TestKillAllFindsEverything checks that no way to leave home hides a process,
// under the worst: several machines at once that start processes as fast as
// they can.
func TestKillAllFindsEverything(t *testing.T) {
	const hop = `if [ "$1" -gt 0 ]; then env -i sh -c "$0" "$0" $(($1 - 1)) & fi`
	for _, c := range []struct{ name, script string }{
		{"cleared environment", `env -i sh -c '(sleep 1000 &)'`},
		{"cleared environment and session", `setsid env -i setsid sh -c '(setsid sleep 1000 &)'`},
		{"replaces itself", `sh -c "$HOP" "$HOP" 20000`},
		{"multiplies", `i=0; while [ $i -lt 200 ]; do (setsid sleep 1000 &); i=$((i + 1)); done & sleep 0`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := startMachine(t, newSpec(t))
			for range 5 {
				p, out := begin(t, m, vm.Command{Args: []string{"sh", "-c", c.script}, Env: []string{"HOP=" + hop}, TimeoutSeconds: 10})
				if _, err := p.Wait(t.Context()); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				if err := p.KillAll(ctx); err != nil {
					t.Fatal(err)
				}
				if err := out.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
					t.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, out); err != nil {
					t.Errorf("something holds the output open: %v", err)
				}
			}
		})
	}
}

// TestKillAllSparesOthers checks that only what is marked is killed: not
// another command's daemon, nor another child of this process.
func TestKillAllSparesOthers(t *testing.T) {
	m := startMachine(t, newSpec(t))
	other := exec.CommandContext(t.Context(), "cat")
	stdin, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	daemon, out := begin(t, m, vm.Command{Args: []string{"sh", "-c", "sleep 1000 &"}, TimeoutSeconds: 10})
	killed, _ := begin(t, m, vm.Command{Args: []string{"sleep", "1000"}, TimeoutSeconds: 10})
	if err := killed.KillAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := out.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, out); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("another command's daemon is gone: %v", err)
	}
	if err := daemon.KillAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := stdin.Close(); err != nil {
		t.Error(err)
	}
	if err := other.Wait(); err != nil {
		t.Errorf("another child of this process: %v", err)
	}
}

func TestMark(t *testing.T) {
	one, other := newMark(), newMark()
	if one == other {
		t.Errorf("two machines have mark %d", one)
	}
	k := one.exec(7)
	if k == one || k == one.exec(8) || k.machine() != one || k.exec(0) != k {
		t.Errorf("the mark of command 7 of machine %x is %x", one, k)
	}
	const limits = "Limit                     Soft Limit           Hard Limit           Units     \n" +
		"Max address space         unlimited            unlimited            bytes     \n" +
		"Max file locks            VALUE                unlimited            locks     \n" +
		"Max pending signals       96365                96365                signals   \n"
	for value, want := range map[string]bool{"unlimited": false, "4096": false, "": false, "2305843009213693952": true} {
		got, ok := parseLimits([]byte(strings.Replace(limits, "VALUE", value, 1)))
		if ok != want || ok && got != marked {
			t.Errorf("limit %q: mark %d, %v", value, got, ok)
		}
	}
	if _, ok := parseLimits(nil); ok {
		t.Errorf("no limits have a mark")
	}
}

func TestParseStat(t *testing.T) {
	const rest = " 1 1 0 -1 4194304 100 0 0 0 0 0 0 0 20 0 "
	for _, c := range []struct {
		stat string
		want sighting
	}{
		{"7 (sh) S 3" + rest + "1 0 12345", sighting{pid: 7, parent: 3}},
		{"7 (a) Z (b) S 3" + rest + "1 0 12345", sighting{pid: 7, parent: 3}},
		{"7 (sh) Z 3" + rest + "1 0 12345", sighting{pid: 7, parent: 3, dead: true}},
		{"7 (sh) X 3" + rest + "0 0 12345", sighting{pid: 7, parent: 3, dead: true}},
		{"7 (first thread ended) Z 3" + rest + "2 0 12345", sighting{pid: 7, parent: 3}},
	} {
		if got, err := parseStat(7, []byte(c.stat)); err != nil || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", c.stat, got, err, c.want)
		}
	}
	for _, stat := range []string{"", "7 (sh", "7 (sh) S", "7 (sh) S x" + rest + "1 0"} {
		if got, err := parseStat(7, []byte(stat)); err == nil {
			t.Errorf("%q: %+v", stat, got)
		}
	}
}
