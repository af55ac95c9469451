// Package hostgw is the datapath without a tunnel: each peer's subnet is routed
// to the peer itself, which must be on the underlay's link.
package hostgw

import (
	"fmt"

	"culvert/backend"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// Plan is what the kernel must be like. Of each peer:
//
//	ip route add <subnet> via <public address> dev eth0
//
// A peer behind a gateway cannot be reached so, and is named in a warning: its
// subnet stays unreachable, rather than sent to a router that does not know it.
func Plan(n backend.Node, s subnet.Snapshot, v host.View) (backend.Wanted, error) {
	w := backend.Wanted{State: backend.Base(n, s)}
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
					Text:  fmt.Sprintf("%s at %s is not on the link of %s, and host-gw cannot reach it", p.Subnet, p.Public, v.Underlay.Name),
					Fix:   "use vxlan with DirectRouting",
				})
				continue
			}
			w.State.Routes = append(w.State.Routes, host.Route{To: p.Subnet, Via: p.Public, Link: v.Underlay.Name})
		}
	}
	return w, nil
}
