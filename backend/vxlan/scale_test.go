package vxlan_test

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"culvert/backend/vxlan"
	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/subnet"
)

// many returns a cluster of n peers; the last has the given underlay address.
func many(t testing.TB, n int, last string) subnet.Snapshot {
	c, _, err := subnet.ParseConfig([]byte(`{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`))
	if err != nil {
		t.Fatal(err)
	}
	s := subnet.Snapshot{Config: c, Self: lease(1)}
	s.Self.Endpoints = s.Self.Endpoints[:1]
	for k := range n {
		name := fmt.Sprintf("peer-%d", k)
		s.Peers = append(s.Peers, subnet.Lease{Node: name, Backend: "vxlan", Endpoints: []subnet.Endpoint{{
			Subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(64 + k>>8), byte(k), 0}), 24),
			Public: netip.AddrFrom4([4]byte{198, 19, byte(k >> 8), byte(k)}),
			VTEP:   subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(name, 1, false)},
		}}})
	}
	if n > 0 {
		s.Peers[n-1].Endpoints[0].Public = netip.MustParseAddr(last)
	}
	return s
}

// underlayIndex returns the interface index of a node's underlay link.
func underlayIndex(t testing.TB, n *lab.Node) (index int) {
	t.Helper()
	if err := n.Do(func() error {
		l, err := net.InterfaceByName(n.Link)
		if err == nil {
			index = l.Index
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return index
}

// applier returns a function that applies snapshots in a node as the datapath does.
func applier(t testing.TB, n *lab.Node) (apply func(subnet.Snapshot), k *host.Keeper) {
	k = host.NewKeeper(underlayIndex(t, n), slog.New(slog.DiscardHandler))
	return func(s subnet.Snapshot) {
		t.Helper()
		err := n.Do(func() error {
			return k.Apply(func(v host.View) (host.State, error) {
				w, err := vxlan.Plan(node(), s, v)
				return w.State, err
			})
		})
		if err != nil {
			t.Fatal(err)
		}
	}, k
}

// TestThousandPeers counts the changes that an apply writes: each peer once, then
// only the peer that changed, then nothing. The last is checked by the Keeper's
// count and by the absence of netlink notifications.
func TestThousandPeers(t *testing.T) {
	const peers = 1000
	n := newNode(t)
	apply, k := applier(t, n)
	apply(many(t, 1, "198.19.0.0")) // the first peer creates the sets and their rules
	written := func(s subnet.Snapshot) uint64 {
		before := k.Status().Writes
		apply(s)
		return k.Status().Writes - before
	}
	// A route, a neighbour and an FDB entry per peer, and two sets filled 200 elements
	// per message.
	if got, want := written(many(t, peers, "198.19.200.1")), uint64(3*(peers-1)+2*peers/200); got != want {
		t.Errorf("growing to %d peers: %d changes, want %d", peers, got, want)
	}
	// A peer's underlay address changes: one FDB entry is replaced, and one element
	// of each set is deleted and added.
	if got := written(many(t, peers, "198.19.200.2")); got != 5 {
		t.Errorf("one peer changes its address: %d changes, want 5", got)
	}

	var socket *nl.NetlinkSocket
	if err := n.Do(func() (err error) {
		socket, err = nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_IFADDR)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	if got := written(many(t, peers, "198.19.200.2")); got != 0 {
		t.Errorf("the same snapshot again: %d changes", got)
	}
	if err := socket.SetReceiveTimeout(&unix.Timeval{Usec: 200_000}); err != nil {
		t.Fatal(err)
	}
	if messages, _, err := socket.Receive(); err == nil {
		t.Errorf("the same snapshot again, and the kernel notified of %v", messages)
	}
}

// BenchmarkApply measures an apply with 1,000 peers: all new, one changed, none
// changed.
func BenchmarkApply(b *testing.B) {
	const peers = 1000
	b.Run("all", func(b *testing.B) {
		n := newNode(b)
		apply, _ := applier(b, n)
		for range b.N {
			b.StopTimer()
			apply(many(b, 0, ""))
			b.StartTimer()
			apply(many(b, peers, "198.19.200.1"))
		}
	})
	b.Run("one", func(b *testing.B) {
		n := newNode(b)
		apply, _ := applier(b, n)
		apply(many(b, peers, "198.19.200.1"))
		b.ResetTimer()
		for i := range b.N {
			apply(many(b, peers, fmt.Sprintf("198.19.200.%d", 2+i%2)))
		}
	})
	b.Run("none", func(b *testing.B) {
		n := newNode(b)
		apply, _ := applier(b, n)
		s := many(b, peers, "198.19.200.1")
		apply(s)
		b.ResetTimer()
		for range b.N {
			apply(s)
		}
	})
}
