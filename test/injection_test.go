package test

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/subnet"
)

// TestChaosInjection sends invalid packets to a node, from a stranger and from
// a peer, many times each, over every datapath. None of them arrives in a pod,
// on the node or, forwarded by the node, anywhere else, and each is counted
// under its reason.
//
//	n1: the datapath under test, a pod
//	n2: a peer      n3: another peer      n4: a stranger, without a lease
//
// n2 to n4 run no daemon but have raw sockets. CULVERT_PACKETS is the number of
// packets per case; the default is 200, or 50 with -short.
func TestChaosInjection(t *testing.T) {
	for _, d := range []struct{ format, kind string }{
		{"vxlan", "userspace"},
		{"vxlan", "kernel"},
		{"vxlan", "fast"},
		{"ipip", "userspace"},
		{"ipip", "kernel"},
		{"ipip", "fast"},
		{"ipip", "kernel fast"},
	} {
		t.Run(d.format+"/"+d.kind, func(t *testing.T) { newInjection(t, d.format, d.kind).run() })
	}
}

// injection is one datapath under test.
type injection struct {
	*cluster
	t            *testing.T
	format, kind string
	packets      int
	victim       *lab.Node
	pod          *lab.Pod
	subnets      []netip.Prefix // the node's, IPv4 first
	from         map[string]*sender
	seen         *witness
	cases        int
}

// leaseOf returns the subnet of a node without a daemon, by number and family.
func leaseOf(node int, is4 bool) netip.Prefix {
	if is4 {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(248 + node), 0}), 24)
	}
	return netip.MustParsePrefix(fmt.Sprintf("fd00:5:0:%x::/64", 0xf8+node))
}

// inside returns an address in a subnet that is assigned to no device.
func inside(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	b[len(b)-1] = 99
	a, _ := netip.AddrFromSlice(b)
	return a
}

func newInjection(t *testing.T, format, kind string) *injection {
	c := newClusterOf(t, lab.Options{Nodes: 4, Prefixes: dualUnderlay})
	f := &injection{cluster: c, t: t, format: format, kind: kind, packets: 200, victim: c.Nodes[0]}
	if testing.Short() {
		f.packets = 50
	}
	if text := os.Getenv("CULVERT_PACKETS"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		f.packets = n
	}
	flags := []string{"--datapath", "userspace"}
	switch kind {
	case "kernel":
		flags = []string{"--datapath", "kernel"}
	case "fast":
		flags = []string{"--datapath", "kernel", "--fast-path", "on"}
		if format == "ipip" {
			flags[1] = "userspace"
		}
	case "kernel fast":
		flags = []string{"--datapath", "kernel", "--fast-path", "on"}
	}
	if format == "ipip" {
		if strings.HasPrefix(kind, "kernel") {
			needIPIP(t, f.victim)
		}
		c.setConfig(`{"Network":"10.5.0.0/16","Backend":{"Type":"ipip"}}`)
	} else {
		c.setConfig(dual)
	}
	for k, n := range c.Nodes[1:3] {
		l := subnet.Lease{Backend: format}
		for i, is4 := range f.families() {
			e := subnet.Endpoint{Subnet: leaseOf(k+1, is4), Public: n.Addrs[i]}
			if format == "vxlan" {
				e.VTEP = subnet.VTEP{VNI: 1, MAC: subnet.MAC{2, 0, 0, 0, byte(i), byte(k + 2)}}
			}
			l.Endpoints = append(l.Endpoints, e)
		}
		value, err := l.Value()
		if err != nil {
			t.Fatal(err)
		}
		c.put("/coreos.com/network/subnets/"+l.Key(), string(value))
	}
	c.start(f.victim, flags...)
	s := c.waitReady(f.victim, 2)
	f.subnets = s.Lease.Subnets
	if strings.HasSuffix(kind, "fast") {
		c.fastPath(f.victim)
	}
	var err error
	if f.pod, err = f.victim.AddPod(t.Context(), "p1"); err != nil {
		t.Fatal(err)
	}
	f.from = map[string]*sender{"peer": newSender(t, c.Nodes[1]), "stranger": newSender(t, c.Nodes[3])}
	f.seen = newWitness(t, f.victim, f.pod)
	return f
}

func (f *injection) families() []bool {
	if f.format == "ipip" {
		return []bool{true}
	}
	return []bool{true, false}
}

// needIPIP skips the test if the kernel has no ipip devices. In the virtual
// machine it must have them.
func needIPIP(t *testing.T, n *lab.Node) {
	t.Helper()
	err := n.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "try"
		l := &netlink.Iptun{LinkAttrs: attrs, Local: n.Addrs[0].AsSlice()}
		if err := netlink.LinkAdd(l); err != nil {
			return err
		}
		return netlink.LinkDel(l)
	})
	if err == nil {
		return
	}
	if os.Getenv("CULVERT_VM") != "" {
		t.Fatalf("no ipip device: %v", err)
	}
	t.Skipf("the kernel has no ipip devices (%v): make test-vm has", err)
}

// injected is one test case: a kind of packet.
type injected struct {
	name        string
	by          string     // the sender: peer or stranger
	outer       netip.Addr // outer source; the sender's own address if zero
	to          netip.Addr // outer destination; the node's if zero
	source      netip.Addr // inner source
	destination netip.Addr
	// change modifies the payload of the outer IP header: the UDP payload for
	// VXLAN, the inner packet for IPIP.
	change func(b []byte) []byte
	tos    byte // of the outer header
	cut    func(from, to netip.Addr, protocol byte, b []byte) [][]byte
	// want is the reason under which the packets are counted, by kind of
	// datapath: "" for none, "delivered", "served" or "answered" if they
	// arrive. "snmp" (malformed headers) and "device" (the tunnel device's
	// errors) are counters of the kernel.
	want map[string]string
}

// everywhere expects the same reason on every datapath; either expects one in
// userspace and another in the kernel, to which the fast path leaves these
// packets.
func everywhere(reason string) map[string]string { return either(reason, reason) }

func either(userspace, kernel string) map[string]string {
	return map[string]string{"userspace": userspace, "kernel": kernel}
}

// below is the datapath to which the fast path leaves these packets.
func (f *injection) below() string {
	if f.kind == "userspace" || f.format == "ipip" && f.kind == "fast" {
		return "userspace"
	}
	return "kernel"
}

func (f *injection) run() {
	for i, is4 := range f.families() {
		all := f.list(i, is4)
		for _, c := range all {
			f.try(i, is4, c)
		}
	}
	time.Sleep(300 * time.Millisecond) // for packets that arrive late
	f.seen.mu.Lock()
	defer f.seen.mu.Unlock()
	if len(f.seen.hits) > 0 {
		f.t.Errorf("seen: %v", f.seen.hits)
	}
	if !strings.HasSuffix(f.kind, "fast") {
		return
	}
	// If valid packets did not take the fast path, the test proves nothing
	// about it.
	if p := f.fastPath(f.victim); p.Ingress.Packets == 0 {
		f.t.Errorf("nothing took the fast path: %v", p.Slow)
	}
}

func (f *injection) list(i int, is4 bool) []injected {
	pod := f.pod.Addr(is4)
	ours := f.subnets[i]
	peer, third := inside(leaseOf(1, is4)), inside(leaseOf(2, is4))
	us, them, other := f.victim.Addrs[i], f.Nodes[1].Addrs[i], f.Nodes[3].Addrs[i]
	parse := netip.MustParseAddr
	sources := map[string]netip.Addr{
		"another peer's": third, "ours": inside(ours), "the pod's own": pod, "our tunnel's": ours.Addr(), "our underlay's": us, "its own underlay's": them,
		"nobody's": inside(leaseOf(5, is4)), "loopback": parse("127.0.0.1"), "link-local": parse("169.254.1.1"), "multicast": parse("224.0.0.1"),
		"0/8": parse("0.0.0.1"), "unspecified": parse("0.0.0.0"), "240/4": parse("240.0.0.1"), "broadcast": parse("255.255.255.255"), "outside": parse("192.0.2.1"),
	}
	destinations := map[string]netip.Addr{
		"outside": parse("192.0.2.1"), "a machine on the underlay": other, "another peer's pod": third, "its own pod": peer, "our underlay's": us,
		"loopback": parse("127.0.0.1"), "multicast": parse("224.0.0.1"), "broadcast": parse("255.255.255.255"), "link-local": parse("169.254.1.1"),
		"nobody's": inside(leaseOf(5, is4)), "the network's end": parse("10.5.255.255"),
	}
	if !is4 {
		for name, a := range map[string]string{
			"loopback": "::1", "link-local": "fe80::1", "multicast": "ff02::1", "0/8": "::7f00:1", "unspecified": "::", "240/4": "100::1", "broadcast": "ff0e::1", "outside": "2001:db8::1",
			"the network's end": "fd00:5:0:ffff:ffff:ffff:ffff:ffff",
		} {
			if _, ok := sources[name]; ok {
				sources[name] = parse(a)
			}
			if _, ok := destinations[name]; ok {
				destinations[name] = parse(a)
			}
		}
	}
	var all []injected
	add := func(c injected) {
		if !c.source.IsValid() {
			c.source = peer
		}
		if !c.destination.IsValid() {
			c.destination = pod
		}
		if c.by == "" {
			c.by = "peer"
		}
		all = append(all, c)
	}
	gateway := ours.Addr().Next()
	add(injected{name: "by right", want: everywhere("delivered")})
	for _, name := range byName(sources) {
		add(injected{name: "a stranger, inner source " + name, by: "stranger", source: sources[name], want: everywhere("ingress-stranger")})
		add(injected{name: "a peer, inner source " + name, source: sources[name], want: everywhere("ingress-source")})
	}
	add(injected{name: "a stranger, inner source a peer's", by: "stranger", want: everywhere("ingress-stranger")})
	for _, name := range byName(destinations) {
		want := everywhere("ingress-destination")
		if !is4 && name == "loopback" { // ip6_rcv_core drops it before any hook
			want = either("ingress-destination", "snmp")
		}
		add(injected{name: "a peer, inner destination " + name, destination: destinations[name], want: want})
		want = everywhere("ingress-stranger")
		if f.format == "ipip" && !netip.MustParsePrefix("10.5.0.0/16").Contains(destinations[name]) {
			// It may be for another program's tunnel: our rules drop it only
			// after our device has decapsulated it.
			want = either("ingress-stranger", "ingress-destination")
		}
		add(injected{name: "a stranger, inner destination " + name, by: "stranger", destination: destinations[name], want: want})
	}
	for name, a := range map[string]netip.Addr{"the tunnel's address": ours.Addr(), "the bridge's address": gateway} {
		add(injected{name: "a stranger to " + name, by: "stranger", destination: a, want: everywhere("ingress-stranger")})
		add(injected{name: "a peer with another's source to " + name, source: third, destination: a, want: everywhere("ingress-source")})
		add(injected{name: "a peer by right to " + name, destination: a, want: everywhere("served")})
	}
	// A sender with a peer's address as the source is indistinguishable from
	// that peer for any receiver; docs/security.md says what helps.
	add(injected{name: "a stranger with a peer's outer address", by: "stranger", outer: them, want: everywhere("delivered")})
	add(injected{name: "congestion outside, not understood inside", tos: 3, want: either("ingress-ecn", "device")})

	at := 0 // offset of the inner packet
	if f.format == "vxlan" {
		at = 22
		f.addVXLAN(is4, add)
	}
	set := func(offset int, v ...byte) func([]byte) []byte {
		return func(b []byte) []byte {
			copy(b[at+offset:], v)
			if is4 {
				return sumHeader(b, at)
			}
			return b
		}
	}
	// The kernel's ipip device drops malformed inner packets as part of the
	// outer packet.
	lie := func(name string, change func([]byte) []byte) {
		add(injected{name: "a peer, " + name, change: change, want: either("ingress-malformed", "snmp")})
		add(injected{name: "a stranger, " + name, by: "stranger", change: change, want: everywhere("ingress-stranger")})
	}
	if is4 {
		lie("header of 16 bytes", set(0, 0x44))
		lie("total length past the end", set(2, 0x0f, 0xff))
		lie("total length of 19", set(2, 0, 19))
		lie("header longer than the packet", func(b []byte) []byte { b[at], b[at+2], b[at+3] = 0x4f, 0, 40; return sumHeader(b, at) })
		lie("bad header checksum", func(b []byte) []byte { b[at+10] ^= 0x55; return b })
		lie("bad header checksum by the TTL", func(b []byte) []byte { b[at+8]--; return b })
	} else {
		lie("payload length past the end", set(4, 0x0f, 0xff))
	}
	if f.format == "vxlan" {
		lie("version 5", set(0, 0x55))
	}

	if f.format == "ipip" { // the host's other addresses are not tunnel endpoints
		second := parse("198.18.0.77")
		f.addAddr(f.victim, f.victim.Link, netip.PrefixFrom(second, 24))
		add(injected{name: "a peer, to another address of the node", to: second, want: either("", "answered")})
	}

	// Fragments of the outer packet.
	whole, strange := everywhere("delivered"), everywhere("ingress-stranger")
	if f.format == "ipip" { // senders set DF; userspace accepts no fragments
		whole, strange = either("ingress-fragment x2", "delivered"), either("ingress-stranger x2", "ingress-stranger")
	}
	add(injected{name: "a stranger, in fragments", by: "stranger", cut: fragmentsOf, want: strange})
	add(injected{name: "a peer by right, in fragments", cut: fragmentsOf, want: whole})
	nowhere := everywhere("")
	if f.format == "ipip" {
		nowhere = either("ingress-fragment", "")
	}
	add(injected{name: "a peer, first fragment alone", cut: first(fragmentsOf), want: nowhere})
	add(injected{name: "a peer, overlapping fragments", cut: overlapping, want: twice(nowhere)})
	return all
}

// twice expects each packet to be counted twice: it is sent in two fragments
// that nothing reassembles.
func twice(want map[string]string) map[string]string {
	m := make(map[string]string)
	for k, v := range want {
		m[k] = v
		if v != "" {
			m[k] = v + " x2"
		}
	}
	return m
}

// addVXLAN adds the cases that only VXLAN has.
func (f *injection) addVXLAN(is4 bool, add func(injected)) {
	set := func(offset int, v ...byte) func([]byte) []byte {
		return func(b []byte) []byte { copy(b[offset:], v); return b }
	}
	ethertype, otherType := []byte{0x08, 0x00}, []byte{0x86, 0xdd}
	if !is4 {
		ethertype, otherType = otherType, ethertype
	}
	kinds := []struct {
		name   string
		change func([]byte) []byte
		want   map[string]string
	}{
		// The VNI may be that of another program's device, so nothing is
		// dropped.
		{"another VNI", set(4, 0, 0, 2), either("ingress-vni", "")},
		{"I flag clear", set(0, 0), either("ingress-flags", "")},
		{"another inner MAC", set(8+5, 0x77), either("ingress-mac", "")},
		{"ARP", set(20, 0x08, 0x06), everywhere("ingress-protocol")},
		{"a VLAN tag", func(b []byte) []byte {
			return append(append(append([]byte{}, b[:20]...), 0x81, 0, 0, 5, ethertype[0], ethertype[1]), b[22:]...)
		}, everywhere("ingress-protocol")},
		{"LLDP", set(20, 0x88, 0xcc), everywhere("ingress-protocol")},
		{"the other family's ethertype", set(20, otherType...), either("ingress-malformed", "ingress-protocol")},
		{"7 bytes", func(b []byte) []byte { return b[:7] }, either("ingress-short", "")},
		{"no inner packet", func(b []byte) []byte { return b[:22] }, either("ingress-malformed", "ingress-source")},
		{"an inner header cut short", func(b []byte) []byte { return b[:22+19] }, either("ingress-malformed", map[bool]string{true: "device", false: "ingress-source"}[is4])},
	}
	for _, k := range kinds {
		add(injected{name: "a peer, " + k.name, change: k.change, want: k.want})
		stranger := either("ingress-stranger", "ingress-stranger")
		if k.name == "another VNI" || k.name == "7 bytes" { // without these the packet is not ours
			stranger = either("ingress-stranger", "")
		}
		add(injected{name: "a stranger, " + k.name, by: "stranger", change: k.change, want: stranger})
	}
	// Ignored on receipt by RFC 7348, section 5. The kernel's device rejects
	// them.
	for name, change := range map[string]func([]byte) []byte{
		"a reserved flag": set(0, 0x08|0x40), "reserved bytes": set(1, 1, 2, 3), "a reserved last byte": set(7, 9),
	} {
		add(injected{name: "a peer, " + name, change: change, want: either("delivered", "device")})
		add(injected{name: "a stranger, " + name, by: "stranger", change: change, want: everywhere("ingress-stranger")})
	}
	// A tunnel packet within another, to the node's own port: valid for the
	// outer tunnel, from a stranger for the inner one. In userspace the port is
	// open on the underlay's address only, so the node answers that it is
	// closed.
	add(injected{name: "a peer, VXLAN in VXLAN", change: func(b []byte) []byte {
		return f.nested(is4, b)
	}, want: either("answered", "ingress-stranger")})
}

// nested wraps the inner packet of a VXLAN datagram into a second one, to the
// tunnel's own address.
func (f *injection) nested(is4 bool, b []byte) []byte {
	from, to := inside(leaseOf(1, is4)), f.subnets[map[bool]int{true: 0, false: 1}[is4]].Addr()
	inner := ipPacket(from, to, unix.IPPROTO_UDP, udpDatagram(from, to, 5000, 8472, b))
	return append(append([]byte{}, b[:22]...), inner...)
}

// sumHeader recomputes the IPv4 header checksum at b[at:].
func sumHeader(b []byte, at int) []byte {
	n := min(int(b[at]&15)*4, len(b)-at)
	b[at+10], b[at+11] = 0, 0
	binary.BigEndian.PutUint16(b[at+10:], ^onesSum(b[at:at+n]))
	return b
}

func first(cut func(from, to netip.Addr, protocol byte, b []byte) [][]byte) func(from, to netip.Addr, protocol byte, b []byte) [][]byte {
	return func(from, to netip.Addr, protocol byte, b []byte) [][]byte { return cut(from, to, protocol, b)[:1] }
}

// overlapping cuts a packet into two fragments. The second starts within the
// first and has other content there (RFC 5722).
func overlapping(from, to netip.Addr, protocol byte, payload []byte) [][]byte {
	parts := fragmentsOf(from, to, protocol, payload)
	head := len(parts[1]) - (len(payload) - 16)
	again := append(append([]byte{}, parts[1][:head]...), payload[8:]...)
	if from.Is4() {
		binary.BigEndian.PutUint16(again[2:], uint16(len(again)))
		binary.BigEndian.PutUint16(again[6:], 1)
		sumHeader(again, 0)
	} else {
		binary.BigEndian.PutUint16(again[4:], uint16(len(again)-40))
		binary.BigEndian.PutUint16(again[40+2:], 1<<3)
	}
	return [][]byte{parts[0], again}
}

func byName(m map[string]netip.Addr) []string {
	var all []string
	for k := range m {
		all = append(all, k)
	}
	slices.Sort(all)
	return all
}

// packet returns a case's next packet, complete, as sent on the wire.
func (f *injection) packet(i int, is4 bool, c injected, mark []byte) [][]byte {
	b := ipPacket(c.source, c.destination, unix.IPPROTO_UDP, udpDatagram(c.source, c.destination, 5000, victimPort, mark))
	from, to := c.outer, f.victim.Addrs[i]
	if !from.IsValid() {
		from = f.from[c.by].node.Addrs[i]
	}
	if c.to.IsValid() {
		to = c.to
	}
	protocol := byte(unix.IPPROTO_IPIP)
	if f.format == "vxlan" {
		protocol = unix.IPPROTO_UDP
		mac := subnet.DeriveMAC(f.victim.ID, 1, !is4)
		ethertype := []byte{0x08, 0x00}
		if !is4 {
			ethertype = []byte{0x86, 0xdd}
		}
		frame := append([]byte{8, 0, 0, 0, 0, 0, 1, 0}, mac[:]...)
		frame = append(append(frame, 2, 0, 0, 0, 0, 9), ethertype...)
		b = append(frame, b...)
	}
	if c.change != nil {
		b = c.change(b)
	}
	if f.format == "vxlan" {
		b = udpDatagram(from, to, 50000, 8472, b)
	}
	if c.cut != nil {
		f.cases++ // a new identification per packet, so that none completes another
		parts := c.cut(from, to, protocol, b)
		for _, p := range parts {
			if is4 {
				binary.BigEndian.PutUint16(p[4:], uint16(f.cases))
				sumHeader(p, 0)
			} else {
				binary.BigEndian.PutUint32(p[44:], uint32(f.cases))
			}
		}
		return parts
	}
	whole := ipPacket(from, to, protocol, b)
	if c.tos != 0 {
		if is4 {
			whole[1] = c.tos
			sumHeader(whole, 0)
		} else {
			whole[1] = c.tos << 4
		}
	}
	return [][]byte{whole}
}

// chunk is the number of packets sent before their fate is checked, so that no
// queue overflows.
const chunk = 500

// try sends a case's packets and checks where they went.
func (f *injection) try(i int, is4 bool, c injected) {
	f.t.Helper()
	want := c.want[f.below()]
	reason, doubled := strings.CutSuffix(want, " x2")
	family := map[bool]string{true: "IPv4", false: "IPv6"}[is4]
	mark := f.seen.expect(c.name + " over " + family)
	before := f.counter(is4, reason)
	times := uint64(1)
	if doubled {
		times = 2
	}
	for sent := 0; sent < f.packets; {
		n := min(chunk, f.packets-sent)
		for range n {
			if err := f.from[c.by].send(is4, cmp.Or(c.to, f.victim.Addrs[i]), f.packet(i, is4, c, mark)); err != nil {
				f.t.Fatalf("%s over %s: %v", c.name, family, err)
			}
		}
		sent += n
		f.settle(i, is4)
		if reason == "" || isPlace(reason) {
			continue
		}
		var got uint64
		for end := time.Now().Add(3 * time.Second); got < uint64(sent)*times; time.Sleep(5 * time.Millisecond) {
			if got = f.counter(is4, reason) - before; time.Now().After(end) {
				break
			}
		}
		if got != uint64(sent)*times {
			s, _ := f.status(f.victim)
			f.t.Errorf("%s over %s: %d of %d counted as %s: %v", c.name, family, got, sent, reason, s.Datapath.Drops)
			break
		}
	}
	// Userspace does not hide IPIP packets outside the cluster network from the
	// kernel, which answers that it has no such tunnel.
	foreign := f.format == "ipip" && f.below() == "userspace" && !netip.MustParsePrefix("10.5.0.0/16").Contains(c.destination)
	delivered := f.seen.count(mark)
	for end := time.Now().Add(3 * time.Second); (reason == "delivered" || reason == "served") && delivered[reason] < f.packets && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond) // the witness may have more to read
		delivered = f.seen.count(mark)
	}
	switch reason {
	case "delivered", "served":
		if delivered[reason] != f.packets {
			f.t.Errorf("%s over %s: %d sent, seen %v", c.name, family, f.packets, delivered)
		}
	}
	f.seen.forget(mark, map[string]bool{"delivered": reason == "delivered", "bridge": reason == "delivered", "served": reason == "served", "answered": reason == "answered" || foreign})
	f.t.Logf("| %s, %s | %d | %d | %s |", c.name, family, f.packets, delivered["delivered"]+delivered["served"], orNone(want))
	if c.cut != nil {
		f.fragmentMemory(is4)
	}
}

// isPlace reports whether a case expects a place, not a counter.
func isPlace(want string) bool { return want == "delivered" || want == "served" || want == "answered" }

func orNone(reason string) string {
	if reason == "" {
		return "none"
	}
	return reason
}

// settle waits until the packets sent so far have been processed: a valid
// packet that follows them arrives.
func (f *injection) settle(i int, is4 bool) {
	f.t.Helper()
	c := injected{by: "peer", source: inside(leaseOf(1, is4)), destination: f.pod.Addr(is4)}
	mark := f.seen.expect("settling")
	eventually(f.t, "a packet that is right", func() error {
		if err := f.from["peer"].send(is4, f.victim.Addrs[i], f.packet(i, is4, c, mark)); err != nil {
			return err
		}
		for range 10 {
			if f.seen.count(mark)["delivered"] > 0 {
				return nil
			}
			time.Sleep(time.Millisecond)
		}
		return errors.New("it does not arrive")
	})
	f.seen.forget(mark, map[string]bool{"delivered": true, "bridge": true})
}

// counter reads one of the node's counters.
func (f *injection) counter(is4 bool, name string) uint64 {
	f.t.Helper()
	switch name {
	case "", "delivered", "served", "answered":
		return 0
	case "snmp":
		return f.snmp(is4)
	case "device":
		return f.deviceErrors(is4)
	}
	var s api.Status
	eventually(f.t, "the status", func() (err error) { s, err = f.status(f.victim); return err })
	return drops(s, name)
}

// snmp sums the kernel's counters of malformed headers (RFC 4293).
func (f *injection) snmp(is4 bool) (sum uint64) {
	f.t.Helper()
	counters, err := f.victim.Counters()
	if err != nil {
		f.t.Fatal(err)
	}
	names := []string{"IpInHdrErrors", "IpExtInTruncatedPkts"}
	if !is4 {
		names = []string{"Ip6InHdrErrors", "Ip6InTruncatedPkts", "Ip6InAddrErrors"}
	}
	for _, name := range names {
		sum += counters[name]
	}
	return sum
}

// deviceErrors reads the tunnel device's receive errors.
func (f *injection) deviceErrors(is4 bool) (n uint64) {
	f.t.Helper()
	device := map[bool]string{true: "cvt.1", false: "cvt6.1"}[is4]
	if f.format == "ipip" {
		device = "cvt.ipip"
	}
	if err := f.victim.Do(func() error {
		l, err := netlink.LinkByName(device)
		if err != nil {
			return err
		}
		n = l.Attrs().Statistics.RxErrors
		return nil
	}); err != nil {
		f.t.Fatal(err)
	}
	return n
}

// fragmentMemory checks that the kernel holds no more incomplete fragments than
// its limit.
func (f *injection) fragmentMemory(is4 bool) {
	f.t.Helper()
	file, name, limit := "sockstat", "FRAG:", "net/ipv4/ipfrag_high_thresh"
	if !is4 {
		file, name, limit = "sockstat6", "FRAG6:", "net/ipv6/ip6frag_high_thresh"
	}
	var held uint64
	if err := f.victim.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/" + file)
		for line := range strings.Lines(string(text)) {
			if w := strings.Fields(line); w[0] == name {
				held, _ = strconv.ParseUint(w[4], 10, 64)
			}
		}
		return err
	}); err != nil {
		f.t.Fatal(err)
	}
	text, err := f.victim.Sysctl(limit)
	if err != nil {
		f.t.Fatal(err)
	}
	most, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		f.t.Fatal(err)
	}
	if held > most+64<<10 {
		f.t.Errorf("the kernel holds %d bytes of fragments, and may hold %d", held, most)
	}
}

// sender has raw sockets on a node.
type sender struct {
	node *lab.Node
	fds  map[bool]int
}

func newSender(t *testing.T, n *lab.Node) *sender {
	t.Helper()
	s := &sender{node: n, fds: make(map[bool]int)}
	if err := n.Do(func() error {
		for is4, family := range map[bool]int{true: unix.AF_INET, false: unix.AF_INET6} {
			fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
			if err != nil {
				return err
			}
			t.Cleanup(func() { unix.Close(fd) })
			s.fds[is4] = fd
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *sender) send(is4 bool, to netip.Addr, packets [][]byte) error {
	var name unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte(to.AsSlice())}
	if !is4 {
		name = &unix.SockaddrInet6{Addr: to.As16()}
	}
	for _, p := range packets {
		if err := unix.Sendto(s.fds[is4], p, 0, name); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
	}
	return nil
}

// witness sees everything that leaves the tunnel: what arrives in the pod, what
// the node receives itself, and what it forwards.
type witness struct {
	mu    sync.Mutex
	names []string
	hits  map[string]int // unexpected packets, by case and place
	now   map[string]map[string]int
}

const markSign = "chaos-case-"

func newWitness(t *testing.T, node *lab.Node, pod *lab.Pod) *witness {
	t.Helper()
	w := &witness{hits: make(map[string]int), now: make(map[string]map[string]int)}
	open := func(where *lab.Namespace, link string, outgoing bool, place func(string) string) {
		var fd int
		names := make(map[int]string)
		if err := where.Do(func() (err error) {
			fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
				return err
			}
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100000}); err != nil {
				return err
			}
			if outgoing {
				if err := onlyOutgoing(fd); err != nil {
					return err
				}
			}
			links, err := netlink.LinkList()
			if err != nil {
				return err
			}
			index := 0
			for _, l := range links {
				names[l.Attrs().Index] = l.Attrs().Name
				if l.Attrs().Name == link {
					index = l.Attrs().Index
				}
			}
			const all = unix.ETH_P_ALL
			return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all>>8 | all&0xff<<8, Ifindex: index})
		}); err != nil {
			t.Fatal(err)
		}
		w.watch(t, fd, func(b []byte, from unix.Sockaddr) string {
			if isICMP(b) {
				return "answered"
			}
			return place(names[from.(*unix.SockaddrLinklayer).Ifindex])
		})
	}
	open(pod.Namespace, "eth0", false, func(string) string { return "delivered" })
	open(node.Namespace, "", true, func(link string) string {
		if link == "eth0" || link == "lo" {
			return link
		}
		return "bridge" // and the pod's host end
	})
	// The node itself.
	if err := node.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100000}); err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrInet6{Port: victimPort}); err != nil {
			return err
		}
		w.watch(t, fd, func([]byte, unix.Sockaddr) string { return "served" })
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	// A listener in the pod prevents port unreachable replies.
	l, err := pod.ListenPacket(t.Context(), "udp", fmt.Sprintf(":%d", victimPort))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return w
}

// isICMP reports whether a packet is ICMP, or a tunnel packet with ICMP inside.
func isICMP(b []byte) bool {
	p, ok := parseIP(b)
	if !ok {
		return false
	}
	switch {
	case p.protocol == unix.IPPROTO_ICMP || p.protocol == unix.IPPROTO_ICMPV6:
		return true
	case p.protocol == unix.IPPROTO_IPIP:
		return isICMP(p.payload)
	case p.protocol == unix.IPPROTO_UDP && len(p.payload) > 8+22 && binary.BigEndian.Uint16(p.payload[2:]) == 8472:
		return isICMP(p.payload[8+22:])
	}
	return false
}

// onlyOutgoing limits a packet socket to packets that the host sends.
func onlyOutgoing(fd int) error {
	raw, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.PACKET_OUTGOING, SkipTrue: 1},
		bpf.RetConstant{Val: 1 << 17},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return err
	}
	var filter []unix.SockFilter
	for _, r := range raw {
		filter = append(filter, unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K})
	}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
}

// watch notes the marks that arrive at a socket, until the test ends.
func (w *witness) watch(t *testing.T, fd int, place func([]byte, unix.Sockaddr) string) {
	receive(t, fd, 1<<16, func(b []byte, from unix.Sockaddr) {
		// A super-frame may contain many packets.
		for rest := b; ; {
			i := bytes.Index(rest, []byte(markSign))
			if i < 0 || len(rest) < i+len(markSign)+6 {
				break
			}
			w.note(string(rest[i:i+len(markSign)+6]), place(b, from))
			rest = rest[i+len(markSign):]
		}
	})
}

// receive passes on what arrives at a socket with a receive timeout, at most size bytes of
// each packet, until the test ends, and closes the socket then.
func receive(t *testing.T, fd, size int, each func(b []byte, from unix.Sockaddr)) {
	stop, done := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(stop); <-done; unix.Close(fd) })
	go func() {
		defer close(done)
		b := make([]byte, size)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if n, from, err := unix.Recvfrom(fd, b, 0); err == nil {
				each(b[:n], from)
			}
		}
	}()
}

func (w *witness) note(mark, place string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if now, ok := w.now[mark]; ok {
		now[place]++
		return
	}
	w.hits[mark+" "+place]++ // late
}

// expect returns a mark for the packets of a case.
func (w *witness) expect(name string) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.names = append(w.names, name)
	mark := fmt.Sprintf("%s%06d", markSign, len(w.names))
	w.now[mark] = make(map[string]int)
	return []byte(mark + strings.Repeat(".", 24))
}

func (w *witness) key(mark []byte) string { return string(mark[:len(markSign)+6]) }

// count returns what was seen of a case, by place.
func (w *witness) count(mark []byte) map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := make(map[string]int)
	for k, n := range w.now[w.key(mark)] {
		all[k] = n
	}
	return all
}

// forget records what was seen of a case in places where it must not arrive.
func (w *witness) forget(mark []byte, may map[string]bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	key := w.key(mark)
	number, _ := strconv.Atoi(key[len(markSign):])
	for place, n := range w.now[key] {
		if !may[place] {
			w.hits[w.names[number-1]+": "+place] += n
		}
	}
	if !may["delivered"] && !may["served"] && !may["answered"] {
		delete(w.now, key) // anything later counts as unexpected
	}
}
