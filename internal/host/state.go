// Package host makes the kernel of this host equal to a State: devices,
// addresses, routes, neighbours, FDB entries, and through package firewall the
// packet filter. It does not
// decide what the State is: the datapaths in packages backend and
// backend/tunnel pass a Plan, and their Keeper holds the last State and View.
// The start, events and repairs all take the same path:
//
//	          Plan(View)           read          diff          write
//	snapshot ────────────▶ State ────────┐
//	                                     ├──▶ steps ──▶ netlink, in batches
//	kernel   ────────────▶ reading ──────┘
//
// Plan and diff do no I/O. Applying a state twice writes nothing.
//
// culvert's objects are identifiable: links by name, routes by protocol number,
// the table by name, rules in other programs' chains by comment. Of other
// objects it changes only sysctls, removes only the devices in Replaces and
// the routes in Stale, and restores the pods' bridge.
package host

import (
	"fmt"
	"math"
	"net"
	"net/netip"
	"strings"

	"culvert/internal/firewall"
	"culvert/internal/names"
)

// State is what culvert wants in the kernel. Applying the zero value removes
// everything that is culvert's, except sysctls.
type State struct {
	// Replaces names devices of other programs to remove just before ours are
	// created, because they conflict.
	Replaces []string
	// Subnets are this node's own.
	Subnets []netip.Prefix
	// Bridges are the names of the bridges in the CNI records that are pods' gateways.
	Bridges []string
	// Stale are routes of other programs to remove.
	Stale      []StaleRoute
	Links      []Link
	Routes     []Route
	Neighbours []Neighbour
	FDB        []FDBEntry
	Firewall   firewall.Policy
	// FastPath allows culvert's tc filters on the links and on the tunnels'
	// uplinks. A Follower attaches them.
	FastPath bool
	// ShortWay allows culvert's tc filters on pods' links too.
	ShortWay bool
	// Process are the tunnels that a process carries, for the fast path.
	Process []ProcessTunnel
}

// ProcessTunnel describes the tunnel of one address family that a process
// carries, as Link and FDBEntry describe a vxlan device.
type ProcessTunnel struct {
	Link   string       // a TUN device
	VXLAN  VXLAN        // with Port 0 IPIP, of which only Local and Device are set
	Subnet netip.Prefix // this node's
	Peers  []ProcessPeer
	// Unfit says why the fast path cannot carry it; "" if it can.
	Unfit string
}

// ProcessPeer is a peer of a ProcessTunnel.
type ProcessPeer struct {
	Inner netip.Prefix
	Outer netip.Addr
	MAC   MAC // of its VTEP, if it has one
}

// Link is the wanted state of a device of culvert's. If VXLAN, IPIP and Veth
// are unset, a process creates it, such as a TUN device; host configures it but
// never creates it.
type Link struct {
	Name  string
	MTU   int            // in bytes of an IP packet
	Addrs []netip.Prefix // all addresses except IPv6 link-local ones
	// GSOMaxSegs limits the GSO frames that the kernel passes to the device, in
	// segments; 0 leaves the limit unchanged.
	GSOMaxSegs int
	VXLAN      *VXLAN
	IPIP       *IPIP
	// Veth is the other end of a veth pair, which is a Link too.
	Veth string
}

// VXLAN is the configuration of a kernel vxlan device (RFC 7348). Other options
// are off: rsc, proxy, l2miss, l3miss, vnifilter.
type VXLAN struct {
	MAC      MAC
	VNI      uint32
	Local    netip.Addr // outer source; its family is the outer one
	Device   string     // the uplink
	Port     uint16     // UDP
	Learning bool       // learn addresses from received packets
	GBP      bool       // group policy extension
	// NoChecksum sends a zero outer UDP checksum. Packets with and without one
	// are received.
	NoChecksum bool
}

// IPIP is the configuration of a kernel ipip device (RFC 2003). It has no
// remote address, because each peer's route names it, and is not bound to a
// link, so its packets follow the underlay's routes.
type IPIP struct {
	Local netip.Addr
}

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// Route is a route to a prefix through a link, or an unreachable route if Link
// is empty.
type Route struct {
	To   netip.Prefix
	Via  netip.Addr // gateway; the zero Addr if none
	Link string
	// OnLink treats Via as directly reachable, whatever the addresses of the
	// link.
	OnLink bool
	Source netip.Addr // preferred source
	Metric int        // 0 is the kernel's default, which for IPv6 is 1024
}

// UnreachableMetric yields to every other route. Package netlink has metrics as an int,
// of which 32-bit processors have the lower half.
const UnreachableMetric = (1<<32 - 2) & math.MaxInt

// normal returns the route as the kernel reports it.
func (r Route) normal() Route {
	if r.Metric == 0 && !r.To.Addr().Is4() {
		r.Metric = 1024 // IP6_RT_PRIO_USER
	}
	return r
}

// String returns the route as the arguments of `ip route add`.
func (r Route) String() string {
	if r.Link == "" {
		return fmt.Sprintf("unreachable %s proto %d metric %d", r.To, names.RouteProtocol, r.Metric)
	}
	s := r.To.String()
	if r.Via.IsValid() {
		s += " via " + r.Via.String()
	}
	s += fmt.Sprintf(" dev %s proto %d", r.Link, names.RouteProtocol)
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

// Neighbour is a permanent neighbour entry.
type Neighbour struct {
	Link string
	IP   netip.Addr
	MAC  MAC
}

func (n Neighbour) String() string {
	return fmt.Sprintf("%s lladdr %s nud permanent dev %s", n.IP, n.MAC, n.Link)
}

// FDBEntry is a permanent FDB entry: the underlay address for an Ethernet
// address.
type FDBEntry struct {
	Link string
	MAC  MAC
	To   netip.Addr
}

func (e FDBEntry) String() string {
	return fmt.Sprintf("%s dev %s dst %s self permanent", e.MAC, e.Link, e.To)
}

// addCommand returns the shell command that creates the device.
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
