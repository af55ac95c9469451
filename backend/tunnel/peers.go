package tunnel

import (
	"time"

	"culvert/backend"
	"culvert/encap"
	"culvert/internal/api"
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
	all := make([]api.PeerState, 0, table.Len())
	for _, p := range table.Peers() {
		s := api.PeerState{Subnet: p.Subnet, PublicIP: p.Underlay.Addr(), Way: api.WayUserspace}
		t.prober.Describe(&s, now)
		n := p.Traffic()
		s.Sent = &api.PeerCount{Packets: n.SentPackets, Bytes: n.SentBytes}
		s.Received = &api.PeerCount{Packets: n.ReceivedPackets, Bytes: n.ReceivedBytes}
		s.Drops = &n.Drops
		if k, ok := p.PathMTU(); ok && (s.PathMTU == 0 || k.MTU < s.PathMTU) {
			s.PathMTU = k.MTU
		}
		all = append(all, s)
	}
	return all, t.mtu
}
