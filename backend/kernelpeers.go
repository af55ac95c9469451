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
	if err != nil {
		counted = nil // what cannot be read is not shown
	}
	var all []api.PeerState
	for _, to := range w.ways() {
		s := api.PeerState{Subnet: to.Inner, PublicIP: to.Outer, Way: way}
		if to.direct {
			s.Way = api.WayDirect
		}
		k.prober.Describe(&s, now)
		if counted != nil {
			sent, received := counted[firewall.Source{Inner: to.Inner}].Sent, counted[firewall.Source{Inner: to.Inner}].Received
			if !to.direct {
				drops := counted[firewall.Source{Outer: to.Outer}].Dropped
				s.Drops = &drops
				received = counted[to.Source].Received
				e := fast[to.Source]
				sent.Packets, sent.Bytes = sent.Packets+e.Sent.Packets, sent.Bytes+e.Sent.Bytes
				received.Packets, received.Bytes = received.Packets+e.Received.Packets, received.Bytes+e.Received.Bytes
			}
			s.Sent = &api.PeerCount{Packets: sent.Packets, Bytes: sent.Bytes}
			s.Received = &api.PeerCount{Packets: received.Packets, Bytes: received.Bytes}
		}
		all = append(all, s)
	}
	return all, w.MTU
}
