package encap

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// Benchmarks of the loop's parts, without system calls. `make bench-micro` compares
// them with bench/micro/baseline.txt.

func BenchmarkChecksum(b *testing.B) {
	for _, n := range []int{64, 1400, 65535} {
		b.Run(fmt.Sprintf("bytes=%d", n), func(b *testing.B) {
			data := make([]byte, n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			var acc uint64
			for b.Loop() {
				acc = sum(data, acc)
			}
			_ = fold(acc)
		})
	}
}

// benchPeers returns peers with a /24 each.
func benchPeers(n int) []*Peer {
	var peers []*Peer
	for k := range n {
		subnet := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 64 + byte(k>>8), byte(k), 0}), 24)
		at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(k >> 8), byte(k)}), 8472)
		peers = append(peers, vxlanPeer(subnet, at, testVNI, [6]byte{2, 0, 0, 0, byte(k >> 8), byte(k)}, [6]byte{2, 1}))
	}
	return peers
}

func BenchmarkLookup(b *testing.B) {
	for _, n := range []int{1, 100, 5000} {
		b.Run(fmt.Sprintf("peers=%d", n), func(b *testing.B) {
			peers := benchPeers(n)
			table := NewTable(nil, peers)
			random := rand.New(rand.NewPCG(1, 2))
			inner := make([]netip.Addr, 1024)
			for i := range inner {
				a := peers[random.IntN(n)].Subnet.Addr().As4()
				a[3] = byte(random.IntN(256))
				inner[i] = netip.AddrFrom4(a)
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if table.lookup(inner[i%len(inner)]) == nil {
					b.Fatal("a peer is not found")
				}
				i++
			}
		})
	}
}

// benchFrame returns a TCP frame as read from a device, a GSO frame if it is larger
// than a packet.
func benchFrame(payload int) (frame []byte, v vnetHeader) {
	v = vnetHeader{flags: vnetNeedsCsum, csumStart: 20, csumOffset: 16}
	if payload > segmentPayload {
		v.gsoType, v.gsoSize = gsoTCP4, segmentPayload
	}
	s := tcpSpec(payload)
	return s.partial(), v
}

// segmentPayload is the payload of a TCP segment on a device with an MTU of 1450.
const segmentPayload = 1410

func BenchmarkSplit(b *testing.B) {
	for _, payload := range []int{1410 * 2, 60000} {
		b.Run(fmt.Sprintf("payload=%d", payload), func(b *testing.B) {
			frame, _ := benchFrame(payload)
			var p packet
			if !p.parse(frame) {
				b.Fatal("the frame does not parse")
			}
			cutter := newSegmenter()
			lead := make([]byte, VXLANHeaderLen)
			b.SetBytes(int64(len(frame)))
			b.ReportAllocs()
			for b.Loop() {
				cutter.cut(lead, frame, &p, segmentPayload)
			}
		})
	}
}

func BenchmarkCoalesce(b *testing.B) {
	for _, state := range []struct {
		name string
		checksum
	}{{"verified", checksumVerified}, {"unknown", checksumUnknown}} {
		b.Run("checksum="+state.name, func(b *testing.B) {
			var leads [][]byte
			total := 0
			s := tcpSpec(60000)
			for _, p := range s.cut(segmentPayload) {
				leads = append(leads, append(make([]byte, VXLANHeaderLen), p...))
				total += len(p)
			}
			first := append([]byte(nil), leads[0][:VXLANHeaderLen+40]...)
			c := newCoalescer(allOn(), len(leads))
			b.SetBytes(int64(total))
			b.ReportAllocs()
			for b.Loop() {
				copy(leads[0], first) // a joined frame's headers are written in place
				c.count = 0
				for _, lead := range leads {
					var p packet
					p.parse(lead[VXLANHeaderLen:])
					c.add(lead, &p, state.checksum)
				}
				for i := range c.count {
					c.frames[i].finish()
					c.iovec(&c.frames[i])
				}
			}
			if c.count != 1 {
				b.Fatalf("%d packets became %d frames", len(leads), c.count)
			}
		})
	}
}

// BenchmarkEncap measures a frame from the device's buffer to the messages for
// sendmmsg.
func BenchmarkEncap(b *testing.B) {
	for _, payload := range []int{0, segmentPayload, 60000} {
		b.Run(fmt.Sprintf("payload=%d", payload), func(b *testing.B) {
			peer := vxlanPeer(netip.PrefixFrom(there4, 24), netip.MustParseAddrPort("198.18.0.2:8472"), testVNI, [6]byte{2}, [6]byte{2, 1})
			table := commonOf(VXLAN)
			table.table.Store(NewTable([]netip.Prefix{netip.PrefixFrom(here4, 24).Masked()}, []*Peer{peer}))
			counters := &Counters{}
			e := newEgress(table, [2][]source{}, counters)
			packet, v := benchFrame(payload)
			frame := make([]byte, vnetHeaderLen, vnetHeaderLen+len(packet))
			v.put(frame)
			frame = append(frame, packet...)
			b.SetBytes(int64(len(packet)))
			b.ReportAllocs()
			for b.Loop() {
				// Restore the slab: completing the checksum changes it.
				e.add(slabStart, copy(e.slab[slabStart:], frame))
				e.flush() // to no socket
			}
			if n := counters.Frames.Load(); n == 0 {
				b.Fatalf("nothing was sent: %v", dropsOf(counters))
			}
		})
	}
}

// BenchmarkDecap measures 43 datagrams of one flow from the receive buffer to the
// joined frame.
func BenchmarkDecap(b *testing.B) {
	from := netip.MustParseAddrPort("198.18.0.2:8472")
	self, peerMAC := [6]byte{2, 1}, [6]byte{2}
	table := commonOf(VXLAN)
	// The flow comes from here4's node to there4's, which is us.
	table.table.Store(NewTable([]netip.Prefix{netip.PrefixFrom(there4, 24).Masked()},
		[]*Peer{vxlanPeer(netip.PrefixFrom(here4, 24), from, testVNI, peerMAC, self)}))
	header := vxlanPeer(netip.PrefixFrom(there4, 24), from, testVNI, self, peerMAC).header
	counters := &Counters{}
	g := newIngress(table, tun(0), nil, testRecvBatch(), Underlay{Self: VTEP{testVNI, self}}, 1450, counters)

	var datagrams [][]byte
	total := 0
	s := tcpSpec(60000)
	for _, p := range s.cut(segmentPayload) {
		datagrams = append(datagrams, append(append([]byte(nil), header...), p...))
		total += len(p)
	}
	first := append([]byte(nil), datagrams[0][:VXLANHeaderLen+40]...)
	b.SetBytes(int64(total))
	b.ReportAllocs()
	for b.Loop() {
		copy(datagrams[0], first)
		for _, d := range datagrams {
			g.datagram(table.table.Load(), d, from.Addr(), 0, checksumVerified, 0)
		}
		for i := range g.join.count {
			g.join.frames[i].finish()
			g.join.iovec(&g.join.frames[i])
		}
		if g.join.count != 1 {
			g.tally.publish(counters)
			b.Fatalf("%d datagrams became %d frames: %v", len(datagrams), g.join.count, dropsOf(counters))
		}
		g.join.count = 0
	}
}

// BenchmarkHeaderIsRight measures the check of an inner IPv4 header, once per packet
// received.
func BenchmarkHeaderIsRight(b *testing.B) {
	s := tcpSpec(1400)
	data := s.bytes()
	var p packet
	if !p.parse(data) {
		b.Fatal("the packet does not parse")
	}
	b.ReportAllocs()
	for b.Loop() {
		if !p.headerIsRight(data) {
			b.Fatal("the header is wrong")
		}
	}
}
