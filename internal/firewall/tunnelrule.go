package firewall

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
)

// TunnelRule describes the tunnel's encapsulated packets and which of them to
// accept.
type TunnelRule struct {
	Port    uint16       // UDP port of VXLAN; 0 for IPIP
	VNI     uint32       // VXLAN only
	Network netip.Prefix // the cluster network; its family is the inner and the outer one
	// Device is the kernel device that decapsulates. It checks nothing: these
	// rules do. Empty if a process decapsulates.
	Device string
	Subnet netip.Prefix // this node's subnet
	Peers  []Source
	// Underlay is the link on which tunnel packets arrive, and Local this
	// node's address there: the outer source of what it sends.
	Underlay string
	Local    netip.Addr
	// NoFIB is set if the kernel lacks nftables' fib expression.
	NoFIB bool
}

// Source pairs a peer's underlay address with a subnet that it leases.
type Source struct {
	Outer netip.Addr
	Inner netip.Prefix
}

// Offsets in a VXLAN datagram, from the start of the UDP header (RFC 7348).
const (
	vxlanVNI       = 8 + 4
	vxlanEtherType = 8 + 8 + 12
	vxlanInner     = 8 + 8 + 14 // the inner IP header
)

// is matches the tunnel's packets by their outer headers.
func (t TunnelRule) is() rule {
	if t.Port == 0 {
		return protocol(4, "meta l4proto 4") // RFC 2003
	}
	return udpPort(t.Port)
}

// notOf returns rules that accept everything but the tunnels' VXLAN packets, so
// that other packets skip the remaining rules, none of which applies to them.
// It returns none for IPIP, or if the tunnels' ports differ.
func notOf(tunnels []TunnelRule) []rule {
	port := tunnels[0].Port
	if port == 0 || slices.ContainsFunc(tunnels, func(t TunnelRule) bool { return t.Port != port }) {
		return nil
	}
	return []rule{all(notUDP(), leave()), all(notUDPPort(port), leave())}
}

// expected returns the rules that accept valid packets of peers before the
// detailed checks, so that most packets match one rule. Valid means: not
// translated, arrived on the underlay,
// outer source not in this node's subnet, and inner source in the peer's
// subnet.
func (t TunnelRule) expected() []rule {
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

// inner matches VXLAN packets of our VNI (is), and those of them whose inner
// packet is of the tunnel's family (right).
func (t TunnelRule) inner() (is, right rule) {
	ethertype := []byte{0x08, 0x00}
	if !t.is4() {
		ethertype = []byte{0x86, 0xdd}
	}
	is = all(t.isNamed(), transport(vxlanVNI, 3, true, []byte{byte(t.VNI >> 16), byte(t.VNI >> 8), byte(t.VNI)}))
	return is, transport(vxlanEtherType, 2, true, ethertype)
}

// received returns the rules that drop packets that the kernel device would
// accept but must not: from unknown nodes, and from a peer with an inner source
// outside its subnet. A peer's valid packet matches the first rule, or one of
// the first if peers' subnets differ in size.
//
// They are in the input hook, where fragments are reassembled and the device
// has not yet received the packet. IPIP has no VNI: packets are ours if their
// inner destination is in the cluster network.
func (t TunnelRule) received() []rule {
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
		lines = append(lines, all(is, right, t.nodes().holds("saddr"), drop("ingress-source"))) // counted by peer
	}
	lines = append(lines, all(is, right, drop("ingress-source")))
	if t.Port != 0 {
		lines = append(lines, all(is, drop("ingress-protocol")))
	}
	return lines
}

// taken returns the rule that drops IPIP packets in the input hook if a process
// receives them by a packet socket. Otherwise a kernel with the ipip module
// would answer with ICMP port unreachable, and the sender's ipip device would
// report the peer unreachable for a while.
func (t TunnelRule) taken() rule {
	return all(familyIs(true, "meta nfproto ipv4"), t.is(), innerDestination(t.Network), verdict(expr.VerdictDrop, "drop"))
}

// unpacked returns the rule that drops decapsulated packets with a destination
// outside this node's subnet: the node does not route them to other networks.
func (t TunnelRule) unpacked() rule {
	return all(inputDevice(t.Device), familyIs(t.Network.Addr().Is4(), ""), address("daddr", false, t.Subnet), drop("ingress-destination"))
}

// A receiver identifies a peer by the outer source only. So each node prevents
// its pods, and anything else it forwards for, from sending tunnel packets with
// a node's address as the source:
//
//	hook         dropped                                      reason
//	prerouting   from a node's address, by the wrong link     egress-forged
//	forward      from a pod's own address to the underlay     egress-encapsulated
//	postrouting  translated to this node's address            egress-encapsulated
//	input        to this node's port: as in forward
//	             translated to this node's port               ingress-translated
//
// The rules are evaluated after DNAT, so packets that a Service redirects to a
// tunnel port are checked too. Later fragments have no ports, but are useless
// without the first one.

// forwarded returns the rules of the forward hook. Most packets match the
// first.
func (t TunnelRule) forwarded() []rule {
	return []rule{
		all(familyIs(t.is4(), ""), address("saddr", true, t.Network), address("daddr", true, t.Network), leave()),
		all(familyIs(t.is4(), ""), address("saddr", true, t.Network), address("daddr", false, t.Network), t.is(), drop("egress-encapsulated")),
	}
}

// arriving returns the rules of the input hook that drop tunnel packets of this
// node's pods, or that were redirected to our port by NAT.
func (t TunnelRule) arriving() []rule {
	// A sender that may not reach our port could have another port translated
	// to it.
	lines := []rule{all(t.isNamed(), translated(), drop("ingress-translated"))}
	if t.Subnet.IsValid() {
		lines = append(lines, all(familyIs(t.is4(), ""), address("saddr", true, t.Subnet), t.is(), drop("egress-encapsulated")))
	}
	return lines
}

// forged returns the rules that drop tunnel packets with a node's address as
// the source that arrive by a bridge or a veth, unless the route to that
// address leads there: a node may be a virtual machine or container behind this
// host's bridge. Physical links are not checked, because routes may be
// asymmetric. They are in the prerouting hook, the only one in which every kernel
// looks up the way back (nft_fib_validate; Linux 5.10 refuses it in others).
func (t TunnelRule) forged() []rule {
	if !t.Local.IsValid() {
		return nil
	}
	var lines []rule
	for _, kind := range []string{"bridge", "veth"} {
		parts := []rule{t.isNamed(), inputKind(kind)}
		if t.Underlay != "" {
			parts = append(parts, notInputDevice(t.Underlay))
		}
		if !t.NoFIB {
			parts = append(parts, notTheWayBack())
		}
		parts = append(parts, t.nodes().holds("saddr")) // last: the set counts what is dropped
		lines = append(lines, all(append(parts, drop("egress-forged"))...))
	}
	return lines
}

// departed returns the rule that drops forwarded tunnel packets whose source
// any NAT rule translated to this node's address. Packets of the kernel's
// tunnel device have that device as their input interface; those of a process
// have none.
func (t TunnelRule) departed() (line rule, ok bool) {
	if !t.Local.IsValid() {
		return line, false
	}
	parts := []rule{familyIs(t.is4(), ""), address("saddr", true, netip.PrefixFrom(t.Local, t.Local.BitLen())), t.is(), someInput()}
	if t.Device != "" {
		parts = append(parts, notInputDevice(t.Device))
	}
	return all(append(parts, drop("egress-encapsulated"))...), true
}

func (t TunnelRule) is4() bool { return t.Network.Addr().Is4() }

// isNamed is is with an explicit family match, for rules that compare no
// address.
func (t TunnelRule) isNamed() rule {
	named := map[bool]string{true: "meta nfproto ipv4", false: "meta nfproto ipv6"}
	return all(familyIs(t.is4(), named[t.is4()]), t.is())
}

// nodes returns the set of the underlay addresses of all nodes, including this
// one, without its elements.
func (t TunnelRule) nodes() set {
	s := set{name: "nodes4", kind: outerAddresses, is4: t.is4(), bits: -1}
	if !t.is4() {
		s.name = "nodes6"
	}
	return s
}

// allNodes is nodes with its elements.
func (t TunnelRule) allNodes() set {
	s := t.nodes()
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

// sets returns the sets of the peers' Sources, one per prefix length (nearly
// always one in all), sorted by length.
func (t TunnelRule) sets() []set {
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
