// Package vxlan plans the datapath of the kernel's vxlan devices, compatible with
// flannel's: one device per address family, and a neighbour, an FDB entry and a
// route per peer. It computes the wanted state only; backend.Kernel applies it,
// and internal/host owns the kernel's state.
package vxlan

import (
	"errors"

	"culvert/backend"
	"culvert/encap"
	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/names"
	"culvert/subnet"
)

// Plan computes the wanted kernel state. For each peer:
//
//	bridge fdb add <VTEP MAC> dev cvt.1 dst <public address> self permanent
//	ip neigh add <subnet.0> lladdr <VTEP MAC> nud permanent dev cvt.1
//	ip route add <subnet> via <subnet.0> dev cvt.1 onlink
//
// or, with DirectRouting and the peer on the underlay's link, only
//
//	ip route add <subnet> via <public address> dev eth0
func Plan(n backend.Node, s subnet.Snapshot, v host.View) (backend.Planned, error) {
	w := backend.Planned{State: backend.Base(n, s)}
	_, ipv6 := s.Self.Endpoint(false)
	outer := n.Outer(v, func(u host.Underlay) error {
		var errs []error
		for _, self := range s.Self.Endpoints {
			_, err := backend.MTU(s.Config.Backend.MTU, u, encap.Overhead(encap.VXLAN, self.Subnet.Addr().Is4()), ipv6)
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
	mtu := func(is4 bool) (int, error) {
		return backend.MTU(s.Config.Backend.MTU, outer, encap.Overhead(encap.VXLAN, is4), ipv6)
	}
	for _, self := range s.Self.Endpoints {
		network, ok := backend.NetworkOf(s, self)
		if !ok {
			continue
		}
		is4 := network.Addr().Is4()
		link, err := device(n, s.Config.Backend, self, v, mtu)
		if err != nil {
			return w, err
		}
		if w.MTU == 0 || link.MTU < w.MTU {
			w.MTU = link.MTU
		}
		state := &w.State
		state.Links = append(state.Links, link)
		peers := backend.Peers(s, is4)
		for _, p := range peers {
			if s.Config.Backend.DirectRouting && v.OnLink(p.Public) {
				state.Routes = append(state.Routes, host.Route{To: p.Subnet, Via: p.Public, Link: v.Underlay.Name})
				continue
			}
			vtep := p.Subnet.Addr()
			state.FDB = append(state.FDB, host.FDBEntry{Link: link.Name, MAC: host.MAC(p.VTEP.MAC), To: p.Public})
			state.Neighbours = append(state.Neighbours, host.Neighbour{Link: link.Name, IP: vtep, MAC: host.MAC(p.VTEP.MAC)})
			state.Routes = append(state.Routes, host.Route{To: p.Subnet, Via: vtep, Link: link.Name, OnLink: true})
		}
		state.Firewall.Tunnels = append(state.Firewall.Tunnels, firewall.TunnelRule{
			Port: link.VXLAN.Port, VNI: link.VXLAN.VNI, Network: network, Device: link.Name, Subnet: self.Subnet, Peers: backend.Sources(peers),
			Underlay: v.Underlay.Name, Local: link.VXLAN.Local, NoFIB: v.NoFIB,
		})
	}
	return w, nil
}

// device returns the vxlan device for the address family of self.
func device(n backend.Node, c subnet.BackendConfig, self subnet.Endpoint, v host.View, mtuOf func(is4 bool) (int, error)) (host.Link, error) {
	is4 := self.Subnet.Addr().Is4()
	local, err := n.Local(v, is4)
	if err != nil {
		return host.Link{}, err
	}
	mtu, err := mtuOf(is4)
	if err != nil {
		return host.Link{}, err
	}
	return host.Link{
		Name: names.VXLAN(self.VTEP.VNI, is4), MTU: mtu, Addrs: backend.HostAddrs(self),
		VXLAN: &host.VXLAN{
			MAC: host.MAC(self.VTEP.MAC), VNI: self.VTEP.VNI, Local: local, Device: v.Underlay.Name, Port: c.Port,
			Learning: c.Learning, GBP: c.GBP,
		},
	}, nil
}
