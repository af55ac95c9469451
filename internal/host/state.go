// Package host makes the kernel of this host equal to a State: addresses,
// routes, the nftables table. The state is computed whole by whoever wants it,
// and Apply changes the difference; applying it twice does nothing.
//
// What is culvert's can be told apart: links by their names, routes by their
// protocol number, the table by its name. Nothing else is touched.
package host

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// RouteProtocol marks culvert's routes (see rtnetlink(7), rtm_protocol).
const RouteProtocol = 67

// State is what culvert wants of the kernel. Its zero value wants nothing:
// applying it removes everything that is culvert's.
type State struct {
	Links      []Link
	Routes     []Route
	Masquerade []Masquerade // one per address family, IPv4 first
}

// Link is a device of culvert's own that exists, and what it should be.
type Link struct {
	Name  string
	MTU   int            // bytes of an IP packet
	Addrs []netip.Prefix // all that it bears, link-local ones apart
	// GSOMaxSegs bounds the frames that the kernel hands to the device, in
	// segments; 0 leaves it as it is.
	GSOMaxSegs int
}

// Route is a route to a prefix through a link, or, where Link is empty, the
// word that the prefix is unreachable.
type Route struct {
	To     netip.Prefix
	Link   string
	Source netip.Addr // of packets that this node sends itself
	Metric int        // 0 is preferred to any other
}

// UnreachableMetric is what gives way to every real route.
const UnreachableMetric = 1<<32 - 2

func (r Route) String() string {
	if r.Link == "" {
		return fmt.Sprintf("unreachable %s proto %d metric %d", r.To, RouteProtocol, r.Metric)
	}
	s := fmt.Sprintf("%s dev %s proto %d", r.To, r.Link, RouteProtocol)
	if r.Source.IsValid() {
		s += " src " + r.Source.String()
	}
	if r.Metric != 0 {
		s += fmt.Sprintf(" metric %d", r.Metric)
	}
	return s
}

// Apply makes the kernel equal to the state and returns what it changed, as
// commands that a person would type. It goes on past an error, since each part
// stands for itself, and returns all errors together.
func Apply(s State) ([]string, error) {
	var changes []string
	var errs []error
	for _, part := range []func(State) ([]string, error){applyForwarding, applyLinks, applyRoutes, applyMasquerade} {
		c, err := part(s)
		changes = append(changes, c...)
		errs = append(errs, err)
	}
	return changes, errors.Join(errs...)
}

// applyForwarding turns packet forwarding on where there is anything to
// forward. It is never turned off: others may need it.
func applyForwarding(s State) ([]string, error) {
	var changes []string
	for _, is4 := range []bool{true, false} {
		if !slices.ContainsFunc(s.Routes, func(r Route) bool { return r.To.Addr().Is4() == is4 }) {
			continue
		}
		key := "net/ipv4/ip_forward"
		if !is4 {
			key = "net/ipv6/conf/all/forwarding"
		}
		changed, err := setSysctl(key, "1")
		if err != nil {
			return changes, fmt.Errorf("turning packet forwarding on: %w", err)
		}
		if changed {
			changes = append(changes, "sysctl -w "+strings.ReplaceAll(key, "/", ".")+"=1")
		}
	}
	return changes, nil
}

func setSysctl(key, value string) (changed bool, err error) {
	path := "/proc/sys/" + key
	old, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	if strings.TrimSpace(string(old)) == value {
		return false, nil
	}
	return true, os.WriteFile(path, []byte(value), 0)
}

func applyLinks(s State) ([]string, error) {
	var changes []string
	for _, want := range s.Links {
		c, err := applyLink(want)
		changes = append(changes, c...)
		if err != nil {
			return changes, fmt.Errorf("setting up %s: %w", want.Name, err)
		}
	}
	return changes, nil
}

func applyLink(want Link) ([]string, error) {
	link, err := netlink.LinkByName(want.Name)
	if err != nil {
		return nil, err
	}
	var changes []string
	var errs []error
	do := func(err error, format string, args ...any) {
		if err != nil {
			errs = append(errs, fmt.Errorf(format+": %w", append(args, err)...))
			return
		}
		changes = append(changes, fmt.Sprintf(format, args...))
	}
	have := link.Attrs()
	// Nobody on a tunnel device is found by link-local address, and nobody asks.
	if changed, err := setSysctl("net/ipv6/conf/"+want.Name+"/addr_gen_mode", "1"); changed || err != nil && !errors.Is(err, fs.ErrNotExist) {
		do(err, "ip link set %s addrgenmode none", want.Name)
	}
	if want.MTU != 0 && have.MTU != want.MTU {
		do(netlink.LinkSetMTU(link, want.MTU), "ip link set %s mtu %d", want.Name, want.MTU)
	}
	if want.GSOMaxSegs != 0 && have.GSOMaxSegs != uint32(want.GSOMaxSegs) {
		do(netlink.LinkSetGSOMaxSegs(link, want.GSOMaxSegs), "ip link set %s gso_max_segs %d", want.Name, want.GSOMaxSegs)
	}

	addrs, err := retry(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return changes, err
	}
	borne := make(map[netip.Prefix]bool)
	for _, a := range addrs {
		p, ok := prefixOf(a.IPNet)
		if !ok || p.Addr().IsLinkLocalUnicast() {
			continue
		}
		if slices.Contains(want.Addrs, p) {
			borne[p] = true
			continue
		}
		do(netlink.AddrDel(link, &a), "ip address del %s dev %s", p, want.Name)
	}
	for _, p := range want.Addrs {
		if !borne[p] {
			do(netlink.AddrAdd(link, &netlink.Addr{IPNet: IPNet(p), Flags: addrFlags(p)}), "ip address add %s dev %s", p, want.Name)
		}
	}
	if have.RawFlags&unix.IFF_UP == 0 {
		do(netlink.LinkSetUp(link), "ip link set %s up", want.Name)
	}
	return changes, errors.Join(errs...)
}

// addrFlags spares an IPv6 address the search for a duplicate, during which it
// could not be used: nobody else is on the link.
func addrFlags(p netip.Prefix) int {
	if p.Addr().Is4() {
		return 0
	}
	return unix.IFA_F_NODAD
}

func applyRoutes(s State) ([]string, error) {
	names := make(map[int]string)
	indexes := make(map[string]int)
	links, err := retry(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing the network interfaces: %w", err)
	}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
		indexes[l.Attrs().Name] = l.Attrs().Index
	}
	filter := &netlink.Route{Protocol: RouteProtocol}
	have, err := retry(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_ALL, filter, netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		return nil, fmt.Errorf("listing the routes: %w", err)
	}
	var changes []string
	var errs []error
	present := make(map[Route]bool)
	for _, r := range have {
		got, ok := routeOf(r, names)
		if ok && slices.Contains(s.Routes, got) {
			present[got] = true
			continue
		}
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("ip route del %s: %w", got, err))
			continue
		}
		changes = append(changes, "ip route del "+got.String())
	}
	for _, want := range sorted(s.Routes) {
		if present[want] {
			continue
		}
		r := &netlink.Route{Dst: IPNet(want.To), Protocol: RouteProtocol, Priority: want.Metric}
		if want.Link == "" {
			r.Type = unix.RTN_UNREACHABLE
		} else {
			r.LinkIndex = indexes[want.Link]
			r.Scope = netlink.SCOPE_LINK
			if !want.To.Addr().Is4() {
				r.Scope = netlink.SCOPE_UNIVERSE
			}
		}
		if want.Source.IsValid() {
			r.Src = want.Source.AsSlice()
		}
		if err := netlink.RouteReplace(r); err != nil {
			errs = append(errs, fmt.Errorf("ip route replace %s: %w", want, err))
			continue
		}
		changes = append(changes, "ip route replace "+want.String())
	}
	return changes, errors.Join(errs...)
}

// sorted puts the routes that catch what others miss first, so that at no
// moment does a packet for the cluster network take the default route.
func sorted(routes []Route) []Route {
	return slices.SortedStableFunc(slices.Values(routes), func(a, b Route) int {
		return cmp.Compare(b.Metric, a.Metric)
	})
}

func routeOf(r netlink.Route, names map[int]string) (Route, bool) {
	to, ok := prefixOf(r.Dst)
	if !ok {
		return Route{}, false
	}
	got := Route{To: to, Metric: r.Priority}
	if r.Type != unix.RTN_UNREACHABLE {
		got.Link = names[r.LinkIndex]
	}
	if a, ok := netip.AddrFromSlice(r.Src); ok {
		got.Source = a.Unmap()
	}
	return got, true
}
