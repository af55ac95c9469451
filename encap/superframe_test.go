package encap

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// superNode returns a node that may send super-frames to its peer, and their device.
func superNode(f Format, mtu int) (*fakeNode, *fakeDevice) {
	n := newFakeNode(f)
	super := &fakeDevice{}
	n.out.super = super
	n.offload.SuperFrame.Store(true)
	n.peer.SetNextHop(&NextHop{MAC: [6]byte{4, 4}, Uplink: [6]byte{5, 5}, Source: netip.MustParseAddr("192.0.2.1"), MTU: mtu})
	return n, super
}

// TestSuperFrameHeaders compares the headers of a super-frame with what the kernel needs
// to cut it: each offset in the virtio header, each length, and the outer checksums.
func TestSuperFrameHeaders(t *testing.T) {
	for _, f := range []Format{VXLAN, IPIP} {
		n, super := superNode(f, 1500)
		s := tcpSpec(40000)
		s.tos = 2
		n.device.queue(s.vnet(1380), s.partial())
		if err := n.out.drain(n.device); err != nil {
			t.Fatal(err)
		}
		if len(super.out) != 1 || len(n.socket.sent) != 0 || n.counters.Super.Load() != 1 || n.counters.Packets.Load() != 29 {
			t.Fatalf("%s: %d super-frames, %d messages, %d packets counted", f.Name(), len(super.out), len(n.socket.sent), n.counters.Packets.Load())
		}
		virtio, eth := super.out[0][:superVnetLen], super.out[0][superVnetLen:]
		ip := eth[14:]
		inner := eth[14+Overhead(f, true):]
		if !bytes.Equal(inner, s.partial()) {
			t.Errorf("%s: the inner packet is changed", f.Name())
		}
		at := len(eth) - len(inner)
		for name, c := range map[string]struct{ got, want int }{
			"hdr_len":     {int(binary.LittleEndian.Uint16(virtio[2:])), at + 40},
			"gso_size":    {int(binary.LittleEndian.Uint16(virtio[4:])), 1380},
			"csum_start":  {int(binary.LittleEndian.Uint16(virtio[6:])), at + 20},
			"csum_offset": {int(binary.LittleEndian.Uint16(virtio[8:])), 16},
			"IP length":   {int(binary.BigEndian.Uint16(ip[2:])), len(ip)},
			"protocol":    {int(ip[9]), int(f.Protocol())},
			"class":       {int(ip[1]), 2},
			"IP checksum": {int(slowChecksum(ip[:20])), 0},
			"EtherType":   {int(binary.BigEndian.Uint16(eth[12:])), 0x0800},
		} {
			if c.got != c.want {
				t.Errorf("%s: %s is %d, want %d", f.Name(), name, c.got, c.want)
			}
		}
		if eth[0] != 4 || eth[6] != 5 {
			t.Errorf("%s: the Ethernet header is %x", f.Name(), eth[:14])
		}
		df := ip[6]&0x40 != 0
		if f == IPIP {
			if virtio[1] != gsoTCP4 || !df {
				t.Errorf("GSO type %#x, DF %t", virtio[1], df)
			}
			continue
		}
		udp := ip[20:]
		pseudo := spec{source: netip.MustParseAddr("192.0.2.1"), destination: peerAddr, proto: protoUDP}.pseudoHeader(len(udp))
		if virtio[1] != gsoTCP4|gsoUDPTunnelIP4 || df || binary.LittleEndian.Uint16(virtio[20:]) != 14+20 || binary.LittleEndian.Uint16(virtio[22:]) != uint16(at) {
			t.Errorf("the virtio header is %x, DF %t", virtio, df)
		}
		if binary.BigEndian.Uint16(udp) != 8472 || binary.BigEndian.Uint16(udp[2:]) != 8472 || int(binary.BigEndian.Uint16(udp[4:])) != len(udp) ||
			binary.BigEndian.Uint16(udp[6:]) != ^slowChecksum(pseudo) || !bytes.Equal(udp[8:8+22], n.peer.header) {
			t.Errorf("the UDP header is %x", udp[:8])
		}
	}
}

// TestSuperFrameOrSockets states by which way a large frame leaves, and what an errno of
// the device changes.
func TestSuperFrameOrSockets(t *testing.T) {
	for _, c := range []struct {
		name    string
		prepare func(n *fakeNode, super *fakeDevice)
		super   bool
		suspend bool // for the peer
		off     bool // for all
	}{
		{"whole", func(*fakeNode, *fakeDevice) {}, true, false, false},
		{"interrupted", func(_ *fakeNode, d *fakeDevice) { d.writeErrors = []unix.Errno{unix.EINTR} }, true, false, false},
		{"turned off", func(n *fakeNode, _ *fakeDevice) { n.offload.SuperFrame.Store(false) }, false, false, true},
		{"no device", func(n *fakeNode, _ *fakeDevice) { n.out.super = nil }, false, false, false},
		{"no next hop", func(n *fakeNode, _ *fakeDevice) { n.peer.SetNextHop(nil) }, false, false, false},
		{"a next hop of the other family", func(n *fakeNode, _ *fakeDevice) { n.peer.SetNextHop(&NextHop{Source: here6}) }, false, false, false},
		{"suspended", func(n *fakeNode, _ *fakeDevice) { n.peer.suspend(mechanismSuper) }, false, true, false},
		{"to keep the neighbour entry in use", func(n *fakeNode, _ *fakeDevice) { n.out.superSent = superKeep - 1 }, false, false, false},
		{"segments that the path does not take", func(n *fakeNode, _ *fakeDevice) { n.peer.narrow(1000, netip.Addr{}, pathMTULife) }, false, false, false},
		{"a full queue", func(_ *fakeNode, d *fakeDevice) { d.writeErrors = []unix.Errno{unix.ENOBUFS} }, false, false, false},
		{"rejected", func(_ *fakeNode, d *fakeDevice) { d.writeErrors = []unix.Errno{unix.EINVAL} }, false, true, false},
		{"the device is down", func(_ *fakeNode, d *fakeDevice) { d.writeErrors = []unix.Errno{unix.EIO} }, false, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, super := superNode(VXLAN, 1500)
			c.prepare(n, super)
			s := tcpSpec(5000)
			n.device.queue(s.vnet(1380), s.partial())
			if err := n.out.drain(n.device); err != nil {
				t.Fatal(err)
			}
			if (len(super.out) == 1) != c.super || (len(n.sentPackets()) == 4) == c.super {
				t.Errorf("%d super-frames, %d packets by the socket", len(super.out), len(n.sentPackets()))
			}
			if !n.peer.allows(mechanismSuper) != c.suspend || !n.offload.SuperFrame.Load() != c.off {
				t.Errorf("suspended %t, off %t", !n.peer.allows(mechanismSuper), !n.offload.SuperFrame.Load())
			}
			if drops := dropsOf(&n.counters); len(drops) != 0 || n.counters.Packets.Load() != 4 {
				t.Errorf("drops %v, %d packets counted", drops, n.counters.Packets.Load())
			}
		})
	}
	// Segments longer than the uplink's MTU allows.
	n, super := superNode(VXLAN, 1400)
	s := tcpSpec(5000)
	n.device.queue(s.vnet(1380), s.partial())
	if err := n.out.drain(n.device); err != nil || len(super.out) != 0 || len(n.sentPackets()) != 4 {
		t.Errorf("%v; %d super-frames, %d packets by the socket", err, len(super.out), len(n.sentPackets()))
	}
}
