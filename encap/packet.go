package encap

import (
	"encoding/binary"
	"net/netip"
)

const (
	protoTCP = 6
	protoUDP = 17

	udpHeaderLen = 8

	ecnBits = 3 // of the traffic class (RFC 3168)
)

const (
	tcpFIN = 1 << 0
	tcpSYN = 1 << 1
	tcpRST = 1 << 2
	tcpPSH = 1 << 3
	tcpACK = 1 << 4
	tcpURG = 1 << 5
	tcpCWR = 1 << 7
)

// packet is the parse of an IP packet: offsets and lengths, not slices, so that
// it can be reused without allocation.
type packet struct {
	is4      bool
	proto    uint8 // of the transport header, if transport is set
	ecn      uint8 // the low two bits of the traffic class
	class    uint8 // the traffic class (IPv4: type of service), ECN included, as parsed
	length   int   // of the whole packet by its header; at most the input's length
	ipLen    int   // of the IP header
	headLen  int   // of the IP and transport headers together, if transport is set
	fragment bool
	// transport reports that a whole TCP or UDP header follows the IP header
	// directly and that the packet is not a fragment.
	transport bool
}

// parse overwrites p with the parse of the packet at the start of b, which may
// be longer (Ethernet padding). It returns false if the IP header is truncated or
// its lengths are inconsistent.
func (p *packet) parse(b []byte) bool {
	*p = packet{}
	if len(b) < 20 {
		return false
	}
	switch b[0] >> 4 {
	case 4:
		p.is4 = true
		p.ipLen = int(b[0]&0x0f) * 4
		p.length = int(binary.BigEndian.Uint16(b[2:]))
		if p.ipLen < 20 || p.length < p.ipLen || p.length > len(b) {
			return false
		}
		p.class = b[1]
		p.proto = b[9]
		p.fragment = binary.BigEndian.Uint16(b[6:])&0x3fff != 0 // MF or an offset
	case 6:
		if len(b) < 40 {
			return false
		}
		p.ipLen = 40
		p.length = 40 + int(binary.BigEndian.Uint16(b[4:]))
		if p.length > len(b) {
			return false
		}
		p.class = b[0]<<4 | b[1]>>4
		p.proto = b[6] // an extension header's number is neither TCP nor UDP
	default:
		return false
	}
	p.ecn = p.class & ecnBits
	if p.fragment {
		return true
	}
	switch p.proto {
	case protoTCP:
		if p.length < p.ipLen+20 {
			return true
		}
		p.headLen = p.ipLen + int(b[p.ipLen+12]>>4)*4
		p.transport = p.headLen >= p.ipLen+20 && p.headLen <= p.length
	case protoUDP:
		p.headLen = p.ipLen + udpHeaderLen
		p.transport = p.headLen <= p.length
	}
	return true
}

// checkOffset is the offset of the transport checksum from the packet's start.
func (p *packet) checkOffset() int {
	if p.proto == protoTCP {
		return p.ipLen + 16
	}
	return p.ipLen + 6
}

// source and destination return the packet's addresses.
func (p *packet) source(b []byte) netip.Addr {
	if p.is4 {
		return netip.AddrFrom4([4]byte(b[12:16]))
	}
	return netip.AddrFrom16([16]byte(b[8:24]))
}

func (p *packet) destination(b []byte) netip.Addr {
	if p.is4 {
		return netip.AddrFrom4([4]byte(b[16:20]))
	}
	return netip.AddrFrom16([16]byte(b[24:40]))
}

// flowHash hashes the addresses, and for TCP the ports. It omits UDP ports:
// fragments do not have them and would take another socket than their flow.
func (p *packet) flowHash(b []byte) uint32 {
	var h uint64
	if p.is4 {
		h = binary.NativeEndian.Uint64(b[12:])
	} else {
		for i := 8; i < 40; i += 8 {
			h = h*31 + binary.NativeEndian.Uint64(b[i:])
		}
	}
	if p.transport && p.proto == protoTCP {
		h ^= uint64(binary.NativeEndian.Uint32(b[p.ipLen:])) * 0x9e3779b97f4a7c15
	}
	h *= 0xff51afd7ed558ccd // MurmurHash3's finalizer
	return uint32(h >> 33)
}

// headerIsRight verifies the IPv4 header checksum. It must be called before the
// header is modified, since that writes a new checksum and would hide damage.
func (p *packet) headerIsRight(b []byte) bool {
	return !p.is4 || fold(sum(b[:p.ipLen], 0)) == 0xffff
}

// setLength writes the packet's length n into its IP header, and updates the IPv4
// header checksum.
func (p *packet) setLength(b []byte, n int) {
	if !p.is4 {
		binary.BigEndian.PutUint16(b[4:], uint16(n-40))
		return
	}
	binary.BigEndian.PutUint16(b[2:], uint16(n))
	b[10], b[11] = 0, 0
	putChecksum(b[10:], ^fold(sum(b[:p.ipLen], 0)))
}

// setECN replaces the low two bits of the traffic class (RFC 3168), and updates
// the IPv4 header checksum.
func (p *packet) setECN(b []byte, ecn uint8) {
	p.ecn = ecn
	if !p.is4 {
		b[1] = b[1]&^(3<<4) | ecn<<4
		return
	}
	b[1] = b[1]&^3 | ecn
	b[10], b[11] = 0, 0
	putChecksum(b[10:], ^fold(sum(b[:p.ipLen], 0)))
}

// parseQuoted is parse for a truncated packet; it sets only is4.
func (p *packet) parseQuoted(b []byte) bool {
	*p = packet{}
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		p.is4 = true
		return true
	case len(b) >= 40 && b[0]>>4 == 6:
		return true
	}
	return false
}

// pseudo returns the sum of the TCP or UDP pseudo-header without the length:
// addresses and protocol.
func (p *packet) pseudo(ip []byte) uint64 {
	if p.is4 {
		return add16(sum(ip[12:20], 0), uint16(p.proto))
	}
	return add16(sum(ip[8:40], 0), uint16(p.proto))
}

// complement turns a sum over pseudo-header, transport header and payload into
// the checksum to store. In UDP, 0 would mean no checksum (RFC 768).
func (p *packet) complement(acc uint64) uint16 {
	c := ^fold(acc)
	if c == 0 && p.proto == protoUDP {
		return 0xffff
	}
	return c
}

// gsoType returns the virtio GSO type of the packet.
func (p *packet) gsoType() uint8 {
	switch {
	case p.proto == protoUDP:
		return gsoUDP
	case p.is4:
		return gsoTCP4
	default:
		return gsoTCP6
	}
}
