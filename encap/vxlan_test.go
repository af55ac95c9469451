package encap

import (
	"bytes"
	"net/netip"
	"testing"

	"culvert/internal/fuzzloop"
)

func TestVXLANHeader(t *testing.T) {
	from, to := VTEP{0x123456, [6]byte{0x02, 6, 7, 8, 9, 10}}, VTEP{0x123456, [6]byte{0x02, 1, 2, 3, 4, 5}}
	want := []byte{
		0x08, 0, 0, 0, 0x12, 0x34, 0x56, 0,
		0x02, 1, 2, 3, 4, 5, 0x02, 6, 7, 8, 9, 10, 0x86, 0xdd,
	}
	got := bytes.Repeat([]byte{0xff}, VXLANHeaderLen)
	VXLAN.Put(got, from, to, etherTypeIPv6)
	if !bytes.Equal(got, want) {
		t.Fatalf("% x, want % x", got, want)
	}
	for _, c := range []struct {
		name   string
		change func(b []byte) []byte
		want   Reason
	}{
		{"as sent", func(b []byte) []byte { return b }, Accepted},
		{"reserved bits", func(b []byte) []byte { b[0], b[1], b[7] = 0x88, 0xff, 0xff; return b }, Accepted},
		{"IPv4", func(b []byte) []byte { b[20], b[21] = 0x08, 0; return b }, Accepted},
		{"another source MAC", func(b []byte) []byte { b[14]++; return b }, Accepted},
		{"short", func(b []byte) []byte { return b[:21] }, IngressShort},
		{"without the I flag", func(b []byte) []byte { b[0] = 0xf7; return b }, IngressFlags},
		{"another VNI", func(b []byte) []byte { b[6]++; return b }, IngressVNI},
		{"another MAC", func(b []byte) []byte { b[13]++; return b }, IngressMAC},
		{"ARP", func(b []byte) []byte { b[20], b[21] = 0x08, 0x06; return b }, IngressProtocol},
	} {
		d := c.change(bytes.Clone(want))
		etherType, r := VXLAN.Check(d, &to)
		if r != c.want || r == Accepted && etherType != uint16(d[20])<<8|uint16(d[21]) {
			t.Errorf("%s: %s, EtherType %#x, want %s", c.name, r, etherType, c.want)
		}
	}
}

// FuzzDatagram gives arbitrary bytes to all code that handles a datagram from the
// network, and checks that an accepted packet lies within the datagram.
func FuzzDatagram(std *testing.F) {
	f := fuzzloop.Of(std)
	s := tcpSpec(30)
	h := vxlanHeader{VNI: testVNI, Destination: [6]byte{2}, EtherType: etherTypeIPv4}
	d := make([]byte, VXLANHeaderLen)
	h.Put(d)
	f.Add(append(bytes.Clone(d), s.bytes()...), uint16(0), uint8(0))
	f.Add(append(bytes.Clone(d), s.partial()...), uint16(70), uint8(3))
	s.source, s.destination = here6, there6
	h.EtherType = etherTypeIPv6
	h.Put(d)
	f.Add(append(bytes.Clone(d), s.bytes()...), uint16(1), uint8(1))

	outer := netip.MustParseAddr("192.0.2.1")
	peers := []*Peer{
		vxlanPeer(netip.MustParsePrefix("10.5.1.0/24"), netip.AddrPortFrom(outer, 8472), testVNI, [6]byte{1}, [6]byte{2}),
		vxlanPeer(netip.MustParsePrefix("fd00:5:1::/64"), netip.AddrPortFrom(outer, 8472), testVNI, [6]byte{1}, [6]byte{2}),
	}
	table := NewTable([]netip.Prefix{netip.MustParsePrefix("10.5.2.0/24"), netip.MustParsePrefix("fd00:5:2::/64")}, peers)
	// One for all: it has megabytes of buffers.
	g := newIngress(commonOf(VXLAN), tun(-1), nil, testRecvBatch(), Underlay{Self: VTEP{testVNI, [6]byte{2}}}, 1450, &Counters{})
	f.Fuzz(func(t *testing.T, data []byte, segment uint16, ecn uint8) {
		g.tally, g.join.count, g.route, g.failed = tally{}, 0, route{}, nil
		if len(data) > recvBufferLen-recvHeadroom {
			return
		}
		name := sockaddr4(192, 0, 2, 1)
		g.udpMessage(table, datagrams{data: data, source: name, segment: int(segment), ecn: ecn & 3})
		for i := range g.join.count {
			fr := &g.join.frames[i]
			fr.finish()
			total := len(fr.head) - vnetHeaderLen
			for _, d := range fr.data {
				total += len(d)
			}
			if total != fr.length || total > len(data) {
				t.Fatalf("a frame of %d bytes says %d, of %d received", total, fr.length, len(data))
			}
		}
		g.flush() // the device rejects every frame, which is counted
	})
}

// FuzzFrame gives arbitrary frames to the sending side.
func FuzzFrame(std *testing.F) {
	f := fuzzloop.Of(std)
	frame := make([]byte, vnetHeaderLen)
	(&vnetHeader{flags: vnetNeedsCsum, csumStart: 20, csumOffset: 16, gsoType: gsoTCP4, gsoSize: 100}).put(frame)
	f.Add(append(frame, tcpSpec(1000).partial()...))
	f.Add(append(make([]byte, vnetHeaderLen), tcpSpec(10).bytes()...))
	n := NewTable([]netip.Prefix{netip.MustParsePrefix("10.5.1.0/24")}, []*Peer{
		vxlanPeer(netip.MustParsePrefix("10.5.2.0/24"), netip.MustParseAddrPort("192.0.2.1:8472"), testVNI, [6]byte{1}, [6]byte{2}),
	})
	l := NewLoop(Options{Format: VXLAN, Offload: allOn()})
	l.SetTable(n)
	e := newEgress(&l.common, [2][]source{}, &Counters{})
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > maxFrame {
			return
		}
		e.batch.reset()
		e.tally, e.used, e.route, e.failed = tally{}, slabStart, route{}, nil
		e.add(slabStart, copy(e.slab[slabStart:], data))
		for _, r := range e.batch.runs {
			if r.bytes > maxDatagram || r.segments > maxSegments {
				t.Fatalf("a run of %d segments, %d bytes", r.segments, r.bytes)
			}
		}
	})
}
