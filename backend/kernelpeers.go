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
	link   string
}

// ways returns how the last plan reaches each peer. A route whose gateway is the peer's
// own underlay address is direct, without a tunnel.
func (w Planned) ways() []kernelWay {
	outer := make(map[netip.Prefix]netip.Addr, len(w.State.Routes))
	for _, t := range w.State.Firewall.Tunnels {
		for _, s := range t.Peers {
			outer[s.Inner] = s.Outer
		}
	}
	all := make([]kernelWay, 0, len(w.State.Routes))
	for _, r := range w.State.Routes {
		if r.Link == "" {
			continue // unreachable
		}
		public, tunnel := outer[r.To]
		if !tunnel {
			public = r.Via
		}
		all = append(all, kernelWay{firewall.Source{Outer: public, Inner: r.To}, r.Via == public && !r.OnLink, r.Link})
	}
	return all
}

func (k *Kernel) probeTargets() []ProbeTarget {
	k.mu.Lock()
	defer k.mu.Unlock()
	var all []ProbeTarget
	for _, w := range k.planned.ways() {
		all = append(all, ProbeTarget{Subnet: w.Inner, Public: w.Outer, Direct: w.direct, MTU: k.planned.MTU})
	}
	return all
}

// count makes the firewall count the traffic with each peer, except what is counted
// elsewhere: the rule that checks a tunnel's received packets counts them, and the fast
// path counts its packets.
func (w *Planned) count(fastPath bool) {
	c := &w.State.Firewall.Count
	for _, to := range w.ways() {
		if to.direct {
			c.Direct, c.Underlay = append(c.Direct, to.Inner), to.link
		}
		if to.direct || !fastPath {
			c.Sent = append(c.Sent, to.Inner)
		}
	}
}

// Peers implements Backend.
func (k *Kernel) Peers() ([]api.PeerState, int) {
	k.mu.Lock()
	w := k.planned
	k.mu.Unlock()
	now := time.Now()
	way := api.WayKernel
	var fast map[firewall.Source]firewall.Exchanged
	if k.options.FastPath != nil && k.options.FastPath.Status().On {
		way = api.WayFastPath
		fast = k.options.FastPath.Exchanged()
	}
	counted, err := firewall.Counts(w.State.Firewall)
	ways := w.ways()
	all := make([]api.PeerState, len(ways))
	counts := make([]struct {
		sent, received api.PeerCount
		drops          uint64
	}, len(ways))
	for i, to := range ways {
		s, n := &all[i], &counts[i]
		*s = api.PeerState{Subnet: to.Inner, PublicIP: to.Outer, Way: way}
		if to.direct {
			s.Way = api.WayDirect
		}
		k.prober.Describe(s, now)
		if err != nil {
			continue // what cannot be read is not shown
		}
		s.Sent, s.Received = &n.sent, &n.received
		n.sent = api.PeerCount(counted.Sent[to.Inner])
		if to.direct {
			n.received = api.PeerCount(counted.Direct[to.Inner])
			continue
		}
		e := fast[to.Source]
		n.sent.Packets += e.Sent.Packets
		n.sent.Bytes += e.Sent.Bytes
		n.received = api.PeerCount(counted.Received[to.Source])
		n.received.Packets += e.Received.Packets
		n.received.Bytes += e.Received.Bytes
		n.drops, s.Drops = counted.Dropped[to.Outer], &n.drops
	}
	return all, w.MTU
}
