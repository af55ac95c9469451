package test

import (
	"os"
	"syscall"
	"testing"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/lab"
)

const ipipConfig = `{"Network":"10.5.0.0/16","Backend":{"Type":"ipip"}}`

// TestFastPathIPIP is TestFastPathOracle with IPIP: the fast path is on at both ends and at
// either, before the userspace datapath and, in the virtual machine, before the kernel's ipip
// device. What pods exchange goes on after a kill, and other flags leave no filter.
func TestFastPathIPIP(t *testing.T) {
	t.Parallel()
	c := newClusterOf(t, lab.Options{Nodes: 2, Underlay: lab.Direct, InOrder: true})
	c.setConfig(ipipConfig)
	n := c.Nodes[0]
	flags := map[string][]string{
		"loop": {"--datapath", "userspace"}, "fast loop": {"--datapath", "userspace", "--fast-path", "on"},
		"kernel": {"--datapath", "kernel"}, "fast": {"--datapath", "kernel", "--fast-path", "on"},
	}
	pairs := [][2]string{{"loop", "fast loop"}, {"fast loop", "loop"}, {"fast loop", "fast loop"}}
	if err := n.Do(func() error { return host.Supports("ipip") }); err == nil {
		pairs = append(pairs, [][2]string{{"fast", "fast loop"}, {"kernel", "fast"}, {"fast", "kernel"}, {"fast", "fast"}}...)
	}
	var daemons [2]*lab.Process
	now := [2]string{}
	begin := func(pair [2]string) {
		t.Helper()
		for i, kind := range pair {
			if kind == now[i] {
				continue
			}
			if daemons[i] != nil {
				stop(t, daemons[i])
			}
			daemons[i] = c.start(c.Nodes[i], append([]string{"--iface", c.Nodes[i].Link}, flags[kind]...)...)
			c.wait(c.Nodes[i], "is ready", func(s api.Status) bool { return s.Ready && (s.Datapath.FastPath != nil) == (len(flags[kind]) > 2) })
		}
		now = pair
		c.waitReady(c.Nodes[0], 1)
		c.waitReady(c.Nodes[1], 1)
	}
	profiles := []lab.Profile{lab.Offload, lab.Cloud, lab.Bare}
	if testing.Short() {
		profiles = []lab.Profile{lab.Offload, lab.Bare}
	}
	if os.Getenv("CULVERT_VM") != "" { // a packet socket of Linux 6.1 loses uncut datagrams (IngressUncut)
		profiles = []lab.Profile{lab.Cloud, lab.Bare}
	}
	begin(pairs[0])
	pods := c.pods()
	ends := []place{{pods[0].Namespace, pods[0].Addrs}, {pods[1].Namespace, pods[1].Addrs}}
	for _, pair := range pairs {
		begin(pair)
		for _, profile := range profiles {
			t.Run(pair[0]+", "+pair[1]+" "+string(profile), func(t *testing.T) {
				if _, err := c.SetProfile(profile); err != nil {
					t.Fatal(err)
				}
				var before [2]api.FastPath
				for i, kind := range pair {
					if len(flags[kind]) > 2 {
						before[i] = c.fastPath(c.Nodes[i])
					}
				}
				exchange(t, ends[0], ends[1], 3<<20)
				for i, kind := range pair {
					if len(flags[kind]) == 2 {
						continue
					}
					after := c.fastPath(c.Nodes[i])
					t.Logf("%s: %d packets sent and %d received, %d coalesced, left: %v", c.Nodes[i].ID, after.Egress.Packets-before[i].Egress.Packets,
						after.Ingress.Packets-before[i].Ingress.Packets, after.Joined-before[i].Joined, after.Slow)
					if after.Egress.Packets == before[i].Egress.Packets || after.Ingress.Packets == before[i].Ingress.Packets {
						t.Errorf("%s: no packet took the fast path", c.Nodes[i].ID)
					}
				}
			})
		}
	}
	for _, node := range c.Nodes {
		if s, err := c.status(node); err != nil || len(dropped(s)) != 0 {
			t.Errorf("%s dropped %v (%v)", node.ID, s.Datapath.Drops, err)
		}
	}

	flow := startFlow(t, pods[0], pods[1])
	c.goesOn(flow)
	there := startPings(t, pods[0], pods[1])
	if err := daemons[0].Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-daemons[0].Exited()
	c.goesOn(flow)
	if left := filters(t, n); len(left) != 3 {
		t.Errorf("while the daemon is not running the filters are %v, want 3", left)
	}
	daemons[0], now[0] = nil, ""
	begin(pairs[len(pairs)-1])
	c.goesOn(flow)
	if sent, lost := there.stop(); lost != 0 {
		t.Errorf("of %d pings %d were lost while the daemon was not running", sent, lost)
	}
	begin([2]string{"loop", now[1]})
	c.goesOn(flow)
	if left := filters(t, n); len(left) != 0 {
		t.Errorf("without the fast path the filters %v are left", left)
	}
	begin(pairs[len(pairs)-1])
	c.goesOn(flow)
	if turns, longest, err := flow.stop(); err != nil {
		t.Errorf("the connection broke after %d round trips, the longest of %s: %v", turns, longest, err)
	}
	stop(t, daemons[0])
	c.cleanup(n)
	if left := filters(t, n); len(left) != 0 {
		t.Errorf("after cleanup the filters %v are left", left)
	}
}
