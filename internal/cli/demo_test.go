package cli

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// demoCommand returns the built program's command; it skips the test if no demo can run.
func demoCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	if err := lab.CheckTUN(); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	program := filepath.Join(labtest.Bin(t), "culvert")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v: run make first", err)
	}
	return exec.Command(program, append([]string{"demo"}, args...)...)
}

// nothingLeft fails the test if this demo left anything; others may run in parallel.
func nothingLeft(t *testing.T, stderr string) {
	t.Helper()
	_, rest, ok := strings.Cut(stderr, "cvt-")
	if !ok || len(rest) < 4 {
		t.Fatalf("which demo is not said: %q", stderr)
	}
	id := "cvt-" + rest[:4]
	for _, pattern := range []string{"/run/netns/" + id + "*", filepath.Join(lab.Root, id)} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range lines {
		if text, err := os.ReadFile(f); err == nil && bytes.Contains(text, []byte(id)) {
			t.Errorf("left running: %q", text)
		}
	}
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}

func TestDemo(t *testing.T) {
	cmd := demoCommand(t, "--nodes", "2", "--pods", "2", "-o", "json")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	d := json.NewDecoder(&stdout)
	d.DisallowUnknownFields()
	var got demoResult
	if err := d.Decode(&got); err != nil || d.More() {
		t.Fatalf("not one JSON object: %v", err)
	}
	// 4 pods to 3 others each, and 2 nodes to and from the other's 2 pods.
	if !got.OK || len(got.Nodes) != 2 || len(got.Pods) != 4 || len(got.Pings) != 4*3+2*2*2 || len(got.Transfers) != 2 {
		t.Errorf("the result is %+v", got)
	}
	for _, p := range got.Pings {
		if !p.OK || p.NAT || p.RTTms <= 0 {
			t.Errorf("%+v", p)
		}
	}
	for _, f := range got.Transfers {
		if !f.OK || f.Gbps <= 0 {
			t.Errorf("%+v", f)
		}
	}
	nothingLeft(t, stderr.String())
}

// watchDemo runs a demo and calls line with each line of its progress.
func watchDemo(t *testing.T, cmd *exec.Cmd, line func(string)) (stderr string, code int) {
	t.Helper()
	pipe, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for s := bufio.NewScanner(pipe); s.Scan(); {
		all.WriteString(s.Text() + "\n")
		line(s.Text())
	}
	return all.String(), exitCode(cmd.Wait())
}

func TestDemoInterrupted(t *testing.T) {
	for _, when := range []string{"nodes and the network", "etcd serves", "n2 (", "pods through"} {
		cmd := demoCommand(t, "--nodes", "2", "--pods", "1")
		stderr, code := watchDemo(t, cmd, func(line string) {
			if strings.Contains(line, when) {
				_ = cmd.Process.Signal(syscall.SIGINT)
			}
		})
		if code != 1 || !strings.Contains(stderr, "interrupted") || !strings.Contains(stderr, "nothing of it is left") {
			t.Errorf("interrupted after %q: exit code %d\n%s", when, code, stderr)
		}
		nothingLeft(t, stderr)
	}
}

func TestDemoSaysWhatFailed(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for pings that nobody answers")
	}
	if !lab.Privileged() {
		t.Skip("needs to see the demo's processes: root")
	}
	// The kernel datapath would keep working without the daemon.
	cmd := demoCommand(t, "--nodes", "2", "--pods", "1", "--datapath", "userspace", "-o", "json")
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	stderr, code := watchDemo(t, cmd, func(line string) {
		if !strings.Contains(line, "n2 (") {
			return
		}
		// The node has its lease, so the demo does not start another daemon.
		records, _ := filepath.Glob(filepath.Join(lab.Root, "*", "processes", "n2.json"))
		for _, f := range records {
			var r struct{ Process struct{ PID int } }
			text, err := os.ReadFile(f)
			if err != nil || json.Unmarshal(text, &r) != nil {
				continue
			}
			parent, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(r.Process.PID), "stat"))
			if err == nil && strings.Contains(string(parent), " "+strconv.Itoa(cmd.Process.Pid)+" ") {
				_ = syscall.Kill(r.Process.PID, syscall.SIGKILL)
			}
		}
	})
	var got demoResult
	if err := json.Unmarshal(stdout.Bytes(), &got); err != nil || got.OK {
		t.Errorf("the result is %s: %v", &stdout, err)
	}
	if code != 1 || !strings.Contains(stderr, "n1-p1 does not reach n2-p1") || !strings.Contains(stderr, "The daemon of n2 has ended (signal: killed)") {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
	nothingLeft(t, stderr)
}

func TestDemoWrongFlags(t *testing.T) {
	for _, args := range [][]string{
		{"--nodes", "0"},
		{"--nodes", "51"},
		{"--pods", "-1"},
		{"-o", "yaml"},
		{"--no-such-flag"},
		{"extra"},
	} {
		cmd := newRootCommand()
		cmd.SetArgs(append([]string{"demo"}, args...))
		if err := cmd.ExecuteContext(t.Context()); err == nil || !isUsage(err) {
			t.Errorf("%v: %v", args, err)
		}
	}
}

func TestDemoTable(t *testing.T) {
	r := demoResult{
		Nodes: []demoNode{
			{Name: "n1", Underlay: netip.MustParseAddr("198.18.0.1"), Subnet: netip.MustParsePrefix("10.42.1.0/24"), Datapath: "userspace", MTU: 1450},
			{Name: "n2", Underlay: netip.MustParseAddr("198.18.0.2"), Subnet: netip.MustParsePrefix("10.42.2.0/24"), Datapath: "kernel", MTU: 1450},
		},
		Pods: []demoPod{
			{Name: "n1-p1", Node: "n1", Address: netip.MustParseAddr("10.42.1.2")},
			{Name: "n2-p1", Node: "n2", Address: netip.MustParseAddr("10.42.2.2")},
		},
		Pings: []demoPing{
			{From: "n1", To: "n2-p1", OK: true, RTTms: 0.2, NAT: true},
			{From: "n2", To: "n1-p1", OK: true, RTTms: 0.3},
			{From: "n1-p1", To: "n2-p1", OK: true, RTTms: 12.345},
			{From: "n2-p1", To: "n1-p1"},
		},
		Transfers: []demoFlow{
			{From: "n1", To: "n2", OK: true, Gbps: 7.777},
			{From: "n2", To: "n1", why: errors.New("reset")},
		},
	}
	if r.good() {
		t.Error("a failed ping is good")
	}
	const want = `
NODE  UNDERLAY    SUBNET        DATAPATH   MTU   PODS
n1    198.18.0.1  10.42.1.0/24  userspace  1450  n1-p1 10.42.1.2
n2    198.18.0.2  10.42.2.0/24  kernel     1450  n2-p1 10.42.2.2

Round-trip times in ms, from each row to each column (pod or node):
         n1  n2   n1-p1  n2-p1
     n1   .   .       .    NAT
     n2   .   .    0.30      .
  n1-p1   .   .       .  12.35
  n2-p1   .   .  FAILED      .

TRANSFER  BYTES      SHA-256  GBIT/S
n1 to n2  100000000  matches  7.78
n2 to n1  100000000  FAILED   -

3 of 4 pairs reached, 1 of them translated (NAT), 1 of 2 transfers intact.
`
	var b strings.Builder
	r.table(&b)
	if b.String() != want {
		t.Errorf("the table is\n%s\nnot\n%s", b.String(), want)
	}
	for i := range 10 {
		r.Pods = append(r.Pods, demoPod{Name: "n1-p" + strconv.Itoa(i+2), Node: "n1"})
	}
	b.Reset()
	r.table(&b)
	if !strings.Contains(b.String(), "\n          n1   n2\n  n1       .  NAT\n  n2  FAILED    .\n") {
		t.Errorf("the table by nodes is\n%s", b.String())
	}
}
