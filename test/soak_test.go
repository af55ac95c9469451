package test

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"culvert/internal/api"
	"culvert/internal/lab"
)

// TestSoak runs pings, flows and bulk transfers while nodes and pods come and go, for the
// duration CULVERT_SOAK: after the first quarter resident memory, threads, descriptors and
// kernel objects do not grow, and no packet is dropped unexpectedly. Half of the nodes have
// the userspace datapath, half the kernel's.
func TestSoak(t *testing.T) {
	text := os.Getenv("CULVERT_SOAK")
	if text == "" {
		t.Skip("for make soak: it takes as long as it is told")
	}
	long, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	c := newClusterOf(t, lab.Options{Nodes: 2, InOrder: true})
	c.setConfig(config)
	var daemons []*lab.Process
	for i, n := range c.Nodes {
		daemons = append(daemons, c.start(n, "--datapath", datapaths[i], "--lease-ttl", "30s"))
	}
	var pods []*lab.Pod
	for _, n := range c.Nodes {
		c.waitReady(n, 1)
		p, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, p)
	}
	ping(t, pods[0], pods[1])
	stream := startPings(t, pods[0], pods[1])
	flows := []*flow{startFlow(t, pods[0], pods[1]), startFlow(t, pods[1], pods[0])}
	a, b := pods[0].Addrs[0], pods[1].Addrs[0]

	type sample struct {
		at      time.Duration
		usage   usage
		objects int
	}
	samples := make([][]sample, len(c.Nodes))
	began := time.Now()
	var moved int64
	for round := 0; time.Since(began) < long; round++ {
		transfer(t, pods[0].Namespace, pods[1].Namespace, a, b, 10<<20)
		transfer(t, pods[1].Namespace, pods[0].Namespace, b, a, 10<<20)
		datagrams(t, pods[0].Namespace, pods[1].Namespace, a, b)
		moved += 20 << 20
		key := fmt.Sprintf("/coreos.com/network/subnets/10.5.%d.0-24", 240+round%8)
		c.put(key, fmt.Sprintf(`{"PublicIP":"192.0.2.%d","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:01:%02x"},"NodeID":"soak-%d"}`, 1+round%8, round%8, round%8))
		for _, n := range c.Nodes {
			c.waitReady(n, 2)
		}
		if _, err := c.client().Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		for _, n := range c.Nodes {
			c.waitReady(n, 1)
		}
		extra, err := c.Nodes[round%2].AddPod(t.Context(), fmt.Sprintf("extra%d", round))
		if err != nil {
			t.Fatal(err)
		}
		if err := extra.Delete(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i, n := range c.Nodes {
			samples[i] = append(samples[i], sample{time.Since(began), usageOf(t, daemons[i].PID), kernelObjects(t, n)})
		}
	}
	for i, n := range c.Nodes {
		all := samples[i]
		if len(all) < 8 {
			t.Fatalf("only %d rounds", len(all))
		}
		early, late := all[len(all)/4], all[len(all)-1]
		t.Logf("%s %s, %d rounds: after %v %+v, %d kernel objects; after %v %+v, %d", n.ID, datapaths[i], len(all),
			early.at.Round(time.Second), early.usage, early.objects, late.at.Round(time.Second), late.usage, late.objects)
		if late.usage.descriptors > early.usage.descriptors+3 || late.usage.threads > early.usage.threads+4 || late.objects > early.objects {
			t.Errorf("the usage of %s grows", n.ID)
		}
		if most := early.usage.resident + early.usage.resident/10 + 4<<20; late.usage.resident > most {
			t.Errorf("%s: %d bytes resident, and %d before", n.ID, late.usage.resident, early.usage.resident)
		}
		s := c.wait(n, "has a status", func(api.Status) bool { return true })
		// What was still on its way to a peer that has left has none.
		d := slices.DeleteFunc(dropped(s), func(d api.Drop) bool { return d.Reason == "egress-no-peer" })
		if len(d) > 0 {
			t.Errorf("%s dropped %v", n.ID, d)
		}
	}
	sent, lost := stream.stop()
	t.Logf("%d MB moved, %d pings, %d lost", moved>>20, sent, lost)
	if lost > 0 {
		t.Errorf("%d of %d pings lost", lost, sent)
	}
	for i, f := range flows {
		if turns, longest, err := f.stop(); err != nil {
			t.Errorf("flow %d broke after %d round trips, the longest of %v: %v", i, turns, longest, err)
		}
	}
}

// kernelObjects counts a node's routes, neighbours and links.
func kernelObjects(t *testing.T, n *lab.Node) (sum int) {
	t.Helper()
	if err := n.Do(func() error {
		routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		permanent := 0
		neighbours, err := netlink.NeighList(0, netlink.FAMILY_ALL)
		for _, x := range neighbours {
			if x.State&netlink.NUD_PERMANENT != 0 {
				if a, ok := netip.AddrFromSlice(x.IP); ok && !a.IsMulticast() {
					permanent++
				}
			}
		}
		sum = len(routes) + len(links) + permanent
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return sum
}
