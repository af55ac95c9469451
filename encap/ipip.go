package encap

import (
	"encoding/binary"
	"net/netip"
)

// IPIP (RFC 2003) is an IPv4 header of protocol 4 before an inner IPv4 packet:
// no ports, no checksum over the payload. Packets are sent through a raw socket,
// one per message, since raw sockets have no GSO; large frames are sent whole
// through the Super device. They are received through a packet socket with a
// virtio header per packet: GRO joins packets before a raw socket receives them,
// and a raw socket does not report the segment size.

// IPIPCost is IPIP's overhead in bytes.
const IPIPCost = 20

const protoIPIP = 4

// IPIPPeer returns the peer that leases subnet and is reached at underlay.
func IPIPPeer(subnet netip.Prefix, underlay netip.Addr) *Peer {
	return NewPeer(subnet, netip.AddrPortFrom(underlay, 0), nil)
}

// ipipMessage decapsulates one message of the packet socket.
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
	if !outer.headerIsRight(d) { // a packet socket gets packets before the kernel verifies them
		g.dropFrom(table, from, IngressMalformed)
		return
	}
	if outer.fragment {
		// The kernel reassembles for raw sockets, not for packet sockets. IPIP
		// senders set DF, as the kernel's device does.
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

// ipipHeader writes the outer header without traffic class, length,
// identification and checksum, which superPath.stamp adds.
func ipipHeader(ip []byte, from, to netip.Addr) {
	ip[0], ip[8], ip[9] = 4<<4|5, ttl, protoIPIP
	const dontFragment = 0x4000
	binary.BigEndian.PutUint16(ip[6:], dontFragment)
	a, b := from.As4(), to.As4()
	copy(ip[12:], a[:])
	copy(ip[16:], b[:])
}
