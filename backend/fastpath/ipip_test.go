package fastpath

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"culvert/internal/firewall"
	"culvert/internal/host"
)

var nearMAC = host.MAC{2, 0, 0, 0, 0, 9} // of the next hop on the underlay

// ipipState returns a node with an IPIP tunnel: of the userspace datapath, or the kernel's.
func ipipState(process bool) host.State {
	peers := []firewall.Source{{Outer: peerNode, Inner: peerNet}, {Outer: wideNode, Inner: wideNet}}
	s := host.State{FastPath: true}
	if !process {
		s.Links = []host.Link{{Name: "lo", IPIP: &host.IPIP{Local: ourNode}}}
		s.Firewall.Tunnels = []firewall.TunnelRule{{Device: "lo", Network: cluster4, Subnet: ourNet, Peers: peers, Underlay: "lo", Local: ourNode}}
		return s
	}
	tunnel := host.ProcessTunnel{Link: "lo", VXLAN: host.VXLAN{Local: ourNode, Device: "lo"}, Subnet: ourNet}
	for _, p := range peers {
		tunnel.Peers = append(tunnel.Peers, host.ProcessPeer{Inner: p.Inner, Outer: p.Outer})
	}
	s.Process = []host.ProcessTunnel{tunnel}
	return s
}

func filledIPIP(t *testing.T, process bool) *Path {
	t.Helper()
	p := open(t)
	c, err := contentsOf(ipipState(process), facts{
		links: map[string]link{"lo": loopback}, hops: map[uint32]uint8{4: 61},
		path: func(to netip.Addr, _ string) (int, bool) { return 1500, to == peerNode },
	})
	if err != nil {
		t.Fatal(err)
	}
	// BPF_PROG_TEST_RUN gives a tc program an Ethernet header.
	tunnel := c.tunnels[4]
	tunnel.Layer3 = 0
	c.tunnels[4] = tunnel
	if err := p.fill(c); err != nil {
		t.Fatal(err)
	}
	return p
}

// anyPackets returns packets that VXLAN's programs leave out, since no outer checksum can
// be derived for them.
func anyPackets(from, to netip.Addr) map[string][]byte {
	fragment := datagram(from, to, 100)
	fragment[6] = 0x20
	noSum := datagram(from, to, 100)
	noSum[26], noSum[27] = 0, 0
	options := append([]byte{}, datagram(from, to, 60)...)
	options = append(options[:20:20], append([]byte{1, 1, 1, 0}, options[20:]...)...)
	options[0] = 0x46
	binary.BigEndian.PutUint16(options[2:], uint16(len(options)))
	options[10], options[11] = 0, 0
	binary.BigEndian.PutUint16(options[10:], ^fold(sumOf(options[:24])))
	return map[string][]byte{
		"a datagram": datagram(from, to, 100), "an empty one": datagram(from, to, 0), "of odd length": datagram(from, to, 1001),
		"a fragment": class(fragment, 0), "no UDP checksum": noSum, "SCTP": protocol(datagram(from, to, 30), 132), "options": options,
	}
}

// TestEncapsulatesIPIP checks the outer header before an unchanged inner packet, as the
// kernel's ipip device writes it, and as the userspace datapath's raw socket does.
func TestEncapsulatesIPIP(t *testing.T) {
	for _, process := range []bool{true, false} {
		p := filledIPIP(t, process)
		for name, packet := range anyPackets(ourPod, peerPod) {
			for inner, outer := range map[byte]byte{0: 0, 1: 1, 2: 2, 3: 2, 0xb8: 0, 0xb9: 1} {
				sent := bytes.Clone(packet)
				if sent[0] == 0x45 {
					sent = class(sent, inner)
				} else if inner != 0 {
					continue
				}
				verdict, out, reason := p.run(t, programOut, frame(peerMAC, ourMAC, sent), 0)
				if verdict != actRedirect || reason != "" {
					t.Fatalf("%s: %#x, %q", name, verdict, reason)
				}
				b := out[14:]
				ttl, numbered := byte(61), false
				if !process {
					ttl, numbered = sent[8], true
				}
				source, _ := netip.AddrFromSlice(b[12:16])
				destination, _ := netip.AddrFromSlice(b[16:20])
				if b[0] != 0x45 || b[1] != outer || int(binary.BigEndian.Uint16(b[2:])) != len(b) || binary.BigEndian.Uint16(b[6:]) != 0x4000 ||
					b[8] != ttl || b[9] != 4 || source != ourNode || destination != peerNode || fold(sumOf(b[:20])) != 0xffff {
					t.Errorf("%s, process %t, class %#x: outer header %x", name, process, inner, b[:20])
				}
				if id := binary.BigEndian.Uint16(b[4:]); id != 0 && !numbered {
					t.Errorf("%s: identification %d", name, id)
				}
				if !bytes.Equal(b[20:], sent) {
					t.Errorf("%s: the inner packet is another", name)
				}
			}
		}
		if r := p.read(); r[outPackets] == 0 || r[outPackets] != r[outFrames] {
			t.Errorf("counted %d packets in %d frames", r[outPackets], r[outFrames])
		}
	}
}

// TestLeavesOutIPIP triggers the reasons for leaving an outgoing packet, unchanged. The
// flow stays left if the userspace datapath has it.
func TestLeavesOutIPIP(t *testing.T) {
	fragment := class(datagram(ourPod, peerPod, 100), 0)
	fragment[6] = 0x20
	arp := frame(peerMAC, ourMAC, datagram(ourPod, peerPod, 10))
	arp[12], arp[13] = 8, 6
	version := datagram(ourPod, peerPod, 10)
	version[0] = 0x55
	long := netip.MustParseAddr("10.5.1.20") // flows of their own
	for _, process := range []bool{true, false} {
		p := filledIPIP(t, process)
		after := ""
		if process {
			after = "egress-flow"
		}
		for _, test := range []struct {
			name   string
			frame  []byte
			gso    int
			reason string
		}{
			{"the longest", frame(peerMAC, ourMAC, datagram(long, peerPod, 1480-28)), 0, ""},
			{"too long", frame(peerMAC, ourMAC, datagram(long, peerPod, 1480-28+1)), 0, "egress-too-long"},
			{"the same flow after it", frame(peerMAC, ourMAC, datagram(long, peerPod, 10)), 0, after},
			{"no peer", frame(peerMAC, ourMAC, datagram(ourPod, thirdPod, 10)), 0, "egress-no-peer"},
			{"a peer without a plain route", frame(peerMAC, ourMAC, datagram(ourPod, netip.MustParseAddr("10.5.31.200"), 10)), 0, "egress-no-peer"},
			{"ARP", arp, 0, "egress-protocol"},
			{"IPv6", frame(peerMAC, ourMAC, datagram(ourPod6, peerPod6, 10)), 0, "egress-protocol"},
			{"version", frame(peerMAC, ourMAC, version), 0, "egress-protocol"},
			{"padded", frame(peerMAC, ourMAC, append(datagram(netip.MustParseAddr("10.5.1.21"), peerPod, 100), 0, 0)), 0, "egress-too-long"},
			{"segments of a fragment", frame(peerMAC, ourMAC, fragment), 50, "egress-segments"},
			{"segments too long", frame(peerMAC, ourMAC, datagram(netip.MustParseAddr("10.5.1.22"), peerPod, 1400)), 1480 - 28 + 1, "egress-too-long"},
			// Without a GSO type; tests cannot set one, only the kernel can.
			{"segments of no kind", frame(peerMAC, ourMAC, datagram(netip.MustParseAddr("10.5.1.23"), peerPod, 1400)), 700, "egress-no-room"},
		} {
			verdict, out, reason := p.run(t, programOut, test.frame, test.gso)
			want := uint32(actUnspec)
			if test.reason == "" {
				want = actRedirect
			}
			if verdict != want || reason != test.reason || want == actUnspec && !bytes.Equal(out, test.frame) {
				t.Errorf("%s, process %t: %#x, %q, want %q", test.name, process, verdict, reason, test.reason)
			}
		}
	}
}

// TestDecapsulatesIPIP decapsulates peers' packets of any kind, and checks the ECN field
// (RFC 6040).
func TestDecapsulatesIPIP(t *testing.T) {
	p := filledIPIP(t, true)
	for peer, from := range map[netip.Addr]netip.Addr{peerNode: peerPod, wideNode: netip.MustParseAddr("10.5.31.200")} {
		for name, packet := range anyPackets(from, ourPod) {
			if name == "options" { // the program does not read them
				continue
			}
			sent := frame(host.MAC{}, nearMAC, ipPacket(peer, ourNode, 4, packet))
			verdict, out, reason := p.run(t, programIn, sent, 0)
			if verdict != actRedirect || reason != "" || !bytes.Equal(out, frame(joinMAC, nearMAC, packet)) {
				t.Errorf("%s from %s: %#x, %q, %x", name, from, verdict, reason, out)
			}
		}
	}
	for _, ecn := range decapsulatedECN {
		inner := class(datagram(peerPod, ourPod, 333), ecn.inner)
		sent := frame(host.MAC{}, nearMAC, class(ipPacket(peerNode, ourNode, 4, inner), ecn.outer))
		verdict, out, reason := p.run(t, programIn, sent, 0)
		if want := frame(joinMAC, nearMAC, class(inner, ecn.want)); verdict != actRedirect || !bytes.Equal(out, want) {
			t.Errorf("ECN %d in %d: %#x, %q\n got %x\nwant %x", ecn.inner, ecn.outer, verdict, reason, out[:34], want[:34])
		}
	}
}

// TestLeavesInIPIP triggers the reasons for leaving an incoming packet, unchanged. Packets
// that are not the tunnel's are not counted.
func TestLeavesInIPIP(t *testing.T) {
	p := filledIPIP(t, true)
	good := datagram(peerPod, ourPod, 100)
	with := func(inner []byte, edit func(outer []byte)) []byte {
		b := ipPacket(peerNode, ourNode, 4, inner)
		if edit != nil {
			edit(b)
			b[10], b[11] = 0, 0
			binary.BigEndian.PutUint16(b[10:], ^fold(sumOf(b[:20])))
		}
		return frame(host.MAC{}, nearMAC, b)
	}
	header := with(good, nil)
	header[14+10] ^= 1
	other := with(good, nil)
	other[0] = 2 // another host's Ethernet address
	options := with(append([]byte{1, 1, 1, 0}, good...), func(b []byte) { b[0] = 0x46 })
	lied := datagram(peerPod, netip.MustParseAddr("10.5.1.11"), 100)
	lied[3]--
	badInner := bytes.Clone(datagram(peerPod, netip.MustParseAddr("10.5.1.12"), 100))
	badInner[10] ^= 1
	version := bytes.Clone(good)
	version[0] = 0x55
	for _, test := range []struct {
		name   string
		frame  []byte
		gso    int
		reason string
	}{
		{"another address", frame(host.MAC{}, nearMAC, ipPacket(peerNode, stranger, 4, good)), 0, ""},
		{"IPv6 in IPv4", with(good, func(b []byte) { b[9] = 41 }), 0, ""},
		{"UDP", with(good, func(b []byte) { b[9] = 17 }), 0, ""},
		{"another's frame", other, 0, ""},
		{"outer options", options, 0, ""},
		{"later outer fragment", with(good, func(b []byte) { b[7] = 1 }), 0, "ingress-fragment"},
		{"outer header checksum", header, 0, "ingress-options"},
		{"padding", append(with(good, nil), 0, 0, 0), 0, "ingress-length"},
		{"version", with(version, nil), 0, "ingress-header"},
		{"inner options", with(anyPackets(peerPod, netip.MustParseAddr("10.5.1.13"))["options"], nil), 0, "ingress-header"},
		{"inner header checksum", with(badInner, nil), 0, "ingress-header"},
		{"inner length", with(class(lied, 0), nil), 0, "ingress-length"},
		{"a stranger", frame(host.MAC{}, nearMAC, ipPacket(stranger, ourNode, 4, good)), 0, "ingress-source"},
		{"another peer's pod", frame(host.MAC{}, nearMAC, ipPacket(wideNode, ourNode, 4, good)), 0, "ingress-source"},
		{"nobody's pod", with(datagram(thirdPod, ourPod, 100), nil), 0, "ingress-source"},
		{"our own pod", with(datagram(ourPod, ourPod, 100), nil), 0, "ingress-source"},
		{"not ours", with(datagram(peerPod, thirdPod, 100), nil), 0, "ingress-not-ours"},
		{"congestion not understood", with(good, func(b []byte) { b[1] = 3 }), 0, "ingress-ecn"},
		{"segments", with(datagram(peerPod, netip.MustParseAddr("10.5.1.10"), 1000), nil), 500, "ingress-segments"},
		{"the same flow after them", with(datagram(peerPod, netip.MustParseAddr("10.5.1.10"), 100), nil), 0, "ingress-flow"},
	} {
		verdict, out, reason := p.run(t, programIn, test.frame, test.gso)
		if verdict != actUnspec || reason != test.reason || !bytes.Equal(out, test.frame) {
			t.Errorf("%s: %#x, %q, want %q; unchanged: %t", test.name, verdict, reason, test.reason, bytes.Equal(out, test.frame))
		}
	}
	// What the peer sends after a fragment could overtake a packet of its flow.
	if _, _, reason := p.run(t, programIn, with(good, func(b []byte) { b[6] = 0x20 }), 0); reason != "ingress-fragment" {
		t.Errorf("first outer fragment: %q", reason)
	}
	if _, _, reason := p.run(t, programIn, with(datagram(peerPod, netip.MustParseAddr("10.5.1.14"), 100), nil), 0); reason != "ingress-flow" {
		t.Errorf("after an outer fragment: %q", reason)
	}
	// A VXLAN tunnel takes no IPIP.
	v := filled(t)
	if verdict, _, reason := v.run(t, programIn, with(good, nil), 0); verdict != actUnspec || reason != "" {
		t.Errorf("before a vxlan device: %#x, %q", verdict, reason)
	}
}

// TestCountsByPeerIPIP counts what is sent to each peer: before the kernel's ipip device also
// what is left to it, which no other counts; before the userspace datapath not.
func TestCountsByPeerIPIP(t *testing.T) {
	for _, process := range []bool{true, false} {
		p := filledIPIP(t, process)
		p.say(true, "")
		p.run(t, programOut, frame(peerMAC, ourMAC, datagram(ourPod, peerPod, 100)), 0)
		p.run(t, programOut, frame(peerMAC, ourMAC, datagram(ourPod, peerPod, 1480)), 0)
		p.run(t, programOut, frame(peerMAC, ourMAC, datagram(ourPod, netip.MustParseAddr("10.5.31.200"), 10)), 0)
		p.run(t, programIn, frame(host.MAC{}, nearMAC, ipPacket(peerNode, ourNode, 4, datagram(peerPod, ourPod, 200))), 0)
		want := firewall.Exchanged{Sent: firewall.Count{Packets: 1, Bytes: 128}, Received: firewall.Count{Packets: 1, Bytes: 228}}
		wide := firewall.Exchanged{}
		if !process {
			want.Sent = firewall.Count{Packets: 2, Bytes: 128 + 1508}
			wide.Sent = firewall.Count{Packets: 1, Bytes: 38}
		}
		got := p.Exchanged()
		if a, b := got[firewall.Source{Outer: peerNode, Inner: peerNet}], got[firewall.Source{Outer: wideNode, Inner: wideNet}]; a != want || b != wide {
			t.Errorf("process %t: %+v and %+v, want %+v and %+v", process, a, b, want, wide)
		}
	}
}

// TestPathMTUIPIP has a router say that a packet was too long: what may be too long for that
// peer is left to the way below, which follows the path MTU, until user space has asked for it.
func TestPathMTUIPIP(t *testing.T) {
	p := filledIPIP(t, false)
	long := frame(peerMAC, ourMAC, datagram(ourPod, peerPod, 1000))
	sends := func(after, want string) {
		t.Helper()
		if _, _, reason := p.run(t, programOut, long, 0); reason != want {
			t.Errorf("after %s a long packet is left for %q, want %q", after, reason, want)
		}
		if verdict, _, _ := p.run(t, programOut, frame(peerMAC, ourMAC, datagram(ourPod, peerPod, 500)), 0); verdict != actRedirect {
			t.Errorf("after %s a short packet is left", after)
		}
	}
	says := func(kind, code byte, protocol byte, source, destination netip.Addr) {
		t.Helper()
		icmp := append([]byte{kind, code, 0, 0, 0, 0, 3, 232}, ipPacket(source, destination, protocol, make([]byte, 8))...)
		frame := frame(host.MAC{}, nearMAC, ipPacket(stranger, ourNode, 1, icmp))
		if verdict, out, reason := p.run(t, programIn, frame, 0); verdict != actUnspec || reason != "" || !bytes.Equal(out, frame) {
			t.Errorf("an ICMP error: %#x, %q", verdict, reason)
		}
	}
	sends("nothing", "")
	says(3, 3, 4, ourNode, peerNode)
	says(11, 0, 4, ourNode, peerNode)
	says(3, 4, 17, ourNode, peerNode)
	says(3, 4, 4, peerNode, ourNode)
	says(3, 4, 4, ourNode, stranger)
	sends("ICMP errors of other kinds", "")
	says(3, 4, 4, ourNode, peerNode)
	sends("packet too big", "egress-too-long")
}
