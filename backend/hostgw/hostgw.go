// Package hostgw plans the host-gw datapath, which has no tunnel: a route sends
// each peer's subnet to the peer's underlay address, which must be on the
// underlay's link. It computes the wanted state only; backend.Kernel applies it,
// and internal/host owns the kernel's state.
package hostgw

import (
	"fmt"

	"culvert/backend"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// Plan computes the wanted kernel state. For each peer:
//
//	ip route add <subnet> via <public address> dev eth0
//
// A peer behind a gateway cannot be reached this way: it gets a warning and no
// route, since the gateway does not know the subnet.
func Plan(n backend.Node, s subnet.Snapshot, v host.View) (backend.Planned, error) {
	w := backend.Planned{State: backend.Base(n, s)}
	if v.Underlay.Name == "" {
		return w, fmt.Errorf("%w: %s", host.ErrNoUnderlay, n.Underlay.Name)
	}
	_, ipv6 := s.Self.Endpoint(false)
	var err error
	mtu := func(u host.Underlay) (int, error) { return backend.MTU(s.Config.Backend.MTU, u, 0, ipv6) }
	if w.MTU, err = mtu(n.Outer(v, func(u host.Underlay) error { _, err := mtu(u); return err })); err != nil {
		return w, err
	}
	for _, self := range s.Self.Endpoints {
		for _, p := range backend.Peers(s, self.Subnet.Addr().Is4()) {
			if !v.OnLink(p.Public) {
				w.Warnings = append(w.Warnings, api.Warning{
					Check: "peer-off-link",
					Text:  fmt.Sprintf("host-gw cannot reach the peer of %s at %s: it is not on the link of %s", p.Subnet, p.Public, v.Underlay.Name),
					Fix:   "use vxlan with DirectRouting",
				})
				continue
			}
			w.State.Routes = append(w.State.Routes, host.Route{To: p.Subnet, Via: p.Public, Link: v.Underlay.Name})
		}
	}
	return w, nil
}
