package encap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

var (
	here4, there4 = netip.MustParseAddr("10.5.1.7"), netip.MustParseAddr("10.5.2.9")
	here6, there6 = netip.MustParseAddr("fd00:5:1::7"), netip.MustParseAddr("fd00:5:2::9")
)

// drawSpec draws a packet that may be cut: TCP with flags that segments may have, or
// UDP.
func drawSpec(t *rapid.T) spec {
	s := spec{
		source: here4, destination: there4, proto: protoTCP,
		tos:   rapid.Byte().Draw(t, "tos"),
		ttl:   rapid.Byte().Draw(t, "ttl"),
		id:    rapid.Uint16().Draw(t, "id"),
		df:    rapid.Bool().Draw(t, "df"),
		sport: rapid.Uint16().Draw(t, "sport"), dport: rapid.Uint16().Draw(t, "dport"),
		seq: rapid.Uint32().Draw(t, "seq"), ack: rapid.Uint32().Draw(t, "ack"),
		window: rapid.Uint16().Draw(t, "window"),
		flags:  tcpACK | rapid.SampledFrom([]uint8{0, tcpPSH, tcpFIN, tcpFIN | tcpPSH}).Draw(t, "flags"),
	}
	if rapid.Bool().Draw(t, "ipv6") {
		s.source, s.destination = here6, there6
	}
	if rapid.Bool().Draw(t, "udp") {
		s.proto = protoUDP
	} else {
		s.options = rapid.SliceOfN(rapid.Byte(), 0, 10).Draw(t, "options")
		s.options = bytes.Repeat(s.options, 4)
	}
	s.payload = make([]byte, rapid.IntRange(1, 60000).Draw(t, "length"))
	x := rapid.Uint32().Draw(t, "content") | 1
	for i := range s.payload {
		x = x*1664525 + 1013904223
		s.payload[i] = byte(x >> 24)
	}
	return s
}

func TestCutIsWhatTheOracleCuts(t *testing.T) {
	cutter := newSegmenter()
	rapid.Check(t, func(t *rapid.T) {
		s := drawSpec(t)
		if s.proto == protoTCP && rapid.Bool().Draw(t, "cwr") {
			s.flags |= tcpCWR
		}
		size := rapid.IntRange(max(1, len(s.payload)/MaxFrameSegments+1), 9000).Draw(t, "size")
		frame := s.partial()
		var p packet
		if !p.parse(frame) {
			t.Fatal("the frame does not parse")
		}
		lead := []byte("lead")
		want := s.cut(size)
		got := cutter.cut(lead, frame, &p, size)
		if len(got) != len(want) {
			t.Fatalf("%d segments, want %d", len(got), len(want))
		}
		for i := range got {
			if b := append(append([]byte(nil), got[i].head...), got[i].data...); !bytes.Equal(b, append([]byte("lead"), want[i]...)) {
				t.Fatalf("segment %d:\n%x\nwant\n%x", i, b, want[i])
			}
		}
	})
}

// TestJoinUndoesCut joins packets that the oracle cut, and cuts the joined frames
// again: the same packets must come out in the same order.
func TestJoinUndoesCut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSpec(t)
		size := rapid.IntRange(max(1, len(s.payload)/500), 9000).Draw(t, "size")
		packets := s.cut(size)
		state := rapid.SampledFrom([]checksum{checksumUnknown, checksumVerified}).Draw(t, "state")
		c := newCoalescer(allOn(), len(packets))
		for _, b := range packets {
			var p packet
			lead := append(make([]byte, VXLANHeaderLen), b...)
			if !p.parse(lead[VXLANHeaderLen:]) {
				t.Fatal("a packet does not parse")
			}
			c.add(lead, &p, state)
		}
		if most := len(packets)/2 + 2; size > 1 && len(packets) > 4 && c.count > most {
			t.Fatalf("%d packets became %d frames: hardly joined", len(packets), c.count)
		}
		var again [][]byte
		for i := range c.count {
			again = append(again, explode(t, &c.frames[i])...)
		}
		if err := samePackets(again, packets); err != nil {
			t.Fatal(err)
		}
	})
}

// explode finishes a frame and cuts it as a device would.
func explode(t rapid.TB, f *frame) [][]byte {
	f.finish()
	var v vnetHeader
	v.parse(f.head)
	b := append([]byte(nil), f.head[vnetHeaderLen:]...)
	for _, d := range f.data {
		b = append(b, d...)
	}
	return cutAsDevice(t, v, b)
}

// deviceCutters are reused, since each has a megabyte.
var deviceCutters = sync.Pool{New: func() any { return newSegmenter() }}

// cutAsDevice completes and segments a frame as the kernel does before a wire.
func cutAsDevice(t rapid.TB, v vnetHeader, b []byte) [][]byte {
	if v.gsoType == gsoNone {
		if v.flags&vnetNeedsCsum != 0 && !completeChecksum(b, int(v.csumStart), int(v.csumOffset), v.csumOffset == 6) {
			t.Fatal("the header points outside the packet")
		}
		return [][]byte{b}
	}
	var p packet
	if !p.parse(b) || !p.transport {
		t.Fatal("the frame does not parse")
	}
	if v.flags&vnetNeedsCsum == 0 || int(v.csumStart) != p.ipLen || int(v.csumStart+v.csumOffset) != p.checkOffset() || int(v.hdrLen) != p.headLen {
		t.Fatalf("virtio header %+v does not fit the packet %+v", v, p)
	}
	if !isPartial(b, &p) {
		t.Fatal("the checksum is not the pseudo-header's")
	}
	var all [][]byte
	cutter := deviceCutters.Get().(*segmenter)
	defer deviceCutters.Put(cutter)
	fixed := cutter.cut(nil, b, &p, int(v.gsoSize))
	for _, s := range fixed {
		all = append(all, append(append([]byte(nil), s.head...), s.data...))
	}
	return all
}

func samePackets(got, want [][]byte) error {
	if len(got) != len(want) {
		return fmt.Errorf("%d packets, want %d", len(got), len(want))
	}
	for i := range got {
		if !bytes.Equal(got[i], want[i]) {
			return fmt.Errorf("packet %d:\n%x\nwant\n%x", i, got[i], want[i])
		}
	}
	return nil
}

func TestChecksumIsTheSlowOne(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.SliceOfN(rapid.Byte(), 0, 4000).Draw(t, "bytes")
		at := rapid.IntRange(0, len(b)/2).Draw(t, "split") * 2
		var got [2]byte
		putChecksum(got[:], ^fold(sum(b[at:], sum(b[:at], 0))))
		want := slowChecksum(b)
		if got != [2]byte{byte(want >> 8), byte(want)} {
			t.Fatalf("%x, want %04x", got, want)
		}
	})
}

// TestChecksumOfEveryLength starts and ends the fast paths at every offset. Data of
// all ones reveals a lost carry.
func TestChecksumOfEveryLength(t *testing.T) {
	random := make([]byte, maxFrameLen)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range random {
		random[i] = byte(rng.Uint32())
	}
	for _, b := range [][]byte{random, bytes.Repeat([]byte{0xff}, maxFrameLen), make([]byte, maxFrameLen)} {
		for n := range len(b) + 1 {
			if n > 2000 && n < len(b)-3 {
				continue
			}
			for _, part := range [][]byte{b[:n], b[len(b)-n:]} {
				var got [2]byte
				if putChecksum(got[:], ^fold(sum(part, 0))); binary.BigEndian.Uint16(got[:]) != slowChecksum(part) {
					t.Fatalf("%d bytes: %x, want %04x", n, got, slowChecksum(part))
				}
			}
		}
	}
}
