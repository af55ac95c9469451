package backend

import (
	"fmt"
	"net/netip"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// Plan computes, purely, what the host must be like for a datapath to carry
// what a snapshot says: the wire format's own half of it. View has the facts of
// the host that it depends on.
type Plan func(n Node, s subnet.Snapshot, v host.View) (Wanted, error)

// Wanted is what a Plan comes to.
type Wanted struct {
	State host.State
	MTU   int // of pods
	// Warnings say what cannot be carried, and why.
	Warnings []api.Warning
}

// Base is what every datapath wants of the host: the part of the cluster
// network that nobody leases is unreachable, rather than the default route's;
// pods' traffic that leaves it bears the node's address; and other programs'
// FORWARD chains let it through.
func Base(n Node, s subnet.Snapshot) host.State {
	var state host.State
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
			// flannel's host-gw: a peer's subnet by that peer, or this node's by the one
			// that had it before.
			for _, p := range Peers(s, e.Subnet.Addr().Is4()) {
				state.Stale = append(state.Stale, host.StaleRoute{To: p.Subnet, Via: p.Public}, host.StaleRoute{To: e.Subnet, Via: p.Public})
			}
		}
		if n.IPMasq {
			m := host.Masquerade{Network: network, Subnet: e.Subnet}
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

// Covered returns what is kept from the host's default route in an endpoint's
// family.
func Covered(s subnet.Snapshot, e subnet.Endpoint) []netip.Prefix {
	network, ok := s.Config.Network(e.Subnet.Addr().Is4())
	if !ok {
		return nil
	}
	return s.Covered(network)
}

// Peers returns the endpoints of other nodes in one address family.
func Peers(s subnet.Snapshot, is4 bool) []subnet.Endpoint {
	var all []subnet.Endpoint
	for _, l := range s.Peers {
		if e, ok := l.Endpoint(is4); ok && !l.Reserved {
			all = append(all, e)
		}
	}
	return all
}

// Sources returns the pairs of addresses that may arrive together.
func Sources(peers []subnet.Endpoint) []host.Source {
	all := make([]host.Source, 0, len(peers))
	for _, p := range peers {
		all = append(all, host.Source{Outer: p.Public, Inner: p.Subnet})
	}
	return all
}

// HostAddrs returns what a tunnel device bears: the subnet's first address, so
// that the node's own packets to pods have a source within its subnet.
func HostAddrs(self subnet.Endpoint) []netip.Prefix {
	a := self.Subnet.Masked().Addr()
	return []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}
}

// Local returns the node's own underlay address of a family: the one that was
// chosen, and is published, whichever interface bears it. The outer source of
// what this node sends is never another: peers accept no other.
func (n Node) Local(v host.View, is4 bool) (netip.Addr, error) {
	if v.Underlay.Name == "" {
		return netip.Addr{}, fmt.Errorf("%w: %s", host.ErrNoUnderlay, n.Underlay.Name)
	}
	a := n.Underlay.Addr(is4)
	if !a.IsValid() {
		return netip.Addr{}, fmt.Errorf("the underlay %s has no address of the family of the network", v.Underlay.Name)
	}
	return a, nil
}

// Outer returns the underlay whose MTU a plan goes by: the link as it is now, or,
// while that does not leave pods enough, as it was when it was chosen. So the
// packets that still fit go on, and no pod is made for an MTU that does not last.
func (n Node) Outer(v host.View, enough func(host.Underlay) error) host.Underlay {
	if enough(v.Underlay) != nil {
		return n.Underlay
	}
	return v.Underlay
}

// MTU returns what is left for pods of the underlay's MTU, or of the configured
// one. Cost is what the tunnel adds to each packet; IPv6 needs more to be left
// than IPv4 (RFC 8200, RFC 791).
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
		return 0, fmt.Errorf("%s is %d, which leaves %d bytes for pods, less than %d", whose, outer, outer-cost, least)
	}
	return outer - cost, nil
}
