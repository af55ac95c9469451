package encap

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// TestTooBig sends packets to a peer with a narrow path, and states what becomes of them:
// sent, fragmented, or dropped and answered with an ICMP error.
func TestTooBig(t *testing.T) {
	withDF, withoutDF := udpSpec(1350), udpSpec(1350)
	withoutDF.df = false
	v6 := udpSpec(1350)
	v6.source, v6.destination = here6, there6
	for _, c := range []struct {
		name         string
		spec         spec
		size         int // of segments, 0 for a single packet
		dontFragment bool
		mtu          int // of the path, outer
		sent         int // packets
		told         int // the MTU in the ICMP error; 0 if there is none
	}{
		{"it fits", withDF, 0, true, 1450, 1, 0},
		{"it is too long", withDF, 0, true, 1400, 0, 1350},
		{"the outer packet may be fragmented", withDF, 0, false, 1400, 1, 0},
		{"the inner packet may be fragmented", withoutDF, 0, true, 1400, 2, 0},
		{"a frame whose segments fit", tcpSpec(4000), 1300, true, 1400, 4, 0},
		{"a frame whose segments are too long", tcpSpec(4000), 1350, true, 1400, 0, 1350},
		{"IPv6", v6, 0, true, 1400, 0, 1350},
		{"IPv6, less than its minimum", v6, 0, true, 1300, 0, 1280},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newFakeNode(VXLAN)
			n.out.dontFragment = c.dontFragment
			peer := n.peer
			if !c.spec.is4() {
				peer = vxlanPeer(netip.PrefixFrom(there6, 64), n.peer.Underlay, testVNI, [6]byte{2, 2}, n.vtep.MAC)
				n.setPeers(n.peer, peer)
			}
			peer.narrow(c.mtu-50, netip.Addr{}, pathMTULife)
			n.device.queue(c.spec.vnet(c.size), c.spec.partial())
			if err := n.out.drain(n.device); err != nil {
				t.Fatal(err)
			}
			packets := n.sentPackets()
			if len(packets) != c.sent {
				t.Errorf("%d packets sent, want %d", len(packets), c.sent)
			}
			dropped := dropsOf(&n.counters)["egress-too-big"]
			if (dropped == 1) != (c.told != 0) {
				t.Errorf("%d counted as too long", dropped)
			}
			if c.told == 0 {
				if len(n.device.out) != 0 {
					t.Errorf("an ICMP error: %x", n.device.out[0])
				}
				return
			}
			if len(n.device.out) != 1 {
				t.Fatalf("%d ICMP errors", len(n.device.out))
			}
			checkTooBig(t, n.device.out[0][vnetHeaderLen:], peer, c.spec, c.told)
		})
	}
}

// checkTooBig checks an ICMP error for the sender of a packet to the peer.
func checkTooBig(t *testing.T, b []byte, peer *Peer, sent spec, told int) {
	t.Helper()
	var p packet
	if !p.parse(b) || p.length != len(b) || !p.headerIsRight(b) {
		t.Fatalf("not a packet: %x", b)
	}
	if p.source(b) != peer.Subnet.Addr() || p.destination(b) != sent.source {
		t.Errorf("it goes from %v to %v", p.source(b), p.destination(b))
	}
	icmp, kind, mtu := b[20:], uint16(0x0304), uint32(0)
	pseudo := []byte(nil)
	if p.is4 {
		mtu = uint32(binary.BigEndian.Uint16(icmp[6:]))
	} else {
		icmp, kind = b[40:], 0x0200
		mtu = binary.BigEndian.Uint32(icmp[4:])
		pseudo = spec{source: p.source(b), destination: p.destination(b), proto: unix.IPPROTO_ICMPV6}.pseudoHeader(len(icmp))
	}
	if binary.BigEndian.Uint16(icmp) != kind || int(mtu) != told || slowChecksum(append(pseudo, icmp...)) != 0 {
		t.Errorf("ICMP %x, want an MTU of %d", icmp[:8], told)
	}
	if limit := map[bool]int{true: 576, false: 1280}[p.is4]; len(b) > limit {
		t.Errorf("it has %d bytes, more than %d", len(b), limit)
	}
	if quote := icmp[8:]; !bytes.HasPrefix(sent.partial(), quote[:20]) {
		t.Errorf("it quotes %x", quote)
	}
}

// TestFragmentsReassemble reassembles the fragments of an inner packet.
func TestFragmentsReassemble(t *testing.T) {
	n := newFakeNode(IPIP)
	n.peer.narrow(leastMTU4, netip.Addr{}, pathMTULife)
	s := udpSpec(1400)
	s.df = false
	n.device.queue(s.vnet(0), s.partial())
	if err := n.out.drain(n.device); err != nil {
		t.Fatal(err)
	}
	var payload []byte
	packets := n.sentPackets()
	for i, b := range packets {
		field := binary.BigEndian.Uint16(b[6:])
		more, offset := field&0x2000 != 0, int(field&0x1fff)*8
		if len(b) > leastMTU4 || offset != len(payload) || more != (i < len(packets)-1) || slowChecksum(b[:20]) != 0 {
			t.Errorf("fragment %d: %d bytes, offset %d, more %t", i, len(b), offset, more)
		}
		payload = append(payload, b[20:]...)
	}
	if !bytes.Equal(payload, s.bytes()[20:]) {
		t.Error("the fragments are not the packet")
	}
}

// TestPathBelowPodsMinimumMTU has a path narrower than pods can be told: packets leave by the
// socket that fragments, one per message.
func TestPathBelowPodsMinimumMTU(t *testing.T) {
	n := newFakeNode(VXLAN)
	fragmenting := &fakeSocket{number: 5}
	n.out.fragmenter[0] = source{socket: fragmenting}
	n.out.dontFragment = true
	n.peer.narrow(520, netip.Addr{}, pathMTULife)
	for range 2 {
		s := udpSpec(leastMTU4 - 28)
		n.device.queue(s.vnet(0), s.partial())
	}
	if err := n.out.drain(n.device); err != nil {
		t.Fatal(err)
	}
	if len(fragmenting.sent) != 2 || len(n.socket.sent) != 0 || len(n.device.out) != 0 {
		t.Errorf("%d by the fragmenting socket, %d by the other, %d ICMP errors; drops %v",
			len(fragmenting.sent), len(n.socket.sent), len(n.device.out), dropsOf(&n.counters))
	}
}

// TestTooBigExpiry: ICMP errors are at most one per tooBigPause, a path MTU is forgotten
// after pathMTULife, and a suspended mechanism is tried again after suspendFor.
func TestTooBigExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(VXLAN)
		n.out.dontFragment = true
		send := func() {
			s := udpSpec(1400)
			n.device.queue(s.vnet(0), s.partial())
			if err := n.out.drain(n.device); err != nil {
				t.Fatal(err)
			}
		}
		n.peer.narrow(1350, netip.Addr{}, pathMTULife)
		time.Sleep(time.Second) // the fake clock starts long before the last error of none
		send()
		send()
		if len(n.device.out) != 1 {
			t.Errorf("%d ICMP errors at once", len(n.device.out))
		}
		time.Sleep(tooBigPause)
		send()
		if len(n.device.out) != 2 {
			t.Errorf("%d ICMP errors after a pause", len(n.device.out))
		}
		time.Sleep(pathMTULife - 2*time.Second)
		send()
		if len(n.socket.sent) != 0 {
			t.Error("the path MTU is forgotten early")
		}
		time.Sleep(2 * time.Second)
		send()
		if len(n.socket.sent) != 1 {
			t.Errorf("the path MTU is not forgotten: drops %v", dropsOf(&n.counters))
		}
		if _, ok := n.peer.PathMTU(); ok {
			t.Error("it is still shown")
		}
		n.peer.suspend(mechanismGSO)
		time.Sleep(suspendFor - time.Second)
		if n.out.gso(n.peer) {
			t.Error("the mechanism is tried early")
		}
		time.Sleep(time.Second)
		if !n.out.gso(n.peer) {
			t.Error("the mechanism is not tried again")
		}
	})
}

// TestErrorsThatLowerPathMTU gives the error queue ICMP errors; the path MTU changes only
// for packet too big that quotes a packet of this node to that peer, and never rises.
func TestErrorsThatLowerPathMTU(t *testing.T) {
	router := netip.MustParseAddr("192.0.2.254")
	for _, f := range formats {
		t.Run(f.Name(), func(t *testing.T) {
			cost := Overhead(f, true)
			ours := func(n *fakeNode) []byte { return append(bytes.Clone(n.peer.header), tcpSpec(100).bytes()...) }
			for _, c := range []struct {
				name  string
				error func(n *fakeNode) icmpError
				fits  int // 0: not believed
			}{
				{"a packet of ours", func(n *fakeNode) icmpError { return icmpError{peerAddr, router, 1400, unix.EMSGSIZE, ours(n)} }, 1400 - cost},
				{"another error", func(n *fakeNode) icmpError { return icmpError{peerAddr, router, 1400, unix.EHOSTUNREACH, ours(n)} }, 0},
				{"no MTU", func(n *fakeNode) icmpError { return icmpError{peerAddr, router, 0, unix.EMSGSIZE, ours(n)} }, 0},
				{"another destination", func(n *fakeNode) icmpError { return icmpError{router, router, 1400, unix.EMSGSIZE, ours(n)} }, 0},
				{"a packet of others", func(n *fakeNode) icmpError {
					return icmpError{peerAddr, router, 1400, unix.EMSGSIZE, append(bytes.Clone(n.peer.header), tcpSpec(100).reply().bytes()...)}
				}, 0},
				{"not a packet", func(n *fakeNode) icmpError {
					return icmpError{peerAddr, router, 1400, unix.EMSGSIZE, append(bytes.Clone(n.peer.header), make([]byte, 40)...)}
				}, 0},
				{"absurdly narrow", func(n *fakeNode) icmpError { return icmpError{peerAddr, router, 100, unix.EMSGSIZE, ours(n)} }, leastFits},
			} {
				n := newFakeNode(f)
				q, w, _ := newFakeQueue(t, n)
				n.socket.icmp = []icmpError{c.error(n)}
				w.steps = []step{{errs: []int{200}}}
				if err := q.serve(); err != nil {
					t.Fatal(err)
				}
				k, ok := n.peer.PathMTU()
				if k.Fits != c.fits || ok != (c.fits != 0) {
					t.Errorf("%s: %+v, want %d", c.name, k, c.fits)
				}
				n.peer.narrow(1440-cost, router, pathMTULife)
				if higher, _ := n.peer.PathMTU(); ok && higher != k {
					t.Errorf("%s: it rises to %d", c.name, higher.Fits)
				}
			}
		})
	}
}
