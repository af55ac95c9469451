package test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"culvert/internal/lab"
	"culvert/internal/priority"
)

// TestChaosPrivileges checks the capabilities, no_new_privs, the seccomp mode and the nice
// value of each thread of a ready daemon. The other tests show that it needs no more: their daemons run
// with --confine=kill, which kills a daemon at the first system call that is not allowed.
func TestChaosPrivileges(t *testing.T) {
	const always = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_BPF
	for _, end := range append(slices.Clip(fastEnds), fastEnd{"loop at nice -10", []string{"--datapath", "userspace", "--priority"}}) {
		t.Run(end.name, func(t *testing.T) {
			c := newClusterOf(t, lab.Options{Nodes: 1, Prefixes: dualUnderlay})
			c.setConfig(dual)
			p := c.start(c.Nodes[0], end.flags...)
			c.waitReady(c.Nodes[0], 0)
			want := uint64(always)
			if strings.HasPrefix(end.name, "fast") {
				want |= 1 << unix.CAP_PERFMON
			}
			files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.PID))
			if err != nil || len(files) < 3 {
				t.Fatalf("threads: %v (%v)", files, err)
			}
			for _, file := range files {
				text, err := os.ReadFile(file)
				if err != nil {
					continue // the thread has exited
				}
				for line := range strings.Lines(string(text)) {
					name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
					value = strings.TrimSpace(value)
					is := map[string]string{
						"CapPrm": fmt.Sprintf("%016x", want), "CapEff": fmt.Sprintf("%016x", want), "CapBnd": fmt.Sprintf("%016x", want),
						"CapInh": strings.Repeat("0", 16), "CapAmb": strings.Repeat("0", 16), "NoNewPrivs": "1", "Seccomp": "2",
					}[name]
					if is != "" && value != is {
						t.Errorf("%s: %s is %s, want %s", file, name, value, is)
					}
				}
				thread, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
				if err != nil {
					t.Fatal(err)
				}
				nice := 0
				if strings.HasSuffix(end.name, "-10") {
					nice = priority.Nice
				}
				if n, err := unix.Getpriority(unix.PRIO_PROCESS, thread); err == nil && 20-n != nice {
					t.Errorf("%s: nice %d, want %d", file, 20-n, nice)
				}
			}
			s, err := c.status(c.Nodes[0])
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range s.Datapath.Mechanisms {
				if m.Name == "priority" && (m.On != strings.HasSuffix(end.name, "-10") || m.Why == "") {
					t.Errorf("the status says %+v", m)
				}
			}
			socket, err := os.Stat(filepath.Join(c.Nodes[0].RunDir, "culvert.sock"))
			if err != nil || socket.Mode().Perm() != 0o600 {
				t.Errorf("the mode of the socket is %v (%v)", socket.Mode(), err)
			}
		})
	}
}
