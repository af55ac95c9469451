package test

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"culvert/internal/lab"
)

// TestFastPathKeepsOrderAfterRuns has a node with the userspace datapath send datagrams right
// after the acknowledgements of a transfer. The loop puts packets of both flows into one
// UDP_SEGMENT frame, which the other end's fast path leaves to the device: it must leave the
// rest of the datagrams to it, too.
func TestFastPathKeepsOrderAfterRuns(t *testing.T) {
	c := newClusterOf(t, lab.Options{Nodes: 2, InOrder: true})
	c.setConfig(config)
	for i, n := range c.Nodes {
		c.start(n, "--datapath", []string{"userspace", "kernel"}[i])
	}
	for _, n := range c.Nodes {
		c.waitReady(n, 1)
	}
	pods := c.pods()
	from, to := pods[0], pods[1]
	before := c.fastPath(c.Nodes[1])
	for round := range times(t, "CULVERT_ORDER", 50) {
		transfer(t, from.Namespace, to.Namespace, from.Addrs[0], to.Addrs[0], 1<<20)
		transfer(t, to.Namespace, from.Namespace, to.Addrs[0], from.Addrs[0], 1<<20)
		if got := arrivals(t, from, to, 16); !slices.IsSorted(got) {
			t.Fatalf("round %d: datagrams arrived in the order %v", round, got)
		}
	}
	if after := c.fastPath(c.Nodes[1]); after.Ingress.Packets == before.Ingress.Packets {
		t.Error("the fast path took no packet")
	}
}

// arrivals sends n datagrams at once, each a byte longer than the one before, and returns in which order they arrived.
func arrivals(t *testing.T, from, to *lab.Pod, n int) (order []int) {
	t.Helper()
	server, err := to.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(to.Addrs[0], 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	client, err := from.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(from.Addrs[0], 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for k := range n {
		if _, err := client.WriteTo(make([]byte, k), server.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
	b := make([]byte, n)
	for range n {
		if err := server.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		size, _, err := server.ReadFrom(b)
		if err != nil {
			t.Fatalf("after %v: %v", order, err)
		}
		order = append(order, size)
	}
	return order
}
