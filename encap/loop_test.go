package encap

import (
	"bytes"
	"context"
	"encoding/binary"
	"go/ast"
	"go/parser"
	"go/token"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pairOfNodes returns two running nodes that are peers.
func pairOfNodes(t testing.TB) (a, b *testNode) {
	t.Helper()
	a = newTestNode(t, "127.0.0.1", "10.5.1.0/24", 1)
	b = newTestNode(t, "127.0.0.2", "10.5.2.0/24", 2)
	meet(a, b)
	for _, n := range []*testNode{a, b} {
		runLoop(t, n.loop)
	}
	return a, b
}

func runLoop(t testing.TB, l *Loop) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the loop failed: %v", err)
		}
	})
}

func tcpSpec(payload int) spec {
	return spec{
		source: here4, destination: there4, proto: protoTCP, ttl: 64, df: true, id: 7,
		sport: 1000, dport: 2000, seq: 5000, ack: 9, flags: tcpACK | tcpPSH, window: 500,
		payload: bytes.Repeat([]byte("culvert "), payload/8+1)[:payload],
	}
}

// TestFrameCrosses sends one frame of each kind from device to device and compares
// the packets that come out, byte for byte and in order, with what the kernel's
// segmentation would produce.
func TestFrameCrosses(t *testing.T) {
	udp := func(n int) spec { s := tcpSpec(n); s.proto = protoUDP; s.flags = 0; return s }
	cases := []struct {
		name string
		spec spec
		size int // payload bytes per segment; 0 for a single packet
	}{
		{"bare acknowledgement", tcpSpec(0), 0},
		{"full TCP packet", tcpSpec(1410), 0},
		{"TCP frame of 60 kB", tcpSpec(60000), 1398},
		{"TCP frame beyond one call", tcpSpec(65400), 1398},
		{"TCP frame of tiny segments", tcpSpec(8000), 64},
		{"empty datagram", udp(0), 0},
		{"one-byte datagram", udp(1), 0},
		{"UDP frame", udp(20000), 1000},
		{"UDP frame with a short end", udp(20001), 1000},
	}
	for _, off := range []string{"", "gso", "gro", "uso"} {
		for _, c := range cases {
			t.Run(c.name+" without "+off, func(t *testing.T) {
				a, b := pairOfNodes(t)
				for _, n := range []*testNode{a, b} {
					switch off {
					case "gso":
						n.options.Offload.GSO.Store(false)
					case "gro":
						n.options.Offload.GRO.Store(false)
					case "uso":
						n.options.Offload.USO.Store(false)
					}
				}
				v := vnetHeader{flags: vnetNeedsCsum, csumStart: 20, csumOffset: 16}
				if c.spec.proto == protoUDP {
					v.csumOffset = 6
				}
				want := [][]byte{c.spec.bytes()}
				if c.size > 0 {
					v.gsoSize = uint16(c.size)
					v.gsoType = gsoTCP4
					if c.spec.proto == protoUDP {
						v.gsoType = gsoUDP
					}
					want = c.spec.cut(c.size)
				}
				a.send(t, v, c.spec.partial())
				var got [][]byte
				frames := 0
				for len(got) < len(want) {
					v, packet := b.receive(t)
					got = append(got, cutAsDevice(t, v, packet)...)
					frames++
				}
				if err := samePackets(got, want); err != nil {
					t.Fatal(err)
				}
				if off == "" && a.options.Offload.GSO.Load() && c.size > 500 && frames > 4 {
					t.Errorf("%d packets came in %d writes: they were not joined", len(want), frames)
				}
			})
		}
	}
}

// TestKernelSuperFrame receives a frame that a kernel VXLAN peer on the same
// machine sends unsegmented: one datagram with a partial checksum.
func TestKernelSuperFrame(t *testing.T) {
	for _, gro := range []bool{true, false} {
		_, b := pairOfNodes(t)
		b.options.Offload.GRO.Store(gro)
		s := tcpSpec(40000)
		stranger := b.loop.Table().lookup(here4)
		c, err := net.DialUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(stranger.Underlay.Addr(), 0)), net.UDPAddrFromAddrPort(b.at))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		h := vxlanHeader{VNI: testVNI, Destination: b.mac, EtherType: etherTypeIPv4}
		d := make([]byte, VXLANHeaderLen)
		h.Put(d)
		if _, err := c.Write(append(d, s.partial()...)); err != nil {
			t.Fatal(err)
		}
		var got []byte
		for len(got) < len(s.payload) {
			v, frame := b.receive(t)
			for _, packet := range cutAsDevice(t, v, frame) {
				if len(packet) > 1450 {
					t.Fatalf("a packet of %d bytes", len(packet))
				}
				var p packet2
				p.check(t, packet)
				got = append(got, packet[40:]...)
			}
		}
		if !bytes.Equal(got, s.payload) {
			t.Fatal("the payload differs")
		}
	}
}

// packet2 checks a packet with the oracle's own arithmetic.
type packet2 struct{}

func (packet2) check(t *testing.T, b []byte) {
	t.Helper()
	if slowChecksum(b[:20]) != 0 {
		t.Fatal("the IP header's checksum is wrong")
	}
	pseudo := append(append([]byte(nil), b[12:20]...), 0, b[9], byte((len(b)-20)>>8), byte(len(b)-20))
	if slowChecksum(append(pseudo, b[20:]...)) != 0 {
		t.Fatal("the transport checksum is wrong")
	}
}

// TestDropsAreCounted sends one packet per drop reason and expects exactly that
// reason to be counted.
func TestDropsAreCounted(t *testing.T) {
	a, b := pairOfNodes(t)
	good := tcpSpec(100)
	datagram := func(change func(h *vxlanHeader, s *spec)) []byte {
		s := good
		h := vxlanHeader{VNI: testVNI, Destination: b.mac, Source: a.mac, EtherType: etherTypeIPv4}
		change(&h, &s)
		d := make([]byte, VXLANHeaderLen)
		h.Put(d)
		return append(d, s.bytes()...)
	}
	raw := func(change func(d []byte) []byte) []byte {
		return change(datagram(func(*vxlanHeader, *spec) {}))
	}
	in := map[Reason][]byte{
		IngressShort:       raw(func(d []byte) []byte { return d[:VXLANHeaderLen-1] }),
		IngressFlags:       raw(func(d []byte) []byte { d[0] = 0; return d }),
		IngressVNI:         datagram(func(h *vxlanHeader, _ *spec) { h.VNI = 2 }),
		IngressMAC:         datagram(func(h *vxlanHeader, _ *spec) { h.Destination[5] = 99 }),
		IngressProtocol:    datagram(func(h *vxlanHeader, _ *spec) { h.EtherType = 0x0806 }),
		IngressMalformed:   raw(func(d []byte) []byte { d[VXLANHeaderLen+2] = 0xff; return d }),
		IngressSource:      datagram(func(_ *vxlanHeader, s *spec) { s.source = there4 }),
		IngressDestination: datagram(func(_ *vxlanHeader, s *spec) { s.destination = here4 }),
		IngressECN:         nil, // see TestECN
	}
	from := func(addr string) *net.UDPConn {
		c, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(addr)}, net.UDPAddrFromAddrPort(b.at))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	peer, stranger := from("127.0.0.1"), from("127.0.0.3")
	for reason, d := range in {
		if d == nil {
			continue
		}
		if _, err := peer.Write(d); err != nil {
			t.Fatal(err)
		}
		expectDrop(t, b.options.Ingress, reason)
	}
	if _, err := stranger.Write(datagram(func(*vxlanHeader, *spec) {})); err != nil {
		t.Fatal(err)
	}
	expectDrop(t, b.options.Ingress, IngressStranger)

	out := map[Reason][]byte{
		EgressMalformed: []byte("not a packet"),
		EgressNoPeer:    func() []byte { s := good; s.destination = netip.MustParseAddr("10.5.77.1"); return s.bytes() }(),
		EgressSource:    func() []byte { s := good; s.source = netip.MustParseAddr("192.0.2.1"); return s.bytes() }(),
	}
	for reason, packet := range out {
		a.send(t, vnetHeader{}, packet)
		expectDrop(t, a.options.Egress, reason)
	}

	// A valid packet with Ethernet padding still passes.
	if _, err := peer.Write(append(datagram(func(*vxlanHeader, *spec) {}), 0, 0, 0, 0)); err != nil {
		t.Fatal(err)
	}
	if _, packet := b.receive(t); !bytes.Equal(packet, good.bytes()) {
		t.Fatal("the good packet changed")
	}
	for _, c := range []*Counters{a.options.Egress, b.options.Ingress} {
		for reason, n := range dropsOf(c) {
			if n != 1 {
				t.Errorf("%s counted %d times", reason, n)
			}
		}
	}
}

func expectDrop(t *testing.T, c *Counters, reason Reason) {
	t.Helper()
	for range 500 {
		if c.Drops[reason].Load() == 1 {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("%s was not counted, but %v", reason, dropsOf(c))
}

// TestECN checks every combination of RFC 6040, figure 4.
func TestECN(t *testing.T) {
	const notECT, ect1, ect0, ce, drop = 0, 1, 2, 3, 4
	want := [4][4]uint8{ // [inner][outer]
		notECT: {notECT: notECT, ect1: notECT, ect0: notECT, ce: drop},
		ect0:   {notECT: ect0, ect0: ect0, ect1: ect1, ce: ce},
		ect1:   {notECT: ect1, ect0: ect1, ect1: ect1, ce: ce},
		ce:     {notECT: ce, ect0: ce, ect1: ce, ce: ce},
	}
	for _, addrs := range [][2]netip.Addr{{here4, there4}, {here6, there6}} {
		for inner := range uint8(4) {
			for outer := range uint8(4) {
				s := tcpSpec(10)
				s.source, s.destination = addrs[0], addrs[1]
				s.tos = 0xb8 | inner
				b := s.bytes()
				var p packet
				if !p.parse(b) || p.ecn != inner {
					t.Fatalf("inner mark %d parsed as %d", inner, p.ecn)
				}
				passed := decapECN(b, &p, outer)
				if passed != (want[inner][outer] != drop) {
					t.Fatalf("inner %d, outer %d: passed is %t", inner, outer, passed)
				}
				if !passed {
					continue
				}
				s.tos = 0xb8 | want[inner][outer]
				if !bytes.Equal(b, s.bytes()) {
					t.Errorf("inner %d, outer %d: %x, want %x", inner, outer, b, s.bytes())
				}
			}
		}
	}
}

// TestFlowsKeepTheirOrder sends a burst of datagrams of many sizes in many flows
// and expects each flow in order.
func TestFlowsKeepTheirOrder(t *testing.T) {
	a, b := pairOfNodes(t)
	const flows, each = 5, 40
	for i := range each {
		for f := range flows {
			s := tcpSpec(60 + i*f*7%300)
			s.proto, s.flags, s.sport = protoUDP, 0, uint16(f)
			binary.BigEndian.PutUint32(s.payload, uint32(i))
			a.send(t, vnetHeader{flags: vnetNeedsCsum, csumStart: 20, csumOffset: 6}, s.partial())
		}
	}
	next := make([]uint32, flows)
	for got := 0; got < flows*each; {
		v, frame := b.receive(t)
		for _, packet := range cutAsDevice(t, v, frame) {
			flow := binary.BigEndian.Uint16(packet[20:])
			if n := binary.BigEndian.Uint32(packet[28:]); n != next[flow] {
				t.Fatalf("flow %d: datagram %d came when %d was due", flow, n, next[flow])
			}
			next[flow]++
			got++
		}
	}
}

// TestMovedFlowKeepsItsOrder moves a flow to a thread's second queue while the first
// holds more than one turn's frames, the first time before the loop starts.
func TestMovedFlowKeepsItsOrder(t *testing.T) {
	a := newTestNode(t, "127.0.0.1", "10.5.1.0/24", 1)
	b := newTestNode(t, "127.0.0.2", "10.5.2.0/24", 2)
	var steering Steering
	var queues, kernel [2]int // pipes, which buffer more than a socket pair
	a.options.Devices = nil
	for i := range queues {
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_DIRECT|unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = unix.Close(pipe[0]), unix.Close(pipe[1]) })
		if _, err := unix.FcntlInt(uintptr(pipe[1]), unix.F_SETPIPE_SZ, 1<<20); err != nil {
			t.Fatal(err)
		}
		queues[i], kernel[i] = pipe[0], pipe[1]
		a.options.Devices = append(a.options.Devices, NewDescriptor(pipe[0]))
	}
	a.options.Threads, a.options.Steering = 1, &steering
	a.loop = NewLoop(a.options)
	meet(a, b)
	steering.Moves.Add(1)
	q, err := a.loop.open(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.close)

	const half = 3*turnFrames + 1
	const length = VXLANHeaderLen + 20 + 8 + 60
	sent, next, overtaken := uint32(0), uint32(0), 0
	arrived := make([]byte, 1<<16)
	for round := range 4 {
		if round > 0 {
			steering.Moves.Add(1)
		}
		for i := range 2 * half {
			s := tcpSpec(60)
			s.proto, s.flags = protoUDP, 0
			binary.BigEndian.PutUint32(s.payload, sent)
			sent++
			frame := make([]byte, vnetHeaderLen)
			(&vnetHeader{flags: vnetNeedsCsum, csumStart: 20, csumOffset: 6}).put(frame)
			if _, err := unix.Write(kernel[i/half], append(frame, s.partial()...)); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 8 { // the second queue first
			if err := q.out.drain(tun(queues[1-i%2])); err != nil {
				t.Fatal(err)
			}
			for {
				n, err := unix.Read(b.options.IPv4.Receive[0].FD(), arrived)
				if err != nil {
					break
				}
				for datagram := range slices.Chunk(arrived[:n], length) {
					if binary.BigEndian.Uint32(datagram[VXLANHeaderLen+28:]) != next {
						overtaken++
					}
					next++
				}
			}
		}
	}
	if next != sent || overtaken > 0 {
		t.Errorf("of %d datagrams %d arrived, %d of them out of their order", sent, next, overtaken)
	}
}

// TestNothingIsAllocated runs one frame of each kind through both directions in one
// goroutine and expects no allocation.
func TestNothingIsAllocated(t *testing.T) {
	a := newTestNode(t, "127.0.0.1", "10.5.1.0/24", 1)
	b := newTestNode(t, "127.0.0.2", "10.5.2.0/24", 2)
	meet(a, b)
	out := newEgress(&a.loop.common, [2][]source{sourcesOf(a.options.IPv4.Send)}, a.options.Egress)
	in := newIngress(&b.loop.common, tun(b.options.Devices[0].FD()), inet(b.options.IPv4.Receive[0].FD()), testRecvBatch(), b.options.IPv4, 1450, b.options.Ingress)
	device := tun(a.options.Devices[0].FD())
	raw, err := b.kernel.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var kernel uintptr
	if err := raw.Control(func(d uintptr) { kernel = d }); err != nil {
		t.Fatal(err)
	}
	discard := make([]byte, maxFrame)
	frame := make([]byte, vnetHeaderLen)
	(&vnetHeader{flags: vnetNeedsCsum, csumStart: 20, csumOffset: 16, gsoType: gsoTCP4, gsoSize: 1398}).put(frame)
	frame = append(frame, tcpSpec(50000).partial()...)
	small := append(make([]byte, vnetHeaderLen), tcpSpec(20).bytes()...)
	if n := testing.AllocsPerRun(200, func() {
		for _, f := range [][]byte{frame, small, small} {
			if _, err := a.kernel.Write(f); err != nil {
				t.Fatal(err)
			}
		}
		if err := out.drain(device); err != nil {
			t.Fatal(err)
		}
		if err := in.drain(); err != nil {
			t.Fatal(err)
		}
		for {
			if _, errno := tun(kernel).read(discard); errno != 0 {
				return
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations per round", n)
	}
	if in.counters.Packets.Load() < 200*37 {
		t.Errorf("only %d packets came through: %v", in.counters.Packets.Load(), dropsOf(in.counters))
	}
}

// TestSystemCallsPerFrame bounds the system calls of bulk transfer: little more than
// two per 64 KB frame on each side.
func TestSystemCallsPerFrame(t *testing.T) {
	a := newTestNode(t, "127.0.0.1", "10.5.1.0/24", 1)
	b := newTestNode(t, "127.0.0.2", "10.5.2.0/24", 2)
	meet(a, b)
	out := newEgress(&a.loop.common, [2][]source{sourcesOf(a.options.IPv4.Send)}, a.options.Egress)
	in := newIngress(&b.loop.common, tun(b.options.Devices[0].FD()), inet(b.options.IPv4.Receive[0].FD()), testRecvBatch(), b.options.IPv4, 1450, b.options.Ingress)
	const frames, payload = 20, 44 * 1398 // the kernel's own frames of 64 KB
	for range frames {
		a.send(t, vnetHeader{flags: vnetNeedsCsum, csumStart: 20, csumOffset: 16, gsoType: gsoTCP4, gsoSize: 1398}, tcpSpec(payload).partial())
	}
	for out.counters.Packets.Load() < frames*44 {
		before := out.counters.Packets.Load()
		if err := out.drain(tun(a.options.Devices[0].FD())); err != nil {
			t.Fatal(err)
		}
		if out.counters.Packets.Load() == before {
			t.Fatalf("only %d packets left: %v", before, dropsOf(out.counters))
		}
	}
	for in.counters.Packets.Load() < frames*44 {
		before := in.counters.Packets.Load()
		if err := in.drain(); err != nil {
			t.Fatal(err)
		}
		if in.counters.Packets.Load() == before {
			t.Fatalf("only %d packets came: %v", before, dropsOf(in.counters))
		}
	}
	most := 2.2
	if !a.options.Offload.GSO.Load() { // each datagram comes in a message of its own
		most = 3
	}
	for name, c := range map[string]*Counters{"sending": out.counters, "receiving": in.counters} {
		if per := float64(c.Syscalls.Load()) / frames; per > most {
			t.Errorf("%s took %.2f system calls per frame of 64 KB", name, per)
		} else {
			t.Logf("%s took %.2f system calls per frame of 64 KB", name, per)
		}
	}
}

// TestStartStopLeaksNothing starts and stops the loop repeatedly on the same
// descriptors, and checks for leaked goroutines and descriptors.
func TestStartStopLeaksNothing(t *testing.T) {
	n := newTestNode(t, "127.0.0.1", "10.5.1.0/24", 1)
	before := openFiles(t)
	for range 1000 {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- n.loop.Run(ctx) }()
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d files are open, %d were", after, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	fd, err := unix.Open("/proc/self/fd", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	n := 0
	buf := make([]byte, 8192)
	for {
		k, err := unix.ReadDirent(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if k <= 0 {
			return n
		}
		_, c, _ := unix.ParseDirent(buf[:k], -1, nil)
		n += c
	}
}

// TestPacketPathHasNoChannels rejects channels, select and locks in the files of the
// packet path.
func TestPacketPathHasNoChannels(t *testing.T) {
	for _, name := range []string{"egress.go", "ingress.go", "udp.go", "rawip.go", "sendbatch.go", "recvbatch.go", "coalesce.go", "segment.go", "packet.go", "checksum.go", "poller.go", "peers.go", "table.go", "traffic.go", "toobig.go", "vnet.go", "vxlan.go", "ipip.go", "os.go", "superframe.go", "queue.go"} {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, imported := range f.Imports {
			if imported.Path.Value == `"sync"` {
				t.Errorf("%s imports sync", name)
			}
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ChanType, *ast.SelectStmt, *ast.SendStmt, *ast.GoStmt:
				t.Errorf("%s has a %T", name, n)
			case *ast.UnaryExpr:
				if n.Op == token.ARROW {
					t.Errorf("%s receives from a channel", name)
				}
			}
			return true
		})
	}
}

func TestReasonsHaveNames(t *testing.T) {
	seen := make(map[string]bool)
	for _, r := range Reasons() {
		if r.String() == "" || seen[r.String()] {
			t.Errorf("reason %d is called %q", r, r)
		}
		seen[r.String()] = true
	}
	if !slices.Contains(Reasons(), IngressWrite) {
		t.Error("the last reason is missing")
	}
}
