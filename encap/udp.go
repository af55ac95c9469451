package encap

import (
	"encoding/binary"
	"net/netip"
)

// Receiving a format whose packets are UDP datagrams: GRO (UDP_GRO) hands over many
// datagrams of a flow as one message.

// udpMessage splits one message of a UDP socket into datagrams.
func (g *ingress) udpMessage(table *Table, m datagrams) {
	if m.cut {
		g.tally.drop(IngressTruncated)
		return
	}
	outer, ok := address(m.source)
	if !ok {
		g.tally.drop(IngressStranger)
		return
	}
	// A kernel peer's super-frame may arrive as one datagram whose segment
	// size, if any, is the inner one. Do not split it: its inner length equals the
	// message's length.
	segment := m.segment
	if segment == 0 || segment >= len(m.data) || g.innerLength(m.data) == len(m.data)-g.header {
		g.datagram(table, m.data, outer, m.ecn, checksumUnknown, segment)
		return
	}
	for data := m.data; len(data) > 0; {
		n := min(segment, len(data))
		// GRO joins only datagrams whose checksums the kernel has verified.
		g.datagram(table, data[:n], outer, m.ecn, checksumVerified, 0)
		data = data[n:]
	}
}

// datagram checks one datagram and delivers its inner packet. gsoSize is
// the kernel's segment size of a super-frame, or 0.
func (g *ingress) datagram(table *Table, d []byte, outer netip.Addr, ecn uint8, state checksum, gsoSize int) {
	var p packet
	if r := g.check(table, d, &p, outer); r != Accepted {
		g.dropFrom(table, outer, r)
		return
	}
	lead := d[:g.header+p.length] // Ethernet padding is trimmed
	if !decapECN(lead[g.header:], &p, ecn) {
		g.tally.drop(IngressECN)
		return
	}
	g.deliver(lead, &p, state, gsoSize)
}

// innerLength returns the length that the inner IP header states, or -1.
func (g *ingress) innerLength(datagram []byte) int {
	if len(datagram) < g.header+20 {
		return -1
	}
	b := datagram[g.header:]
	if b[0]>>4 == 4 {
		return int(binary.BigEndian.Uint16(b[2:]))
	}
	return 40 + int(binary.BigEndian.Uint16(b[4:]))
}
