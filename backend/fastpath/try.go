package fastpath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"culvert/internal/host"
)

// The programs' verdicts (linux/pkt_cls.h).
const (
	actUnspec   = 0xffffffff // TC_ACT_UNSPEC: leave the packet to the kernel datapath
	actRedirect = 7
)

// try runs the programs on a packet in the kernel, without a network
// (BPF_PROG_TEST_RUN), to detect helpers that an older kernel lacks or rejects before
// real packets are lost.
func try(loaded *ebpf.Collection) error {
	const loopback = 1 // BPF_PROG_TEST_RUN uses the loopback interface
	mac, theirs := host.MAC{2, 0, 0, 0, 0, 1}, host.MAC{2, 0, 0, 0, 0, 2}
	here, there := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	inner, other := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("203.0.113.1")
	c := contents{
		tunnels: map[uint32]tunnel{4: {
			Device: loopback, Uplink: loopback, MTU: 1500, VNI: [4]byte{0, 0, 1, 0}, Port: [2]byte{0x21, 0x18}, FirstPort: 32768, Ports: 1000,
			Hops: 64, Lengths: 1, MAC: mac, Local: addressOf(here), Subnet: addressOf(netip.MustParseAddr("198.51.100.0")), Mask: maskOf(24),
			Bits: [mostLengths]uint32{24}, Masks: [mostLengths]address{maskOf(24)},
		}},
		peers:   map[peerKey]peer{macKey(4, theirs): {Outer: addressOf(there), MTU: 1500}},
		sources: map[sourceKey]struct{}{{24, addressOf(there), addressOf(netip.MustParseAddr("203.0.113.0"))}: {}},
	}
	p := Path{loaded: loaded}
	if err := p.fill(c); err != nil {
		return err
	}
	defer func() { _ = p.fill(contents{}) }()
	sent := ethernetFrame(mac, theirs, udpPacket(inner, other, []byte("culvert")))
	verdict, wire, err := loaded.Programs[programOut].Test(sent)
	if err != nil {
		return fmt.Errorf("trying the programs: %w", err)
	}
	if verdict != actRedirect {
		return fmt.Errorf("the kernel does not encapsulate by eBPF (Linux 5.13 does): %s", p.read().reasons())
	}
	// The reply: the same packet with source and destination swapped.
	answer := ethernetFrame(theirs, mac, udpPacket(other, inner, []byte("culvert")))
	wire = bytes.Clone(wire)
	clear(wire[:6]) // the loopback interface's address
	copy(wire[26:30], there.AsSlice())
	copy(wire[30:34], here.AsSlice())
	copy(wire[50:], answer)
	verdict, got, err := loaded.Programs[programIn].Test(wire)
	if err != nil {
		return fmt.Errorf("trying the programs: %w", err)
	}
	if verdict != actRedirect || !bytes.Equal(got, answer) {
		return fmt.Errorf("the kernel does not decapsulate by eBPF: %s", p.read().reasons())
	}
	return p.reset()
}

// reset clears the counters.
func (p *Path) reset() error {
	m := p.loaded.Maps["counters"]
	var each []uint64
	var errs []error
	for c := range counters {
		if err := m.Lookup(uint32(c), &each); err != nil {
			return err
		}
		clear(each)
		errs = append(errs, m.Put(uint32(c), each))
	}
	return errors.Join(errs...)
}

// reasons returns the most frequent reason for leaving packets to the kernel datapath.
func (r readings) reasons() string {
	all := r.slow()
	if len(all) == 0 {
		return "no reason is known"
	}
	return all[0].Reason
}

func ethernetFrame(source, destination host.MAC, packet []byte) []byte {
	b := append(destination[:], source[:]...)
	return append(append(b, 8, 0), packet...)
}

// udpPacket returns an IPv4 packet with a UDP datagram from port 1024 to 1025.
func udpPacket(source, destination netip.Addr, payload []byte) []byte {
	b := make([]byte, 28, 28+len(payload))
	b[0], b[8], b[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(b[2:], uint16(28+len(payload)))
	copy(b[12:], source.AsSlice())
	copy(b[16:], destination.AsSlice())
	binary.BigEndian.PutUint16(b[10:], ^fold(sumOf(b[:20])))
	binary.BigEndian.PutUint16(b[20:], 1024)
	binary.BigEndian.PutUint16(b[22:], 1025)
	binary.BigEndian.PutUint16(b[24:], uint16(8+len(payload)))
	b = append(b, payload...)
	binary.BigEndian.PutUint16(b[26:], ^fold(sumOf(b[12:])+17+uint64(8+len(payload))))
	return b
}

// sumOf adds 16-bit words (RFC 1071).
func sumOf(b []byte) (s uint64) {
	for ; len(b) > 1; b = b[2:] {
		s += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	return s
}

func fold(s uint64) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}
