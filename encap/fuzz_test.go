package encap

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"

	"culvert/internal/fuzzloop"
)

// specOf makes a packet that may be cut from fuzzed values.
func specOf(kind uint8, id uint16, seq uint32, flags uint8, options, payload []byte) spec {
	s := spec{
		source: here4, destination: there4, proto: protoTCP, tos: kind & 0xfc, ttl: 64, id: id, df: kind&4 != 0,
		sport: 1000, dport: 2000, seq: seq, ack: seq ^ 0x55, window: id, flags: tcpACK | flags&(tcpPSH|tcpFIN|tcpCWR), payload: payload,
	}
	if kind&1 != 0 {
		s.source, s.destination = here6, there6
	}
	if kind&2 != 0 {
		s.proto = protoUDP
	} else {
		s.options = options[:min(len(options), 40)&^3]
	}
	return s
}

// bounded returns the payload that an execution works on: in one of 64 as many segments of
// size bytes as there may be, otherwise 16 at most, because what a packet may be and what
// changes it matters more than how many there are.
func bounded(payload []byte, size, most int) []byte {
	if crc32.ChecksumIEEE(payload)%64 != 0 {
		most = 16
		payload = payload[:min(len(payload), 4000)]
	}
	return payload[:min(len(payload), size*most, 60000)]
}

// FuzzCut compares the segmenter with the oracle.
func FuzzCut(std *testing.F) {
	f := fuzzloop.Of(std)
	f.Add(uint8(0), uint16(0xfffe), uint32(0xffffff00), uint8(tcpPSH|tcpCWR), []byte{1, 1, 8, 10}, bytes.Repeat([]byte("payload"), 300), uint16(100))
	f.Add(uint8(3), uint16(1), uint32(1), uint8(0), []byte{}, bytes.Repeat([]byte{0xff}, 1000), uint16(1))
	cutter := newSegmenter()
	f.Fuzz(func(t *testing.T, kind uint8, id uint16, seq uint32, flags uint8, options, payload []byte, size uint16) {
		size = max(size, 1)
		if payload = bounded(payload, int(size), MaxFrameSegments); len(payload) == 0 {
			return
		}
		s := specOf(kind, id, seq, flags, options, payload)
		frame := s.partial()
		var p packet
		if !p.parse(frame) {
			t.Fatal("the frame does not parse")
		}
		want := s.cut(int(size))
		got := cutter.cut(nil, frame, &p, int(size))
		if len(got) != len(want) {
			t.Fatalf("%d segments, want %d", len(got), len(want))
		}
		for i := range got {
			if b := append(bytes.Clone(got[i].head), got[i].data...); !bytes.Equal(b, want[i]) {
				t.Fatalf("segment %d:\n%x\nwant\n%x", i, b, want[i])
			}
		}
	})
}

// FuzzJoin joins packets of a flow with changed bytes and cuts the frames again:
// every packet comes out unchanged and in order, except that a partial checksum may
// be completed, and that IDs may differ with DF.
func FuzzJoin(std *testing.F) {
	f := fuzzloop.Of(std)
	f.Add(uint8(0), bytes.Repeat([]byte("payload"), 100), uint8(70), []byte{})
	f.Add(uint8(0), bytes.Repeat([]byte("payload"), 100), uint8(70), []byte{1, 0, 8, 1, 2, 0, 33, 0x10})
	f.Add(uint8(3), bytes.Repeat([]byte("payload"), 100), uint8(33), []byte{0, 0, 44, 0xff})
	c := newCoalescer(allOn(), 101)
	f.Fuzz(func(t *testing.T, kind uint8, payload []byte, size uint8, changes []byte) {
		size = max(size, 1)
		if payload = bounded(payload, int(size), 100); len(payload) == 0 {
			return
		}
		packets := specOf(kind, 7, 1000, kind&tcpPSH, nil, payload).cut(int(size))
		for ; len(changes) >= 4; changes = changes[4:] {
			b := packets[int(changes[0])%len(packets)]
			b[int(binary.BigEndian.Uint16(changes[1:]))%len(b)] ^= changes[3]
		}
		c.count = 0
		var want [][]byte
		for _, b := range packets {
			lead := append(make([]byte, VXLANHeaderLen, VXLANHeaderLen+len(b)), b...)
			var p packet
			// As checkInner and datagram do.
			if !p.parse(lead[VXLANHeaderLen:]) || !p.headerIsRight(lead[VXLANHeaderLen:]) {
				continue
			}
			lead = lead[:VXLANHeaderLen+p.length]
			w := finished(b[:p.length], &p)
			withoutID(w, &p)
			want = append(want, w)
			c.add(lead, &p, checksumUnknown)
		}
		// By flow: flows may overtake each other.
		got := make(map[flow][][]byte)
		for i := range c.count {
			fr := &c.frames[i]
			for _, b := range explode(t, fr) {
				var p packet
				if !p.parse(b) || !p.headerIsRight(b) {
					t.Fatalf("no packet: %x", b)
				}
				withoutID(b, &p)
				k := flowIn(b, &p)
				got[k] = append(got[k], b)
			}
		}
		for _, b := range want {
			var p packet
			p.parse(b)
			k := flowIn(b, &p)
			if len(got[k]) == 0 || !bytes.Equal(got[k][0], b) {
				t.Fatalf("%x is lost or changed: %x", b, got[k])
			}
			got[k] = got[k][1:]
		}
	})
}

// flowIn returns a packet's flow, the zero flow if it has none.
func flowIn(b []byte, p *packet) flow {
	if !p.transport {
		return flow{}
	}
	return flowOf(b, p)
}

// withoutID clears the ID and the header checksum of an IPv4 packet with DF: the ID has no
// meaning then (RFC 6864), and packets of one ID may be joined, which are then cut into
// packets of several.
func withoutID(b []byte, p *packet) {
	if p.is4 && b[6]&0x40 != 0 {
		clear(b[4:6])
		clear(b[10:12])
	}
}

// finished returns the packet with its checksum completed if it was partial.
func finished(b []byte, p *packet) []byte {
	b = bytes.Clone(b)
	if p.transport && isPartial(b, p) {
		completeChecksum(b, p.ipLen, p.checkOffset()-p.ipLen, p.proto == protoUDP)
	}
	return b
}
