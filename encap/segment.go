package encap

import "encoding/binary"

// segment is one packet cut from a frame: new headers, and a slice of the
// frame's payload.
type segment struct {
	head []byte // lead (see cut), then the packet's headers
	data []byte
}

// segmenter cuts frames of up to 64 KB into packets. It owns the headers that it
// writes, which are valid until the next cut.
type segmenter struct {
	arena    []byte
	segments []segment
}

const (
	// MaxFrameSegments is the maximum number of segments per frame; a frame with
	// more is dropped. The device's gso_max_segs should be set to it.
	MaxFrameSegments = 1024
	// The longest headers: the tunnel's, IPv4 with options, TCP with options.
	headSpace = (maxHeaderLen + 60 + 60 + 15) &^ 15
)

func newSegmenter() *segmenter {
	return &segmenter{
		arena:    make([]byte, MaxFrameSegments*headSpace),
		segments: make([]segment, 0, MaxFrameSegments),
	}
}

// cut cuts the TCP or UDP packet b, parsed as p, into segments of size payload
// bytes (the last may be shorter) and puts lead before each. Lengths, IPv4
// identification, TCP sequence numbers and flags, and all checksums are as the
// kernel's segmentation sets them (tcp_gso_segment, __udp_gso_segment). It returns
// nil if size is not positive or there would be too many segments.
//
// The payload is borrowed from b, the headers from s.
func (s *segmenter) cut(lead, b []byte, p *packet, size int) []segment {
	s.segments = s.segments[:0]
	payload := b[p.headLen:p.length]
	if size <= 0 || len(payload) > size*MaxFrameSegments {
		return nil
	}
	base := p.pseudo(b)
	for first, i := 0, 0; first < len(payload) || i == 0; first, i = first+size, i+1 {
		data := payload[first:min(first+size, len(payload))]
		head := s.arena[i*headSpace:][:len(lead)+p.headLen]
		copy(head, lead)
		ip := head[len(lead):]
		copy(ip, b[:p.headLen])
		if p.is4 {
			binary.BigEndian.PutUint16(ip[4:], binary.BigEndian.Uint16(b[4:])+uint16(i))
		}
		p.setLength(ip, p.headLen+len(data))

		transport := ip[p.ipLen:]
		if p.proto == protoTCP {
			binary.BigEndian.PutUint32(transport[4:], binary.BigEndian.Uint32(b[p.ipLen+4:])+uint32(first))
			if first > 0 {
				transport[13] &^= tcpCWR
			}
			if first+size < len(payload) {
				transport[13] &^= tcpFIN | tcpPSH
			}
		} else {
			binary.BigEndian.PutUint16(transport[4:], uint16(udpHeaderLen+len(data)))
		}
		at := p.checkOffset()
		ip[at], ip[at+1] = 0, 0
		acc := sum(data, sum(transport, add16(base, uint16(len(transport)+len(data)))))
		putChecksum(ip[at:], p.complement(acc))
		s.segments = append(s.segments, segment{head, data})
	}
	return s.segments
}

// completeChecksum completes a partial checksum (VIRTIO_NET_HDR_F_NEEDS_CSUM):
// the field at start+offset holds the pseudo-header's sum, and the packet's bytes
// from start on are added. It returns false if the field is outside the packet.
func completeChecksum(b []byte, start, offset int, udp bool) bool {
	at := start + offset
	if start < 0 || offset < 0 || at+2 > len(b) {
		return false
	}
	c := ^fold(sum(b[start:], 0))
	if c == 0 && udp {
		c = 0xffff
	}
	putChecksum(b[at:], c)
	return true
}
