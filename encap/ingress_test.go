package encap

import (
	"bytes"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestIngressJoins receives messages and states how many writes the device gets, and
// that the packets are unchanged.
func TestIngressJoins(t *testing.T) {
	bulk := tcpSpec(4*1398 + 100).reply()
	datagrams := udpSpec(3000).reply()
	one := func(s spec) [][]byte { return [][]byte{s.bytes()} }
	other := tcpSpec(100).reply()
	other.sport++
	for _, c := range []struct {
		name    string
		packets [][]byte
		gro     bool // the kernel joined them into one message
		noGRO   bool // the device's
		noUSO   bool
		writes  int
	}{
		{"one packet", one(bulk.withPayload(100)), false, false, false, 1},
		{"a TCP flow", bulk.cut(1398), false, false, false, 1},
		{"a TCP flow in one message", bulk.cut(1398), true, false, false, 1},
		{"a TCP flow without GRO", bulk.cut(1398), false, true, false, 5},
		{"a UDP flow", datagrams.cut(1000), false, false, false, 1},
		{"a UDP flow without USO", datagrams.cut(1000), false, false, true, 3},
		{"two flows", append(bulk.cut(1398), other.bytes()), false, false, false, 2},
		{"a flow with a gap", slices.Delete(bulk.cut(1398), 2, 3), false, false, false, 2},
		{"two flows, interleaved", [][]byte{bulk.cut(1398)[0], other.bytes(), bulk.cut(1398)[1]}, false, false, false, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newFakeNode(VXLAN)
			n.offload.GRO.Store(!c.noGRO)
			n.offload.USO.Store(!c.noUSO)
			var whole []byte
			for _, p := range c.packets {
				d := n.from(p)
				whole = append(whole, d...)
				if !c.gro {
					n.socket.arriving = append(n.socket.arriving, arrival{from: peerAddr, data: d})
				}
			}
			if c.gro {
				n.socket.arriving = []arrival{{from: peerAddr, data: whole, segment: n.header + len(c.packets[0])}}
			}
			if err := n.in.drain(); err != nil {
				t.Fatal(err)
			}
			if len(n.device.out) != c.writes {
				t.Errorf("%d writes, want %d; drops %v", len(n.device.out), c.writes, dropsOf(&n.counters))
			}
			got, want := n.device.packets(t), slices.Clone(c.packets)
			slices.SortStableFunc(got, byFlow)
			slices.SortStableFunc(want, byFlow)
			if err := samePackets(got, want); err != nil {
				t.Error(err)
			}
			if traffic := n.peer.Traffic(); int(traffic.ReceivedPackets) != len(c.packets) || n.counters.Packets.Load() != traffic.ReceivedPackets {
				t.Errorf("%d packets counted, for the peer %+v", n.counters.Packets.Load(), traffic)
			}
		})
	}
}

// byFlow orders packets by source port: flows may overtake each other.
func byFlow(a, b []byte) int { return bytes.Compare(a[20:22], b[20:22]) }

func (s spec) withPayload(n int) spec { s.payload = s.payload[:n]; return s }

// TestIngressSuperFrame receives frames that a kernel peer sent unsegmented: one
// datagram with a partial checksum.
func TestIngressSuperFrame(t *testing.T) {
	tcp, udp := tcpSpec(10000).reply(), udpSpec(10000).reply()
	for _, c := range []struct {
		name    string
		spec    spec
		segment int // that the control message states
		noGRO   bool
		writes  int
		size    int // payload of the segments
	}{
		{"TCP, segment size unknown", tcp, 0, false, 1, 1450 - 40},
		{"TCP, segment size known", tcp, 1000, false, 1, 1000},
		{"TCP, longer than the device's MTU", tcp, 5000, false, 1, 1450 - 40},
		{"TCP, the device takes single packets only", tcp, 0, true, 8, 1450 - 40},
		{"UDP", udp, 1000, false, 1, 1000},
		{"UDP, the device takes single packets only", udp, 1000, true, 10, 1000},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newFakeNode(VXLAN)
			n.offload.GRO.Store(!c.noGRO)
			n.socket.arriving = []arrival{{from: peerAddr, data: n.from(c.spec.partial()), segment: c.segment}}
			if err := n.in.drain(); err != nil {
				t.Fatal(err)
			}
			if len(n.device.out) != c.writes {
				t.Errorf("%d writes, want %d; drops %v", len(n.device.out), c.writes, dropsOf(&n.counters))
			}
			if err := samePackets(n.device.packets(t), c.spec.cut(c.size)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestIngressReceiveErrors answers receives with errnos.
func TestIngressReceiveErrors(t *testing.T) {
	for _, c := range []struct {
		errno unix.Errno
		drops Reason
		fails bool
	}{
		{unix.EAGAIN, 0, false},
		{unix.EINTR, 0, false},
		{unix.ENOMEM, 0, false},
		{unix.ENETDOWN, 0, false},
		{unix.ECONNREFUSED, 0, false},
		{unix.EMSGSIZE, 0, false},
		{unix.EINVAL, IngressUncut, false},
		{unix.ENODEV, 0, true},
		{unix.EBADF, 0, true},
		{unix.Errno(4000), 0, true},
	} {
		n := newFakeNode(VXLAN)
		n.socket.receiveErrors = []unix.Errno{c.errno}
		n.socket.arriving = []arrival{{from: peerAddr, data: n.from(tcpSpec(10).reply().bytes())}}
		if err := n.in.drain(); (err != nil) != c.fails || c.fails && !strings.Contains(err.Error(), "receiving from the underlay") {
			t.Errorf("%v: the error is %v", c.errno, err)
		}
		if got := dropsOf(&n.counters); c.drops != 0 && got[c.drops.String()] != 1 || c.drops == 0 && len(got) != 0 {
			t.Errorf("%v: drops %v", c.errno, got)
		}
		if c.fails {
			continue
		}
		if err := n.in.drain(); err != nil || len(n.device.out) != 1 {
			t.Errorf("%v: the next receive: %v, %d writes", c.errno, err, len(n.device.out))
		}
	}
}

// TestIngressWriteErrors answers writes to the device with errnos. If the device rejects
// a joined frame, its packets are written one by one.
func TestIngressWriteErrors(t *testing.T) {
	bulk, datagrams := tcpSpec(3*1000).reply(), udpSpec(3*1000).reply()
	for _, c := range []struct {
		name      string
		spec      spec
		errnos    []unix.Errno
		written   int // packets
		lost      int
		reason    Reason
		suspended mechanism
		fails     bool
	}{
		{"no error", bulk, nil, 3, 0, 0, 0, false},
		{"interrupted", bulk, []unix.Errno{unix.EINTR}, 3, 0, 0, 0, false},
		{"the device is down", bulk, []unix.Errno{unix.EIO}, 0, 3, IngressDown, 0, false},
		{"no memory", bulk, []unix.Errno{unix.ENOBUFS}, 0, 3, IngressNoBuffers, 0, false},
		{"a full queue", bulk, []unix.Errno{unix.EAGAIN}, 0, 3, IngressWrite, 0, false},
		{"large TCP frames are rejected", bulk, []unix.Errno{unix.EINVAL}, 3, 0, 0, mechanismGRO, false},
		{"large UDP frames are rejected", datagrams, []unix.Errno{unix.EINVAL}, 3, 0, 0, mechanismUSO, false},
		{"and one packet too", bulk, []unix.Errno{unix.EINVAL, 0, unix.EINVAL}, 2, 1, IngressWrite, mechanismGRO, false},
		{"the device was removed", bulk, []unix.Errno{unix.EBADFD}, 0, 3, IngressWrite, 0, true},
		{"a bug", bulk, []unix.Errno{unix.EBADF}, 0, 3, IngressWrite, 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newFakeNode(VXLAN)
			n.device.writeErrors = c.errnos
			for _, p := range c.spec.cut(1000) {
				n.socket.arriving = append(n.socket.arriving, arrival{from: peerAddr, data: n.from(p)})
			}
			if err := n.in.drain(); (err != nil) != c.fails || c.fails && !strings.Contains(err.Error(), "writing to the tunnel device") {
				t.Errorf("the error is %v", err)
			}
			got := dropsOf(&n.counters)
			if c.lost == 0 && len(got) != 0 || c.lost > 0 && got[c.reason.String()] != uint64(c.lost) {
				t.Errorf("drops %v, want %d for %s", got, c.lost, c.reason)
			}
			packets := n.device.packets(t)
			if len(packets) != c.written || n.counters.Packets.Load() != uint64(c.written) {
				t.Errorf("%d packets written, %d counted, want %d", len(packets), n.counters.Packets.Load(), c.written)
			}
			bytes := 0
			for _, b := range packets {
				bytes += len(b)
			}
			if n.counters.Bytes.Load() != uint64(bytes) {
				t.Errorf("%d bytes counted, %d written", n.counters.Bytes.Load(), bytes)
			}
			for m := range mechanisms {
				if !n.peer.allows(m) != (c.suspended == m && m != 0) {
					t.Errorf("mechanism %d is suspended: %t", m, !n.peer.allows(m))
				}
			}
		})
	}
}

// TestIngressDrops receives one datagram per reason. One from an address that no peer
// has counts as a stranger's, whatever else is wrong with it.
func TestIngressDrops(t *testing.T) {
	good := tcpSpec(100).reply()
	for _, c := range []struct {
		name   string
		change func(n *fakeNode, a *arrival)
		want   Reason
	}{
		{"cut off", func(_ *fakeNode, a *arrival) { a.flags = unix.MSG_TRUNC }, IngressTruncated},
		{"no source", func(_ *fakeNode, a *arrival) { a.from = netip.Addr{} }, IngressStranger},
		{"a stranger", func(_ *fakeNode, a *arrival) { a.from = netip.MustParseAddr("192.0.2.9") }, IngressStranger},
		{"a stranger's malformed one", func(_ *fakeNode, a *arrival) { a.from, a.data = netip.MustParseAddr("192.0.2.9"), a.data[:3] }, IngressStranger},
		{"short", func(n *fakeNode, a *arrival) { a.data = a.data[:n.header-1] }, IngressShort},
		{"no I flag", func(_ *fakeNode, a *arrival) { a.data[0] = 0 }, IngressFlags},
		{"another VNI", func(_ *fakeNode, a *arrival) { a.data[6]++ }, IngressVNI},
		{"another MAC", func(_ *fakeNode, a *arrival) { a.data[13]++ }, IngressMAC},
		{"not IP", func(_ *fakeNode, a *arrival) { a.data[21] = 6 }, IngressProtocol},
		{"an IPv4 packet as IPv6", func(_ *fakeNode, a *arrival) { a.data[20], a.data[21] = 0x86, 0xdd }, IngressMalformed},
		{"a damaged header", func(n *fakeNode, a *arrival) { a.data[n.header+8]-- }, IngressMalformed},
		{"no packet", func(n *fakeNode, a *arrival) { a.data = a.data[:n.header] }, IngressMalformed},
		{"not the sender's", func(n *fakeNode, a *arrival) { a.data = n.from(tcpSpec(100).bytes()) }, IngressSource},
		{"not ours", func(n *fakeNode, a *arrival) {
			s := good
			s.destination = netip.MustParseAddr("10.5.9.9")
			a.data = n.from(s.bytes())
		}, IngressDestination},
		{"congestion that cannot be marked", func(_ *fakeNode, a *arrival) { a.class = 3 }, IngressECN},
		{"a frame of too many segments", func(n *fakeNode, a *arrival) {
			n.offload.GRO.Store(false)
			s := tcpSpec(MaxFrameSegments*8 + 1).reply()
			a.data, a.segment = n.from(s.partial()), 8
		}, IngressUncut},
	} {
		n := newFakeNode(VXLAN)
		a := arrival{from: peerAddr, data: n.from(good.bytes())}
		c.change(n, &a)
		n.socket.arriving = []arrival{a}
		if err := n.in.drain(); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if got := dropsOf(&n.counters); len(got) != 1 || got[c.want.String()] == 0 || len(n.device.out) != 0 {
			t.Errorf("%s: drops %v, want %s; %d writes", c.name, got, c.want, len(n.device.out))
		}
		if n.counters.Packets.Load() != 0 || n.counters.Bytes.Load() != 0 {
			t.Errorf("%s: %d packets of %d bytes count as carried", c.name, n.counters.Packets.Load(), n.counters.Bytes.Load())
		}
	}
}

// TestIngressBatches receives at most ingressMessages at once, and fewer after large
// ones, so that they stay in the cache.
func TestIngressBatches(t *testing.T) {
	n := newFakeNode(VXLAN)
	small := arrival{from: peerAddr, data: n.from(udpSpec(10).reply().bytes())}
	large := arrival{from: peerAddr, data: n.from(tcpSpec(60000).reply().partial())}
	n.socket.arriving = append(slices.Repeat([]arrival{small}, ingressMessages+3), slices.Repeat([]arrival{large}, 10)...)
	for _, left := range []int{13, 0} {
		if err := n.in.drain(); err != nil || len(n.socket.arriving) != left {
			t.Fatalf("%v; %d messages are left, want %d", err, len(n.socket.arriving), left)
		}
	}
	n.socket.arriving = slices.Repeat([]arrival{large}, 10)
	for _, left := range []int{6, 2, 0} {
		if err := n.in.drain(); err != nil || len(n.socket.arriving) != left {
			t.Fatalf("%v; %d large messages are left, want %d", err, len(n.socket.arriving), left)
		}
	}
	if drops := dropsOf(&n.counters); len(drops) != 0 {
		t.Errorf("drops %v", drops)
	}
}

// TestIngressSpreadsFlows writes a flow's packets always to the same queue, joined,
// single and cut ones alike.
func TestIngressSpreadsFlows(t *testing.T) {
	n := newFakeNode(VXLAN)
	queues := []*fakeDevice{{}, {}, {}, {}}
	for _, q := range queues {
		n.in.spread = append(n.in.spread, q)
	}
	for flow := range 30 {
		s := tcpSpec(3000).reply()
		s.sport = uint16(flow)
		for _, p := range s.cut(1000) {
			n.socket.arriving = append(n.socket.arriving, arrival{from: peerAddr, data: n.from(p)})
		}
		n.socket.arriving = append(n.socket.arriving, arrival{from: peerAddr, data: n.from(s.partial()), segment: 1000})
		for len(n.socket.arriving) > 0 {
			n.offload.GRO.Store(len(n.socket.arriving)%2 == 0)
			if err := n.in.drain(); err != nil {
				t.Fatal(err)
			}
		}
	}
	by := make(map[string]*fakeDevice)
	used := 0
	for _, q := range queues {
		if len(q.out) > 0 {
			used++
		}
		for _, b := range q.packets(t) {
			port := string(b[20:22])
			if by[port] == nil {
				by[port] = q
			}
			if by[port] != q {
				t.Errorf("the flow from port %x is in two queues", port)
			}
		}
	}
	if used < 2 || len(by) != 30 {
		t.Errorf("%d flows in %d of %d queues", len(by), used, len(queues))
	}
}

// TestRawIngress receives through a packet socket: a virtio and a link-layer header
// before the packet.
func TestRawIngress(t *testing.T) {
	bulk := tcpSpec(3000).reply()
	message := func(n *fakeNode, v vnetHeader, packet []byte) []byte {
		b := ipipDatagram(peerAddr.String(), n.from(packet))
		v.put(b)
		return b
	}
	gso := bulk.vnet(1000)
	for _, c := range []struct {
		name    string
		packets func(n *fakeNode) [][]byte
		writes  int
		want    [][]byte
	}{
		{"single packets", func(n *fakeNode) (all [][]byte) {
			for _, p := range bulk.cut(1000) {
				all = append(all, message(n, vnetHeader{}, p))
			}
			return all
		}, 1, bulk.cut(1000)},
		{"verified by the kernel", func(n *fakeNode) [][]byte {
			return [][]byte{message(n, vnetHeader{flags: vnetDataValid}, bulk.withPayload(100).bytes())}
		}, 1, [][]byte{bulk.withPayload(100).bytes()}},
		{"joined by the kernel", func(n *fakeNode) [][]byte { return [][]byte{message(n, gso, bulk.partial())} }, 1, bulk.cut(1000)},
	} {
		n := newFakeNode(IPIP)
		for _, b := range c.packets(n) {
			n.socket.arriving = append(n.socket.arriving, arrival{data: b})
		}
		if err := n.in.drain(); err != nil {
			t.Fatal(err)
		}
		if len(n.device.out) != c.writes {
			t.Errorf("%s: %d writes, want %d; drops %v", c.name, len(n.device.out), c.writes, dropsOf(&n.counters))
		}
		if err := samePackets(n.device.packets(t), c.want); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
