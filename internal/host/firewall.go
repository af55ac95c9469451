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

// Tunnel says which encapsulated packets are to be.
type Tunnel struct {
	Port    uint16       // UDP, of VXLAN; 0 for IPIP
	VNI     uint32       // of VXLAN
	Network netip.Prefix // the cluster's; of the inner family, which is also the outer one
	// Device is the kernel's that takes packets off the wire. It checks nothing:
	// these rules do. Empty where a process takes them.
	Device string
	Subnet netip.Prefix // this node's, if there is a Device
	Peers  []Source     // if there is a Device
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
//  2. this node's pods to pods: no translation
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
		all(familyIs(is4, ""), address("saddr", true, m.Subnet), address("daddr", true, m.Network), leave()),
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

// received returns the lines that drop what may not come in: packets that a
// kernel device would take, but of strangers, or of a peer with an inner source
// that is not in its subnet. What belongs to a peer leaves by the first line, or
// where peers lease subnets of several sizes by one of the first.
//
// They stand in the input hook, where fragments are whole again and the device
// has not seen the packet. IPIP has no number of its own like the VNI: its packets are ours
// if they lead into the cluster network.
func (t Tunnel) received() []rule {
	is4 := t.Network.Addr().Is4()
	named := map[bool]string{true: "meta nfproto ipv4", false: "meta nfproto ipv6"}
	is := all(familyIs(is4, named[is4]), t.is())
	var right rule
	if t.Port == 0 {
		right = innerDestination(t.Network)
	} else {
		ethertype := []byte{0x08, 0x00}
		if !is4 {
			ethertype = []byte{0x86, 0xdd}
		}
		is = all(is, transport(vxlanVNI, 3, true, []byte{byte(t.VNI >> 16), byte(t.VNI >> 8), byte(t.VNI)}))
		right = transport(vxlanEtherType, 2, true, ethertype)
	}
	var lines []rule
	for _, s := range t.sets() {
		lines = append(lines, all(is, right, s.pair(), leave()))
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

// sent returns the line that drops tunnel packets that a pod makes itself: with
// the node's address on them, peers would take them for the node's.
func (t Tunnel) sent() rule {
	is4 := t.Network.Addr().Is4()
	return all(familyIs(is4, ""), address("saddr", true, t.Network), address("daddr", false, t.Network), t.is(), drop("egress-encapsulated"))
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
	var in, inner, out []rule
	for _, tunnel := range f.Tunnels {
		if tunnel.Device == "" && tunnel.Port == 0 {
			in = append(in, tunnel.taken())
		}
		if tunnel.Device != "" {
			in = append(in, tunnel.received()...)
			inner = append(inner, tunnel.unpacked())
			t.sets = append(t.sets, tunnel.sets()...)
		}
		out = append(out, tunnel.sent())
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
	if len(t.chains) == 0 {
		return nil
	}
	return t
}
