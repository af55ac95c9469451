package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/bench/load"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

func options(t *testing.T, datapaths, workloads string) Options {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Options{
		Underlays: []string{"offload"}, Datapaths: strings.Split(datapaths, ","), Workloads: strings.Split(workloads, ","),
		Nodes: 2, Rounds: 1, Duration: 60 * time.Millisecond, Warmup: 20 * time.Millisecond, Generator: "builtin",
		Self: self, Version: "test",
	}
}

// labsOf returns the labs that a process owns.
func labsOf(t *testing.T, pid int) []string {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(lab.Root, "*", "owner.json"))
	var ids []string
	for _, f := range files {
		var owner struct{ Process struct{ PID int } }
		text, err := os.ReadFile(f)
		if err == nil && json.Unmarshal(text, &owner) == nil && owner.Process.PID == pid {
			ids = append(ids, filepath.Base(filepath.Dir(f)))
		}
	}
	return ids
}

func TestRun(t *testing.T) {
	labtest.NeedTUN(t)
	// A program that is installed but fails must not stop the others.
	bin := t.TempDir()
	script := "#!/bin/sh\ncase $1 in --version) echo broken 1.0;; *) echo 'no luck today' >&2; exit 3;; esac\n"
	if err := os.WriteFile(filepath.Join(bin, "fastd"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":/usr/bin:/bin")

	o := options(t, "native,host-gw,vxlan/kernel,vxlan/userspace,naive,wireguard-go,ipip/userspace,fastd", "tcp1,tcp4,tcp1-reverse,udp64,rr,rr-loaded,crr")
	o.Lossfree = true
	if testing.Short() {
		o.Datapaths = []string{"native", "vxlan/kernel", "vxlan/userspace", "ipip/userspace", "fastd"}
	}
	var last Progress
	o.Progress = func(p Progress) { last = p }
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	wants := map[string][]Metric{
		"tcp1": {Throughput, CPUPerGB}, "tcp4": {Throughput, CPUPerGB}, "tcp1-reverse": {Throughput, CPUPerGB},
		"udp64": {Rate, RateLossfree, CPUPerGB}, "rr": {P50, P90, P99, P999}, "rr-loaded": {P50}, "crr": {Connections},
	}
	for _, d := range o.Datapaths {
		if d == "fastd" {
			continue
		}
		for w, wanted := range wants {
			for _, m := range wanted {
				x, ok := r.Find("offload", d, w, m)
				// The CPU time may be less than one tick.
				if !ok || x.Median <= 0 && m != CPUPerGB && m != RateLossfree {
					t.Errorf("%s %s %s: %+v", d, w, m, x)
				}
			}
		}
	}
	for _, m := range []Metric{RSS, SyscallsPerPacket, DaemonCPUPerGB} {
		if x, ok := r.Find("offload", "vxlan/userspace", "tcp1", m); !ok || m == RSS && x.Median < 1 {
			t.Errorf("the daemon's %s: %+v", m, x)
		}
		if _, ok := r.Find("offload", "vxlan/kernel", "tcp1", m); ok {
			t.Errorf("the kernel has a daemon's %s", m)
		}
	}
	if x, ok := r.Find("offload", "naive", "tcp1", SyscallsPerPacket); !testing.Short() && (!ok || x.Median < 3.5 || x.Median > 4.5) {
		t.Errorf("system calls per packet, two at each end: %+v", x)
	}
	for _, f := range r.Failed {
		switch f.Datapath {
		case "fastd":
			if f.Unavailable || !strings.Contains(f.Reason, "no luck today") && !strings.Contains(f.Reason, "exit status 3") {
				t.Errorf("%+v", f)
			}
		default:
			t.Errorf("%+v", f)
		}
	}
	if len(r.Failed) != 1 || !r.Broken() {
		t.Errorf("failed: %+v", r.Failed)
	}
	if got := r.Machine.Offloads["offload"]; !got["tx-tcp-segmentation"] || !got["rx-gro"] {
		t.Errorf("offloads read back: %v", got)
	}
	if r.Machine.Programs["fastd"] != "broken 1.0" {
		t.Errorf("programs: %v", r.Machine.Programs)
	}
	if last.Total == 0 || last.Done != last.Total-1 { // Progress is called before each measurement
		t.Errorf("the last progress: %+v", last)
	}
	if left := labsOf(t, os.Getpid()); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestResume(t *testing.T) {
	labtest.NeedTUN(t)
	path := filepath.Join(t.TempDir(), "report.json")
	o := options(t, "native,vxlan/kernel", "tcp1,rr")
	o.Rounds = 2
	saves := 0
	ctx, cancel := context.WithCancel(t.Context())
	o.Save = func(r *Report) error {
		if saves++; saves == 3 {
			cancel() // as Ctrl-C does
		}
		return r.Save(path)
	}
	part, err := Run(ctx, o)
	if !errors.Is(err, context.Canceled) || part == nil || len(part.Results) == 0 {
		t.Fatalf("%v, and %+v", err, part)
	}
	if left := labsOf(t, os.Getpid()); len(left) > 0 {
		t.Errorf("left: %v", left)
	}

	prior, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Resume(prior); err != nil {
		t.Fatal(err)
	}
	o.Save = func(r *Report) error { saves++; return r.Save(path) }
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if saves != 2*2*2 {
		t.Errorf("%d measurements for 8", saves)
	}
	for _, x := range r.Results {
		if len(x.Rounds) != 2 {
			t.Errorf("%+v", x)
		}
		if was, ok := part.Find(x.Underlay, x.Datapath, x.Workload, x.Metric); ok && was.Rounds[0] != x.Rounds[0] {
			t.Errorf("%+v was %+v", x, was)
		}
	}

	// Nothing is left to measure, so nothing is started.
	done, err := Load(path)
	if err == nil {
		err = o.Resume(done)
	}
	if err != nil {
		t.Fatal(err)
	}
	o.Self = "/nonexistent"
	if _, err := Run(t.Context(), o); err != nil || saves != 8 {
		t.Errorf("%d measurements: %v", saves, err)
	}
	o.Duration = time.Second
	if err := o.Resume(done); err == nil || !strings.Contains(err.Error(), "duration 60ms, and this run 1s") {
		t.Errorf("another method: %v", err)
	}
}

// TestDaemonExits kills a daemon during a measurement: its datapath fails, and the
// others are measured.
func TestDaemonExits(t *testing.T) {
	labtest.NeedTUN(t)
	o := options(t, "naive,native", "tcp1")
	o.Duration, o.Rounds = 300*time.Millisecond, 2
	killed := false
	o.Progress = func(p Progress) {
		if killed || !strings.Contains(p.Doing, "tcp1 on naive") {
			return
		}
		records, _ := filepath.Glob(filepath.Join(lab.Root, "*", "processes", "n2.json"))
		for _, f := range records {
			id := filepath.Base(filepath.Dir(filepath.Dir(f)))
			var r struct{ Process struct{ PID int } }
			text, err := os.ReadFile(f)
			if err == nil && json.Unmarshal(text, &r) == nil && slices.Contains(labsOf(t, os.Getpid()), id) {
				killed = true
				time.AfterFunc(100*time.Millisecond, func() { _ = exec.Command("kill", "-9", fmt.Sprint(r.Process.PID)).Run() })
			}
		}
	}
	r, err := Run(t.Context(), o)
	if err != nil || !killed {
		t.Fatalf("killed %t: %v", killed, err)
	}
	if f, ok := r.Failure("offload", "naive", "tcp1"); !ok || !strings.Contains(f.Reason, "a daemon ended (signal: killed)") {
		t.Errorf("%+v", r.Failed)
	}
	if x, ok := r.Find("offload", "native", "tcp1", Throughput); !ok || len(x.Rounds) != 2 {
		t.Errorf("the other datapath: %+v", x)
	}
}

// TestKilled kills the whole program: its processes end with it, and the next run
// removes the lab that it left.
func TestKilled(t *testing.T) {
	labtest.Long(t)
	labtest.NeedTUN(t)
	for _, signal := range []os.Signal{os.Kill, os.Interrupt} {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		victim := exec.Command(self, "bench", "victim")
		out, err := victim.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := victim.Start(); err != nil {
			t.Fatal(err)
		}
		line := make([]byte, 64)
		if n, err := out.Read(line); err != nil || !bytes.HasPrefix(line[:n], []byte("measuring")) {
			t.Fatalf("%q: %v", line[:n], err)
		}
		ids := labsOf(t, victim.Process.Pid)
		if len(ids) != 2 {
			t.Fatalf("its labs are %v", ids)
		}
		if err := victim.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		_ = victim.Wait()
		if signal == os.Kill {
			if _, err := lab.Sweep(); err != nil {
				t.Error(err)
			}
		}
		if left := labsOf(t, victim.Process.Pid); len(left) > 0 {
			t.Errorf("%v: labs are left: %v", signal, left)
		}
		for _, id := range ids {
			if left, _ := filepath.Glob("/run/netns/" + id + "*"); len(left) > 0 {
				t.Errorf("%v: namespaces are left: %v", signal, left)
			}
			lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
			for _, f := range lines {
				if text, err := os.ReadFile(f); err == nil && bytes.Contains(text, []byte(id)) {
					t.Errorf("%v: still runs: %q", signal, text)
				}
			}
		}
	}
}

// TestExistingUnderlay measures between two hosts, which here are two nodes of a lab;
// server and client are processes in them:
//
//	n1 client ── eth0 ── eth0 ── n2 server
func TestExistingUnderlay(t *testing.T) {
	labtest.Long(t)
	labtest.NeedTUN(t)
	l := labtest.New(t, lab.Options{Nodes: 2, Underlay: lab.Direct})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	at := fmt.Sprintf("%s:%d", l.Nodes[1].Addrs[0], DefaultPort)
	server, err := l.Nodes[1].Start(lab.Command{Name: "server", Path: self, Args: []string{"bench", "server", at}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := server.WaitLine(t.Context(), "ready "); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the server serves a second client after the first
		text, err := l.Nodes[0].Run(t.Context(), self, "bench", "client", at, "native", "vxlan/kernel", "vxlan/userspace", "ipip/userspace", "ipip/kernel")
		if err != nil {
			t.Fatal(err)
		}
		var r Report
		if err := json.Unmarshal(text, &r); err != nil {
			t.Fatal(err)
		}
		for _, d := range []string{"native", "vxlan/kernel", "vxlan/userspace"} {
			for w, m := range map[string]Metric{"tcp1": Throughput, "udp64": Rate, "rr": P50} {
				if x, ok := r.Find(Existing, d, w, m); !ok || x.Median <= 0 {
					t.Errorf("%s %s: %+v", d, w, x)
				}
			}
		}
		for _, f := range r.Failed { // the kernel may lack ipip/kernel; ipip/userspace needs culvert0, which is taken
			if f.Datapath != "ipip/kernel" && f.Datapath != "ipip/userspace" || !f.Unavailable {
				t.Errorf("%+v", f)
			}
		}
		if x, ok := r.Find(Existing, "vxlan/userspace", "udp64", SyscallsPerPacket); !ok || x.Median <= 0 {
			t.Errorf("both daemons' system calls: %+v", x)
		}
		if len(r.Machine.Offloads[Existing]) == 0 {
			t.Error("the link's features were not read")
		}
	}
	for _, n := range l.Nodes {
		deadline := time.Now().Add(5 * time.Second)
		for {
			var links []string
			err := n.Do(func() error {
				entries, err := os.ReadDir("/proc/thread-self/net/dev_snmp6")
				for _, e := range entries {
					links = append(links, e.Name())
				}
				return err
			})
			if err != nil {
				t.Skipf("the links of a node cannot be listed: %v", err)
			}
			left := slices.DeleteFunc(links, func(name string) bool { return !strings.HasPrefix(name, "cv") && !strings.HasPrefix(name, "culvert") })
			if len(left) == 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s still has %v", n.Name, left)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	if _, err := Connect(t.Context(), "198.18.0.300", ""); err == nil || !strings.Contains(err.Error(), "is not an IP address") {
		t.Errorf("a wrong address: %v", err)
	}
	if _, err := Connect(t.Context(), "127.0.0.1:1", ""); err == nil || !strings.Contains(err.Error(), "--underlay existing --server") {
		t.Errorf("without a server: %v", err)
	}
}

func TestScale(t *testing.T) {
	if testing.Short() {
		t.Skip("starts etcd and daemons")
	}
	labtest.NeedTUN(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r, err := Scale(t.Context(), ScaleOptions{
		Peers: []int{1, 300}, Rounds: 1, Duration: 100 * time.Millisecond, Leases: 2, Self: self, Bin: labtest.Bin(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range r.Scale {
		if s.Throughput.Median <= 0 || s.Rate.Median <= 0 || s.ReadyMS <= 0 || s.DaemonRSS <= 1 || s.EtcdRSS <= 1 ||
			len(s.FirstPacket.Rounds) != 2 || s.FirstPacket.Min <= 0 || s.FirstPacket.Max > 5000 {
			t.Errorf("%+v", s)
		}
	}
}

func TestOptionsCheck(t *testing.T) {
	good := Options{
		Underlays: []string{"offload"}, Datapaths: []string{"native"}, Workloads: []string{"rr"},
		Nodes: 2, Rounds: 1, Duration: time.Second, Generator: "builtin",
	}
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Options){
		`there is no underlay "wifi": offload, cloud, plain, bare, existing`:       func(o *Options) { o.Underlays = []string{"wifi"} },
		`there is no datapath "vxlan": native, native/iperf3, host-gw, vxlan/auto`: func(o *Options) { o.Datapaths = []string{"vxlan"} },
		`there is no workload "tcp": tcp1, tcp4`:                                   func(o *Options) { o.Workloads = []string{"tcp"} },
		"no workload is chosen: tcp1":                                              func(o *Options) { o.Workloads = nil },
		"1 nodes: 2 to 250":                                                        func(o *Options) { o.Nodes = 1 },
		"251 nodes: 2 to 250":                                                      func(o *Options) { o.Nodes = 251 },
		"joins two hosts":                                                          func(o *Options) { o.Underlays, o.Remote, o.Nodes = []string{Existing}, &Remote{}, 3 },
		"0 rounds: at least 1":                                                     func(o *Options) { o.Rounds = 0 },
		`there are no ends "vms": nodes, pods`:                                     func(o *Options) { o.Ends = "vms" },
		"--ends pods is for labs":                                                  func(o *Options) { o.Underlays, o.Remote, o.Ends = []string{Existing}, &Remote{}, Pods },
		`there is no datapath "native#1"`:                                          func(o *Options) { o.Datapaths = []string{"native#1"} },
		"at least 50ms":                                                            func(o *Options) { o.Duration = time.Microsecond },
		"a warm-up of -1s":                                                         func(o *Options) { o.Warmup = -time.Second },
		`there is no generator "netperf": builtin, iperf3`:                         func(o *Options) { o.Generator = "netperf" },
		"needs --server on one host":                                               func(o *Options) { o.Underlays = []string{Existing} },
		"cannot be combined":                                                       func(o *Options) { o.Underlays = []string{Existing, "bare"} },
		"--underlay existing":                                                      func(o *Options) { o.Remote = &Remote{} },
	} {
		o := good
		change(&o)
		if err := o.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// TestPrograms parses every description and expands its templates.
func TestPrograms(t *testing.T) {
	node := programNode{Self: programEnd{Number: 1, Dir: "/a"}, Peer: programEnd{Number: 2, Dir: "/b"}, Link: "eth0", Port: 1, Etcd: "http://etcd"}
	names := map[string]bool{}
	for _, p := range programs() {
		names[p.Name] = true
		node.Device = p.Device
		texts := append(slices.Concat(p.Setup, p.After), p.Start, p.Address)
		for name, text := range p.Files {
			texts = append(texts, name, text)
		}
		for _, text := range texts {
			if _, err := expand(text, node); err != nil {
				t.Errorf("%s: %v", p.Name, err)
			}
		}
		if p.Program == "" || p.About == "" || p.Version == "" || p.Start == "" || p.Device == "" && p.Address == "" || len(p.Device) > 15 {
			t.Errorf("%s lacks a field: %+v", p.Name, p)
		}
	}
	for _, want := range []string{"nebula", "tinc", "fastd", "openvpn", "quicktun", "openvswitch", "flannel", "flannel-vxlan"} {
		if !names[want] {
			t.Errorf("no description of %s", want)
		}
	}
	t.Setenv("PATH", t.TempDir())
	for _, p := range programs() {
		if ok, why := p.available(); ok || !strings.HasSuffix(why, "is not on PATH") {
			t.Errorf("%s: %t %s", p.Name, ok, why)
		}
	}
}

func TestParseIPerf3(t *testing.T) {
	tcp := Workload{Streams: 1}
	for text, want := range map[string]string{
		"nonsense":                      "printed no JSON",
		`{"error":"unable to connect"}`: "unable to connect",
		`{"end":{}}`:                    "no end.sum_received",
		`{"end":{"sum_received":{"seconds":1},"sender_tcp_congestion":"bbr"}}`: "congestion control bbr",
	} {
		if _, err := parseIPerf3([]byte(text), tcp); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if _, err := parseIPerf3([]byte(`{"end":{}}`), Workload{Payload: 64}); err == nil {
		t.Error("parsed a report of datagrams without sum_received")
	}
}

func TestParseCPU(t *testing.T) {
	got, err := parseCPU([]byte("cpu  100 200 300 4000 50 6 7 8 90 10\ncpu0 1 2 3\n"))
	if want := (CPUTime{Busy: 6.13, Steal: 0.08, Idle: 40.5}); err != nil || got != want {
		t.Errorf("%+v: %v", got, err)
	}
	for _, bad := range []string{"", "intr 5", "cpu 1 2 3", "cpu a b c d e f g h"} {
		if _, err := parseCPU([]byte(bad)); err == nil {
			t.Errorf("parseCPU accepted %q", bad)
		}
	}
	if c, err := processCPU(os.Getpid()); err != nil || c < 0 {
		t.Errorf("%v: %v", c, err)
	}
	if rss, err := processRSS(os.Getpid()); err != nil || rss < 1e6 {
		t.Errorf("%v: %v", rss, err)
	}
	if _, err := processRSS(1 << 30); err == nil {
		t.Error("processRSS of a nonexistent process succeeded")
	}
}

// TestFanIn has two nodes send to the first at once:
//
//	n2 ──┐
//	     bridge ── n1
//	n3 ──┘
func TestFanIn(t *testing.T) {
	labtest.Long(t)
	labtest.NeedTUN(t)
	o := options(t, "native,host-gw,vxlan/kernel,vxlan/userspace,naive,wireguard-go,ipip/userspace,fastd", "tcp1,tcp1-reverse,udp64,rr,crr")
	o.Nodes, o.Lossfree, o.Underlays = 3, true, []string{"cloud"}
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range o.Datapaths {
		if d == "fastd" {
			if f, ok := r.Failure("cloud", d, "rr"); !ok || !f.Unavailable || f.Reason != "connects only two nodes" {
				t.Errorf("%+v", f)
			}
			continue
		}
		for w, m := range map[string]Metric{"tcp1": Throughput, "tcp1-reverse": Throughput, "udp64": Rate, "rr": P50, "crr": Connections} {
			if x, ok := r.Find("cloud", d, w, m); !ok || x.Median <= 0 {
				t.Errorf("%s %s: %+v", d, w, x)
			}
		}
	}
	if len(r.Failed) != 1 || r.Broken() {
		t.Errorf("failed: %+v", r.Failed)
	}
	if at := r.Machine.Bridge["cloud"]; r.Machine.Nodes != 3 || at["rx-gro"] || at["tx-udp_tnl-segmentation"] || !at["tx-tcp-segmentation"] {
		t.Errorf("%d nodes, at the bridge %v", r.Machine.Nodes, at)
	}

	s, err := startLab(t.Context(), Datapath{Name: "vxlan/userspace"}, siteOptions{nodes: 3, profile: lab.Cloud, self: o.Self})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.close() }()
	defer load.Quiet(mostStreams * 2)()
	for _, w := range []Workload{{Streams: 1}, {Payload: 64}, {Requests: true}, {Connections: true}} {
		before := []uint64{linkCounters(t, s.labs.Nodes[1]).TxPackets, linkCounters(t, s.labs.Nodes[2]).TxPackets}
		if _, err := (builtin{}).measure(t.Context(), s, w, method{duration: o.Duration}); err != nil {
			t.Fatal(err)
		}
		for i, was := range before {
			if n := linkCounters(t, s.labs.Nodes[i+1]).TxPackets - was; n < 20 {
				t.Errorf("%+v: node %d sent %d packets", w, i+2, n)
			}
		}
	}
}
