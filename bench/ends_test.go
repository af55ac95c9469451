package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"culvert/bench/load"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// TestPodsAsEnds measures every datapath between pods:
//
//	n1-pod ── cni0 ── n1 ══ the datapath ══ n2 ── cni0 ── n2-pod
func TestPodsAsEnds(t *testing.T) {
	labtest.Long(t)
	labtest.NeedTUN(t)
	bin := labtest.Bin(t)
	o := options(t, "native,host-gw,vxlan/auto,vxlan/kernel,vxlan/kernel+fast,vxlan/userspace,ipip/userspace,naive,wireguard-go", "tcp1,udp64,rr,crr")
	o.Duration = 300 * time.Millisecond // more than TCP waits before it sends a lost segment again
	for _, name := range o.Datapaths {
		d, ok := FindDatapath(name)
		if !ok {
			t.Fatal(name)
		}
		s, err := startLab(t.Context(), d, siteOptions{nodes: 2, profile: lab.Cloud, ends: Pods, self: o.Self, bin: bin})
		if d.fast != "" && errors.Is(err, ErrUnavailable) && !lab.Privileged() {
			continue // loading BPF programs needs real root
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !s.subnets[0].Contains(s.to) || s.to == s.subnets[0].Addr() {
			t.Errorf("%s: the traffic goes to %s, which is not a pod in the first of %s", name, s.to, s.subnets)
		}
		var before []netlink.LinkStatistics
		for _, n := range s.labs.Nodes {
			before = append(before, podCounters(t, n))
		}
		for _, w := range []Workload{{Streams: 1}, {Payload: 64}, {Requests: true}, {Connections: true}} {
			f, err := (builtin{}).measure(t.Context(), s, w, method{duration: o.Duration})
			if err != nil {
				t.Errorf("%s %+v: %v", name, w, err)
			}
			// The fast path's share is between 0 and 1, and is missing if the fast path
			// is off.
			if share, ok := f[FastShare]; w.Plain() && (ok != (d.fast != "") && !d.auto || ok && (share <= 0 || share > 1)) {
				t.Errorf("%s %+v: %v of the bytes took the fast path (%t)", name, w, share, ok)
			}
		}
		for i, n := range s.labs.Nodes {
			forwards, err := n.Sysctl("net/ipv4/ip_forward")
			if err != nil || forwards != "1" {
				t.Errorf("%s: %s forwards: %q: %v", name, n.ID, forwards, err)
			}
			if n := podCounters(t, n).RxPackets - before[i].RxPackets; n < 100 {
				t.Errorf("%s: only %d packets passed the bridge of node %d", name, n, i+1)
			}
			mtu := 0
			err = s.ends[i].Do(func() error {
				link, err := netlink.LinkByName("eth0")
				if err == nil {
					mtu = link.Attrs().MTU
				}
				return err
			})
			want := map[string]int{"native": 1500, "host-gw": 1500, "vxlan/auto": 1450, "vxlan/kernel": 1450, "vxlan/kernel+fast": 1450, "vxlan/userspace": 1450, "ipip/userspace": 1480, "naive": 1450, "wireguard-go": 1420}[name]
			if err != nil || mtu != want {
				t.Errorf("%s: the pod's MTU is %d, want %d: %v", name, mtu, want, err)
			}
		}
		if daemons := len(s.daemons); d.culvert && daemons != 2 || d.none && daemons != 0 {
			t.Errorf("%s has %d daemons", name, daemons)
		}
		// Kernel datapaths have no cost in daemons.
		if c, err := costHere(t.Context(), s.daemons); err != nil || (c.RSS > 0) == (d.kernel || d.auto || d.none) {
			t.Errorf("%s: %+v: %v", name, c, err)
		}
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}
}

// podCounters returns the counters of a node's bridge.
func podCounters(t *testing.T, n *lab.Node) (counters netlink.LinkStatistics) {
	t.Helper()
	if err := n.Do(func() error {
		link, err := netlink.LinkByName("cni0")
		if err == nil {
			counters = *link.Attrs().Statistics
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return counters
}

// TestRunWithPods calls Run with two instances of one datapath and the workloads that
// have more than one flow.
func TestRunWithPods(t *testing.T) {
	labtest.Long(t)
	labtest.NeedTUN(t)
	path := filepath.Join(t.TempDir(), "report.json")
	o := options(t, "vxlan/kernel#2,vxlan/kernel", "rr-loaded,rr-loaded-reverse,fair8,tcp1-flooded")
	o.Ends, o.Bin, o.Rounds, o.Nodes = Pods, labtest.Bin(t), 2, 3
	o.Save = func(r *Report) error { return r.Save(path) }
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"vxlan/kernel", "vxlan/kernel#2"} {
		for w, wanted := range map[string][]Metric{
			"rr-loaded": {P50, P999, Throughput}, "rr-loaded-reverse": {P50, P999, Throughput},
			"fair8": {Throughput, Jain, LeastShare, MostShare}, "tcp1-flooded": {Throughput, Rate},
		} {
			for _, m := range wanted {
				// In so short a time one stream, or all during a flood, may get nothing.
				may := m == LeastShare || w == "tcp1-flooded"
				if x, ok := r.Find("offload", d, w, m); !ok || len(x.Rounds) != 2 || x.Max <= 0 && !may {
					t.Errorf("%s %s %s: %+v", d, w, m, x)
				}
			}
		}
		if x, _ := r.Find("offload", d, "fair8", Jain); x.Min < 1./16 || x.Max > 1.0001 {
			t.Errorf("Jain's index of 16 streams: %+v", x)
		}
	}
	if len(r.Failed) > 0 || r.Machine.Ends != Pods {
		t.Errorf("ends %q, failed: %+v", r.Machine.Ends, r.Failed)
	}

	// Resume works only with the same ends. With nothing to measure it starts nothing.
	prior, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Resume(prior); err != nil {
		t.Fatal(err)
	}
	o.Self, o.Bin = "/nonexistent", "/nonexistent"
	if _, err := Run(t.Context(), o); err != nil {
		t.Error(err)
	}
	o.Ends = Nodes
	if err := o.Resume(prior); err == nil || !strings.Contains(err.Error(), "has ends pods, and this run nodes") {
		t.Errorf("other ends: %v", err)
	}
}

// TestFastPathNeedsTheFlag checks programs with and without the flag.
func TestFastPathNeedsTheFlag(t *testing.T) {
	dir := t.TempDir()
	program := func(name, help string, code int) string {
		path := filepath.Join(dir, name)
		script := fmt.Sprintf("#!/bin/sh\ncat <<E\n%s\nE\nexit %d\n", help, code)
		if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for path, want := range map[string]bool{
		program("old", "--datapath string   who carries", 0):                       false,
		program("new", "--datapath string\n      --fast-path string   auto or", 0): true,
	} {
		for range 2 {
			if got, err := hasFastPath(t.Context(), path); err != nil || got != want {
				t.Errorf("%s: %t, %v", path, got, err)
			}
		}
	}
	if _, err := hasFastPath(t.Context(), program("broken", "", 1)); err == nil {
		t.Error("hasFastPath of a program that fails succeeded")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := hasFastPath(ctx, program("late", fastFlag, 0)); err == nil {
		t.Error("hasFastPath succeeded after ctx ended")
	}
}

func TestDaemonArgs(t *testing.T) {
	for _, c := range []struct {
		name string
		flag bool
		want string // empty: unavailable
	}{
		{"vxlan/kernel", false, "--datapath kernel"},
		{"vxlan/kernel", true, "--datapath kernel --fast-path=off"},
		{"vxlan/kernel#3", true, "--datapath kernel --fast-path=off"},
		{"vxlan/kernel+fast", true, "--datapath kernel --fast-path=auto"},
		{"vxlan/kernel+fast#2", true, "--datapath kernel --fast-path=auto"},
		{"vxlan/kernel+on", true, "--datapath kernel --fast-path=on"},
		{"vxlan/kernel+pod", true, "--datapath kernel --fast-path=pod"},
		{"vxlan/userspace+fast", true, "--datapath userspace --fast-path=on"},
		{"vxlan/kernel+fast", false, ""},
		{"vxlan/userspace+fast", true, "--datapath userspace --fast-path=on"},
		{"vxlan/userspace+priority", true, "--datapath userspace --fast-path=off --priority"},
		{"ipip/userspace", false, "--datapath userspace"},
		{"host-gw", false, "--datapath auto"},
		{"vxlan/auto", true, "--datapath auto --fast-path=auto"},
		{"vxlan/auto", false, "--datapath auto"},
	} {
		d, ok := FindDatapath(c.name)
		if !ok {
			t.Errorf("FindDatapath does not find %s", c.name)
			continue
		}
		args, err := d.daemonArgs(c.flag)
		if got := strings.Join(args, " "); got != c.want || (err != nil) != (c.want == "") || err != nil && !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %q, %v", c.name, got, err)
		}
	}
}

func TestFindDatapath(t *testing.T) {
	for _, bad := range []string{"", "vxlan", "vxlan/kernel#", "vxlan/kernel#1", "vxlan/kernel#two", "#2", "vxlan/kernel#2#3"} {
		if d, ok := FindDatapath(bad); ok {
			t.Errorf("%q is %+v", bad, d)
		}
	}
	for _, c := range [][2]string{{"native", "host-gw"}, {"vxlan/kernel", "vxlan/kernel#2"}, {"vxlan/kernel#9", "vxlan/kernel#10"}, {"vxlan/kernel#2", "vxlan/kernel+fast"}} {
		if CompareDatapaths(c[0], c[1]) >= 0 || CompareDatapaths(c[1], c[0]) <= 0 || CompareDatapaths(c[0], c[0]) != 0 {
			t.Errorf("%s is not sorted before %s", c[0], c[1])
		}
	}
}

// TestBalanced checks that over n rounds, or 2n if n is odd, each datapath is in each
// position and directly after each other one equally often.
func TestBalanced(t *testing.T) {
	for n := 1; n <= 9; n++ {
		rounds := n
		if n%2 == 1 {
			rounds = 2 * n
		}
		place, after := map[[2]int]int{}, map[[2]int]int{}
		for round := range rounds {
			order := balanced(n, round)
			seen := map[int]bool{}
			for i, d := range order {
				seen[d] = true
				place[[2]int{i, d}]++
				if i > 0 {
					after[[2]int{order[i-1], d}]++
				}
			}
			if len(seen) != n || len(order) != n {
				t.Errorf("round %d of %d: %v", round, n, order)
			}
		}
		for _, c := range []struct {
			times map[[2]int]int
			pairs int
		}{{place, n * n}, {after, n * (n - 1)}} {
			if len(c.times) != c.pairs {
				t.Errorf("%d datapaths: %d of %d pairs: %v", n, len(c.times), c.pairs, c.times)
			}
			for pair, times := range c.times {
				if times != rounds/n {
					t.Errorf("%d datapaths: %v occurs %d times", n, pair, times)
				}
			}
		}
	}
}

func TestFairness(t *testing.T) {
	for _, c := range []struct {
		name             string
		before, after    []uint64
		n                int
		jain, least, mst float64
	}{
		{"all equal", []uint64{5, 6, 7, 8}, []uint64{15, 16, 17, 18}, 4, 1, 1, 1},
		{"one has everything", []uint64{0, 0, 0, 0}, []uint64{9, 0, 0, 0}, 4, 0.25, 0, 4},
		{"two to one", []uint64{0, 0}, []uint64{2, 1}, 2, 0.9, 2. / 3, 4. / 3},
		{"a stream that was accepted late", []uint64{4}, []uint64{6, 2}, 2, 1, 1, 1},
		{"a stream that was never accepted", []uint64{0}, []uint64{8}, 2, 0.5, 0, 2},
	} {
		f := fairness(load.Reading{Streams: c.before}, load.Reading{Streams: c.after}, c.n)
		for m, want := range map[Metric]float64{Jain: c.jain, LeastShare: c.least, MostShare: c.mst} {
			if got, ok := f[m]; !ok || got < want-1e-9 || got > want+1e-9 {
				t.Errorf("%s: %s is %v, want %v", c.name, m, got, want)
			}
		}
	}
	if f := fairness(load.Reading{}, load.Reading{Streams: []uint64{0, 0}}, 2); len(f) != 0 {
		t.Errorf("fairness of streams without bytes: %v", f)
	}
}

// TestSubnetEnv checks that subnet.env has what flannel writes.
func TestSubnetEnv(t *testing.T) {
	labtest.NeedTUN(t)
	l := labtest.New(t, lab.Options{Nodes: 2, Underlay: lab.Direct, MTU: 1400})
	s := &site{subnets: []netip.Prefix{innerSubnet(0), innerSubnet(1)}}
	if err := s.routeSubnets(l); err != nil {
		t.Fatal(err)
	}
	if err := s.writeSubnetEnv(l.Nodes[0], 0); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(l.Nodes[0].SubnetFile())
	if want := "FLANNEL_NETWORK=10.213.0.0/16\nFLANNEL_SUBNET=10.213.1.1/24\nFLANNEL_MTU=1400\nFLANNEL_IPMASQ=true\n"; err != nil || string(text) != want {
		t.Errorf("%s: %v", text, err)
	}
}
