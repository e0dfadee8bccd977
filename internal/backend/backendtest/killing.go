package backendtest

import (
	"syscall"
)

// killing is that KillAll leaves nothing alive.
func killing() []subtest {
	return []subtest{
		{"a plain command", killPlain},
		{"a detached tree", killTree},
		{"a tree whose first process has ended", killOrphans},
		{"processes that are being started", killForking},
		{"a process that keeps replacing itself", killHopping},
		{"a stopped command", killStopped},
		{"other commands are spared", killSpares},
		{"several at once", killTogether},
	}
}

// tree starts processes that have left the command's first process behind in
// different ways, all holding its output open and ignoring every signal that
// can be ignored. Each says ready.
const tree = `
survivor='trap "" HUP INT TERM; echo ready; while :; do sleep 1; done'
detach=
if command -v setsid >/dev/null; then detach=setsid; fi
sh -c "$survivor" &
(sh -c "$survivor" &)
($detach sh -c "$survivor" &)
(cd / && exec $detach sh -c "($survivor) &")
($detach env -i PATH="$PATH" sh -c "$survivor" <&- 2>&1 &)
`

// treeSize is how many processes of tree say ready.
const treeSize = 5

func killPlain(f *fixture) {
	m := f.started()
	r := f.begin(m, command("sleep", "1000"), nothing)
	f.killAll(r)
	f.expectKilled(f.wait(r), syscall.SIGKILL)
	f.expectEOF(r)
	f.killAll(r)
}

func killTree(f *fixture) {
	m := f.started()
	r := f.begin(m, shell(tree+`eval "$survivor"`), nothing)
	for range treeSize + 1 {
		f.expectLine(r, "ready")
	}
	f.killAll(r)
	f.expectKilled(f.wait(r), syscall.SIGKILL)
	f.expectEOF(r)
	f.expectExit(f.run(m, command("true"), nil).status, 0)
}

func killOrphans(f *fixture) {
	m := f.started()
	r := f.begin(m, shell(tree+"exit 7"), nothing)
	f.expectExit(f.wait(r), 7)
	for range treeSize {
		f.expectLine(r, "ready")
	}
	f.killAll(r)
	f.expectEOF(r)
	f.expectExit(f.wait(r), 7)
}

func killForking(f *fixture) {
	m := f.started()
	r := f.begin(m, shell(`
		echo ready
		i=0
		while [ $i -lt 500 ]; do
			(sleep 1000 &)
			i=$((i + 1))
		done
		wait`), nothing)
	f.expectLine(r, "ready")
	f.killAll(r)
	f.expectKilled(f.wait(r), syscall.SIGKILL)
	f.expectEOF(r)
}

// killHopping kills something that is never one process for long: each starts
// the next and ends.
func killHopping(f *fixture) {
	const hop = `if [ "$1" -gt 0 ]; then sh -c "$0" "$0" $(($1 - 1)) & else echo over; fi`
	m := f.started()
	r := f.begin(m, shell(`sh -c "$1" "$1" 20000; echo ready`, hop), nothing)
	f.expectLine(r, "ready")
	f.expectExit(f.wait(r), 0)
	f.killAll(r)
	f.expectEOF(r)
}

func killStopped(f *fixture) {
	m := f.started()
	r := f.begin(m, shell("cat & kill -STOP $!; echo ready; kill -STOP $$"), nothing)
	f.expectLine(r, "ready")
	f.killAll(r)
	f.expectKilled(f.wait(r), syscall.SIGKILL)
	f.expectEOF(r)
}

func killSpares(f *fixture) {
	if f.KillsOthers {
		f.Skip("this driver kills a machine's other commands too")
	}
	m := f.started()
	spared := f.begin(m, shell("cat; exit 2"), piped)
	r := f.begin(m, shell(tree+`eval "$survivor"`), nothing)
	for range treeSize + 1 {
		f.expectLine(r, "ready")
	}
	f.killAll(r)
	f.expectEOF(r)
	f.expectRunning(spared)
	if err := spared.stdin.Close(); err != nil {
		f.Error(err)
	}
	f.expectExit(f.wait(spared), 2)
}

func killTogether(f *fixture) {
	m := f.started()
	var all []*running
	for range 3 {
		r := f.begin(m, shell(tree+`eval "$survivor"`), nothing)
		for range treeSize + 1 {
			f.expectLine(r, "ready")
		}
		all = append(all, r)
	}
	killed := make(chan error, len(all))
	ctx := f.ctx()
	for _, r := range all {
		go func() { killed <- r.KillAll(ctx) }()
	}
	for range all {
		if err := <-killed; err != nil {
			f.Errorf("kill all: %v", err)
		}
	}
	for _, r := range all {
		f.expectKilled(f.wait(r), syscall.SIGKILL)
		f.expectEOF(r)
	}
}
