package host

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
)

// TableName is the nftables table that is culvert's.
const TableName = "culvert"

// Firewall is what culvert wants of nftables.
type Firewall struct {
	Masquerade []Masquerade // one per address family, IPv4 first
	Tunnels    []Tunnel     // one per outer address family
	// Forward are the networks whose packets must get through other programs'
	// FORWARD chains.
	Forward []netip.Prefix
}

// Masquerade is the rule, in one address family, that traffic from pods
// leaving the cluster network bears the node's address, and that traffic
// within it never does.
type Masquerade struct {
	Network netip.Prefix // the cluster's
	Subnet  netip.Prefix // this node's
	// Except are destinations that see the pod's own address.
	Except []netip.Prefix
}

// Tunnel is what the rules must know of the tunnel's encapsulated packets.
type Tunnel struct {
	Port    uint16       // UDP, of VXLAN; 0 for IPIP
	VNI     uint32       // of VXLAN
	Network netip.Prefix // the cluster's; of the inner family, which is also the outer one
	// Device is the kernel's that takes packets off the wire. It checks nothing:
	// these rules do. Empty where a process takes them.
	Device string
	Subnet netip.Prefix // this node's
	Peers  []Source
	// Underlay is the link that tunnel packets come in by, and Local this node's
	// own address there: the outer source of what it sends.
	Underlay string
	Local    netip.Addr
	// NoFIB says that the kernel lacks nftables' fib expression.
	NoFIB bool
}

// Source is a pair that belongs together: a peer's underlay address and the
// subnet that it leases.
type Source struct {
	Outer netip.Addr
	Inner netip.Prefix
}

// kubeMark is set on packets that kube-proxy masquerades itself.
const kubeMark = 0x4000

// masquerade returns the lines of a family, which say what flannel's say:
//
//  1. what goes to an exempted network: the pod's own address
//  2. pods to pods: no translation; with the address of a pod that is not here, which
//     flannel would translate to the node's, it is a forgery, for the tunnel to drop
//  3. others to this node's pods: none either, the pod sees who it is
//  4. pods to anywhere else, multicast apart: the node's address
//  5. others to pods elsewhere: the node's address, so that the answer returns
func (m Masquerade) rules() []rule {
	is4 := m.Network.Addr().Is4()
	multicast := netip.MustParsePrefix("224.0.0.0/4")
	if !is4 {
		multicast = netip.MustParsePrefix("ff00::/8")
	}
	masquerade := rule{"masquerade fully-random", masqueradeExprs(), ""}
	var lines []rule
	for _, p := range m.Except {
		lines = append(lines, all(familyIs(is4, ""), address("daddr", true, p), leave()))
	}
	return append(lines,
		all(familyIs(is4, ""), address("saddr", true, m.Network), address("daddr", true, m.Network), leave()),
		all(familyIs(is4, ""), address("daddr", true, m.Subnet), leave()),
		all(familyIs(is4, ""), address("saddr", true, m.Network), address("daddr", false, multicast), masquerade),
		all(familyIs(is4, ""), address("saddr", false, m.Network), address("daddr", true, m.Network), masquerade),
	)
}

// Where things stand in a VXLAN datagram, counted from the UDP header: RFC 7348.
const (
	vxlanVNI       = 8 + 4
	vxlanEtherType = 8 + 8 + 12
	vxlanInner     = 8 + 8 + 14 // the inner IP header
)

// is matches the tunnel's packets by their outer headers.
func (t Tunnel) is() rule {
	if t.Port == 0 {
		return protocol(4, "meta l4proto 4") // RFC 2003
	}
	return udpPort(t.Port)
}

// notOf returns the lines that let all pass that is no VXLAN packet of these
// tunnels, so that it meets no further line. Nothing follows that would concern
// it. None if the tunnels are IPIP's.
func notOf(tunnels []Tunnel) []rule {
	port := tunnels[0].Port
	if port == 0 || slices.ContainsFunc(tunnels, func(t Tunnel) bool { return t.Port != port }) {
		return nil
	}
	return []rule{all(notUDP(), leave()), all(notUDPPort(port), leave())}
}

// expected returns the lines that let the packets of peers pass, before all that
// would look at them one by one: what is no translation, comes in by the underlay
// (which no line of forged concerns), not from this node's own pods, and belongs
// to its peer. So most packets meet one line.
func (t Tunnel) expected() []rule {
	if t.Device == "" || t.Port == 0 || t.Underlay == "" || !t.Subnet.IsValid() {
		return nil
	}
	is, right := t.inner()
	var lines []rule
	for _, s := range t.sets() {
		lines = append(lines, all(inputDevice(t.Underlay), is, untranslated(), address("saddr", false, t.Subnet), right, s.pair(), leave()))
	}
	return lines
}

// inner matches VXLAN packets of our VNI, and, as the second part, those of them
// that have an IP packet of the family inside.
func (t Tunnel) inner() (is, right rule) {
	ethertype := []byte{0x08, 0x00}
	if !t.is4() {
		ethertype = []byte{0x86, 0xdd}
	}
	is = all(t.isNamed(), transport(vxlanVNI, 3, true, []byte{byte(t.VNI >> 16), byte(t.VNI >> 8), byte(t.VNI)}))
	return is, transport(vxlanEtherType, 2, true, ethertype)
}

// received returns the lines that drop what may not come in: packets that a
// kernel device would take, but of strangers, or of a peer with an inner source
// that is not in its subnet. What belongs to a peer leaves by the first line, or
// where peers lease subnets of several sizes by one of the first.
//
// They stand in the input hook, where fragments are whole again and the device
// has not seen the packet. IPIP has no number of its own like the VNI: its packets are ours
// if they lead into the cluster network.
func (t Tunnel) received() []rule {
	is, right := t.isNamed(), innerDestination(t.Network)
	if t.Port != 0 {
		is, right = t.inner()
	}
	var lines []rule
	for _, s := range t.sets() {
		lines = append(lines, all(is, right, s.pair(), leave()))
	}
	if t.Local.IsValid() {
		ours := is
		if t.Port == 0 {
			ours = all(is, right)
		}
		lines = append(lines, all(ours, t.nodes().lacks("saddr"), drop("ingress-stranger")))
	}
	lines = append(lines, all(is, right, drop("ingress-source")))
	if t.Port != 0 {
		lines = append(lines, all(is, drop("ingress-protocol")))
	}
	return lines
}

// taken returns the line that keeps IPIP packets from the kernel where a process
// has taken them off the wire already, by a packet socket. A kernel that has
// ipip devices would answer each that none of them wants with port unreachable,
// upon which its sender's device gives up the way for a while.
func (t Tunnel) taken() rule {
	return all(familyIs(true, "meta nfproto ipv4"), t.is(), innerDestination(t.Network), verdict(expr.VerdictDrop, "drop"))
}

// unpacked returns the line that drops what came out of the tunnel and is for
// nobody in this node's subnet: the node is no router into other networks.
func (t Tunnel) unpacked() rule {
	return all(inputDevice(t.Device), familyIs(t.Network.Addr().Is4(), ""), address("daddr", false, t.Subnet), drop("ingress-destination"))
}

// A receiver knows a peer by the outer source alone. So each node keeps its own
// pods, and whatever else it forwards packets for, from sending tunnel packets
// with a node's address as the source:
//
//	forward      pod's own source, towards the underlay      egress-encapsulated
//	             a node's address, from where it is not       egress-forged
//	postrouting  translated to this node's address           egress-encapsulated
//	input        the same as in forward, to this node's port
//	             translated to this node's port               ingress-translated
//
// The input and forward hooks come after DNAT, so what a Service leads to a
// tunnel port is seen as such. A later fragment has no ports, but without its
// first one it is nothing.

// forwarded returns the lines of the forward hook. Most packets are those of the
// first line.
func (t Tunnel) forwarded() []rule {
	lines := []rule{
		all(familyIs(t.is4(), ""), address("saddr", true, t.Network), address("daddr", true, t.Network), leave()),
		all(familyIs(t.is4(), ""), address("saddr", true, t.Network), address("daddr", false, t.Network), t.is(), drop("egress-encapsulated")),
	}
	return append(lines, t.forged()...)
}

// arriving returns the lines of the input hook that drop what does not come from
// the underlay, or only by a translation.
func (t Tunnel) arriving() []rule {
	// A sender that may not send to our port could have a port translated to it.
	lines := []rule{all(t.isNamed(), translated(), drop("ingress-translated"))}
	if t.Subnet.IsValid() {
		lines = append(lines, all(familyIs(t.is4(), ""), address("saddr", true, t.Subnet), t.is(), drop("egress-encapsulated")))
	}
	return append(lines, t.forged()...)
}

// forged returns the lines that drop tunnel packets with a node's address as the
// source that come in by a bridge or a veth, and not by the link that leads to
// that address. A node may be a virtual machine or a container behind this
// host's bridge: then that is the link. Physical links are left alone, since the
// ways there and back may differ.
func (t Tunnel) forged() []rule {
	if !t.Local.IsValid() {
		return nil
	}
	var lines []rule
	for _, kind := range []string{"bridge", "veth"} {
		parts := []rule{t.isNamed(), inputKind(kind)}
		if t.Underlay != "" {
			parts = append(parts, notInputDevice(t.Underlay))
		}
		parts = append(parts, t.nodes().holds("saddr"))
		if !t.NoFIB {
			parts = append(parts, notTheWayBack())
		}
		lines = append(lines, all(append(parts, drop("egress-forged"))...))
	}
	return lines
}

// departed returns the line that drops forwarded tunnel packets to which a
// translation, whoever's, gave this node's address. What the kernel's own device
// makes has come in by that device; what a process sends, by none.
func (t Tunnel) departed() (line rule, ok bool) {
	if !t.Local.IsValid() {
		return line, false
	}
	parts := []rule{familyIs(t.is4(), ""), address("saddr", true, netip.PrefixFrom(t.Local, t.Local.BitLen())), t.is(), someInput()}
	if t.Device != "" {
		parts = append(parts, notInputDevice(t.Device))
	}
	return all(append(parts, drop("egress-encapsulated"))...), true
}

func (t Tunnel) is4() bool { return t.Network.Addr().Is4() }

// isNamed is is for a line that compares no address of the family.
func (t Tunnel) isNamed() rule {
	named := map[bool]string{true: "meta nfproto ipv4", false: "meta nfproto ipv6"}
	return all(familyIs(t.is4(), named[t.is4()]), t.is())
}

// nodes is the set of the underlay addresses of all nodes, this one's included.
func (t Tunnel) nodes() set {
	s := set{name: "nodes4", is4: t.is4(), bits: nodesOnly}
	if !t.is4() {
		s.name = "nodes6"
	}
	addrs := map[netip.Addr]bool{t.Local: true}
	s.elements = []Source{{Outer: t.Local}}
	for _, p := range t.Peers {
		if !addrs[p.Outer] {
			addrs[p.Outer] = true
			s.elements = append(s.elements, Source{Outer: p.Outer})
		}
	}
	return s
}

// sets are the sets of the peers' Sources: one for each length of their prefixes,
// nearly always one in all, in the order of the lengths.
func (t Tunnel) sets() []set {
	is4 := t.Network.Addr().Is4()
	offset, name := addressOffset("saddr", is4), "peers4"
	if !is4 {
		name = "peers6"
	}
	if t.Port != 0 {
		offset += vxlanInner
	}
	byBits := make(map[int][]Source)
	for _, p := range t.Peers {
		byBits[p.Inner.Bits()] = append(byBits[p.Inner.Bits()], p)
	}
	var sets []set
	for _, bits := range slices.Sorted(maps.Keys(byBits)) {
		sets = append(sets, set{name: fmt.Sprintf("%s_%d", name, bits), is4: is4, bits: bits, offset: offset, elements: byBits[bits]})
	}
	return sets
}

// table returns the whole table, or nil if nothing of it is wanted.
func (f Firewall) table() *table {
	t := &table{}
	if len(f.Masquerade) > 0 {
		lines := []rule{all(marked(), leave())}
		for _, m := range f.Masquerade {
			lines = append(lines, m.rules()...)
		}
		t.chains = append(t.chains, chain{"postrouting", lines})
	}
	var in, inner, out, departed []rule
	if len(f.Tunnels) > 0 {
		in = notOf(f.Tunnels)
	}
	for _, tunnel := range f.Tunnels {
		in = append(in, tunnel.expected()...)
	}
	for _, tunnel := range f.Tunnels {
		in = append(in, tunnel.arriving()...)
		if tunnel.Device == "" && tunnel.Port == 0 {
			in = append(in, tunnel.taken())
		}
		if tunnel.Device != "" {
			in = append(in, tunnel.received()...)
			inner = append(inner, tunnel.unpacked())
			t.sets = append(t.sets, tunnel.sets()...)
		}
		out = append(out, tunnel.forwarded()...)
		if line, ok := tunnel.departed(); ok {
			departed = append(departed, line)
			t.sets = append(t.sets, tunnel.nodes())
		}
	}
	if len(in) > 0 {
		t.chains = append(t.chains, chain{"input", in})
	}
	if len(inner) > 0 {
		t.chains = append(t.chains, chain{"prerouting", inner})
	}
	if len(out) > 0 {
		t.chains = append(t.chains, chain{"forward", out})
	}
	if len(departed) > 0 {
		t.chains = append(t.chains, chain{"departed", departed})
	}
	if len(t.chains) == 0 {
		return nil
	}
	return t
}
