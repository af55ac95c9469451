package encap

import (
	"encoding/binary"
	"net/netip"
)

// IPIP (RFC 2003) puts one IPv4 header before an inner IPv4 packet, and nothing
// else: protocol 4, no ports, no checksum over the payload. It is sent through
// a raw socket, one packet a message, since the kernel cuts up nothing there;
// large frames leave whole by the Super device. It is received through a packet
// socket with a virtio header before each packet, since the kernel joins
// packets before a raw socket sees them, and does not say how.

// IPIPCost is what IPIP takes from the underlay's MTU.
const IPIPCost = 20

const protoIPIP = 4

// IPIPPeer returns the peer that leases subnet and is reached at underlay.
func IPIPPeer(subnet netip.Prefix, underlay netip.Addr) *Peer {
	return NewPeer(subnet, netip.AddrPortFrom(underlay, 0), nil)
}

// ipipMessage takes one message of the packet socket apart.
func (g *ingress) ipipMessage(table *Table, m datagrams) {
	if m.cut || len(m.data) < vnetHeaderLen+g.linkLen {
		g.tally.drop(IngressTruncated)
		return
	}
	var v vnetHeader
	v.parse(m.data)
	d := m.data[vnetHeaderLen+g.linkLen:]
	var outer packet
	if !outer.parse(d) || !outer.is4 || outer.proto != protoIPIP {
		g.tally.drop(IngressShort)
		return
	}
	from := outer.source(d)
	if !outer.headerIsRight(d) { // the kernel has not looked yet
		g.dropFrom(table, from, IngressMalformed)
		return
	}
	if outer.fragment {
		// The kernel would put it together for a raw socket, not for this one.
		// Senders of IPIP set DF, as the kernel's device does.
		g.dropFrom(table, from, IngressFragment)
		return
	}
	var p packet
	if r := g.checkInner(table, d[outer.ipLen:outer.length], &p, from); r != Accepted {
		g.dropFrom(table, from, r)
		return
	}
	lead := d[:outer.ipLen+p.length]
	b := lead[outer.ipLen:]
	if !decapECN(b, &p, outer.ecn) {
		g.tally.drop(IngressECN)
		return
	}
	size := 0
	if v.gsoType != gsoNone {
		size = int(v.gsoSize)
	}
	state := checksumUnknown
	if v.flags&vnetDataValid != 0 {
		state = checksumVerified
	}
	g.deliver(lead, &p, state, size)
}

// ipipHeader writes the outer header of an inner packet of n bytes, without
// its identification and checksum, which superPath.stamp adds.
func ipipHeader(ip []byte, from, to netip.Addr) {
	ip[0], ip[8], ip[9] = 4<<4|5, ttl, protoIPIP
	const dontFragment = 0x4000
	binary.BigEndian.PutUint16(ip[6:], dontFragment)
	a, b := from.As4(), to.As4()
	copy(ip[12:], a[:])
	copy(ip[16:], b[:])
}
