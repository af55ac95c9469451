package encap

import (
	"bytes"
	"net/netip"
	"testing"

	"culvert/internal/fuzzloop"
)

func TestVXLANHeader(t *testing.T) {
	h := VXLAN{
		VNI: 0x123456, Destination: [6]byte{0x02, 1, 2, 3, 4, 5},
		Source: [6]byte{0x02, 6, 7, 8, 9, 10}, EtherType: etherTypeIPv6,
	}
	want := []byte{
		0x08, 0, 0, 0, 0x12, 0x34, 0x56, 0,
		0x02, 1, 2, 3, 4, 5, 0x02, 6, 7, 8, 9, 10, 0x86, 0xdd,
	}
	got := bytes.Repeat([]byte{0xff}, VXLANHeaderLen)
	h.Put(got)
	if !bytes.Equal(got, want) {
		t.Fatalf("% x, want % x", got, want)
	}
	dirty := VXLAN{VNI: 9, Destination: [6]byte{9}, Source: [6]byte{9}, EtherType: 9}
	if r := dirty.Parse(got); r != Accepted || dirty != h {
		t.Fatalf("%s %+v, want %+v", r, dirty, h)
	}
	if r := dirty.Parse(got[:21]); r != IngressShort || dirty != (VXLAN{}) {
		t.Errorf("short: %s %+v", r, dirty)
	}
	got[0] = 0xf7
	if r := dirty.Parse(got); r != IngressFlags || dirty != (VXLAN{}) {
		t.Errorf("without the I flag: %s %+v", r, dirty)
	}
}

// FuzzDatagram gives arbitrary bytes to all code that handles a datagram from the
// network, and checks that an accepted packet lies within the datagram.
func FuzzDatagram(std *testing.F) {
	f := fuzzloop.Of(std)
	s := tcpSpec(30)
	h := VXLAN{VNI: testVNI, Destination: [6]byte{2}, EtherType: etherTypeIPv4}
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
		PeerTo(netip.MustParsePrefix("10.5.1.0/24"), netip.AddrPortFrom(outer, 8472), testVNI, [6]byte{1}, [6]byte{2}),
		PeerTo(netip.MustParsePrefix("fd00:5:1::/64"), netip.AddrPortFrom(outer, 8472), testVNI, [6]byte{1}, [6]byte{2}),
	}
	table := NewTable([]netip.Prefix{netip.MustParsePrefix("10.5.2.0/24"), netip.MustParsePrefix("fd00:5:2::/64")}, peers)
	// One for all: it has megabytes of buffers.
	g := newIngress(&common{offload: allOn()}, ^uintptr(0), Descriptor{}, Underlay{VNI: testVNI, MAC: [6]byte{2}}, 1450, &Counters{})
	f.Fuzz(func(t *testing.T, data []byte, segment uint16, ecn uint8) {
		g.tally, g.join.count, g.route, g.failed = tally{}, 0, route{}, nil
		if len(data) > recvBufferLen-recvHeadroom {
			return
		}
		name := sockaddr4(192, 0, 2, 1)
		g.message(table, datagrams{data: data, source: name, segment: int(segment), ecn: ecn & 3})
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
		PeerTo(netip.MustParsePrefix("10.5.2.0/24"), netip.MustParseAddrPort("192.0.2.1:8472"), testVNI, [6]byte{1}, [6]byte{2}),
	})
	l := NewLoop(Options{Offload: allOn()})
	l.SetTable(n)
	e := newEgress(&l.common, [2][]Source{}, &Counters{})
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
