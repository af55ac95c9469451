package encap

import (
	"net/netip"
	"testing"
)

// TestDamagedHeaderStaysDamaged delivers packets with a damaged IPv4 header to each
// operation that writes a new header checksum: coalescing, ECN marking,
// segmentation. None may come out with a correct checksum.
func TestDamagedHeaderStaysDamaged(t *testing.T) {
	outer := netip.MustParseAddr("192.0.2.1")
	name := sockaddr4(192, 0, 2, 1)
	peer := vxlanPeer(netip.PrefixFrom(here4, 24).Masked(), netip.AddrPortFrom(outer, 8472), testVNI, [6]byte{1}, [6]byte{2})
	table := NewTable([]netip.Prefix{netip.PrefixFrom(there4, 24).Masked()}, []*Peer{peer})
	h := vxlanHeader{VNI: testVNI, Destination: [6]byte{2}, EtherType: etherTypeIPv4}
	head := make([]byte, VXLANHeaderLen)
	h.Put(head)
	message := func(s spec, damage bool) []byte {
		b := s.bytes()
		if damage {
			b[8]-- // the TTL, which no transport checksum covers
		}
		return append(append(make([]byte, 0, 2048), head...), b...)
	}
	for _, c := range []struct {
		name    string
		segment int   // GRO segment size, or 0
		ecn     uint8 // outer
		tos     uint8 // inner
	}{
		{"joined", 0, 0, 0},
		{"joined, verified outside", 1, 0, 0},
		{"marked", 0, 3, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newIngress(commonOf(VXLAN), tun(-1), nil, testRecvBatch(), Underlay{Self: VTEP{testVNI, [6]byte{2}}}, 1450, &Counters{})
			first := tcpSpec(100)
			first.tos = c.tos
			second := first
			second.seq += 100
			second.id++
			a, b := message(first, false), message(second, true)
			if c.segment > 0 {
				room := make([]byte, recvHeadroom, recvHeadroom+4096)
				both := append(append(room, a...), b...)[recvHeadroom:]
				g.udpMessage(table, datagrams{data: both, source: name, segment: len(a), ecn: c.ecn})
			} else {
				for _, d := range [][]byte{a, b} {
					room := make([]byte, recvHeadroom, recvHeadroom+4096)
					g.udpMessage(table, datagrams{data: append(room, d...)[recvHeadroom:], source: name, ecn: c.ecn})
				}
			}
			if g.tally.drops[IngressMalformed] != 1 || g.tally.packets != 1 {
				t.Errorf("%d carried, malformed %d", g.tally.packets, g.tally.drops[IngressMalformed])
			}
			for i := range g.join.count {
				f := &g.join.frames[i]
				f.finish()
				if f.segments != 1 {
					t.Error("it was joined")
				}
			}
		})
	}
}
