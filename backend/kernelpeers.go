package backend

import (
	"net/netip"
	"time"

	"culvert/internal/api"
	"culvert/internal/firewall"
)

// kernelWay is how the kernel reaches a peer's subnet.
type kernelWay struct {
	firewall.Source
	direct bool
}

// ways are those of the last plan: a route to a gateway that is the peer's own
// underlay address is no tunnel.
func (w Wanted) ways() []kernelWay {
	outer := make(map[netip.Prefix]netip.Addr)
	for _, t := range w.State.Firewall.Tunnels {
		for _, s := range t.Peers {
			outer[s.Inner] = s.Outer
		}
	}
	var all []kernelWay
	for _, r := range w.State.Routes {
		if r.Link == "" {
			continue // unreachable
		}
		public, tunnel := outer[r.To]
		if !tunnel {
			public = r.Via
		}
		all = append(all, kernelWay{firewall.Source{Outer: public, Inner: r.To}, r.Via == public && !r.OnLink})
	}
	return all
}

func (k *Kernel) probeTargets() []ProbeTarget {
	k.mu.Lock()
	defer k.mu.Unlock()
	var all []ProbeTarget
	for _, w := range k.wanted.ways() {
		all = append(all, ProbeTarget{Subnet: w.Inner, Public: w.Outer, Direct: w.direct, MTU: k.wanted.MTU})
	}
	return all
}

// Peers says what is known of the way to each peer, and what pods may send. The kernel counts by peer what
// its tunnel devices receive, and not what they send; what takes the fast path is
// not counted by peer.
func (k *Kernel) Peers() ([]api.PeerState, int) {
	k.mu.Lock()
	w := k.wanted
	k.mu.Unlock()
	now := time.Now()
	way := api.WayKernel
	if k.options.FastPath != nil && k.options.FastPath.Status().On {
		way = api.WayFastPath
	}
	var received map[firewall.Source]firewall.Count
	if way == api.WayKernel {
		received, _ = firewall.Received(w.State.Firewall.Tunnels) // what cannot be read is not shown
	}
	var all []api.PeerState
	for _, to := range w.ways() {
		s := api.PeerState{Subnet: to.Inner, PublicIP: to.Outer, Way: way}
		if to.direct {
			s.Way = api.WayDirect
		}
		k.prober.Describe(&s, now)
		if n, ok := received[to.Source]; ok && !to.direct {
			s.Received = &api.PeerCount{Packets: n.Packets, Bytes: n.Bytes}
		}
		all = append(all, s)
	}
	return all, w.MTU
}
