package subnet

import (
	"net/netip"
	"slices"
)

// Allocatable returns the allocatable part of the network, from SubnetMin to
// SubnetMax, as the fewest prefixes. The host routes only this part into the
// tunnel. The first subnet is included if nothing else is left out below
// SubnetMin, so that by default the result is the whole network.
func (n Network) Allocatable() []netip.Prefix {
	is4, length := n.Prefix.Addr().Is4(), n.Prefix.Addr().BitLen()
	low, high := toU128(n.SubnetMin), lastOf(netip.PrefixFrom(n.SubnetMax, n.SubnetLen))
	first, size := toU128(n.Prefix.Masked().Addr()), u128pow2(length-n.SubnetLen)
	if low.compare(first.add(size)) <= 0 {
		low = first
	}
	var all []netip.Prefix
	for {
		p := netip.PrefixFrom(low.addr(is4), length)
		for p.Bits() > 0 {
			wider := netip.PrefixFrom(p.Addr(), p.Bits()-1)
			if wider != wider.Masked() || lastOf(wider).compare(high) > 0 {
				break
			}
			p = wider
		}
		all = append(all, p)
		last := lastOf(p)
		if last.compare(high) >= 0 {
			return all
		}
		low = last.add(u128{lo: 1})
	}
}

// AllocatableOverlap returns the first prefix of Allocatable that overlaps p, and
// whether there is one.
func (n Network) AllocatableOverlap(p netip.Prefix) (netip.Prefix, bool) {
	given := n.Allocatable()
	i := slices.IndexFunc(given, p.Overlaps)
	if i < 0 {
		return netip.Prefix{}, false
	}
	return given[i], true
}

// Covered returns the prefixes that must not leave by the host's default route:
// the allocatable part of the network, and the subnets of leases outside it,
// allocated under an earlier configuration.
func (s Snapshot) Covered(n Network) []netip.Prefix {
	all := n.Allocatable()
	inside := func(p netip.Prefix) bool {
		return slices.ContainsFunc(all, func(g netip.Prefix) bool { return g.Contains(p.Addr()) && g.Bits() <= p.Bits() })
	}
	add := func(l Lease) {
		if e, ok := l.Endpoint(n.Prefix.Addr().Is4()); ok && !l.Reserved && !inside(e.Subnet) {
			all = append(all, e.Subnet)
		}
	}
	add(s.Self)
	for _, l := range s.Peers {
		add(l)
	}
	return all
}

// WithoutOverlaps returns the snapshot without the peers that overlap one of the host's
// own networks, each moved to Rejected, in the order of their keys: routing such
// a peer would make that network unreachable from the host.
func (s Snapshot) WithoutOverlaps(networks []HostNetwork) Snapshot {
	if len(networks) == 0 {
		return s
	}
	peers, rejected := make([]Lease, 0, len(s.Peers)), slices.Clone(s.Rejected)
	for _, l := range s.Peers {
		reason := ""
		for _, e := range l.Endpoints {
			for _, h := range networks {
				if e.Subnet.Overlaps(h.Prefix) {
					reason = "overlaps " + h.Prefix.Masked().String() + " on " + h.Link + " of this node, which would become unreachable"
				}
			}
		}
		if reason == "" {
			peers = append(peers, l)
			continue
		}
		rejected = append(rejected, Rejection{Key: l.Key(), Reason: reason})
	}
	s.Peers, s.Rejected = peers, rejected
	return s
}

// WithNetworks returns the snapshot with other networks, for a node that cannot apply
// the configured ones. Peers outside them are moved to Rejected.
func (s Snapshot) WithNetworks(networks []Network) Snapshot {
	s.Config.Networks = networks
	peers := make([]Lease, 0, len(s.Peers))
	s.Rejected = slices.Clone(s.Rejected)
	for _, l := range s.Peers {
		outside := slices.ContainsFunc(l.Endpoints, func(e Endpoint) bool {
			n, ok := s.Config.Network(e.Subnet.Addr().Is4())
			return !ok || !n.holds(e.Subnet)
		})
		if outside {
			s.Rejected = append(s.Rejected, Rejection{Key: l.Key(), Reason: "outside the network that this node uses"})
			continue
		}
		peers = append(peers, l)
	}
	s.Peers = peers
	return s
}

// HostNetwork is a network directly attached to one of the host's links.
type HostNetwork struct {
	Link   string
	Prefix netip.Prefix // host bits may be set
}
