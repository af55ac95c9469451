package encap

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
)

// TestParseRejectsFalseLengths gives parse packets with inconsistent lengths. A wrong IP
// length is rejected. With a wrong transport length the packet counts as one without
// a transport header, which is passed on unchanged, not joined or cut.
func TestParseRejectsFalseLengths(t *testing.T) {
	tcp4, tcp6, udp4 := tcpSpec(20), tcpSpec(20), tcpSpec(20)
	tcp6.source, tcp6.destination = here6, there6
	udp4.proto = protoUDP
	for _, c := range []struct {
		name      string
		of        spec
		change    func(b []byte) []byte
		ok        bool
		transport bool
	}{
		{"IPv4", tcp4, func(b []byte) []byte { return b }, true, true},
		{"IPv4, padded", tcp4, func(b []byte) []byte { return append(b, 0, 0, 0) }, true, true},
		{"IPv4, header of 16 bytes", tcp4, func(b []byte) []byte { b[0] = 0x44; return b }, false, false},
		{"IPv4, header of 0 bytes", tcp4, func(b []byte) []byte { b[0] = 0x40; return b }, false, false},
		{"IPv4, length beyond the packet", tcp4, func(b []byte) []byte { b[3]++; return b }, false, false},
		{"IPv4, shorter than its header", tcp4, func(b []byte) []byte { b[2], b[3] = 0, 19; return b }, false, false},
		{"IPv4, length 0", tcp4, func(b []byte) []byte { b[2], b[3] = 0, 0; return b }, false, false},
		{"IPv4, header beyond the packet", tcp4, func(b []byte) []byte { b[0], b[2], b[3] = 0x4f, 0, 59; return b }, false, false},
		{"IPv4, truncated", tcp4, func(b []byte) []byte { return b[:19] }, false, false},
		{"IPv6", tcp6, func(b []byte) []byte { return b }, true, true},
		{"IPv6, length beyond the packet", tcp6, func(b []byte) []byte { b[5]++; return b }, false, false},
		{"IPv6, truncated", tcp6, func(b []byte) []byte { return b[:39] }, false, false},
		{"version 5", tcp4, func(b []byte) []byte { b[0] = 0x55; return b }, false, false},
		{"TCP, data offset beyond the packet", tcp4, func(b []byte) []byte { b[20+12] = 0xf0; return b }, true, false},
		{"TCP, data offset 4", tcp4, func(b []byte) []byte { b[20+12] = 0x40; return b }, true, false},
		{"TCP, truncated header", tcp4, func(b []byte) []byte { b[3] = 39; return b[:39] }, true, false},
		{"TCP over IPv6, data offset beyond the packet", tcp6, func(b []byte) []byte { b[40+12] = 0xf0; return b }, true, false},
		{"UDP", udp4, func(b []byte) []byte { return b }, true, true},
		{"UDP, truncated header", udp4, func(b []byte) []byte { b[3] = 27; return b[:27] }, true, false},
		{"a fragment", tcp4, func(b []byte) []byte { b[6] = 0x20; return b }, true, false},
	} {
		p := packet{ipLen: 99, headLen: 99, length: 99, transport: true, fragment: true} // every field is overwritten
		b := c.change(c.of.bytes())
		ok := p.parse(b)
		if ok != c.ok || ok && p.transport != c.transport {
			t.Errorf("%s: %t %+v", c.name, ok, p)
		}
		if ok && (p.length > len(b) || p.transport && p.headLen > p.length) {
			t.Errorf("%s: it reaches past the end: %+v", c.name, p)
		}
	}
}

// A datagram whose UDP length differs from the packet's is not joined: segmentation would
// not restore it.
func TestFalseUDPLengthIsNotJoined(t *testing.T) {
	s := tcpSpec(100)
	s.proto = protoUDP
	for _, by := range []int{0, 1, -1, 1000} {
		b := s.bytes()
		binary.BigEndian.PutUint16(b[24:], uint16(int(binary.BigEndian.Uint16(b[24:]))+by))
		var p packet
		if !p.parse(b) {
			t.Fatal("it does not parse")
		}
		if got := udpJoinable(b, &p); got != (by == 0) {
			t.Errorf("a length that is wrong by %d: %t", by, got)
		}
	}
}

// A frame with a segment size of 0 is malformed.
func TestSegmentSizeZero(t *testing.T) {
	s := tcpSpec(3000)
	peer := vxlanPeer(netip.PrefixFrom(here4, 24).Masked(), netip.MustParseAddrPort("192.0.2.1:8472"), testVNI, [6]byte{1}, [6]byte{2})
	table := NewTable([]netip.Prefix{netip.PrefixFrom(there4, 24).Masked()}, []*Peer{peer})
	h := vxlanHeader{VNI: testVNI, Destination: [6]byte{2}, EtherType: etherTypeIPv4}
	head := make([]byte, VXLANHeaderLen)
	h.Put(head)
	for _, mtu := range []int{40, 39, 0} { // the headers alone
		g := newIngress(commonOf(VXLAN), tun(-1), nil, testRecvBatch(), Underlay{Self: VTEP{testVNI, [6]byte{2}}}, mtu, &Counters{})
		room := append(make([]byte, recvHeadroom, recvHeadroom+4096), head...)
		g.udpMessage(table, datagrams{data: append(room, s.partial()...)[recvHeadroom:], source: sockaddr4(192, 0, 2, 1)})
		if g.tally.drops[IngressMalformed] != 1 || g.tally.packets != 0 {
			t.Errorf("MTU %d: %d carried, malformed %d", mtu, g.tally.packets, g.tally.drops[IngressMalformed])
		}
	}
}

// A virtio header whose checksum field is outside the packet is rejected.
func TestChecksumFieldOutsidePacket(t *testing.T) {
	whole := tcpSpec(10).partial()
	for _, c := range []struct {
		start, offset int
		ok            bool
	}{{20, 16, true}, {len(whole) - 2, 0, true}, {len(whole) - 1, 0, false}, {len(whole), 0, false}, {20, len(whole), false}, {0xffff, 0xffff, false}, {-1, 4, false}, {4, -5, false}} {
		b := bytes.Clone(whole)
		if ok := completeChecksum(b[:len(b):len(b)], c.start, c.offset, false); ok != c.ok {
			t.Errorf("start %d, offset %d: %t", c.start, c.offset, ok)
		}
	}
}
