// Package host makes the kernel of this host equal to a State: devices,
// addresses, routes, neighbours, FDB entries, the nftables table. The state is
// computed whole by whoever wants it, and one way leads from it to the kernel,
// for the start, for an event, and for a repair:
//
//	          Plan(View)           read          diff          write
//	snapshot ────────────▶ State ────────┐
//	                                     ├──▶ steps ──▶ netlink, in batches
//	kernel   ────────────▶ reading ──────┘
//
// Plan and diff are pure; reading and writing are in a file each. Applying a
// state twice writes nothing.
//
// What is culvert's can be told apart: links by their names, routes by their
// protocol number, the table by its name, a rule in somebody's FORWARD chain by
// its comment. Nothing else is touched.
package host

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// RouteProtocol marks culvert's routes (see rtnetlink(7), rtm_protocol).
const RouteProtocol = 67

// State is what culvert wants of the kernel. Its zero value wants nothing:
// applying it removes everything that is culvert's.
type State struct {
	// Replaces names devices of other programs that go just before ours come,
	// because the two cannot exist together.
	Replaces []string
	// Subnets are this node's own.
	Subnets []netip.Prefix
	// Stale are routes of other programs that go.
	Stale      []StaleRoute
	Links      []Link
	Routes     []Route
	Neighbours []Neighbour
	FDB        []FDBEntry
	Firewall   Firewall
	// FastPath says that tc filters of culvert's may stay on the links, and on the
	// uplinks of the vxlan devices. A Follower attaches them.
	FastPath bool
}

// Link is a device of culvert's own, and what it should be. Where none
// of VXLAN, IPIP and Veth is set it is a process's, such as a TUN device: it is set up
// while it exists, and never made.
type Link struct {
	Name  string
	MTU   int            // bytes of an IP packet
	Addrs []netip.Prefix // all that it bears, link-local ones apart
	// GSOMaxSegs bounds the frames that the kernel hands to the device, in
	// segments; 0 leaves it as it is.
	GSOMaxSegs int
	VXLAN      *VXLAN
	IPIP       *IPIP
	// Veth is the other end, where the device is one of a pair: a Link too.
	Veth string
}

// VXLAN is how a kernel vxlan device is made (RFC 7348). What is not said is
// off: rsc, proxy, l2miss, l3miss, vnifilter.
type VXLAN struct {
	MAC      MAC
	VNI      uint32
	Local    netip.Addr // outer source; its family is the outer one
	Device   string     // the underlay's
	Port     uint16     // UDP
	Learning bool       // of addresses from what arrives
	GBP      bool       // group policy in the header
	// NoChecksum leaves the outer UDP checksum zero, on the way out; either is
	// taken on the way in.
	NoChecksum bool
}

// IPIP is how a kernel ipip device is made (RFC 2003). It has no remote end:
// the route of each peer names it. Nor is it bound to a link, so that its
// packets take the underlay's routes.
type IPIP struct {
	Local netip.Addr
}

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// Route is a route to a prefix through a link, or, where Link is empty, the
// word that the prefix is unreachable.
type Route struct {
	To   netip.Prefix
	Via  netip.Addr // gateway, which may be the zero Addr
	Link string
	// OnLink says that Via is on the link although no address of it says so.
	OnLink bool
	Source netip.Addr // of packets that this node sends itself
	Metric int        // 0 is the kernel's default, which in IPv6 is 1024
}

// UnreachableMetric is what gives way to every real route.
const UnreachableMetric = 1<<32 - 2

// normal is the route as the kernel would tell it back.
func (r Route) normal() Route {
	if r.Metric == 0 && !r.To.Addr().Is4() {
		r.Metric = 1024 // IP6_RT_PRIO_USER
	}
	return r
}

// String is the route as `ip route add` takes it.
func (r Route) String() string {
	if r.Link == "" {
		return fmt.Sprintf("unreachable %s proto %d metric %d", r.To, RouteProtocol, r.Metric)
	}
	s := r.To.String()
	if r.Via.IsValid() {
		s += " via " + r.Via.String()
	}
	s += fmt.Sprintf(" dev %s proto %d", r.Link, RouteProtocol)
	if r.Source.IsValid() {
		s += " src " + r.Source.String()
	}
	if r.Metric != 0 {
		s += fmt.Sprintf(" metric %d", r.Metric)
	}
	if r.OnLink {
		s += " onlink"
	}
	return s
}

// Neighbour says, for ever, which Ethernet address an IP address has.
type Neighbour struct {
	Link string
	IP   netip.Addr
	MAC  MAC
}

func (n Neighbour) String() string {
	return fmt.Sprintf("%s lladdr %s nud permanent dev %s", n.IP, n.MAC, n.Link)
}

// FDBEntry says, for ever, to which underlay address frames for an Ethernet
// address go.
type FDBEntry struct {
	Link string
	MAC  MAC
	To   netip.Addr
}

func (e FDBEntry) String() string {
	return fmt.Sprintf("%s dev %s dst %s self permanent", e.MAC, e.Link, e.To)
}

// addCommand is how a person would make the device.
func (l Link) addCommand() string {
	switch {
	case l.VXLAN != nil:
		v := l.VXLAN
		s := fmt.Sprintf("ip link add %s address %s mtu %d type vxlan id %d local %s dev %s dstport %d",
			l.Name, v.MAC, l.MTU, v.VNI, v.Local, v.Device, v.Port)
		s += flag(v.Learning, "learning") + " " + checksumFlags(*v)
		if v.GBP {
			s += " gbp"
		}
		return s
	case l.IPIP != nil:
		return fmt.Sprintf("ip link add %s mtu %d type ipip local %s", l.Name, l.MTU, l.IPIP.Local)
	case l.Veth != "":
		return fmt.Sprintf("ip link add %s mtu %d type veth peer name %s", l.Name, l.MTU, l.Veth)
	}
	return "# a process makes " + l.Name
}

func checksumFlags(v VXLAN) string {
	if v.Local.Is4() {
		return strings.TrimSpace(flag(!v.NoChecksum, "udpcsum"))
	}
	return strings.TrimSpace(flag(v.NoChecksum, "udp6zerocsumtx")) + " udp6zerocsumrx"
}

func flag(on bool, name string) string {
	if on {
		return " " + name
	}
	return " no" + name
}

// The pair of veth whose far end joins the segments of bulk flows (GRO).
const (
	JoinNear = "cvt.join0"
	JoinFar  = "cvt.join1"
)

// Ours says whether a device bears one of culvert's names: culvert0, cvt.<VNI>,
// cvt6.<VNI>, cvt.ipip, cvt.join0, cvt.join1.
func Ours(device string) bool {
	if device == "culvert0" || device == "cvt.ipip" || device == probeDevice || device == JoinNear || device == JoinFar {
		return true
	}
	vni, ok := strings.CutPrefix(device, "cvt.")
	if !ok {
		vni, ok = strings.CutPrefix(device, "cvt6.")
	}
	return ok && vni != "" && strings.Trim(vni, "0123456789") == ""
}
