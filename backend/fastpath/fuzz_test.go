package fastpath

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"culvert/internal/host"
)

// accepts is a slow and obvious oracle: whether the kernel datapath accepts a frame from
// the uplink, and the inner frame that it then delivers. It covers only frames without
// IPv4 options in the outer header.
func accepts(b []byte) (inner []byte, accepted bool) {
	if len(b) < 14+20+16+14+20 || !bytes.Equal(b[:6], make([]byte, 6)) || b[12] != 8 || b[13] != 0 {
		return nil, false
	}
	ip := b[14:]
	if ip[0] != 0x45 || ip[9] != 17 || fold(sumOf(ip[:20])) != 0xffff || int(binary.BigEndian.Uint16(ip[2:])) != len(ip) || binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 {
		return nil, false
	}
	outer, _ := netip.AddrFromSlice(ip[12:16])
	to, _ := netip.AddrFromSlice(ip[16:20])
	udp := ip[20:]
	if to != ourNode || binary.BigEndian.Uint16(udp[2:]) != 8472 || int(binary.BigEndian.Uint16(udp[4:])) != len(udp) ||
		binary.BigEndian.Uint32(udp[8:]) != 8<<24 || binary.BigEndian.Uint32(udp[12:]) != vni<<8 {
		return nil, false
	}
	check := binary.BigEndian.Uint16(udp[6:])
	unfinished := check == fold(pseudo(ip, 17))
	if check != 0 && !unfinished && fold(pseudo(ip, 17)+sumOf(udp)) != 0xffff {
		return nil, false
	}
	inner = bytes.Clone(udp[16:])
	if !bytes.Equal(inner[:6], ourMAC[:]) || bytes.Equal(inner[6:12], ourMAC[:]) || inner[12] != 8 || inner[13] != 0 {
		return nil, false
	}
	return inner, deliverable(outer, ip[1], inner[14:])
}

// acceptsIPIP is accepts for an IPIP tunnel. It returns the inner packet.
func acceptsIPIP(b []byte) (inner []byte, accepted bool) {
	if len(b) < 14+20+20 || !bytes.Equal(b[:6], make([]byte, 6)) || b[12] != 8 || b[13] != 0 {
		return nil, false
	}
	ip := b[14:]
	if ip[0] != 0x45 || ip[9] != 4 || fold(sumOf(ip[:20])) != 0xffff || int(binary.BigEndian.Uint16(ip[2:])) != len(ip) || binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 {
		return nil, false
	}
	outer, _ := netip.AddrFromSlice(ip[12:16])
	to, _ := netip.AddrFromSlice(ip[16:20])
	if to != ourNode {
		return nil, false
	}
	inner = bytes.Clone(ip[20:])
	return inner, deliverable(outer, ip[1], inner)
}

// deliverable reports whether an inner packet may come from an outer source, and sets its
// ECN field from the outer traffic class.
func deliverable(outer netip.Addr, class byte, packet []byte) bool {
	if packet[0]>>4 != 4 || packet[0]&15 < 5 || int(binary.BigEndian.Uint16(packet[2:])) != len(packet) || headerLen(packet) > len(packet) {
		return false
	}
	source, _ := netip.AddrFromSlice(packet[12:16])
	destination, _ := netip.AddrFromSlice(packet[16:20])
	pair := outer == peerNode && peerNet.Contains(source) || outer == wideNode && wideNet.Contains(source)
	if !pair || !ourNet.Contains(destination) {
		return false
	}
	outside, inside := class&3, packet[1]&3
	switch {
	case outside == 3 && inside == 0:
		return false
	case outside == 3:
		inside = 3
	case outside == 1 && inside == 2:
		inside = 1
	}
	if class := packet[1]&^3 | inside; class != packet[1] {
		sum := uint64(^binary.BigEndian.Uint16(packet[10:])) + uint64(^uint16(packet[1])) + uint64(class) // RFC 1624
		packet[1] = class
		binary.BigEndian.PutUint16(packet[10:], ^fold(sum))
	}
	return true
}

// TestTakesNothingThatTheDatapathBelowWouldNot changes valid frames at random. What the
// program takes, the kernel datapath would have accepted with the same inner frame. What
// the oracle accepts, the program takes, unless a checksum or flow prevents it.
func TestTakesNothingThatTheDatapathBelowWouldNot(t *testing.T) {
	t.Run("VXLAN", func(t *testing.T) {
		takesNothingElse(t, filled(t), accepts, func(packet []byte, outer byte) []byte {
			return wire(peerNode, ourNode, frame(ourMAC, peerMAC, packet), func(b []byte) { copy(b, class(b, outer)) })
		})
	})
	t.Run("IPIP", func(t *testing.T) {
		takesNothingElse(t, filledIPIP(t, true), acceptsIPIP, func(packet []byte, outer byte) []byte {
			return frame(host.MAC{}, nearMAC, class(ipPacket(peerNode, ourNode, 4, packet), outer))
		})
	})
}

func takesNothingElse(t *testing.T, p *Path, accepts func([]byte) ([]byte, bool), wire func(packet []byte, class byte) []byte) {
	t.Helper()
	random := rand.New(rand.NewPCG(1, 2))
	rounds, taken, left := 20000, 0, 0
	if testing.Short() {
		rounds = 4000
	}
	for range rounds {
		pod := netip.AddrFrom4([4]byte{10, 5, 1, byte(1 + random.IntN(250))})
		packet := class(datagram(peerPod, pod, random.IntN(200)), byte(random.IntN(4)))
		b := wire(packet, byte(random.IntN(4)))
		for range random.IntN(4) {
			at := random.IntN(min(len(b), 14+20+16+14+28))
			if random.IntN(2) == 0 {
				b[at] ^= 1 << random.IntN(8)
			} else {
				b[at] = byte(random.IntN(256))
			}
		}
		if random.IntN(8) == 0 {
			b = b[:60+random.IntN(len(b)-60)]
		}
		if random.IntN(2) == 0 && len(b) >= 34 { // repair the outer header checksum, so that other checks are reached
			b[24], b[25] = 0, 0
			binary.BigEndian.PutUint16(b[24:], ^fold(sumOf(b[14:34])))
		}
		want, accepted := accepts(b)
		verdict, got, reason := p.run(t, programIn, b, 0)
		if reason == "ingress-fragment" { // or what follows it is left, too
			p.forgetUnread(t)
		}
		switch {
		case verdict == actRedirect && !accepted:
			// The program derives one of the inner and outer checksums from the other. If
			// both are wrong by the same amount, the packet arrives and the pod drops it.
			if b[23] == 17 && sumsAgree(b) {
				left++
				continue
			}
			t.Fatalf("taken: %x", b)
		case verdict == actRedirect && !bytes.HasSuffix(got, want):
			t.Fatalf("of %x it made\n%x, not\n%x", b, got, want)
		case verdict == actRedirect:
			taken++
		case accepted && reason != "ingress-checksum" && reason != "ingress-flow" && !(reason == "ingress-header" && b[23] == 4):
			t.Fatalf("left as %q: %x", reason, b)
		default:
			left++
		}
	}
	if taken < rounds/20 || left < rounds/20 {
		t.Errorf("%d taken, %d left", taken, left)
	}
}

// sumsAgree reports whether a frame would be accepted without its outer UDP checksum.
func sumsAgree(b []byte) bool {
	b = bytes.Clone(b)
	udp := b[34:]
	udp[6], udp[7] = 0, 0
	_, accepted := accepts(b)
	return accepted
}
