// Package ipip plans the datapath of the kernel's ipip device (RFC 2003),
// compatible with flannel's: one device without a remote address, and a route per
// peer. It computes the wanted state only; backend.Kernel applies it, and
// internal/host owns the kernel's state.
package ipip

import (
	"culvert/backend"
	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/names"
	"culvert/subnet"
)

// Cost is the bytes that IPIP adds to each packet: one IPv4 header.
const Cost = 20

// Plan computes the wanted kernel state. For each peer:
//
//	ip route add <subnet> via <public address> dev cvt.ipip onlink
//
// or, with DirectRouting and the peer on the underlay's link, a route via the
// underlay device. An ipip device accepts packets from anyone who can reach it, so
// the firewall admits only pairs of a peer's underlay address and its subnet.
func Plan(n backend.Node, s subnet.Snapshot, v host.View) (backend.Planned, error) {
	w := backend.Planned{State: backend.Base(n, s)}
	self, ok := s.Self.Endpoint(true)
	network, found := backend.NetworkOf(s, self)
	if !ok || !found {
		return w, nil
	}
	local, err := n.Local(v, true)
	if err != nil {
		return w, err
	}
	mtu := func(u host.Underlay) (int, error) { return backend.MTU(s.Config.Backend.MTU, u, Cost, false) }
	if w.MTU, err = mtu(n.Outer(v, func(u host.Underlay) error { _, err := mtu(u); return err })); err != nil {
		return w, err
	}
	state := &w.State
	state.Links = []host.Link{{Name: names.IPIP, MTU: w.MTU, Addrs: backend.HostAddrs(self), IPIP: &host.IPIP{Local: local}}}
	peers := backend.Peers(s, true)
	for _, p := range peers {
		r := host.Route{To: p.Subnet, Via: p.Public, Link: names.IPIP, OnLink: true}
		if s.Config.Backend.DirectRouting && v.OnLink(p.Public) {
			r.Link, r.OnLink = v.Underlay.Name, false
		}
		state.Routes = append(state.Routes, r)
	}
	state.Firewall.Tunnels = []firewall.TunnelRule{{
		Network: network, Device: names.IPIP, Subnet: self.Subnet, Peers: backend.Sources(peers),
		Underlay: v.Underlay.Name, Local: local, NoFIB: v.NoFIB,
	}}
	return w, nil
}
