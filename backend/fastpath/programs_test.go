package fastpath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"culvert/internal/firewall"
	"culvert/internal/host"
)

// open loads the programs, or skips the test if eBPF is not permitted; in continuous
// integration it fails.
func open(t *testing.T) *Path {
	t.Helper()
	return openAs(t, On)
}

func openAs(t *testing.T, mode Mode) *Path {
	t.Helper()
	p, err := Open(mode, slog.New(slog.DiscardHandler))
	if p != nil && p.loaded == nil {
		err = errors.New(p.why)
	}
	if err != nil && (!has(unix.CAP_BPF) || !has(unix.CAP_PERFMON) || errors.Is(err, unix.EPERM)) {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(p.Close)
	return p
}

var (
	ourMAC, peerMAC            = host.MAC{2, 0, 0, 0, 0, 1}, host.MAC{2, 0, 0, 0, 0, 2}
	ourNode, peerNode          = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	ourNode6, peerNode6        = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
	ourPod, peerPod            = netip.MustParseAddr("10.5.1.9"), netip.MustParseAddr("10.5.2.9")
	ourPod6, peerPod6          = netip.MustParseAddr("fd00:5:0:1::9"), netip.MustParseAddr("fd00:5:0:2::9")
	stranger, thirdPod         = netip.MustParseAddr("192.0.2.66"), netip.MustParseAddr("10.5.3.9")
	ourNet, ourNet6            = netip.MustParsePrefix("10.5.1.0/24"), netip.MustParsePrefix("fd00:5:0:1::/64")
	peerNet, peerNet6          = netip.MustParsePrefix("10.5.2.0/24"), netip.MustParsePrefix("fd00:5:0:2::/64")
	cluster4, cluster6         = netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("fd00:5::/48")
	wideNet, wideNode          = netip.MustParsePrefix("10.5.16.0/20"), netip.MustParseAddr("192.0.2.3")
	loopback                   = link{index: 1, mtu: 1500, ethernet: true}
	vni                 uint32 = 7
)

// state returns a node with one tunnel per family, all on the loopback interface, which
// BPF_PROG_TEST_RUN uses.
func state() host.State {
	tunnel := func(name string, local netip.Addr, network, subnet netip.Prefix, peers ...firewall.Source) (host.Link, firewall.TunnelRule) {
		return host.Link{Name: name, VXLAN: &host.VXLAN{MAC: ourMAC, VNI: vni, Local: local, Device: "lo", Port: 8472}},
			firewall.TunnelRule{Device: name, Port: 8472, VNI: vni, Network: network, Subnet: subnet, Peers: peers}
	}
	l4, t4 := tunnel("cvt.7", ourNode, cluster4, ourNet, firewall.Source{Outer: peerNode, Inner: peerNet}, firewall.Source{Outer: wideNode, Inner: wideNet})
	l6, t6 := tunnel("cvt6.7", ourNode6, cluster6, ourNet6, firewall.Source{Outer: peerNode6, Inner: peerNet6})
	neighbour := func(link string, subnet netip.Prefix) host.Neighbour {
		return host.Neighbour{Link: link, IP: subnet.Addr(), MAC: peerMAC}
	}
	return host.State{
		Neighbours: []host.Neighbour{neighbour("cvt.7", peerNet), neighbour("cvt6.7", peerNet6)},
		FastPath:   true, Links: []host.Link{l4, l6}, Firewall: firewall.Policy{Tunnels: []firewall.TunnelRule{t4, t6}},
		FDB: []host.FDBEntry{{Link: "cvt.7", MAC: peerMAC, To: peerNode}, {Link: "cvt6.7", MAC: peerMAC, To: peerNode6}},
	}
}

func filled(t *testing.T) *Path {
	t.Helper()
	return fill(t, open(t), nil)
}

func fill(t *testing.T, p *Path, pods []podLink) *Path {
	t.Helper()
	c, err := contentsOf(state(), facts{
		pods:      pods,
		links:     map[string]link{"cvt.7": loopback, "cvt6.7": loopback, "lo": loopback},
		firstPort: 32768, ports: 28231, hops: map[uint32]uint8{4: 61, 6: 62},
		path: func(netip.Addr, string) (int, bool) { return 1500, true },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.fill(c); err != nil {
		t.Fatal(err)
	}
	return p
}

// run runs a program on a frame and returns the verdict, the resulting frame and the
// slow-path reason that it counted, if any.
func (p *Path) run(t *testing.T, program string, frame []byte, gso int) (verdict uint32, out []byte, reason string) {
	t.Helper()
	before := p.read()
	opts := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256)}
	if gso != 0 {
		// struct __sk_buff; gso_size is the last field before a hole.
		context := make([]byte, 192)
		binary.NativeEndian.PutUint32(context[164:], uint32(2))   // gso_segs
		binary.NativeEndian.PutUint32(context[176:], uint32(gso)) // gso_size
		opts.Context = context
	}
	verdict, err := p.loaded.Programs[program].Run(&opts)
	if err != nil {
		t.Fatal(err)
	}
	after := p.read()
	for c, name := range slowNames {
		if name != "" && after[c] != before[c] {
			reason += name
		}
	}
	return verdict, opts.DataOut, reason
}

// wire returns a frame as a peer sends it: Ethernet, IP, UDP and VXLAN headers, then the
// inner frame, with correct checksums after edit.
func wire(outerSource, outerDestination netip.Addr, inner []byte, edit func(b []byte)) []byte {
	udp := make([]byte, 16)
	binary.BigEndian.PutUint16(udp, 45678)
	binary.BigEndian.PutUint16(udp[2:], 8472)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)+len(inner)))
	udp[8] = 8
	binary.BigEndian.PutUint32(udp[12:], vni<<8)
	udp = append(udp, inner...)
	b := ipPacket(outerSource, outerDestination, 17, udp)
	if edit != nil {
		edit(b)
	}
	header := headerLen(b)
	if b[0]>>4 == 4 {
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], ^fold(sumOf(b[:20])))
	}
	if string(b[header+6:header+8]) != "\xff\xfe" { // a wrong checksum to keep
		b[header+6], b[header+7] = 0, 0
		binary.BigEndian.PutUint16(b[header+6:], ^fold(pseudo(b, 17)+sumOf(b[header:])))
	}
	return frame(host.MAC{}, host.MAC{2, 0, 0, 0, 0, 9}, b)
}

func headerLen(b []byte) int {
	if b[0]>>4 == 6 {
		return 40
	}
	return int(b[0]&15) * 4
}

func pseudo(b []byte, protocol byte) uint64 {
	header := headerLen(b)
	addresses := b[12:20]
	if header == 40 && b[0]>>4 == 6 {
		addresses = b[8:40]
	}
	return sumOf(addresses) + uint64(protocol) + uint64(len(b)-header)
}

func frame(destination, source host.MAC, packet []byte) []byte {
	b := append(destination[:], source[:]...)
	if packet[0]>>4 == 6 {
		return append(append(b, 0x86, 0xdd), packet...)
	}
	return append(append(b, 8, 0), packet...)
}

func ipPacket(source, destination netip.Addr, protocol byte, payload []byte) []byte {
	if source.Is4() {
		b := make([]byte, 20, 20+len(payload))
		b[0], b[8], b[9] = 0x45, 64, protocol
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
		copy(b[12:], source.AsSlice())
		copy(b[16:], destination.AsSlice())
		binary.BigEndian.PutUint16(b[10:], ^fold(sumOf(b)))
		return append(b, payload...)
	}
	b := make([]byte, 40, 40+len(payload))
	b[0], b[6], b[7] = 0x60, protocol, 64
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	copy(b[8:], source.AsSlice())
	copy(b[24:], destination.AsSlice())
	return append(b, payload...)
}

// datagram returns an IP packet with a UDP datagram and correct checksums.
func datagram(source, destination netip.Addr, size int) []byte {
	udp := make([]byte, 8+size)
	binary.BigEndian.PutUint16(udp, 1024)
	binary.BigEndian.PutUint16(udp[2:], 1025)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	for i := range size {
		udp[8+i] = byte(i * 7)
	}
	b := ipPacket(source, destination, 17, udp)
	header := headerLen(b)
	binary.BigEndian.PutUint16(b[header+6:], ^fold(pseudo(b, 17)+sumOf(b[header:])))
	return b
}

// class sets an IP packet's traffic class.
func class(b []byte, class byte) []byte {
	b = bytes.Clone(b)
	if b[0]>>4 == 6 {
		b[0], b[1] = 0x60|class>>4, class<<4
		return b
	}
	b[1], b[10], b[11] = class, 0, 0
	binary.BigEndian.PutUint16(b[10:], ^fold(sumOf(b[:20])))
	return b
}

func protocol(b []byte, protocol byte) []byte {
	b = bytes.Clone(b)
	b[9], b[10], b[11] = protocol, 0, 0
	binary.BigEndian.PutUint16(b[10:], ^fold(sumOf(b[:20])))
	return b
}

// TestEncapsulates checks an encapsulated packet: headers, checksums, ECN, and the
// unchanged inner frame.
func TestEncapsulates(t *testing.T) {
	p := filled(t)
	for _, family := range []struct {
		pod, to, node, peer netip.Addr
		hops                byte
	}{{ourPod, peerPod, ourNode, peerNode, 61}, {ourPod6, peerPod6, ourNode6, peerNode6, 62}} {
		for inner, outer := range map[byte]byte{0: 0, 1: 1, 2: 2, 3: 2, 0xb8: 0, 0xb9: 1} {
			for _, size := range []int{0, 1, 2, 100, 1001} {
				sent := frame(peerMAC, ourMAC, class(datagram(family.pod, family.to, size), inner))
				verdict, out, reason := p.run(t, programOut, sent, 0)
				if verdict != actRedirect || reason != "" {
					t.Fatalf("%s, %d bytes: %#x, %q", family.to, size, verdict, reason)
				}
				b := out[14:]
				header := headerLen(b)
				got := b[1]
				if header == 40 {
					got = b[0]<<4 | b[1]>>4
				}
				source, _ := netip.AddrFromSlice(b[header-len(family.node.AsSlice())*2 : header][:len(family.node.AsSlice())])
				destination, _ := netip.AddrFromSlice(b[header-len(family.node.AsSlice()) : header])
				if got != outer || source != family.node || destination != family.peer {
					t.Errorf("class %#x became %#x, from %s to %s", inner, got, source, destination)
				}
				if hops := b[map[int]int{20: 8, 40: 7}[header]]; hops != family.hops {
					t.Errorf("TTL %d", hops)
				}
				if header == 20 && fold(sumOf(b[:20])) != 0xffff {
					t.Errorf("outer header checksum %x", b[:20])
				}
				if fold(pseudo(b, 17)+sumOf(b[header:])) != 0xffff {
					t.Errorf("%s, %d bytes: outer UDP checksum %x", family.to, size, b[header+6:header+8])
				}
				udp := b[header:]
				if port := binary.BigEndian.Uint16(udp); port < 32768 || port >= 32768+28231 || binary.BigEndian.Uint16(udp[2:]) != 8472 ||
					int(binary.BigEndian.Uint16(udp[4:])) != len(udp) || binary.BigEndian.Uint32(udp[8:]) != 8<<24 || binary.BigEndian.Uint32(udp[12:]) != vni<<8 {
					t.Errorf("UDP and VXLAN headers %x", udp[:16])
				}
				if !bytes.Equal(udp[16:], sent) {
					t.Errorf("the inner frame is another")
				}
			}
		}
	}
}

// TestLeavesOut triggers every reason for leaving an outgoing packet, unchanged, to the
// device.
func TestLeavesOut(t *testing.T) {
	p := filled(t)
	fragment := datagram(ourPod, peerPod, 100)
	fragment[6] = 0x20
	fragment = class(fragment, 0) // updates the header checksum
	noSum := datagram(ourPod, peerPod, 100)
	noSum[26], noSum[27] = 0, 0
	short := append(datagram(ourPod, peerPod, 100), 0, 0) // padded
	arp := frame(peerMAC, ourMAC, datagram(ourPod, peerPod, 10))
	arp[12], arp[13] = 8, 6
	for _, test := range []struct {
		name   string
		frame  []byte
		gso    int
		reason string
	}{
		{"broadcast", frame(host.MAC{255, 255, 255, 255, 255, 255}, ourMAC, datagram(ourPod, peerPod, 10)), 0, "egress-no-peer"},
		{"no peer", frame(host.MAC{2, 0, 0, 0, 0, 3}, ourMAC, datagram(ourPod, peerPod, 10)), 0, "egress-no-peer"},
		{"ARP", arp, 0, "egress-protocol"},
		{"too long", frame(peerMAC, ourMAC, datagram(ourPod, peerPod, 1450-28+1)), 0, "egress-too-long"},
		{"too long for every IPv6 path", frame(peerMAC, ourMAC, datagram(ourPod6, peerPod6, 1280-70-48+1)), 0, "egress-too-long"},
		{"padded", frame(peerMAC, ourMAC, short), 0, "egress-too-long"},
		{"fragment", frame(peerMAC, ourMAC, fragment), 0, "egress-checksum"},
		{"no UDP checksum", frame(peerMAC, ourMAC, noSum), 0, "egress-checksum"},
		{"SCTP", frame(peerMAC, ourMAC, protocol(datagram(ourPod, peerPod, 10), 132)), 0, "egress-checksum"},
		{"IPv6 segments", frame(peerMAC, ourMAC, datagram(ourPod6, peerPod6, 1000)), 500, "egress-segments"},
		{"segments of a fragment", frame(peerMAC, ourMAC, fragment), 50, "egress-segments"},
		{"segments too long", frame(peerMAC, ourMAC, datagram(ourPod, peerPod, 1400)), 1450 - 28 + 1, "egress-too-long"},
		// Without a GSO type; tests cannot set one, only the kernel can.
		{"segments of no kind", frame(peerMAC, ourMAC, datagram(ourPod, peerPod, 1400)), 700, "egress-no-room"},
	} {
		verdict, out, reason := p.run(t, programOut, test.frame, test.gso)
		if verdict != actUnspec || reason != test.reason || !bytes.Equal(out, test.frame) {
			t.Errorf("%s: %#x, %q, want %q; unchanged: %t", test.name, verdict, reason, test.reason, bytes.Equal(out, test.frame))
		}
	}
	if longest := frame(peerMAC, ourMAC, datagram(ourPod, peerPod, 1450-28)); longest != nil {
		if verdict, _, reason := p.run(t, programOut, longest, 0); verdict != actRedirect {
			t.Errorf("the longest: %#x, %q", verdict, reason)
		}
	}
}

// decapsulatedECN are the ECN fields of outer and inner headers, and what becomes of the
// inner one (RFC 6040, figure 4); the last with a DSCP.
var decapsulatedECN = []struct{ outer, inner, want byte }{
	{0, 0, 0},
	{0, 1, 1},
	{0, 2, 2},
	{0, 3, 3},
	{1, 0, 0},
	{1, 1, 1},
	{1, 2, 1},
	{1, 3, 3},
	{2, 0, 0},
	{2, 1, 1},
	{2, 2, 2},
	{2, 3, 3},
	{3, 1, 3},
	{3, 2, 3},
	{3, 3, 3},
	{3, 0xb9, 0xbb},
}

// TestDecapsulates decapsulates peers' packets, and checks the ECN field (RFC 6040) and
// the checksums.
func TestDecapsulates(t *testing.T) {
	p := filled(t)
	for _, family := range []struct{ node, peer, pod, from netip.Addr }{
		{ourNode, peerNode, ourPod, peerPod}, {ourNode6, peerNode6, ourPod6, peerPod6}, {ourNode, wideNode, ourPod, netip.MustParseAddr("10.5.31.200")},
	} {
		for _, ecn := range decapsulatedECN {
			inner := frame(ourMAC, peerMAC, class(datagram(family.from, family.pod, 333), ecn.inner))
			for _, sum := range []string{"right", "zero", "unfinished"} {
				sent := wire(family.peer, family.node, inner, func(b []byte) { copy(b, class(b, ecn.outer)) })
				at := 14 + headerLen(sent[14:]) + 6
				switch sum {
				case "zero":
					sent[at], sent[at+1] = 0, 0
				case "unfinished": // a partial checksum, as over a virtual link
					binary.BigEndian.PutUint16(sent[at:], fold(pseudo(sent[14:], 17)))
				}
				verdict, out, reason := p.run(t, programIn, sent, 0)
				want := frame(ourMAC, peerMAC, class(datagram(family.from, family.pod, 333), ecn.want))
				if verdict != actRedirect || reason != "" || !bytes.Equal(out, want) {
					t.Errorf("%s, ECN %d in %d, checksum %s: %#x, %q\n got %x\nwant %x", family.pod, ecn.inner, ecn.outer, sum, verdict, reason, out, want)
				}
			}
		}
	}
}

// TestLeavesIn triggers every reason for leaving an incoming packet, unchanged, to the
// device. Packets that are not the tunnel's are not counted.
func TestLeavesIn(t *testing.T) {
	p := filled(t)
	good := frame(ourMAC, peerMAC, datagram(peerPod, ourPod, 100))
	good6 := frame(ourMAC, peerMAC, datagram(peerPod6, ourPod6, 100))
	from := func(source, destination netip.Addr) []byte {
		return frame(ourMAC, peerMAC, datagram(source, destination, 100))
	}
	with := func(inner []byte, edit func(b []byte)) []byte { return wire(peerNode, ourNode, inner, edit) }
	fragment := datagram(peerPod, ourPod, 100)
	fragment[6] = 0x20
	fragment = class(fragment, 0)
	keep := func(b []byte) { copy(b[26:], "\xff\xfe") } // a wrong checksum
	badHeader := with(good, nil)
	badHeader[14+10] ^= 1
	other := with(good, nil)
	other[0] = 2 // another host's Ethernet address
	tests := []struct {
		name   string
		frame  []byte
		gso    int
		reason string
	}{
		{"another port", with(good, func(b []byte) { b[22]++ }), 0, ""},
		{"another address", wire(peerNode, stranger, good, nil), 0, ""},
		{"TCP", with(good, func(b []byte) { b[9] = 6 }), 0, ""},
		{"another's frame", other, 0, ""},
		{"outer fragment of another port", with(good, func(b []byte) { b[6], b[22] = 0x20, 0 }), 0, "ingress-fragment"},
		{"later outer fragment", with(good, func(b []byte) { b[7] = 1 }), 0, "ingress-fragment"},
		{"outer header checksum", badHeader, 0, "ingress-options"},
		{"UDP length", with(good, func(b []byte) { b[25]-- }), 0, "ingress-length"},
		{"no I flag", with(good, func(b []byte) { b[28] = 0 }), 0, "ingress-header"},
		{"other flags", with(good, func(b []byte) { b[28] |= 0x80 }), 0, "ingress-header"},
		{"VNI", with(good, func(b []byte) { b[34]++ }), 0, "ingress-header"},
		{"MAC", with(frame(host.MAC{2, 0, 0, 0, 0, 3}, peerMAC, datagram(peerPod, ourPod, 10)), nil), 0, "ingress-header"},
		{"our own MAC as the source", with(frame(ourMAC, ourMAC, datagram(peerPod, ourPod, 10)), nil), 0, "ingress-header"},
		{"IPv6 in IPv4", with(good6, nil), 0, "ingress-header"},
		{"version", with(good, func(b []byte) { b[50] = 0x65 }), 0, "ingress-header"},
		{"inner length", with(from(peerPod, netip.MustParseAddr("10.5.1.11")), func(b []byte) { b[53]-- }), 0, "ingress-length"},
		{"a stranger", wire(stranger, ourNode, good, nil), 0, "ingress-source"},
		{"another peer's pod", wire(wideNode, ourNode, good, nil), 0, "ingress-source"},
		{"nobody's pod", with(from(thirdPod, ourPod), nil), 0, "ingress-source"},
		{"our own pod", with(from(ourPod, ourPod), nil), 0, "ingress-source"},
		{"not ours", with(from(peerPod, thirdPod), nil), 0, "ingress-not-ours"},
		{"congestion not understood", with(good, func(b []byte) { b[1] = 3 }), 0, "ingress-ecn"},
		{"a checksum that is wrong", with(good, keep), 0, "ingress-checksum"},
		{"the same flow after it", with(good, nil), 0, "ingress-flow"},
		{"a fragment whose checksum nobody verified", with(frame(ourMAC, peerMAC, fragment), nil), 0, "ingress-checksum"},
		{"datagrams of UDP_SEGMENT", with(frame(ourMAC, peerMAC, datagram(peerPod, netip.MustParseAddr("10.5.1.10"), 1000)), nil), 500, "ingress-segments"},
		{"IPv6: a stranger", wire(peerNode, ourNode, good6, nil), 0, "ingress-header"},
		{"IPv6: another's pod", wire(netip.MustParseAddr("2001:db8::66"), ourNode6, good6, nil), 0, "ingress-source"},
		{"IPv6: congestion", wire(peerNode6, ourNode6, good6, func(b []byte) { b[1] |= 0x30 }), 0, "ingress-ecn"},
		{"IPv6: not ours", wire(peerNode6, ourNode6, frame(ourMAC, peerMAC, datagram(peerPod6, peerPod6, 9)), nil), 0, "ingress-not-ours"},
	}
	for _, test := range tests {
		verdict, out, reason := p.run(t, programIn, test.frame, test.gso)
		if verdict != actUnspec || reason != test.reason || !bytes.Equal(out, test.frame) {
			t.Errorf("%s: %#x, %q, want %q; unchanged: %t", test.name, verdict, reason, test.reason, bytes.Equal(out, test.frame))
		}
	}
}

// TestKeepsOrderAfterUnreadFrames leaves a frame of several datagrams, and fragments, without a
// look at the flows in them. So all that the same peer sends soon after takes the device,
// too, whatever its flow, or it could overtake a packet of its own flow in there.
func TestKeepsOrderAfterUnreadFrames(t *testing.T) {
	p := filled(t)
	third := netip.MustParseAddr("10.5.31.200") // at wideNode
	fragment6 := wire(peerNode6, ourNode6, frame(ourMAC, peerMAC, datagram(peerPod6, ourPod6, 100)), nil)
	fragment6 = slices.Insert(fragment6, 14+40, 17, 0, 0, 1, 1, 2, 3, 4) // the first
	fragment6[14+6] = 44
	binary.BigEndian.PutUint16(fragment6[14+4:], uint16(len(fragment6)-14-40))
	later6 := bytes.Clone(fragment6)
	later6[14+40+2] = 1
	two := wire(peerNode, ourNode, append(frame(ourMAC, peerMAC, datagram(peerPod, netip.MustParseAddr("10.5.1.77"), 100)), make([]byte, 100)...), nil)
	two6 := wire(peerNode6, ourNode6, append(frame(ourMAC, peerMAC, datagram(peerPod6, netip.MustParseAddr("fd00:5:0:1::77"), 100)), make([]byte, 100)...), nil)
	first := wire(peerNode, ourNode, frame(ourMAC, peerMAC, datagram(peerPod, ourPod, 100)), func(b []byte) { b[6] = 0x20 })
	for _, test := range []struct {
		name           string
		frame          []byte
		gso            int
		reason         string
		after4, after6 string
	}{
		{"nothing", nil, 0, "", "", ""},
		{"two datagrams", two, 200, "ingress-segments", "ingress-flow", ""},
		{"two datagrams over IPv6", two6, 200, "ingress-segments", "", "ingress-flow"},
		{"the first fragment", first, 0, "ingress-fragment", "ingress-flow", ""},
		{"the first fragment over IPv6", fragment6, 0, "ingress-fragment", "", "ingress-flow"},
		{"a later fragment over IPv6", later6, 0, "ingress-fragment", "", ""},
	} {
		if test.frame != nil {
			if verdict, _, reason := p.run(t, programIn, test.frame, test.gso); verdict != actUnspec || reason != test.reason {
				t.Errorf("%s: %#x, %q, want %q", test.name, verdict, reason, test.reason)
			}
		}
		for _, after := range []struct {
			node, peer, from, to netip.Addr
			reason               string
		}{{ourNode, peerNode, peerPod, ourPod, test.after4}, {ourNode6, peerNode6, peerPod6, ourPod6, test.after6}, {ourNode, wideNode, third, ourPod, ""}} {
			sent := wire(after.peer, after.node, frame(ourMAC, peerMAC, datagram(after.from, after.to, 50)), nil)
			verdict, _, reason := p.run(t, programIn, sent, 0)
			if reason != after.reason || (verdict == actRedirect) != (after.reason == "") {
				t.Errorf("a packet of %s after %s: %#x, %q, want %q", after.from, test.name, verdict, reason, after.reason)
			}
		}
		p.forgetUnread(t)
		p.forgetFlows(t)
	}
}

// forgetUnread does what a pause of 100 ms does for outer sources.
func (p *Path) forgetUnread(t *testing.T) {
	t.Helper()
	m := p.loaded.Maps["unread"]
	keys := make([]uint32, m.MaxEntries())
	for k := range keys {
		keys[k] = uint32(k)
	}
	if _, err := m.BatchUpdate(keys, make([]uint64, len(keys)), nil); err != nil {
		t.Fatal(err)
	}
}

// forgetFlows does what a pause of 100 ms does for inner flows.
func (p *Path) forgetFlows(t *testing.T) {
	t.Helper()
	m := p.loaded.Maps["flows"]
	zero := make([]byte, m.ValueSize())
	for k := range m.MaxEntries() {
		if err := m.Put(k, zero); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLeavesWithoutHash runs culvert_out on a packet whose flow hash another program has set
// to 0: the outer source port cannot be derived.
func TestLeavesWithoutHash(t *testing.T) {
	p := filled(t)
	programs, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer programs.Close()
	if err := programs.Put(uint32(0), p.loaded.Programs[programOut]); err != nil {
		t.Fatal(err)
	}
	first, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnSetHash.Call(),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMapPtr(asm.R2, programs.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, 2), // TC_ACT_SHOT: the call failed
		asm.Return(),
	}})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer first.Close()
	p.loaded.Programs["hash"] = first
	for _, packet := range [][]byte{datagram(ourPod, peerPod, 100), datagram(ourPod6, peerPod6, 100)} {
		sent := frame(peerMAC, ourMAC, packet)
		verdict, out, reason := p.run(t, "hash", sent, 0)
		if verdict != actUnspec || reason != "egress-no-flow" || !bytes.Equal(out, sent) {
			t.Errorf("%#x, %q; unchanged: %t", verdict, reason, bytes.Equal(out, sent))
		}
	}
}

// TestLeavesFramesThatCannotShrink gives a bulk flow a super-frame without a GSO type, whose
// outer headers the kernel does not remove. Only the kernel can set the type.
func TestLeavesFramesThatCannotShrink(t *testing.T) {
	const joined = 1 // enum way in bpf/fastpath.c
	flow := make([]byte, 0, 40)
	flow = binary.NativeEndian.AppendUint64(flow, monotonic(t)+uint64(time.Hour)) // last
	flow = binary.NativeEndian.AppendUint64(flow, 0)
	for _, v := range []uint32{0, joined, 1 << 20, 0} { // bytes, way, joining
		flow = binary.NativeEndian.AppendUint32(flow, v)
	}
	inner := segment(peerPod, ourPod, peerPort, ourPort, tcpACK, 1000, 1000)
	inner6 := segment(peerPod6, ourPod6, peerPort, ourPort, tcpACK, 1000, 1000)
	vxlan := filled(t)
	for _, test := range []struct {
		name string
		path *Path
		sent []byte
	}{
		{"VXLAN", vxlan, wire(peerNode, ourNode, frame(ourMAC, peerMAC, inner), nil)},
		{"VXLAN over IPv6", vxlan, wire(peerNode6, ourNode6, frame(ourMAC, peerMAC, inner6), nil)},
		{"IPIP", filledIPIP(t, true), frame(host.MAC{}, nearMAC, ipPacket(peerNode, ourNode, 4, inner))},
	} {
		flows := test.path.loaded.Maps["flows"]
		for k := range flows.MaxEntries() {
			if err := flows.Put(k, flow); err != nil {
				t.Fatal(err)
			}
		}
		verdict, out, reason := test.path.run(t, programIn, test.sent, 500)
		if verdict != actUnspec || reason != "ingress-no-room" || !bytes.Equal(out, test.sent) {
			t.Errorf("%s: %#x, %q; unchanged: %t", test.name, verdict, reason, bytes.Equal(out, test.sent))
		}
	}
}

// TestCountsByPeer counts what is exchanged with each peer: what the program sends and
// takes, and what it leaves to the device on the way out, not what it leaves on the way in.
func TestCountsByPeer(t *testing.T) {
	p := filled(t)
	if got := p.Exchanged(); got != nil {
		t.Errorf("while the fast path is off: %v", got)
	}
	p.say(true, "")
	out, out6 := datagram(ourPod, peerPod, 100), datagram(ourPod6, peerPod6, 200)
	p.run(t, programOut, frame(peerMAC, ourMAC, out), 0)
	p.run(t, programOut, frame(peerMAC, ourMAC, out), 0)
	p.run(t, programOut, frame(peerMAC, ourMAC, out6), 0)
	long := datagram(ourPod, peerPod, 1473)
	if verdict, _, reason := p.run(t, programOut, frame(peerMAC, ourMAC, long), 0); verdict != actUnspec || reason != "egress-too-long" {
		t.Fatalf("%#x, %q", verdict, reason)
	}
	in := datagram(peerPod, ourPod, 300)
	p.run(t, programIn, wire(peerNode, ourNode, frame(ourMAC, peerMAC, in), nil), 0)
	p.run(t, programIn, wire(stranger, ourNode, frame(ourMAC, peerMAC, in), nil), 0)

	there, there6 := firewall.Source{Outer: peerNode, Inner: peerNet}, firewall.Source{Outer: peerNode6, Inner: peerNet6}
	want := map[firewall.Source]firewall.Exchanged{
		there:                             {Sent: firewall.Count{Packets: 3, Bytes: uint64(2*len(out) + len(long))}, Received: firewall.Count{Packets: 1, Bytes: uint64(len(in))}},
		there6:                            {Sent: firewall.Count{Packets: 1, Bytes: uint64(len(out6))}},
		{Outer: wideNode, Inner: wideNet}: {},
	}
	if got := p.Exchanged(); !maps.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	passed := func() (sent, received []firewall.Source) {
		for _, x := range p.Activity() {
			if x.Sent {
				sent = append(sent, x.Source)
			}
			if x.Received {
				received = append(received, x.Source)
			}
		}
		return sent, received
	}
	if sent, received := passed(); len(sent) != 2 || !slices.Equal(received, []firewall.Source{there}) {
		t.Errorf("sent to %v, received from %v", sent, received)
	}
	if sent, received := passed(); sent != nil || received != nil {
		t.Errorf("the second time: sent to %v, received from %v", sent, received)
	}
}

// TestEveryReasonHasAName checks that each reason has a unique name.
func TestEveryReasonHasAName(t *testing.T) {
	seen := map[string]bool{}
	for c := slowOutPeer; c < counters; c++ {
		if name := slowNames[c]; name == "" || seen[name] {
			t.Errorf("counter %d is called %q", c, name)
		}
		seen[slowNames[c]] = true
	}
}

// TestContents checks the states that the fast path does not support, each with its
// reason.
func TestContents(t *testing.T) {
	f := facts{
		links: map[string]link{"cvt.7": loopback, "cvt6.7": loopback, "lo": loopback}, ports: 1,
		path: func(to netip.Addr, _ string) (int, bool) { return 9000, to != peerNode6 },
	}
	c, err := contentsOf(state(), f)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.tunnels) != 2 || len(c.sources) != 3 || len(c.peers) != 1 || len(c.hooks) != 3 {
		t.Errorf("%+v", c)
	}
	if got := c.peers[macKey(4, peerMAC)].MTU; got != 1500 {
		t.Errorf("the path's MTU is %d", got)
	}
	for name, spoil := range map[string]func(*host.State, map[string]link){
		"there is no tunnel device":                               func(s *host.State, _ map[string]link) { s.Links = nil },
		"cvt.7 is not there":                                      func(_ *host.State, l map[string]link) { delete(l, "cvt.7") },
		"the uplink lo is not there":                              func(_ *host.State, l map[string]link) { delete(l, "lo") },
		"the uplink lo is no Ethernet interface":                  func(_ *host.State, l map[string]link) { l["lo"] = link{index: 1} },
		"cvt.7 learns addresses from what it receives (Learning)": func(s *host.State, _ map[string]link) { s.Links[0].VXLAN.Learning = true },
		"cvt.7 sends group policy in its headers (GBP)":           func(s *host.State, _ map[string]link) { s.Links[0].VXLAN.GBP = true },
	} {
		s, links := state(), map[string]link{"cvt.7": loopback, "cvt6.7": loopback, "lo": loopback}
		spoil(&s, links)
		if _, err := contentsOf(s, facts{links: links, path: f.path}); err == nil || err.Error() != name {
			t.Errorf("%v, want %q", err, name)
		}
	}
	// More prefix lengths than the program looks up: the rest are left out.
	s := state()
	for bits := 10; bits < 24; bits++ {
		s.Firewall.Tunnels[0].Peers = append(s.Firewall.Tunnels[0].Peers, firewall.Source{Outer: peerNode, Inner: netip.PrefixFrom(netip.MustParseAddr("10.0.0.0"), bits)})
	}
	if c, err = contentsOf(s, f); err != nil || c.tunnels[4].Lengths != mostLengths {
		t.Errorf("%d lengths (%v)", c.tunnels[4].Lengths, err)
	}
}

// TestFillAfterFailure checks that the maps hold nothing of peers that left while they could
// not be written: here because a map is full, with the kernel also for lack of memory.
func TestFillAfterFailure(t *testing.T) {
	p := open(t)
	count := func(name string) (n int) {
		t.Helper()
		var key []byte
		err := p.loaded.Maps[name].NextKey(nil, &key)
		for ; err == nil; err = p.loaded.Maps[name].NextKey(key, &key) {
			n++
		}
		if !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Fatal(err)
		}
		return n
	}
	with := func(tunnels, peers int) contents {
		c := contents{tunnels: make(map[uint32]tunnel), peers: make(map[peerKey]peer), counted: make(map[peerKey]struct{}), sources: make(map[sourceKey]struct{})}
		for i := range tunnels {
			c.tunnels[uint32(i)] = tunnel{}
		}
		for i := range peers {
			key := macKey(4, host.MAC{2, 0, 0, 0, 1, byte(i)})
			c.peers[key], c.counted[key] = peer{}, struct{}{}
			c.sources[sourceKey{Bits: 24, Outer: addressOf(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}))}] = struct{}{}
		}
		return c
	}
	for i, step := range []struct {
		contents
		fails bool
	}{{with(1, 9), false}, {with(3, 12), true}, {with(3, 7), true}, {with(2, 2), false}, {with(1, 1), false}} { // the map of tunnels takes two
		if err := p.fill(step.contents); (err != nil) != step.fails {
			t.Fatalf("step %d: %v", i, err)
		}
		if step.fails {
			continue
		}
		for name, want := range map[string]int{"tunnels": len(step.tunnels), "peers": len(step.peers), "sent": len(step.counted), "sources": len(step.sources)} {
			if n := count(name); n != want {
				t.Errorf("step %d: %d entries in %s, want %d", i, n, name, want)
			}
		}
	}
}

// TestContentsOfUserspaceTunnel checks what the maps hold for the userspace datapath's tunnel:
// peers by their prefixes, of which the program tries the longest first.
func TestContentsOfUserspaceTunnel(t *testing.T) {
	process := host.ProcessTunnel{
		Link: "culvert0", Subnet: ourNet, VXLAN: host.VXLAN{MAC: ourMAC, VNI: vni, Local: ourNode, Device: "lo", Port: 8472},
		Peers: []host.ProcessPeer{{Inner: wideNet, Outer: wideNode, MAC: peerMAC}, {Inner: peerNet, Outer: peerNode, MAC: peerMAC}},
	}
	s := host.State{FastPath: true, Links: []host.Link{{Name: "culvert0"}}, Process: []host.ProcessTunnel{process}}
	f := facts{links: map[string]link{"culvert0": {index: 7, mtu: 1450}, "lo": loopback}, ports: 1, path: func(netip.Addr, string) (int, bool) { return 1400, true }}
	c, err := contentsOf(s, f)
	if err != nil {
		t.Fatal(err)
	}
	got := c.tunnels[4]
	if got.Layer3 != 1 || got.Device != 7 || got.Lengths != 2 || got.Bits[0] != 24 || got.Bits[1] != 20 {
		t.Errorf("%+v", got)
	}
	// Two peers with one Ethernet address are two peers.
	for _, p := range process.Peers {
		if got := c.peers[prefixKey(p.Inner)]; got.Outer != addressOf(p.Outer) || got.MAC != peerMAC || got.MTU != 1400 {
			t.Errorf("%s: %+v", p.Inner, got)
		}
	}
	s.Process[0].Unfit = "no"
	if _, err := contentsOf(s, f); err == nil || err.Error() != "no" {
		t.Errorf("of a tunnel that is unfit: %v", err)
	}
}
