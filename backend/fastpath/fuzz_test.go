package fastpath

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// TestReceivesAsTheDatapathBelow changes frames from the uplink at random.
// What the program takes, the datapath below would have accepted with the same inner frame.
// What the oracle accepts, the program takes, unless a checksum or flow prevents it.
// CULVERT_FASTPATH_FRAMES is the number of frames of each kind.
func TestReceivesAsTheDatapathBelow(t *testing.T) {
	vxlan := func(packet []byte, outer byte) []byte {
		return wire(peerNode, ourNode, frame(ourMAC, peerMAC, packet), func(b []byte) { copy(b, class(b, outer)) })
	}
	t.Run("VXLAN", func(t *testing.T) { takesNothingElse(t, filled(t), accepts, vxlan, nil) })
	t.Run("IPIP", func(t *testing.T) {
		takesNothingElse(t, filledIPIP(t, true), acceptsIPIP, func(packet []byte, outer byte) []byte {
			return frame(host.MAC{}, nearMAC, class(ipPacket(peerNode, ourNode, 4, packet), outer))
		}, nil)
	})
	t.Run("to a pod", func(t *testing.T) {
		p := withPods(t)
		k := key(peerPod, ourPod, 1024, 1025) // those of datagram
		k.Protocol = unix.IPPROTO_UDP
		valid := shortcut{
			Until: monotonic(t) + uint64(24*time.Hour), Generation: p.generation, Link: uint32(loopback.index), Ethernet: ethernet{podMAC, bridgeMAC, etherType(4)},
		}
		takesNothingElse(t, p, func(b []byte) (inner []byte, accepted bool) {
			inner, accepted = accepts(b)
			if packet := inner[min(14, len(inner)):]; accepted && short(packet, peerPod, ourPod) {
				inner = frame(podMAC, bridgeMAC, forwarded(packet))
			}
			return inner, accepted
		}, vxlan, func() { p.put(t, k, valid) }) // a packet on the host's way ends the short one
	})
}

// short reports whether a datagram may take the short way between two pods. It has
// datagram's ports.
func short(packet []byte, source, destination netip.Addr) bool {
	return packet[0] == 0x45 && packet[9] == unix.IPPROTO_UDP && len(packet) >= 28 && binary.BigEndian.Uint16(packet[6:])&0x3fff == 0 && packet[8] > 1 &&
		bytes.Equal(packet[12:16], source.AsSlice()) && bytes.Equal(packet[16:20], destination.AsSlice()) &&
		binary.BigEndian.Uint16(packet[20:]) == 1024 && binary.BigEndian.Uint16(packet[22:]) == 1025
}

// forwarded returns an IPv4 packet with its TTL decreased. A wrong header checksum stays
// wrong (RFC 1624).
func forwarded(packet []byte) []byte {
	b := bytes.Clone(packet)
	b[8]--
	sum := uint64(^binary.BigEndian.Uint16(b[10:])) + uint64(^binary.BigEndian.Uint16(packet[8:])) + uint64(binary.BigEndian.Uint16(b[8:]))
	binary.BigEndian.PutUint16(b[10:], ^fold(sum))
	return b
}

// randomFrames returns the source of random numbers and the number of frames.
func randomFrames(t *testing.T) (*rand.Rand, int) {
	t.Helper()
	text := os.Getenv("CULVERT_FASTPATH_FRAMES")
	if text == "" {
		return rand.New(rand.NewPCG(1, 2)), 10_000
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("CULVERT_FASTPATH_FRAMES: %v", err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("%d frames, seed %d", n, seed)
	return rand.New(rand.NewPCG(seed, 0)), n
}

// damage changes up to three of the first bytes.
func damage(random *rand.Rand, b []byte, bytes int) {
	for range random.IntN(4) {
		at := random.IntN(min(len(b), bytes))
		if random.IntN(2) == 0 {
			b[at] ^= 1 << random.IntN(8)
		} else {
			b[at] = byte(random.IntN(256))
		}
	}
}

func takesNothingElse(t *testing.T, p *Path, accepts func([]byte) ([]byte, bool), wire func(packet []byte, class byte) []byte, before func()) {
	t.Helper()
	random, rounds := randomFrames(t)
	taken, left, rejected := 0, 0, 0
	for range rounds {
		from, to := peerPod, ourPod
		if random.IntN(2) == 0 {
			from, to = netip.AddrFrom4([4]byte{10, 5, 2, byte(random.IntN(256))}), netip.AddrFrom4([4]byte{10, 5, 1, byte(random.IntN(256))})
		}
		packet := class(datagram(from, to, random.IntN(200)), byte(random.IntN(4)))
		b := wire(packet, byte(random.IntN(4)))
		damage(random, b, 14+20+16+14+28)
		if random.IntN(8) == 0 {
			b = b[:60+random.IntN(len(b)-60)]
		}
		if random.IntN(2) == 0 && len(b) >= 34 { // repair the outer header checksum, so that other checks are reached
			b[24], b[25] = 0, 0
			binary.BigEndian.PutUint16(b[24:], ^fold(sumOf(b[14:34])))
		}
		if before != nil {
			before()
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
		case !bytes.Equal(got, b):
			t.Fatalf("left changed: %x\nbefore: %x", got, b)
		case !accepted:
			rejected++
		default:
			left++
		}
	}
	t.Logf("%d taken, %d left that the datapath below accepts, %d that it rejects", taken, left, rejected)
	if taken < rounds/20 || left+rejected < rounds/20 {
		t.Errorf("%d taken, %d left", taken, left+rejected)
	}
}

// TestSendsAsTheDatapathBelow changes frames of pods at random. What the program
// takes, the datapath below would have sent: the same inner packet, to the same peer, in the
// same outer headers. What the oracle finds sendable, the program takes, unless its flow
// prevents it.
func TestSendsAsTheDatapathBelow(t *testing.T) {
	fromPod := func(packet []byte) []byte { return frame(peerMAC, ourMAC, packet) }
	t.Run("VXLAN", func(t *testing.T) {
		sendsWhatIsBelow(t, filled(t), programOut, fromPod, func(b []byte) (inner []byte, sendable bool) {
			return b, bytes.Equal(b[:6], peerMAC[:]) && b[12] == 8 && b[13] == 0 && whole(b[14:]) && checksummed(b[14:])
		}, nil)
	})
	t.Run("IPIP", func(t *testing.T) {
		sendsWhatIsBelow(t, filledIPIP(t, true), programOut, fromPod, func(b []byte) (inner []byte, sendable bool) {
			to, _ := netip.AddrFromSlice(b[30:34])
			return b[14:], b[12] == 8 && b[13] == 0 && whole(b[14:]) && peerNet.Contains(to)
		}, nil)
	})
	t.Run("from a pod", func(t *testing.T) {
		p := withPods(t)
		k := key(ourPod, peerPod, 1024, 1025)
		k.Protocol = unix.IPPROTO_UDP
		valid := shortcut{
			Until: monotonic(t) + uint64(24*time.Hour), Generation: p.generation, Link: uint32(loopback.index), Ethernet: ethernet{peerMAC, ourMAC, etherType(4)}, Bridge: bridgeMAC,
		}
		sendsWhatIsBelow(t, p, programPodOut, func(packet []byte) []byte { return frame(bridgeMAC, podMAC, packet) }, func(b []byte) (inner []byte, sendable bool) {
			return frame(peerMAC, ourMAC, forwarded(b[14:])),
				bytes.Equal(b[:6], bridgeMAC[:]) && b[12] == 8 && b[13] == 0 && whole(b[14:]) && checksummed(b[14:]) && short(b[14:], ourPod, peerPod)
		}, func() { p.put(t, k, valid) }) // a packet on the host's way ends the short one
	})
}

// whole reports whether an IPv4 header without options describes the packet.
func whole(packet []byte) bool {
	return packet[0] == 0x45 && int(binary.BigEndian.Uint16(packet[2:])) == len(packet)
}

// checksummed reports whether a packet has a checksum from which the outer one can be
// derived.
func checksummed(packet []byte) bool {
	udpSum := packet[26] != 0 || packet[27] != 0
	return binary.BigEndian.Uint16(packet[6:])&0x3fff == 0 && (packet[9] == 1 || packet[9] == 6 || packet[9] == 17 && udpSum)
}

// intact reports whether a packet's checksums are right.
func intact(packet []byte) bool {
	n := headerLen(packet)
	if n < 20 || n > len(packet) || fold(sumOf(packet[:n])) != 0xffff {
		return false
	}
	if packet[9] == 1 {
		return fold(sumOf(packet[n:])) == 0xffff
	}
	return fold(pseudo(packet, packet[9])+sumOf(packet[n:])) == 0xffff
}

func sendsWhatIsBelow(t *testing.T, p *Path, program string, fromPod func([]byte) []byte, sends func([]byte) (inner []byte, sendable bool), before func()) {
	t.Helper()
	random, rounds := randomFrames(t)
	taken, left, kept := 0, 0, 0
	for range rounds {
		from, to := ourPod, peerPod
		if program == programOut && random.IntN(2) == 0 {
			from, to = netip.AddrFrom4([4]byte{10, 5, 1, byte(random.IntN(256))}), netip.AddrFrom4([4]byte{10, 5, 2, byte(random.IntN(256))})
		}
		b := fromPod(class(datagram(from, to, random.IntN(200)), byte(random.IntN(4))))
		damage(random, b, 14+28)
		if random.IntN(16) == 0 {
			b = b[:14+28+random.IntN(len(b)-14-28+1)]
		}
		if before != nil {
			before()
		}
		want, sendable := sends(b)
		verdict, got, reason := p.run(t, program, b, 0)
		switch {
		case verdict != actRedirect && !bytes.Equal(got, b):
			t.Fatalf("left changed: %x\nbefore: %x", got, b)
		case verdict != actRedirect && sendable && reason != "egress-flow":
			t.Fatalf("left as %q: %x", reason, b)
		case verdict != actRedirect && sendable:
			kept++
		case verdict != actRedirect:
			left++
		case !encapsulated(got[14:], b[14:], want):
			t.Fatalf("of %x it made\n%x", b, got)
		default:
			taken++
		}
	}
	t.Logf("%d taken, %d left because of their flow, %d others left", taken, kept, left)
	if taken < rounds/20 || left < rounds/20 {
		t.Errorf("%d taken, %d left", taken, left)
	}
}

// encapsulated reports whether b is the inner frame or packet in the headers that this
// node's tunnel to peerNode adds, for a packet of a pod.
func encapsulated(b, packet, inner []byte) bool {
	ecn := packet[1] & 3
	if ecn == 3 {
		ecn = 2 // INET_ECN_encapsulate
	}
	if b[0] != 0x45 || b[1] != ecn || int(binary.BigEndian.Uint16(b[2:])) != len(b) || b[8] != 61 || fold(sumOf(b[:20])) != 0xffff ||
		!bytes.Equal(b[12:16], ourNode.AsSlice()) || !bytes.Equal(b[16:20], peerNode.AsSlice()) || !bytes.HasSuffix(b, inner) {
		return false
	}
	if b[9] == 4 {
		return len(b) == 20+len(inner) && binary.BigEndian.Uint16(b[6:]) == 0x4000
	}
	udp := b[20:]
	port := binary.BigEndian.Uint16(udp)
	// The checksum is derived from the inner ones: of a damaged packet it may be wrong, as
	// the packet is.
	return b[9] == unix.IPPROTO_UDP && len(b) == 36+len(inner) && binary.BigEndian.Uint16(b[6:])&0x3fff == 0 &&
		port >= 32768 && port < 32768+28231 && binary.BigEndian.Uint16(udp[2:]) == 8472 && int(binary.BigEndian.Uint16(udp[4:])) == len(udp) &&
		binary.BigEndian.Uint32(udp[8:]) == 8<<24 && binary.BigEndian.Uint32(udp[12:]) == vni<<8 &&
		(!intact(packet) || fold(pseudo(b, unix.IPPROTO_UDP)+sumOf(udp)) == 0xffff)
}

// sumsAgree reports whether a frame would be accepted without its outer UDP checksum.
func sumsAgree(b []byte) bool {
	b = bytes.Clone(b)
	udp := b[34:]
	udp[6], udp[7] = 0, 0
	_, accepted := accepts(b)
	return accepted
}
