package test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
)

// TestSoak runs pings, flows and bulk transfers while nodes and pods come and go, for the
// duration CULVERT_SOAK: after the first quarter the heap, resident memory, goroutines,
// threads, descriptors and kernel objects do not grow, and no packet is dropped. Half of the nodes
// have the userspace datapath, half the kernel's. CULVERT_SOAK_REST is a rest between
// rounds, with a tenth of the pings: 10s leaves a run beside other work at a few percent
// of a core.
func TestSoak(t *testing.T) {
	long, rest := duration(t, "CULVERT_SOAK"), duration(t, "CULVERT_SOAK_REST")
	if long == 0 {
		t.Skip("for make soak: it takes as long as it is told")
	}
	every := pingEvery
	if rest > 0 {
		every *= 10
	}
	c := newClusterOf(t, lab.Options{Nodes: 2, InOrder: true})
	c.setConfig(config)
	var daemons []*lab.Process
	for i, n := range c.Nodes {
		daemons = append(daemons, c.start(n, "--datapath", datapaths[i], "--lease-ttl", "30s"))
	}
	for _, n := range c.Nodes {
		c.waitReady(n, 1)
	}
	pods := c.pods()
	ping(t, pods[0], pods[1])
	stream := startPingsEvery(t, pods[0], pods[1], every)
	flows := []*flow{startFlowEvery(t, pods[0], pods[1], every, time.Minute), startFlowEvery(t, pods[1], pods[0], every, time.Minute)}
	a, b := pods[0].Addrs[0], pods[1].Addrs[0]
	client := c.client()

	samples := make([]soakSamples, len(c.Nodes))
	began := time.Now()
	told := began
	var moved int64
	for round := 0; time.Since(began) < long; round++ {
		transfer(t, pods[0].Namespace, pods[1].Namespace, a, b, 10<<20)
		transfer(t, pods[1].Namespace, pods[0].Namespace, b, a, 10<<20)
		datagrams(t, pods[0].Namespace, pods[1].Namespace, a, b)
		moved += 20 << 20
		key := fmt.Sprintf("/coreos.com/network/subnets/10.5.%d.0-24", 240+round%8)
		if _, err := client.Put(t.Context(), key, fmt.Sprintf(`{"PublicIP":"192.0.2.%d","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:01:%02x"},"NodeID":"soak-%d"}`, 1+round%8, round%8, round%8)); err != nil {
			t.Fatal(err)
		}
		for _, n := range c.Nodes {
			c.waitReady(n, 2)
		}
		if _, err := client.Delete(t.Context(), key); err != nil {
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
			now := c.metrics(n)
			samples[i] = append(samples[i], soakSample{
				at: time.Since(began), usage: usageOf(t, daemons[i].PID), objects: kernelObjects(t, n),
				goroutines: now("go_goroutines"), collected: now("go_memstats_next_gc_bytes"), mapped: now("go_memstats_sys_bytes"),
			})
		}
		if time.Since(told) > 5*time.Minute {
			told = time.Now()
			for i, n := range c.Nodes {
				t.Logf("%s, round %d: %v", n.ID, round+1, samples[i][round])
			}
			t.Logf("%d pings, %d lost", stream.sentSoFar(), stream.lostSoFar())
		}
		time.Sleep(rest)
	}
	for i, n := range c.Nodes {
		if len(samples[i]) < 8 {
			t.Fatalf("only %d rounds", len(samples[i]))
		}
		t.Logf("%s, %s, %d rounds:", n.ID, datapaths[i], len(samples[i]))
		samples[i].check(t)
		s := c.wait(n, "has a status", func(api.Status) bool { return true })
		// Only the daemon sends to the leases that come and go: its probe may be on the device
		// at the moment in which the peer leaves.
		d := slices.DeleteFunc(dropped(s), func(d api.Drop) bool {
			few := d.Reason == "egress-no-peer" && d.Packets <= uint64(1+len(samples[i])/100)
			if few {
				t.Logf("%d probes of a peer that had just left", d.Packets)
			}
			return few
		})
		if len(d) > 0 {
			t.Errorf("%s dropped %v", n.ID, d)
		}
	}
	sent, lost := stream.stop()
	t.Logf("%v, %d MB moved, %d pings, %d lost", time.Since(began).Round(time.Second), moved>>20, sent, lost)
	if lost > 0 {
		t.Errorf("%d of %d pings lost", lost, sent)
	}
	for i, f := range flows {
		turns, longest, err := f.stop()
		t.Logf("flow %d: %d round trips, the longest took %v", i, turns, longest)
		if err != nil {
			t.Errorf("flow %d broke after %d round trips: %v", i, turns, err)
		}
	}
}

// duration returns an environment variable's value; 0 if it is not set.
func duration(t *testing.T, variable string) time.Duration {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return d
}

// soakSample is what a node uses after a round.
type soakSample struct {
	at         time.Duration
	usage      usage
	goroutines int
	collected  int // bytes of the heap at which Go collects next: about twice what is live
	mapped     int // bytes that Go's runtime has from the kernel
	objects    int // of the kernel
}

func (s soakSample) String() string {
	return fmt.Sprintf("after %v %.1f MB resident (%.1f without the program's file), next collection at %.1f MB, %.1f MB mapped, %d goroutines, %d threads, %d descriptors, %d kernel objects",
		s.at.Round(time.Second), float64(s.usage.resident)/1e6, float64(s.usage.anonymous)/1e6, float64(s.collected)/1e6, float64(s.mapped)/1e6, s.goroutines, s.usage.threads, s.usage.descriptors, s.objects)
}

type soakSamples []soakSample

// check compares the second quarter with the last: counts by their medians, memory by the
// slope of a line through all samples after the first quarter.
func (all soakSamples) check(t *testing.T) {
	t.Helper()
	rest := all[len(all)/4:]
	early, late := rest[:len(rest)/3], rest[len(rest)-len(rest)/3:]
	for _, count := range []struct {
		name string
		more int // that it may have grown by
		of   func(soakSample) int
	}{
		{"goroutines", 0, func(s soakSample) int { return s.goroutines }},
		{"threads", 2, func(s soakSample) int { return s.usage.threads }}, // the runtime makes one when all wait in the kernel
		{"descriptors", 0, func(s soakSample) int { return s.usage.descriptors }},
		{"kernel objects", 0, func(s soakSample) int { return s.objects }},
	} {
		before, after := median(early, count.of), median(late, count.of)
		t.Logf("%s: %d in the second quarter, %d in the last", count.name, before, after)
		if after > before+count.more {
			t.Errorf("there are %d %s, and there were %d", after, count.name, before)
		}
	}
	over := rest[len(rest)-1].at - rest[0].at
	for _, part := range []struct {
		name string
		of   func(soakSample) int
	}{
		// This is a constant share more than what was live, so it shows half a kilobyte a round.
		{"next collection", func(s soakSample) int { return s.collected }},
		// Between two collections this changes by a tenth.
		{"resident without the program's file", func(s soakSample) int { return s.usage.anonymous }},
		// Pages of the program are resident once their code has run, some only after an hour.
		{"resident", func(s soakSample) int { return s.usage.resident }},
	} {
		slope, mean := line(rest, part.of)
		t.Logf("%s: %.1f MB on average, slope %+.0f KB an hour over %v", part.name, mean/1e6, slope*3600/1e3, over.Round(time.Second))
		if growth := slope * over.Seconds(); growth > mean/10 {
			t.Errorf("%s: it has grown by %.0f KB from %.0f", part.name, growth/1e3, mean/1e3)
		}
	}
}

func median(all soakSamples, of func(soakSample) int) int {
	var sorted []int
	for _, s := range all {
		sorted = append(sorted, of(s))
	}
	slices.Sort(sorted)
	return sorted[len(sorted)/2]
}

// line fits a line to a number of bytes, by least squares: its slope in bytes per second, and the mean.
func line(all soakSamples, of func(soakSample) int) (slope, mean float64) {
	n, at := float64(len(all)), 0.0
	for _, s := range all {
		at += s.at.Seconds() / n
		mean += float64(of(s)) / n
	}
	var above, below float64
	for _, s := range all {
		d := s.at.Seconds() - at
		above += d * (float64(of(s)) - mean)
		below += d * d
	}
	return above / below, mean
}

// metrics reads a node's metrics, and returns what finds one without labels.
func (c *cluster) metrics(n *lab.Node) func(name string) int {
	c.t.Helper()
	_, text := c.get(n, "/metrics")
	return func(name string) int {
		c.t.Helper()
		for line := range strings.Lines(text) {
			if value, ok := strings.CutPrefix(line, name+" "); ok {
				if number, err := strconv.ParseFloat(strings.TrimSpace(value), 64); err == nil {
					return int(number)
				}
			}
		}
		c.t.Fatalf("the metrics have no %s", name)
		return 0
	}
}

// kernelObjects counts a node's links, addresses, routes, rules, queueing disciplines,
// permanent neighbours, FDB entries, and the elements of its nftables sets and rules of its
// nftables chains.
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
		addrs, err1 := netlink.AddrList(nil, netlink.FAMILY_ALL)
		rules, err2 := netlink.RuleList(netlink.FAMILY_ALL)
		qdiscs, err3 := netlink.QdiscList(nil)
		neighbours, err4 := netlink.NeighList(0, netlink.FAMILY_ALL)
		fdb, err5 := netlink.NeighList(0, unix.AF_BRIDGE)
		permanent := 0
		for _, x := range slices.Concat(neighbours, fdb) {
			if x.State&netlink.NUD_PERMANENT != 0 {
				if a, ok := netip.AddrFromSlice(x.IP); !ok || !a.IsMulticast() {
					permanent++
				}
			}
		}
		filtered, err6 := firewallObjects()
		sum = len(routes) + len(links) + len(addrs) + len(rules) + len(qdiscs) + permanent + filtered
		return errors.Join(err1, err2, err3, err4, err5, err6)
	}); err != nil {
		t.Fatal(err)
	}
	return sum
}

// firewallObjects counts nftables' rules and set elements.
func firewallObjects() (sum int, err error) {
	nft, err := nftables.New()
	if err != nil {
		return 0, err
	}
	tables, err := nft.ListTables()
	if err != nil {
		return 0, err
	}
	for _, table := range tables {
		sets, err := nft.GetSets(table)
		if err != nil {
			return 0, err
		}
		for _, set := range sets {
			elements, err := nft.GetSetElements(set)
			if err != nil {
				return 0, err
			}
			sum += len(elements)
		}
		chains, err := nft.ListChainsOfTableFamily(table.Family)
		if err != nil {
			return 0, err
		}
		for _, chain := range chains {
			if chain.Table.Name != table.Name {
				continue
			}
			rules, err := nft.GetRules(table, chain)
			if err != nil {
				return 0, err
			}
			sum += len(rules)
		}
	}
	return sum, nil
}
