package encap

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

func udpSpec(payload int) spec {
	s := tcpSpec(payload)
	s.proto, s.flags = protoUDP, 0
	return s
}

// innerOf returns the inner packets of a sent message.
func (n *fakeNode) innerOf(m message) [][]byte {
	size := m.segment
	if size == 0 {
		size = len(m.data)
	}
	var all [][]byte
	for d := range slices.Chunk(m.data, size) {
		all = append(all, d[n.header:])
	}
	return all
}

// sentPackets returns the inner packets of all sent messages.
func (n *fakeNode) sentPackets() [][]byte {
	var all [][]byte
	for _, m := range n.socket.sent {
		all = append(all, n.innerOf(m)...)
	}
	return all
}

// TestEgressBatches reads frames and states which messages leave: datagrams per message,
// and the calls that take them.
func TestEgressBatches(t *testing.T) {
	type frame struct {
		spec spec
		size int
	}
	repeat := func(n int, f frame) []frame { return slices.Repeat([]frame{f}, n) }
	other := udpSpec(100)
	other.tos = 1 // ECT(1), which is copied to the outer header
	v6 := udpSpec(100)
	v6.source, v6.destination = here6, there6
	for _, c := range []struct {
		name     string
		format   Format
		frames   []frame
		noGSO    bool
		messages []int
		calls    int
	}{
		{"nothing", VXLAN, nil, false, nil, 0},
		{"one packet", VXLAN, repeat(1, frame{udpSpec(100), 0}), false, []int{1}, 1},
		{"packets of one size", VXLAN, repeat(5, frame{udpSpec(100), 0}), false, []int{5}, 1},
		{"a shorter one ends a run", VXLAN, append(repeat(3, frame{udpSpec(100), 0}), frame{udpSpec(50), 0}, frame{udpSpec(50), 0}), false, []int{4, 1}, 1},
		{"a longer one starts a run", VXLAN, []frame{{udpSpec(50), 0}, {udpSpec(100), 0}}, false, []int{1, 1}, 1},
		{"another class starts a run", VXLAN, []frame{{udpSpec(100), 0}, {other, 0}, {other, 0}}, false, []int{1, 2}, 1},
		{"a run is full at 64", VXLAN, repeat(64, frame{udpSpec(10), 0}), false, []int{64}, 1},
		{"without GSO", VXLAN, repeat(3, frame{udpSpec(100), 0}), true, []int{1, 1, 1}, 1},
		{"a raw socket has no GSO", IPIP, repeat(3, frame{udpSpec(100), 0}), false, []int{1, 1, 1}, 1},
		{"a frame of 60 kB", VXLAN, []frame{{tcpSpec(60000), 1398}}, false, []int{43}, 1},
		{"a frame that outgrows one message", VXLAN, []frame{{tcpSpec(65000), 1398}}, false, []int{44, 3}, 1},
		{"a frame of tiny segments", VXLAN, []frame{{tcpSpec(8000), 100}}, false, []int{64, 16}, 2},
		{"a frame without GSO", VXLAN, []frame{{tcpSpec(4000), 1398}}, true, []int{1, 1, 1}, 1},
		{"a frame over a raw socket", IPIP, []frame{{tcpSpec(4000), 1398}}, false, []int{1, 1, 1}, 1},
		{"no packet joins a frame's run", VXLAN, []frame{{tcpSpec(2796), 1398}, {tcpSpec(1398), 0}}, false, []int{2, 1}, 2},
		{"a UDP frame", VXLAN, []frame{{udpSpec(3000), 1000}}, false, []int{3}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newFakeNode(c.format)
			n.offload.GSO.Store(!c.noGSO)
			var want [][]byte
			for _, f := range c.frames {
				n.device.queue(f.spec.vnet(f.size), f.spec.partial())
				if f.size == 0 {
					want = append(want, f.spec.bytes())
				} else {
					want = append(want, f.spec.cut(f.size)...)
				}
			}
			if err := n.out.drain(n.device); err != nil {
				t.Fatal(err)
			}
			var messages []int
			for _, m := range n.socket.sent {
				messages = append(messages, len(n.innerOf(m)))
				if m.to != peerAddr || !bytes.HasPrefix(m.data, n.peer.header) {
					t.Errorf("a message to %v that begins with %x", m.to, m.data[:n.header])
				}
				if inner := m.data[n.header:]; m.tos != inner[1]&ecnBits {
					t.Errorf("the outer class is %d, the inner %d", m.tos, inner[1])
				}
			}
			if !slices.Equal(messages, c.messages) || n.socket.calls != c.calls {
				t.Errorf("messages of %v datagrams in %d calls, want %v in %d", messages, n.socket.calls, c.messages, c.calls)
			}
			if err := samePackets(n.sentPackets(), want); err != nil {
				t.Error(err)
			}
			if got := n.counters.Packets.Load(); int(got) != len(want) || n.peer.Traffic().SentPackets != got {
				t.Errorf("%d packets counted, %d for the peer, want %d", got, n.peer.Traffic().SentPackets, len(want))
			}
		})
	}
	t.Run("IPv6 inside", func(t *testing.T) {
		n := newFakeNode(VXLAN)
		peer := vxlanPeer(netip.PrefixFrom(there6, 64), n.peer.Underlay, testVNI, [6]byte{2, 2}, n.vtep.MAC)
		n.setPeers(n.peer, peer)
		n.device.queue(v6.vnet(0), v6.partial())
		if err := n.out.drain(n.device); err != nil {
			t.Fatal(err)
		}
		if err := samePackets(n.sentPackets(), [][]byte{v6.bytes()}); err != nil || !bytes.HasPrefix(n.socket.sent[0].data, peer.header) {
			t.Errorf("%v, %x", err, n.socket.sent[0].data)
		}
	})
}

// TestEgressTurn reads at most a turn's frames, so that the other direction runs.
func TestEgressTurn(t *testing.T) {
	n := newFakeNode(VXLAN)
	for range turnFrames + 10 {
		s := udpSpec(10)
		n.device.queue(s.vnet(0), s.partial())
	}
	for _, left := range []int{10, 0, 0} {
		if err := n.out.drain(n.device); err != nil {
			t.Fatal(err)
		}
		if len(n.device.in) != left {
			t.Errorf("%d frames are left, want %d", len(n.device.in), left)
		}
	}
	big := tcpSpec(40000)
	for range 4 {
		n.device.queue(big.vnet(1398), big.partial())
	}
	if err := n.out.drain(n.device); err != nil || len(n.device.in) != 2 {
		t.Errorf("%v; %d frames of 40 kB are left, want 2", err, len(n.device.in))
	}
}

// TestEgressSendErrors answers sends with errnos. A packet is lost under its reason only
// if the errno comes twice: the first may be about an earlier packet.
func TestEgressSendErrors(t *testing.T) {
	twice := func(e unix.Errno) []unix.Errno { return []unix.Errno{e, e} }
	packets := func(n int) func(*fakeNode) {
		return func(f *fakeNode) {
			s := udpSpec(100)
			for range n {
				f.device.queue(s.vnet(0), s.partial())
			}
		}
	}
	frame := func(f *fakeNode) {
		s := tcpSpec(2796)
		f.device.queue(s.vnet(1398), s.partial())
	}
	for _, c := range []struct {
		name      string
		send      func(*fakeNode)
		errnos    []unix.Errno
		atOnce    int
		sent      int
		lost      int
		reason    Reason
		suspended bool
		fatal     bool
	}{
		{"no error", packets(1), nil, 0, 1, 0, 0, false, false},
		{"about an earlier packet", packets(1), []unix.Errno{unix.ECONNREFUSED}, 0, 1, 0, 0, false, false},
		{"interrupted", packets(1), []unix.Errno{unix.EINTR, unix.EINTR, unix.EINTR}, 0, 1, 0, 0, false, false},
		{"a full socket", packets(1), twice(unix.EAGAIN), 0, 0, 1, EgressFull, false, false},
		{"a full link", packets(1), twice(unix.ENOBUFS), 0, 0, 1, EgressNoBuffers, false, false},
		{"no memory", packets(1), twice(unix.ENOMEM), 0, 0, 1, EgressNoBuffers, false, false},
		{"too long", packets(1), twice(unix.EMSGSIZE), 0, 0, 1, EgressTooBig, false, false},
		{"a firewall", packets(1), twice(unix.EPERM), 0, 0, 1, EgressDenied, false, false},
		{"a prohibit route", packets(1), twice(unix.EACCES), 0, 0, 1, EgressDenied, false, false},
		{"no route", packets(1), twice(unix.ENETUNREACH), 0, 0, 1, EgressUnreachable, false, false},
		{"the link is down", packets(1), twice(unix.ENETDOWN), 0, 0, 1, EgressUnreachable, false, false},
		{"our address is gone", packets(1), twice(unix.EINVAL), 0, 0, 1, EgressSend, false, false},
		{"an unknown errno", packets(1), twice(unix.Errno(4000)), 0, 0, 1, EgressSend, false, false},
		{"a bug", packets(1), twice(unix.EBADF), 0, 0, 1, EgressSend, false, true},
		{"the whole run is lost", packets(3), twice(unix.ENETUNREACH), 0, 0, 3, EgressUnreachable, false, false},
		{"later messages still leave", func(f *fakeNode) { packets(2)(f); frame(f) }, twice(unix.ENOBUFS), 0, 2, 2, EgressNoBuffers, false, false},
		{"taken in parts", func(f *fakeNode) { f.offload.GSO.Store(false); packets(5)(f) }, nil, 2, 5, 0, 0, false, false},
		{"GSO is refused (EIO)", frame, []unix.Errno{unix.EIO}, 0, 2, 0, 0, true, false},
		{"a run is too long for the route (EMSGSIZE)", frame, []unix.Errno{unix.EMSGSIZE}, 0, 2, 0, 0, false, false},
		{"a run is too long for the route (EINVAL)", frame, []unix.Errno{unix.EINVAL}, 0, 2, 0, 0, false, false},
		{"and one of its datagrams too", frame, []unix.Errno{unix.EMSGSIZE, 0, unix.EMSGSIZE}, 0, 1, 1, EgressTooBig, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newFakeNode(VXLAN)
			n.socket.sendErrors, n.socket.atOnce = c.errnos, c.atOnce
			c.send(n)
			err := n.out.drain(n.device)
			if (err != nil) != c.fatal || c.fatal && !strings.Contains(err.Error(), "sending to the underlay") {
				t.Errorf("the error is %v", err)
			}
			want := map[string]uint64{}
			if c.lost > 0 {
				want[c.reason.String()] = uint64(c.lost)
			}
			if got := dropsOf(&n.counters); len(got) != len(want) || got[c.reason.String()] != want[c.reason.String()] {
				t.Errorf("drops %v, want %v", got, want)
			}
			if got := n.counters.Packets.Load(); int(got) != c.sent || len(n.sentPackets()) != c.sent {
				t.Errorf("%d packets counted, %d sent, want %d", got, len(n.sentPackets()), c.sent)
			}
			if traffic := n.peer.Traffic(); int(traffic.Drops) != c.lost || int(traffic.SentPackets) != c.sent {
				t.Errorf("the peer's traffic is %+v", traffic)
			}
			if got := !n.peer.allows(mechanismGSO); got != c.suspended {
				t.Errorf("GSO is suspended: %t", got)
			}
		})
	}
}

// TestEgressReadErrors answers reads of the device with errnos.
func TestEgressReadErrors(t *testing.T) {
	for _, c := range []struct {
		errnos []unix.Errno
		reads  bool // the frame is read
		fails  bool
	}{
		{nil, true, false},
		{[]unix.Errno{unix.EINTR, unix.EINTR}, true, false},
		{[]unix.Errno{unix.EAGAIN}, false, false},
		{[]unix.Errno{unix.ENOMEM}, false, false},
		{[]unix.Errno{unix.EBADFD}, false, true},
		{[]unix.Errno{unix.EBADF}, false, true},
		{[]unix.Errno{unix.Errno(4000)}, false, true},
	} {
		n := newFakeNode(VXLAN)
		s := udpSpec(10)
		n.device.queue(s.vnet(0), s.partial())
		n.device.readErrors = c.errnos
		err := n.out.drain(n.device)
		if (err != nil) != c.fails || (len(n.socket.sent) == 1) != c.reads {
			t.Errorf("%v: %v, %d messages sent", c.errnos, err, len(n.socket.sent))
		}
	}
}

// TestEgressDrops reads one frame per reason.
func TestEgressDrops(t *testing.T) {
	good := tcpSpec(100)
	change := func(f func(s *spec)) []byte { s := good; f(&s); return s.bytes() }
	with := func(v vnetHeader, b []byte) []byte {
		frame := make([]byte, vnetHeaderLen)
		v.put(frame)
		return append(frame, b...)
	}
	solicitation := udpSpec(10)
	solicitation.source, solicitation.destination = netip.MustParseAddr("fe80::1"), netip.MustParseAddr("ff02::2")
	tiny := tcpSpec(MaxFrameSegments*2 + 1)
	for _, c := range []struct {
		name  string
		frame []byte
		want  Reason
	}{
		{"no virtio header", make([]byte, vnetHeaderLen-1), EgressMalformed},
		{"not IP", with(vnetHeader{}, []byte("not a packet")), EgressMalformed},
		{"a checksum outside of the packet", with(vnetHeader{flags: vnetNeedsCsum, csumStart: 60000}, good.bytes()), EgressMalformed},
		{"a frame of segments of no bytes", with(vnetHeader{gsoType: gsoTCP4}, good.bytes()), EgressMalformed},
		{"a UDP frame that is TCP", with(vnetHeader{gsoType: gsoUDP, gsoSize: 10}, good.bytes()), EgressMalformed},
		{"a frame of too many segments", with(tiny.vnet(2), tiny.partial()), EgressMalformed},
		{"no peer", with(vnetHeader{}, change(func(s *spec) { s.destination = netip.MustParseAddr("10.5.77.1") })), EgressNoPeer},
		{"a forged source", with(vnetHeader{}, change(func(s *spec) { s.source = netip.MustParseAddr("192.0.2.1") })), EgressSource},
		{"a router solicitation", with(vnetHeader{}, solicitation.bytes()), EgressLinkLocal},
	} {
		n := newFakeNode(VXLAN)
		n.device.in = [][]byte{c.frame}
		if err := n.out.drain(n.device); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if got := dropsOf(&n.counters); len(got) != 1 || got[c.want.String()] != 1 || len(n.socket.sent) != 0 {
			t.Errorf("%s: drops %v, want %s; %d messages sent", c.name, got, c.want, len(n.socket.sent))
		}
	}
	t.Run("an unused family", func(t *testing.T) {
		n := newFakeNode(VXLAN)
		n.setPeers(vxlanPeer(n.peer.Subnet, netip.MustParseAddrPort("[2001:db8::2]:8472"), testVNI, [6]byte{2, 2}, n.vtep.MAC))
		n.device.queue(good.vnet(0), good.partial())
		if err := n.out.drain(n.device); err != nil || dropsOf(&n.counters)["egress-unreachable"] != 1 {
			t.Errorf("%v, drops %v", err, dropsOf(&n.counters))
		}
	})
}

// TestEgressSpreadsFlows has several source ports: a flow always leaves by the same one,
// and one call takes all messages of a port.
func TestEgressSpreadsFlows(t *testing.T) {
	n := newFakeNode(VXLAN)
	sockets := []*fakeSocket{{}, {}, {}, {}}
	n.out.sources[0] = nil
	for i, s := range sockets {
		s.number = i
		n.out.sources[0] = append(n.out.sources[0], source{socket: s, port: uint16(i)})
	}
	for i := range 60 {
		s := tcpSpec(20 + i)
		s.sport = uint16(i % 20)
		n.device.queue(s.vnet(0), s.partial())
	}
	if err := n.out.drain(n.device); err != nil {
		t.Fatal(err)
	}
	by := make(map[uint16]*fakeSocket)
	used, total := 0, 0
	for _, s := range sockets {
		if len(s.sent) > 0 {
			used++
		}
		if s.calls > 1 {
			t.Errorf("%d calls for one batch", s.calls)
		}
		for _, m := range s.sent {
			for _, b := range n.innerOf(m) {
				total++
				port := binary.BigEndian.Uint16(b[20:])
				if by[port] == nil {
					by[port] = s
				}
				if by[port] != s {
					t.Errorf("the flow from port %d uses two sockets", port)
				}
			}
		}
	}
	if used < 2 || total != 60 {
		t.Errorf("%d packets by %d of %d sockets", total, used, len(sockets))
	}
}

// TestEgressMovedFlow moves a flow to the second queue: what the first holds leaves
// before it, once per move.
func TestEgressMovedFlow(t *testing.T) {
	n := newFakeNode(VXLAN)
	var moves atomic.Uint64
	second := &fakeDevice{}
	n.out.moves = &moves
	put := func(d *fakeDevice, id uint16) {
		s := udpSpec(10)
		s.id = id
		d.queue(s.vnet(0), s.partial())
	}
	order := func() (ids []uint16) {
		for _, b := range n.sentPackets() {
			ids = append(ids, binary.BigEndian.Uint16(b[4:]))
		}
		n.socket.sent = nil
		return ids
	}
	for _, c := range []struct {
		name string
		move bool
		want []uint16
	}{
		{"no move", false, []uint16{2, 3}},
		{"a move", true, []uint16{1, 1, 2, 3}},
	} {
		n.device.in = nil
		put(n.device, 1)
		if c.move {
			put(n.device, 1)
			n.device.in = n.device.in[:2]
			moves.Add(1)
		}
		put(second, 2)
		put(second, 3)
		if err := n.out.drain(second); err != nil {
			t.Fatal(err)
		}
		if got := order(); !slices.Equal(got, c.want) {
			t.Errorf("%s: the packets leave as %v, want %v", c.name, got, c.want)
		}
	}
	// The first queue fails while it is drained.
	moves.Add(1)
	put(second, 4)
	n.device.readErrors = []unix.Errno{unix.EBADFD}
	if err := n.out.drain(second); err == nil {
		t.Error("the device is gone, and drain returns no error")
	}
}

// TestEgressCopiesClass copies the DSCP if that is enabled, else ECN alone.
func TestEgressCopiesClass(t *testing.T) {
	for mask, want := range map[uint8]uint8{ecnBits: 2, 0xff: 0xb8 | 2} {
		for _, size := range []int{0, 100} {
			n := newFakeNode(VXLAN)
			n.out.classes = mask
			s := tcpSpec(300)
			s.tos = 0xb8 | 2
			n.device.queue(s.vnet(size), s.partial())
			if err := n.out.drain(n.device); err != nil || len(n.socket.sent) != 1 || n.socket.sent[0].tos != want {
				t.Errorf("mask %#x: %v, %+v, want %#x", mask, err, n.socket.sent, want)
			}
		}
	}
}
