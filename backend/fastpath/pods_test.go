package fastpath

import (
	"bytes"
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"culvert/internal/host"
)

var podMAC, bridgeMAC = host.MAC{2, 0, 0, 0, 1, 1}, host.MAC{2, 0, 0, 0, 1, 2}

const (
	tcpFIN, tcpSYN, tcpRST, tcpACK = 1, 2, 4, 16
	ourPort, peerPort              = 40000, 80
)

// segment returns a TCP packet with correct checksums.
func segment(source, destination netip.Addr, sourcePort, destinationPort uint16, flags byte, sequence uint32, size int) []byte {
	tcp := make([]byte, 20+size)
	binary.BigEndian.PutUint16(tcp, sourcePort)
	binary.BigEndian.PutUint16(tcp[2:], destinationPort)
	binary.BigEndian.PutUint32(tcp[4:], sequence)
	binary.BigEndian.PutUint32(tcp[8:], 77)
	tcp[12], tcp[13] = 5<<4, flags
	b := ipPacket(source, destination, unix.IPPROTO_TCP, tcp)
	header := headerLen(b)
	binary.BigEndian.PutUint16(b[header+16:], ^fold(pseudo(b, unix.IPPROTO_TCP)+sumOf(b[header:])))
	return b
}

// hops sets an IP packet's TTL or hop limit.
func hops(b []byte, n byte) []byte {
	b = bytes.Clone(b)
	if b[0]>>4 == 6 {
		b[7] = n
		return b
	}
	b[8], b[10], b[11] = n, 0, 0
	binary.BigEndian.PutUint16(b[10:], ^fold(sumOf(b[:20])))
	return b
}

func key(source, destination netip.Addr, sourcePort, destinationPort uint16) (k flowKey) {
	k.Source, k.Destination = addressOf(source), addressOf(destination)
	binary.BigEndian.PutUint16(k.Ports[:], sourcePort)
	binary.BigEndian.PutUint16(k.Ports[2:], destinationPort)
	k.Protocol = unix.IPPROTO_TCP
	return k
}

// monotonic returns the time that the programs compare with.
func monotonic(t *testing.T) uint64 {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	return uint64(now.Nano())
}

func withPods(t *testing.T) *Path {
	t.Helper()
	p := fill(t, openAs(t, Pods), []podLink{{name: "veth1", index: loopback.index, bridge: bridgeMAC}})
	p.on = true
	if err := p.nextGeneration(); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *Path) put(t *testing.T, k flowKey, s shortcut) {
	t.Helper()
	if err := p.loaded.Maps["shortcuts"].Put(&k, &s); err != nil {
		t.Fatal(err)
	}
}

func (p *Path) shortcut(t *testing.T, k flowKey) (s shortcut, there bool) {
	t.Helper()
	return s, p.loaded.Maps["shortcuts"].Lookup(&k, &s) == nil
}

var bothFamilies = []struct {
	family                 uint32
	pod, peer, node, other netip.Addr
}{
	{4, ourPod, peerPod, ourNode, peerNode}, {6, ourPod6, peerPod6, ourNode6, peerNode6},
}

// TestShortWayOut encapsulates at the pod's link, and checks what keeps a packet on the
// host's way, unchanged.
func TestShortWayOut(t *testing.T) {
	p := withPods(t)
	for _, f := range bothFamilies {
		kind := etherType(f.family)
		k := key(f.pod, f.peer, ourPort, peerPort)
		good := shortcut{
			Until: monotonic(t) + uint64(time.Hour), Generation: p.generation, Link: uint32(loopback.index),
			Ethernet: ethernet{peerMAC, ourMAC, kind}, Bridge: bridgeMAC,
		}
		packet := segment(f.pod, f.peer, ourPort, peerPort, tcpACK, 1000, 100)
		sent := frame(bridgeMAC, podMAC, packet)
		p.put(t, k, good)
		verdict, out, _ := p.run(t, programPodOut, sent, 0)
		b := out[14:]
		header := headerLen(b)
		if want := frame(peerMAC, ourMAC, hops(packet, 63)); verdict != actRedirect || !bytes.Equal(b[header+16:], want) {
			t.Fatalf("%s: %#x\n got %x\nwant %x", f.pod, verdict, b[header+16:], want)
		}
		if fold(pseudo(b, unix.IPPROTO_UDP)+sumOf(b[header:])) != 0xffff {
			t.Errorf("%s: outer checksum %x", f.pod, b[header+6:header+8])
		}
		fragment := segment(f.pod, f.peer, ourPort, peerPort, tcpACK, 1000, 100)
		fragment[6] |= 0x20 // for IPv6 another next header
		for name, test := range map[string]struct {
			frame []byte
			spoil func(*shortcut)
			ends  bool
		}{
			"it is over":              {sent, func(s *shortcut) { s.Until = monotonic(t) - uint64(10*time.Millisecond) }, false},
			"it never was":            {sent, func(s *shortcut) { s.Until = 0 }, false},
			"the host has changed":    {sent, func(s *shortcut) { s.Generation-- }, false},
			"another pod's address":   {sent, func(s *shortcut) { s.Link++ }, false},
			"the peer is gone":        {sent, func(s *shortcut) { s.Ethernet.Destination[5]++ }, false},
			"not to the bridge":       {frame(peerMAC, podMAC, packet), nil, false},
			"the last hop":            {frame(bridgeMAC, podMAC, hops(packet, 1)), nil, false},
			"too long":                {frame(bridgeMAC, podMAC, segment(f.pod, f.peer, ourPort, peerPort, tcpACK, 1000, 1460)), nil, false},
			"another port":            {frame(bridgeMAC, podMAC, segment(f.pod, f.peer, ourPort+1, peerPort, tcpACK, 1000, 100)), nil, false},
			"UDP":                     {frame(bridgeMAC, podMAC, datagram(f.pod, f.peer, 100)), nil, false},
			"a fragment":              {frame(bridgeMAC, podMAC, fragment), nil, false},
			"the connection ends":     {frame(bridgeMAC, podMAC, segment(f.pod, f.peer, ourPort, peerPort, tcpACK|tcpFIN, 1000, 0)), nil, true},
			"the connection is reset": {frame(bridgeMAC, podMAC, segment(f.pod, f.peer, ourPort, peerPort, tcpRST, 1000, 0)), nil, true},
			"a new one":               {frame(bridgeMAC, podMAC, segment(f.pod, f.peer, ourPort, peerPort, tcpSYN, 1000, 0)), nil, true},
		} {
			s := good
			if test.spoil != nil {
				test.spoil(&s)
			}
			p.put(t, k, s)
			p.put(t, k.reversed(), s)
			verdict, out, _ := p.run(t, programPodOut, test.frame, 0)
			if verdict != actUnspec || !bytes.Equal(out, test.frame) {
				t.Errorf("%s, %s: %#x; unchanged: %t", f.pod, name, verdict, bytes.Equal(out, test.frame))
			}
			_, there := p.shortcut(t, k)
			if _, back := p.shortcut(t, k.reversed()); there == test.ends || back == test.ends {
				t.Errorf("%s, %s: the shortcuts stay: %t, %t", f.pod, name, there, back)
			}
		}
	}
}

// TestShortWayIsRenewed checks that a direction becomes short when the last packet given
// to the host's way has come out of it, and not before.
func TestShortWayIsRenewed(t *testing.T) {
	p := withPods(t)
	k := key(ourPod, peerPod, ourPort, peerPort)
	p.put(t, k, shortcut{Link: uint32(loopback.index), Ethernet: ethernet{peerMAC, ourMAC, [2]byte{8, 0}}, Bridge: bridgeMAC})
	is := func(what string, want bool) {
		t.Helper()
		if s, there := p.shortcut(t, k); !there || (s.Until != 0) != want {
			t.Errorf("%s: %+v", what, s)
		}
	}
	give := func(sequence uint32) {
		t.Helper()
		p.run(t, programPodOut, frame(bridgeMAC, podMAC, segment(ourPod, peerPod, ourPort, peerPort, tcpACK, sequence, 100)), 0)
	}
	pass := func(sequence uint32) {
		t.Helper()
		p.run(t, programOut, frame(peerMAC, ourMAC, segment(ourPod, peerPod, ourPort, peerPort, tcpACK, sequence, 100)), 0)
	}
	pass(900)
	is("before anything was given to the host", false)
	give(1000)
	give(1100)
	is("two are on their way", false)
	pass(1000)
	is("one is on its way", false)
	give(1000) // sent again
	pass(1000)
	is("a segment sent again has come out, but not the last", false)
	pass(1100)
	is("all are out", true)
	if err := p.nextGeneration(); err != nil {
		t.Fatal(err)
	}
	give(1200)
	is("the host has changed", false)
	pass(1200)
	is("and has let it pass", true)
	s, _ := p.shortcut(t, k)
	if now := monotonic(t); s.Until > now+uint64(250*time.Millisecond) || s.Generation != p.generation {
		t.Errorf("short for %s, generation %d of %d", time.Duration(s.Until-now), s.Generation, p.generation)
	}
}

// TestShortWayOfDatagrams sends and receives UDP the short way, and checks when a direction
// of it becomes short: datagrams have no sequence numbers, and may be alike.
func TestShortWayOfDatagrams(t *testing.T) {
	p := withPods(t)
	for _, f := range bothFamilies {
		kind := etherType(f.family)
		k := key(f.pod, f.peer, 1024, 1025) // those of datagram
		k.Protocol = unix.IPPROTO_UDP
		entry := shortcut{Link: uint32(loopback.index), Ethernet: ethernet{peerMAC, ourMAC, kind}, Bridge: bridgeMAC}
		p.put(t, k, entry)
		alike := datagram(f.pod, f.peer, 100)
		give := func() (verdict uint32) {
			t.Helper()
			verdict, _, _ = p.run(t, programPodOut, frame(bridgeMAC, podMAC, alike), 0)
			return verdict
		}
		pass := func() {
			t.Helper()
			p.run(t, programOut, frame(peerMAC, ourMAC, alike), 0)
		}
		is := func(what string, want bool) {
			t.Helper()
			if s, there := p.shortcut(t, k); !there || (s.Until != 0) != want {
				t.Errorf("%s, %s: %+v", f.pod, what, s)
			}
		}
		pass()
		is("before anything was given to the host", false)
		give()
		give()
		pass()
		is("one of two that are alike is on its way", false)
		pass()
		is("both are out", true)
		if verdict := give(); verdict != actRedirect {
			t.Errorf("%s: it does not go short: %#x", f.pod, verdict)
		}
		if err := p.nextGeneration(); err != nil {
			t.Fatal(err)
		}
		give()
		give()
		pass()
		is("the host has lost one", false)
		s, _ := p.shortcut(t, k)
		s.Since -= uint64(time.Second)
		p.put(t, k, s)
		give()
		pass()
		is("a second later", true)
		if f.family == 6 { // the first fragment, with no more than the UDP header
			tiny := slices.Concat(alike[:4], []byte{0, 16, unix.IPPROTO_FRAGMENT}, alike[7:40], []byte{unix.IPPROTO_UDP, 0, 0, 1, 0, 0, 0, 1}, alike[40:48])
			p.run(t, programPodOut, frame(bridgeMAC, podMAC, tiny), 0)
			is("a short fragment", false)
		}
		if err := p.nextGeneration(); err != nil {
			t.Fatal(err)
		}
		give()
		if f.family == 4 {
			alike[6] |= 0x20 // more fragments
			give()
			pass()
			is("a fragment", false)
		}

		back := key(f.peer, f.pod, 1024, 1025)
		back.Protocol = unix.IPPROTO_UDP
		entry = shortcut{
			Until: monotonic(t) + uint64(time.Hour), Generation: p.generation, Link: uint32(loopback.index), Ethernet: ethernet{podMAC, bridgeMAC, kind},
		}
		p.put(t, back, entry)
		packet := datagram(f.peer, f.pod, 100)
		verdict, out, reason := p.run(t, programIn, wire(f.other, f.node, frame(ourMAC, peerMAC, packet), nil), 0)
		if want := frame(podMAC, bridgeMAC, hops(packet, 63)); verdict != actRedirect || !bytes.Equal(out, want) {
			t.Errorf("%s: %#x, %q\n got %x\nwant %x", f.pod, verdict, reason, out, want)
		}
	}
}

// TestShortWayWaitsForTheQueue checks that a packet waits behind those of its flow that have
// come out of the host's way and that the pod has not received, and not otherwise.
func TestShortWayWaitsForTheQueue(t *testing.T) {
	p := withPods(t)
	for family, t4 := range p.held.tunnels {
		t4.Queue = uint32(loopback.index)
		if err := p.loaded.Maps["tunnels"].Put(&family, &t4); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range bothFamilies {
		kind := etherType(f.family)
		k := key(f.peer, f.pod, peerPort, ourPort)
		p.put(t, k, shortcut{Link: uint32(loopback.index), Ethernet: ethernet{podMAC, bridgeMAC, kind}})
		packet := segment(f.peer, f.pod, peerPort, ourPort, tcpACK, 1000, 100)
		arrives := func(what string, queued, unqueued uint32) {
			t.Helper()
			p.run(t, programIn, wire(f.other, f.node, frame(ourMAC, peerMAC, packet), nil), 0)
			if s, _ := p.shortcut(t, k); s.Queued != queued || s.Unqueued != unqueued {
				t.Errorf("%s, %s: %d entered the queue, %d have left it", f.pod, what, s.Queued, s.Unqueued)
			}
		}
		arrives("by the host's way", 0, 0)
		if verdict, _, _ := p.run(t, programPodIn, frame(podMAC, bridgeMAC, packet), 0); verdict != actRedirect {
			t.Errorf("%s: what comes out of the host's way does not enter the queue: %#x", f.pod, verdict)
		}
		arrives("behind it", 2, 0)
		// The queue's end: struct __sk_buff has mark and priority.
		for n := range uint32(2) {
			context := make([]byte, 192)
			binary.NativeEndian.PutUint32(context[8:], uint32(loopback.index))
			binary.NativeEndian.PutUint32(context[32:], n+1)
			verdict, err := p.loaded.Programs[programJoin].Run(&ebpf.RunOptions{
				Data: frame(podMAC, bridgeMAC, packet), DataOut: make([]byte, 256), Context: context,
			})
			if err != nil || verdict != actRedirect {
				t.Errorf("%s: what leaves the queue: %#x, %v", f.pod, verdict, err)
			}
		}
		arrives("when it is empty", 2, 2)
		const actShot = 2
		if verdict, _, _ := p.run(t, programJoin, frame(podMAC, bridgeMAC, packet), 0); verdict != actShot {
			t.Errorf("%s: the pair of veth's own packet is delivered: %#x", f.pod, verdict)
		}
	}
}

// TestShortWayIn decapsulates to the pod's link, and only what the host's way would accept.
func TestShortWayIn(t *testing.T) {
	p := withPods(t)
	for _, f := range bothFamilies {
		kind := etherType(f.family)
		k := key(f.peer, f.pod, peerPort, ourPort)
		good := shortcut{
			Until: monotonic(t) + uint64(time.Hour), Generation: p.generation, Link: uint32(loopback.index), Ethernet: ethernet{podMAC, bridgeMAC, kind},
		}
		packet := segment(f.peer, f.pod, peerPort, ourPort, tcpACK, 1000, 100)
		toPod, toDevice := frame(podMAC, bridgeMAC, hops(packet, 63)), frame(ourMAC, peerMAC, packet)
		for name, test := range map[string]struct {
			outer netip.Addr
			spoil func(*shortcut)
			want  []byte // nil: it is left
		}{
			"short":                {f.other, nil, toPod},
			"it is over":           {f.other, func(s *shortcut) { s.Until = monotonic(t) - uint64(10*time.Millisecond) }, toDevice},
			"the host has changed": {f.other, func(s *shortcut) { s.Generation-- }, toDevice},
			"a stranger":           {map[bool]netip.Addr{true: stranger, false: netip.MustParseAddr("2001:db8::66")}[f.pod.Is4()], nil, nil},
		} {
			s := good
			if test.spoil != nil {
				test.spoil(&s)
			}
			p.put(t, k, s)
			sent := wire(test.outer, f.node, toDevice, nil)
			verdict, out, reason := p.run(t, programIn, sent, 0)
			if test.want == nil {
				if verdict != actUnspec || reason != "ingress-source" || !bytes.Equal(out, sent) {
					t.Errorf("%s, %s: %#x, %q", f.pod, name, verdict, reason)
				}
				if now, _ := p.shortcut(t, k); now != s {
					t.Errorf("%s, %s: changed to %+v", f.pod, name, now)
				}
				continue
			}
			if verdict != actRedirect || !bytes.Equal(out, test.want) {
				t.Errorf("%s, %s: %#x, %q\n got %x\nwant %x", f.pod, name, verdict, reason, out, test.want)
			}
		}
	}
}

// TestShortcutsFor checks which proposed connections are entered at all.
func TestShortcutsFor(t *testing.T) {
	p := withPods(t)
	good := candidate{Key: key(ourPod, peerPod, ourPort, peerPort), Family: 4, Link: uint32(loopback.index), Pod: podMAC, Bridge: bridgeMAC}
	k := good.Key
	out := shortcut{Link: uint32(loopback.index), Ethernet: ethernet{peerMAC, ourMAC, [2]byte{8, 0}}, Bridge: bridgeMAC}
	in := shortcut{Link: uint32(loopback.index), Ethernet: ethernet{podMAC, bridgeMAC, [2]byte{8, 0}}}
	if got, want := p.shortcutsFor(good), (map[flowKey]shortcut{k: out, k.reversed(): in}); !maps.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	datagrams := good
	datagrams.Key.Protocol = unix.IPPROTO_UDP
	if got, want := p.shortcutsFor(datagrams), (map[flowKey]shortcut{datagrams.Key: out}); !maps.Equal(got, want) {
		t.Errorf("UDP that the pod sends: got %+v, want %+v", got, want)
	}
	datagrams.Key = datagrams.Key.reversed()
	if got, want := p.shortcutsFor(datagrams), (map[flowKey]shortcut{datagrams.Key: in}); !maps.Equal(got, want) {
		t.Errorf("UDP that it receives: got %+v, want %+v", got, want)
	}
	for name, spoil := range map[string]func(*candidate){
		"a link that is no pod's":      func(c *candidate) { c.Link++ },
		"another Ethernet destination": func(c *candidate) { c.Bridge[5]++ },
		"to an address of nobody":      func(c *candidate) { c.Key.Destination = addressOf(thirdPod) },
		"to this node":                 func(c *candidate) { c.Key.Destination = addressOf(ourPod) },
		"from an address not ours":     func(c *candidate) { c.Key.Source = addressOf(thirdPod) },
		"of a family without a tunnel": func(c *candidate) { c.Family = 5 },
		"while the fast path is off":   func(*candidate) { p.on = false },
	} {
		c := good
		spoil(&c)
		for _, protocol := range []uint32{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			c.Key.Protocol = protocol
			if got := p.shortcutsFor(c); got != nil {
				t.Errorf("%s, protocol %d: %+v", name, protocol, got)
			}
		}
		p.on = true
	}
}
