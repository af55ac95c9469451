package backend

import (
	"fmt"
	"net/netip"

	"culvert/internal/api"
	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/remedy"
	"culvert/subnet"
)

// Planner computes the host state that a wire format needs to carry a snapshot. It
// is pure: it depends on the host only through View.
type Planner func(n Node, s subnet.Snapshot, v host.View) (Planned, error)

// Planned is the result of a Planner.
type Planned struct {
	State host.State
	MTU   int // of pods, in bytes
	// Warnings name the peers that cannot be reached, and why.
	Warnings []api.Warning
}

// Base returns the host state that every datapath needs: unreachable routes for
// the cluster network, so that packets to unleased subnets do not take the
// default route; masquerading of pods' traffic that leaves the cluster network;
// and exemptions from other programs' FORWARD chains.
func Base(n Node, s subnet.Snapshot) host.State {
	state := host.State{Bridges: n.PodBridges}
	for _, e := range s.Self.Endpoints {
		network, ok := NetworkOf(s, e)
		if !ok {
			continue
		}
		for _, p := range Covered(s, e) {
			state.Routes = append(state.Routes, host.Route{To: p, Metric: host.UnreachableMetric})
		}
		state.Subnets = append(state.Subnets, e.Subnet)
		if n.TakeOver {
			// Left by flannel's host-gw: a route to a peer's subnet via that peer, or to
			// this node's subnet via the peer that held it before.
			for _, p := range Peers(s, e.Subnet.Addr().Is4()) {
				state.Stale = append(state.Stale, host.StaleRoute{To: p.Subnet, Via: p.Public}, host.StaleRoute{To: e.Subnet, Via: p.Public})
			}
		}
		if n.IPMasq {
			m := firewall.Masquerade{Network: network, Subnet: e.Subnet}
			for _, p := range n.NoMasq {
				if p.Addr().Is4() == network.Addr().Is4() {
					m.Except = append(m.Except, p)
				}
			}
			state.Firewall.Masquerade = append(state.Firewall.Masquerade, m)
		}
		state.Firewall.Forward = append(state.Firewall.Forward, network)
	}
	return state
}

// NetworkOf returns the cluster network of an endpoint's family.
func NetworkOf(s subnet.Snapshot, e subnet.Endpoint) (netip.Prefix, bool) {
	network, ok := s.Config.Network(e.Subnet.Addr().Is4())
	return network.Prefix, ok
}

// Covered returns the prefixes of an endpoint's family that must not follow the
// host's default route.
func Covered(s subnet.Snapshot, e subnet.Endpoint) []netip.Prefix {
	network, ok := s.Config.Network(e.Subnet.Addr().Is4())
	if !ok {
		return nil
	}
	return s.Covered(network)
}

// Peers returns the other nodes' endpoints of one address family, without
// reservations.
func Peers(s subnet.Snapshot, is4 bool) []subnet.Endpoint {
	var all []subnet.Endpoint
	for _, l := range s.Peers {
		if e, ok := l.Endpoint(is4); ok && !l.Reserved {
			all = append(all, e)
		}
	}
	return all
}

// Sources returns the permitted pairs of outer source address and inner source
// subnet.
func Sources(peers []subnet.Endpoint) []firewall.Source {
	all := make([]firewall.Source, 0, len(peers))
	for _, p := range peers {
		all = append(all, firewall.Source{Outer: p.Public, Inner: p.Subnet})
	}
	return all
}

// HostAddrs returns the tunnel device's address: the first of the subnet, so that
// the node's own packets to pods have a source within its subnet.
func HostAddrs(self subnet.Endpoint) []netip.Prefix {
	a := self.Subnet.Masked().Addr()
	return []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}
}

// Local returns the node's underlay address of a family: the one published in the
// lease, on whichever interface it is. It is the outer source address of every
// packet that this node sends, since peers accept no other.
func (n Node) Local(v host.View, is4 bool) (netip.Addr, error) {
	if v.Underlay.Name == "" {
		return netip.Addr{}, fmt.Errorf("%w: %s", host.ErrNoUnderlay, n.Underlay.Name)
	}
	a := n.Underlay.Addr(is4)
	if !a.IsValid() {
		return netip.Addr{}, fmt.Errorf("the underlay %s has no address of the network's address family", v.Underlay.Name)
	}
	return a, nil
}

// Outer returns the underlay whose MTU a plan uses: the link's current one or, if
// enough rejects that, the one from when the underlay was chosen. Packets that
// still fit keep flowing, and pods do not get an MTU that is too small.
func (n Node) Outer(v host.View, enough func(host.Underlay) error) host.Underlay {
	if enough(v.Underlay) != nil {
		return n.Underlay
	}
	return v.Underlay
}

// MTU returns the pods' MTU: the configured one or, if that is 0, the underlay's,
// minus cost, the bytes that the tunnel adds to each packet. The result is at
// least 576 (RFC 791), or 1280 with IPv6 (RFC 8200); less is an error.
func MTU(configured int, u host.Underlay, cost int, ipv6 bool) (int, error) {
	outer, whose := u.MTU, "the MTU of "+u.Name
	if configured != 0 {
		outer, whose = configured, "Backend.MTU"
	}
	least := 576
	if ipv6 {
		least = 1280
	}
	if outer-cost < least {
		do := fmt.Sprintf("ip link set %s mtu %d, or more", u.Name, least+cost)
		if configured != 0 {
			do = fmt.Sprintf("set Backend.MTU to %d or more, or leave it out (`culvert config set`)", least+cost)
		}
		return 0, remedy.Errorf(do, "%s is %d, which leaves %d bytes for pods, less than %d", whose, outer, outer-cost, least)
	}
	return outer - cost, nil
}
