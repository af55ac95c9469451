package encap

// Receiving a format with an IP protocol of its own, through packet sockets with a virtio
// header per packet. A raw socket would not do: GRO joins packets before it receives them,
// and it does not report the segment size.
//
// Such packets are sent through a raw socket, one per message, since raw sockets have no
// GSO; large frames are sent whole through the Super device.

// rawMessage checks and delivers one message of a packet socket: a virtio header, a
// link-layer header, and an IPv4 packet.
func (g *ingress) rawMessage(table *Table, m datagrams) {
	if m.cut || len(m.data) < vnetHeaderLen+g.linkLen {
		g.tally.drop(IngressTruncated)
		return
	}
	var v vnetHeader
	v.parse(m.data)
	d := m.data[vnetHeaderLen+g.linkLen:]
	var outer packet
	if !outer.parse(d) || !outer.is4 || outer.proto != g.format.Protocol() {
		g.tally.drop(IngressShort)
		return
	}
	from := outer.source(d)
	if !outer.headerIsRight(d) { // a packet socket gets packets before the kernel verifies them
		g.dropFrom(table, from, IngressMalformed)
		return
	}
	if outer.fragment {
		// The kernel reassembles for raw sockets, not for packet sockets. Senders set DF,
		// as the kernel's ipip device does.
		g.dropFrom(table, from, IngressFragment)
		return
	}
	var p packet
	if r := g.check(table, d[outer.ipLen:outer.length], &p, from); r != Accepted {
		g.dropFrom(table, from, r)
		return
	}
	at := outer.ipLen + g.header
	lead := d[:at+p.length]
	if !decapECN(lead[at:], &p, outer.ecn) {
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
