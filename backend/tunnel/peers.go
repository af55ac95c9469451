package tunnel

import (
	"time"

	"culvert/backend"
	"culvert/encap"
	"culvert/internal/api"
	"culvert/internal/firewall"
)

// probeTargets returns the table's peers for the Prober.
func (t *Tunnel) probeTargets(table *encap.Table) []backend.ProbeTarget {
	var all []backend.ProbeTarget
	for _, p := range table.Peers() {
		all = append(all, backend.ProbeTarget{Subnet: p.Subnet, Public: p.Underlay.Addr(), MTU: t.mtu})
	}
	return all
}

// Peers returns the state of each peer, in no order, and the pods' MTU.
func (t *Tunnel) Peers() ([]api.PeerState, int) {
	table, now := t.loop.Table(), time.Now()
	way := api.WayUserspace
	var fast map[firewall.Source]firewall.Exchanged
	if t.options.FastPath != nil && t.options.FastPath.Status().On {
		way = api.WayFastPath
		fast = t.options.FastPath.Exchanged()
	}
	all := make([]api.PeerState, 0, table.Len())
	for _, p := range table.Peers() {
		s := api.PeerState{Subnet: p.Subnet, PublicIP: p.Underlay.Addr(), Way: way}
		t.prober.Describe(&s, now)
		n, f := p.Traffic(), fast[firewall.Source{Outer: s.PublicIP, Inner: s.Subnet}]
		s.Sent = &api.PeerCount{Packets: n.SentPackets + f.Sent.Packets, Bytes: n.SentBytes + f.Sent.Bytes}
		s.Received = &api.PeerCount{Packets: n.ReceivedPackets + f.Received.Packets, Bytes: n.ReceivedBytes + f.Received.Bytes}
		s.Drops = &n.Drops
		if k, ok := p.PathMTU(); ok && (s.PathMTU == 0 || k.MTU < s.PathMTU) {
			s.PathMTU = k.MTU
		}
		all = append(all, s)
	}
	return all, t.mtu
}
