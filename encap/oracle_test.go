package encap

import (
	"encoding/binary"
	"net/netip"
)

// The oracle builds and cuts packets in the slowest, most obvious way: byte by byte,
// from RFC 791, 8200, 768, 9293 and 1071. It shares no code with package encap.

// spec describes a TCP or UDP packet.
type spec struct {
	source, destination netip.Addr
	proto               uint8
	tos, ttl            uint8
	id                  uint16
	df                  bool
	sport, dport        uint16
	seq, ack            uint32
	flags               uint8
	window              uint16
	options             []byte // TCP, a multiple of 4 bytes
	payload             []byte
}

func (s spec) is4() bool { return s.source.Is4() }

// bytes returns the packet with correct checksums.
func (s spec) bytes() []byte {
	transport := s.transport()
	at := 16
	if s.proto == protoUDP {
		at = 6
	}
	c := slowChecksum(append(s.pseudoHeader(len(transport)), transport...))
	if c == 0 && s.proto == protoUDP {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(transport[at:], c)
	return append(s.ipHeader(len(transport)), transport...)
}

// partial returns the packet with a partial checksum, as the kernel leaves it to a
// device: the field holds the pseudo-header's sum.
func (s spec) partial() []byte {
	transport := s.transport()
	at := 16
	if s.proto == protoUDP {
		at = 6
	}
	binary.BigEndian.PutUint16(transport[at:], ^slowChecksum(s.pseudoHeader(len(transport))))
	return append(s.ipHeader(len(transport)), transport...)
}

func (s spec) transport() []byte {
	if s.proto == protoUDP {
		b := make([]byte, 8, 8+len(s.payload))
		binary.BigEndian.PutUint16(b, s.sport)
		binary.BigEndian.PutUint16(b[2:], s.dport)
		binary.BigEndian.PutUint16(b[4:], uint16(8+len(s.payload)))
		return append(b, s.payload...)
	}
	b := make([]byte, 20, 20+len(s.options)+len(s.payload))
	binary.BigEndian.PutUint16(b, s.sport)
	binary.BigEndian.PutUint16(b[2:], s.dport)
	binary.BigEndian.PutUint32(b[4:], s.seq)
	binary.BigEndian.PutUint32(b[8:], s.ack)
	b[12] = byte(20+len(s.options)) / 4 << 4
	b[13] = s.flags
	binary.BigEndian.PutUint16(b[14:], s.window)
	return append(append(b, s.options...), s.payload...)
}

func (s spec) ipHeader(n int) []byte {
	if !s.is4() {
		b := make([]byte, 40, 40+n)
		b[0] = 0x60 | s.tos>>4
		b[1] = s.tos << 4
		binary.BigEndian.PutUint16(b[4:], uint16(n))
		b[6], b[7] = s.proto, s.ttl
		copy(b[8:], s.source.AsSlice())
		copy(b[24:], s.destination.AsSlice())
		return b
	}
	b := make([]byte, 20, 20+n)
	b[0], b[1] = 0x45, s.tos
	binary.BigEndian.PutUint16(b[2:], uint16(20+n))
	binary.BigEndian.PutUint16(b[4:], s.id)
	if s.df {
		b[6] = 0x40
	}
	b[8], b[9] = s.ttl, s.proto
	copy(b[12:], s.source.AsSlice())
	copy(b[16:], s.destination.AsSlice())
	binary.BigEndian.PutUint16(b[10:], slowChecksum(b))
	return b
}

func (s spec) pseudoHeader(n int) []byte {
	b := append(make([]byte, 0, 40+n), s.source.AsSlice()...) // with room for what bytes appends
	b = append(b, s.destination.AsSlice()...)
	return append(b, 0, s.proto, byte(n>>8), byte(n))
}

// cut returns the segments of size payload bytes of the frame.
func (s spec) cut(size int) [][]byte {
	var all [][]byte
	for at := 0; at < len(s.payload); at += size {
		one := s
		one.payload = s.payload[at:min(at+size, len(s.payload))]
		one.id += uint16(at / size)
		one.seq += uint32(at)
		if at > 0 {
			one.flags &^= tcpCWR
		}
		if at+size < len(s.payload) {
			one.flags &^= tcpFIN | tcpPSH
		}
		all = append(all, one.bytes())
	}
	return all
}

// slowChecksum is the checksum of RFC 1071, section 4.1: it adds two bytes at a time, and
// the carries at the end.
func slowChecksum(b []byte) uint16 {
	total := uint64(0)
	for ; len(b) >= 2; b = b[2:] {
		total += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) > 0 {
		total += uint64(b[0]) << 8
	}
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return ^uint16(total)
}
