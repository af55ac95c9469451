package host

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// Facts is a snapshot of the host's links, addresses and main routing table:
// everything that the choice of the underlay depends on. It is immutable.
type Facts struct {
	Links []LinkFact
	Addrs []AddrFact // in the kernel's order
	// Routes are those of the main table, one entry per next hop of a multipath
	// route.
	Routes []RouteFact
}

// LinkFact is a network interface.
type LinkFact struct {
	Index  int
	Name   string
	MTU    int // in bytes of an IP packet
	Master int // index of the bridge or bond that it is a port of; 0 if none
	// Bridge is set for bridges, and for bonds and the like.
	Bridge bool
	// Local is set for loopback and dummy interfaces: no packet leaves by them,
	// and their addresses belong to the whole host.
	Local bool
}

// AddrFact is an address of an interface; see IFA_FLAGS in rtnetlink(7).
type AddrFact struct {
	Link   int
	Prefix netip.Prefix // host bits kept
	Global bool         // scope global
	// Tentative: duplicate address detection has not completed, or has failed
	// (Duplicate: another machine has the address, and this host does not use it).
	// Deprecated: the preferred lifetime is over. Temporary: a privacy address
	// (RFC 8981).
	Tentative, Duplicate, Deprecated, Temporary bool
	// Dynamic: it has a lifetime (SLAAC, DHCP), or the kernel derives temporary
	// addresses from it.
	Dynamic bool
}

// RouteFact is a route, or one next hop of a multipath route.
type RouteFact struct {
	To     netip.Prefix
	Link   int        // interface index; 0 for unreachable and similar routes
	Via    netip.Addr // gateway; the zero Addr if none
	Source netip.Addr // preferred source; the zero Addr if none
	Metric int
	Ours   bool
}

// ReadFacts reads links, addresses and the main table's routes.
func ReadFacts() (Facts, error) {
	f, err := readAddressing()
	if err != nil {
		return f, err
	}
	routes, err := Retry(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, 0)
	})
	if err != nil {
		return f, fmt.Errorf("listing the routes: %w", err)
	}
	for _, r := range routes {
		f.Routes = append(f.Routes, routeFacts(r)...)
	}
	return f, nil
}

// readAddressing reads links and addresses only, which is cheap even on a host
// with many routes.
func readAddressing() (Facts, error) {
	var f Facts
	links, err := Retry(netlink.LinkList)
	if err != nil {
		return f, fmt.Errorf("listing the network interfaces: %w", err)
	}
	addrs, err := Retry(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return f, fmt.Errorf("listing the addresses: %w", err)
	}
	for _, l := range links {
		a := l.Attrs()
		f.Links = append(f.Links, LinkFact{
			Index: a.Index, Name: a.Name, MTU: a.MTU, Master: a.MasterIndex,
			Local:  a.Flags&net.FlagLoopback != 0 || l.Type() == "dummy",
			Bridge: slices.Contains([]string{"bridge", "bond", "team", "openvswitch"}, l.Type()),
		})
	}
	for _, a := range addrs {
		if fact, ok := addrFact(a); ok {
			f.Addrs = append(f.Addrs, fact)
		}
	}
	return f, nil
}

func addrFact(a netlink.Addr) (AddrFact, bool) {
	p, ok := prefixOf(a.IPNet)
	if !ok {
		return AddrFact{}, false
	}
	return AddrFact{
		Link: a.LinkIndex, Prefix: p,
		Global:     a.Scope == unix.RT_SCOPE_UNIVERSE,
		Tentative:  a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0,
		Duplicate:  a.Flags&unix.IFA_F_DADFAILED != 0,
		Deprecated: a.Flags&unix.IFA_F_DEPRECATED != 0,
		Temporary:  p.Addr().Is6() && a.Flags&unix.IFA_F_TEMPORARY != 0, // for IPv4 the bit means secondary
		Dynamic:    a.Flags&unix.IFA_F_PERMANENT == 0 || a.Flags&unix.IFA_F_MANAGETEMPADDR != 0,
	}, true
}

func routeFacts(r netlink.Route) []RouteFact {
	to, ok := prefixOf(r.Dst)
	if !ok {
		to = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if r.Family == unix.AF_INET6 {
			to = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
	}
	f := RouteFact{To: to.Masked(), Metric: r.Priority, Ours: r.Protocol == names.RouteProtocol}
	if a, ok := netip.AddrFromSlice(r.Src); ok {
		f.Source = a.Unmap()
	}
	if r.Type != unix.RTN_UNICAST && r.Type != unix.RTN_UNSPEC {
		return []RouteFact{f}
	}
	hop := func(link int, gw net.IP, via netlink.Destination) RouteFact {
		f.Link, f.Via = link, netip.Addr{}
		if v, ok := via.(*netlink.Via); ok {
			gw = v.Addr
		}
		if a, ok := netip.AddrFromSlice(gw); ok {
			f.Via = a.Unmap()
		}
		return f
	}
	if len(r.MultiPath) == 0 {
		return []RouteFact{hop(r.LinkIndex, r.Gw, r.Via)}
	}
	var all []RouteFact
	for _, n := range r.MultiPath {
		all = append(all, hop(n.LinkIndex, n.Gw, n.Via))
	}
	return all
}

// link returns the interface with an index.
func (f Facts) link(index int) (LinkFact, bool) {
	i := slices.IndexFunc(f.Links, func(l LinkFact) bool { return l.Index == index })
	if i < 0 {
		return LinkFact{}, false
	}
	return f.Links[i], true
}

// bearers returns the interfaces that have an address, whatever their state.
func (f Facts) bearers(a netip.Addr) []int {
	var all []int
	for _, x := range f.Addrs {
		if x.Prefix.Addr() == a {
			all = append(all, x.Link)
		}
	}
	return all
}

// duplicate reports whether the host does not use an address because another machine on
// the link has it.
func (f Facts) duplicate(a netip.Addr) bool {
	return slices.ContainsFunc(f.Addrs, func(x AddrFact) bool { return x.Prefix.Addr() == a && x.Duplicate })
}

// HasAddrs reports whether the host has all of the addresses.
func (f Facts) HasAddrs(addrs []netip.Addr) bool {
	return !slices.ContainsFunc(addrs, func(a netip.Addr) bool { return len(f.bearers(a)) == 0 })
}

// defaults returns other programs' default routes of a family that lead to a
// link, sorted by metric.
func (f Facts) defaults(is4 bool) []RouteFact {
	var all []RouteFact
	for _, r := range f.Routes {
		if r.To.Bits() == 0 && r.To.Addr().Is4() == is4 && r.Link != 0 && !r.Ours {
			all = append(all, r)
		}
	}
	slices.SortStableFunc(all, func(a, b RouteFact) int { return a.Metric - b.Metric })
	return all
}

// route returns the most specific route to an address among those that keep
// accepts.
func (f Facts) route(to netip.Addr, keep func(RouteFact) bool) (RouteFact, bool) {
	best, found := RouteFact{}, false
	for _, r := range f.Routes {
		if !r.To.Contains(to) || !keep(r) {
			continue
		}
		if !found || r.To.Bits() > best.To.Bits() || r.To.Bits() == best.To.Bits() && r.Metric < best.Metric {
			best, found = r, true
		}
	}
	return best, found
}

// LinkNetwork is a network that is directly connected to a link of the host.
type LinkNetwork struct {
	Link   string
	Prefix netip.Prefix // an interface address with its prefix length, or a route's destination
}

// Networks returns the directly connected networks of all links except ours and
// the pods': their global addresses, and routes without a gateway.
func (f Facts) Networks(k UnderlayContext) []LinkNetwork {
	pods := f.podLinks(k)
	var all []LinkNetwork
	add := func(index int, p netip.Prefix) {
		l, ok := f.link(index)
		a := p.Addr()
		if !ok || names.Ours(l.Name) || pods[index] || p.Bits() == 0 || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast() {
			return
		}
		n := LinkNetwork{l.Name, p}
		if !slices.ContainsFunc(all, func(o LinkNetwork) bool { return o.Link == n.Link && o.Prefix.Masked() == p.Masked() }) {
			all = append(all, n)
		}
	}
	for _, a := range f.Addrs {
		if a.Global {
			add(a.Link, a.Prefix)
		}
	}
	for _, r := range f.Routes {
		if !r.Ours && !r.Via.IsValid() {
			add(r.Link, r.To)
		}
	}
	return all
}

// RouteOfOthers returns the most specific route to an address that is not ours
// and does not lead to a device of ours.
func (f Facts) RouteOfOthers(to netip.Addr) (RouteFact, bool) {
	return f.route(to, func(r RouteFact) bool {
		l, ok := f.link(r.Link)
		return !r.Ours && ok && !names.Ours(l.Name)
	})
}

// Route returns the most specific route to an address, ours included.
func (f Facts) Route(to netip.Addr) (RouteFact, bool) {
	return f.route(to, func(RouteFact) bool { return true })
}

// LinkName returns the name of an interface.
func (f Facts) LinkName(index int) (string, bool) {
	l, ok := f.link(index)
	return l.Name, ok
}
