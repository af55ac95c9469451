package host

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/firewall"
	"culvert/internal/names"
)

// foreignRoute is another program's route in the main table.
type foreignRoute struct {
	Route
	kind  int  // RTN_UNICAST, or a type that drops
	hops  bool // multipath
	proto int  // rtm_protocol
	first bool // listed before our route for the same prefix, which it thus precedes
	index int  // of the link
}

// StaleRoute is another program's route that is known to be wrong: according to
// the store, the subnet is elsewhere now.
type StaleRoute struct {
	To  netip.Prefix
	Via netip.Addr
}

// connected6 is the metric of IPv6 routes that the kernel adds for an address
// (IP6_RT_PRIO_ADDRCONF).
const connected6 = 256

// foreignOf describes another program's route; false for default routes and
// those of the kernel or of router advertisements.
func foreignOf(r rawRoute, linkNames map[int]string, ours map[netip.Prefix]bool) (foreignRoute, bool) {
	if r.to.Bits() == 0 || r.proto == unix.RTPROT_KERNEL || r.proto == unix.RTPROT_RA {
		return foreignRoute{}, false
	}
	return foreignRoute{
		Route: Route{To: r.to.Masked(), Metric: r.metric, Link: linkNames[r.index], Via: r.via.Unmap()},
		kind:  int(r.kind), hops: r.hops, proto: int(r.proto), first: !ours[r.to.Masked()], index: r.index,
	}, true
}

// String returns the route as the arguments of `ip route del`.
func (f foreignRoute) String() string {
	s := f.To.String()
	switch f.kind {
	case unix.RTN_UNREACHABLE:
		s = "unreachable " + s
	case unix.RTN_BLACKHOLE:
		s = "blackhole " + s
	case unix.RTN_PROHIBIT:
		s = "prohibit " + s
	}
	if f.Via.IsValid() {
		s += " via " + f.Via.String()
	}
	if f.Link != "" && f.kind == unix.RTN_UNICAST {
		s += " dev " + f.Link
	}
	s += fmt.Sprintf(" proto %d", f.proto)
	if f.Metric != 0 {
		s += fmt.Sprintf(" metric %d", f.Metric)
	}
	return s
}

// foreignRoutes returns the steps that remove stale routes, and warnings about
// the others that divert packets for this node's pods or for peers'.
func foreignRoutes(have reading, want State) (steps []step, warnings []api.Warning) {
	for _, f := range have.foreign {
		what := want.shadowed(f, have.view.Underlay.Name)
		if what == "" {
			continue
		}
		if slices.Contains(want.Stale, StaleRoute{f.To, f.Via}) {
			steps = append(steps, step{Change: Change{KindRoute, "ip route del " + f.String()}, do: func(*writer) error { return f.delete() }})
			continue
		}
		warnings = append(warnings, api.Warning{
			Check: "foreign-route",
			Text:  fmt.Sprintf("the route %s, which is not culvert's, diverts the packets for %s", f, what),
			Fix:   "ip route del " + f.String(),
		})
	}
	return steps, warnings
}

func (f foreignRoute) delete() error {
	r := &netlink.Route{Dst: IPNet(f.To), Gw: f.Via.AsSlice(), LinkIndex: f.index, Priority: f.Metric, Protocol: netlink.RouteProtocol(f.proto)}
	if err := netlink.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}

// shadowed describes the pods whose packets a foreign route diverts; "" if
// none. A route to local pods has no gateway and leads to a link that is not
// the underlay or ours.
func (s State) shadowed(f foreignRoute, underlay string) string {
	within := slices.ContainsFunc(s.Firewall.Forward, func(n netip.Prefix) bool { return n.Bits() <= f.To.Bits() && n.Contains(f.To.Addr()) })
	if !within {
		return ""
	}
	for _, own := range s.Subnets {
		if own.Bits() > f.To.Bits() || !own.Contains(f.To.Addr()) {
			continue
		}
		local := f.kind == unix.RTN_UNICAST && !f.Via.IsValid() && !f.hops && f.Link != underlay && !names.Managed(f.Link)
		if local || f.To == own && f.Metric > 0 && (own.Addr().Is4() || f.Metric > connected6) {
			return ""
		}
		return "this node's own pods in " + own.String()
	}
	// Our route of the same length, or else the next shorter one.
	best := Route{}
	for _, r := range s.Routes {
		if r = r.normal(); r.Link != "" && r.To.Bits() <= f.To.Bits() && r.To.Contains(f.To.Addr()) && (best.Link == "" || r.To.Bits() > best.To.Bits()) {
			best = r
		}
	}
	if best.Link == "" || f.Link == best.Link && f.Via == best.Via && f.kind == unix.RTN_UNICAST {
		return ""
	}
	if f.To == best.To && (f.Metric > best.Metric || f.Metric == best.Metric && f.To.Addr().Is4() && !f.first) {
		return ""
	}
	if f.To.IsSingleIP() && slices.Contains(s.Firewall.Forward, best.To) && !s.leased(f.To.Addr()) {
		// A host route to an address that is not leased, such as an etcd server
		// within the cluster network's range.
		return ""
	}
	return "pods of other nodes in " + f.To.String()
}

// leased reports whether an address is in a peer's subnet.
func (s State) leased(a netip.Addr) bool {
	return slices.ContainsFunc(s.Firewall.Tunnels, func(t firewall.TunnelRule) bool {
		return slices.ContainsFunc(t.Peers, func(p firewall.Source) bool { return p.Inner.Contains(a) })
	})
}
