package encap

import (
	"net/netip"
	"testing"

	"culvert/internal/fuzzloop"
)

// ipipIngress returns the receiving side of a node that leases there4's subnet and
// has a peer with here4's.
func ipipIngress() *ingress {
	c := commonOf(IPIP)
	c.table.Store(NewTable(
		[]netip.Prefix{netip.PrefixFrom(there4, 24).Masked()},
		[]*Peer{ipipPeer(netip.PrefixFrom(here4, 24).Masked(), netip.MustParseAddr("198.18.0.1"))},
	))
	return newIngress(c, tun(-1), nil, testRecvBatch(), Underlay{LinkHeader: 14}, 1480, &Counters{})
}

// ipipDatagram encapsulates a packet, as the packet socket returns it.
func ipipDatagram(from string, inner []byte) []byte {
	b := make([]byte, vnetHeaderLen+14+20, vnetHeaderLen+14+20+len(inner))
	ip := b[vnetHeaderLen+14:]
	ip[0], ip[6], ip[8], ip[9] = 4<<4|5, 0x40, 64, 4
	source, destination := netip.MustParseAddr(from).As4(), netip.MustParseAddr("198.18.0.2").As4()
	copy(ip[12:], source[:])
	copy(ip[16:], destination[:])
	(&packet{is4: true, ipLen: 20}).setLength(ip, 20+len(inner))
	return append(b, inner...)
}

func TestIPIPAcceptsPeersAlone(t *testing.T) {
	good := tcpSpec(100).bytes()
	truncated := ipipDatagram("198.18.0.1", good)
	fragment := ipipDatagram("198.18.0.1", good)
	fragment[vnetHeaderLen+14+6] = 0x20
	sumOuter := func(b []byte) {
		(&packet{is4: true, ipLen: 20}).setLength(b[vnetHeaderLen+14:], len(b)-vnetHeaderLen-14)
	}
	sumOuter(fragment)
	other := ipipDatagram("198.18.0.1", good)
	other[vnetHeaderLen+14+9] = 47
	sumOuter(other)
	damaged := ipipDatagram("198.18.0.1", good)
	damaged[vnetHeaderLen+14+8]--
	inside := ipipDatagram("198.18.0.1", good)
	inside[vnetHeaderLen+14+20+8]--
	for name, c := range map[string]struct {
		message []byte
		want    Reason
	}{
		"a peer's":               {ipipDatagram("198.18.0.1", good), Accepted},
		"a stranger's":           {ipipDatagram("198.18.0.66", good), IngressStranger},
		"another protocol":       {other, IngressShort},
		"a fragment":             {fragment, IngressFragment},
		"a damaged outer header": {damaged, IngressMalformed},
		"a damaged inner header": {inside, IngressMalformed},
		"cut short":              {truncated[:len(truncated)-1], IngressShort},
		"no room for headers":    {truncated[:vnetHeaderLen+13], IngressTruncated},
		"nothing in the outer":   {ipipDatagram("198.18.0.1", nil), IngressMalformed},
	} {
		g := ipipIngress()
		g.rawMessage(g.table.Load(), datagrams{data: c.message})
		if c.want == Accepted {
			if g.join.count != 1 || g.tally.packets != 1 {
				t.Errorf("%s: %d frames, drops %v", name, g.join.count, g.tally.drops)
			}
			continue
		}
		if g.tally.drops[c.want] != 1 || g.join.count != 0 {
			t.Errorf("%s: drops %v, %d frames", name, g.tally.drops, g.join.count)
		}
	}
}

// FuzzIPIP gives the receiving side arbitrary bytes: each message is delivered or
// counted as dropped.
func FuzzIPIP(std *testing.F) {
	f := fuzzloop.Of(std)
	f.Add(ipipDatagram("198.18.0.1", tcpSpec(100).bytes()))
	f.Add(ipipDatagram("198.18.0.9", tcpSpec(0).bytes()))
	g := ipipIngress()
	f.Fuzz(func(t *testing.T, message []byte) {
		g.tally, g.join.count, g.route = tally{}, 0, route{}
		g.rawMessage(g.table.Load(), datagrams{data: message})
		drops := uint64(0)
		for _, n := range g.tally.drops {
			drops += n
		}
		if drops+g.tally.packets == 0 {
			t.Error("neither delivered nor counted")
		}
		for i := range g.join.count {
			g.join.frames[i].finish()
		}
	})
}

// FuzzQuote gives path MTU discovery arbitrary quotes of ICMP errors: only a quote
// of a packet of this node changes the path MTU, and never below the minimum.
func FuzzQuote(std *testing.F) {
	f := fuzzloop.Of(std)
	peer := vxlanPeer(netip.PrefixFrom(there4, 24).Masked(), netip.MustParseAddrPort("198.18.0.2:8472"), testVNI, [6]byte{2}, [6]byte{2, 1})
	ours := append(append([]byte{}, peer.header...), tcpSpec(100).bytes()...)
	f.Add(ours, 1000)
	f.Add(ours[:30], 0)
	f.Fuzz(func(t *testing.T, quote []byte, mtu int) {
		if mtu <= 0 || mtu > 1<<16 {
			return
		}
		peer.path.Store(nil)
		c := commonOf(VXLAN)
		c.table.Store(NewTable([]netip.Prefix{netip.PrefixFrom(here4, 24).Masked()}, []*Peer{peer}))
		q := &errorQueue{common: c}
		q.narrower(peer.Underlay.Addr(), netip.Addr{}, quote, mtu)
		limit := peer.limit()
		if limit == 0 {
			return
		}
		if limit < leastMTU4 {
			t.Errorf("a path of %d bytes", limit)
		}
		if string(quote[:len(peer.header)]) != string(peer.header) {
			t.Errorf("believed %x", quote)
		}
	})
}
