package test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/subnet"
)

// forgery is the cluster of TestP1ForgedTunnelPackets. The attacker has a raw socket and tries to
// have a packet that it forged decapsulated and delivered to a victim.
//
//	n1: attacker, bystander     n2: victim     n3: the node that it pretends to be
//	 │   └ box (a container of another program, masqueraded)
//	 └──────────── bridge ───────┴──────────────┘
type forgery struct {
	*cluster
	t                   *testing.T
	is4                 bool
	format              string
	nodes               []netip.Addr   // the underlay addresses
	subnets             []netip.Prefix // of the nodes
	attacker, bystander *lab.Pod
	victim              *lab.Pod
	box                 *lab.Namespace
	victims             map[*lab.Pod]net.PacketConn
}

// Victims listen on victimPort; n2 translates (DNAT) remotePort to its own tunnel port;
// serviceAddr is a Service address on n1 that is translated to n2's tunnel port.
const (
	victimPort = 7777
	remotePort = 9999
)

var serviceAddr = map[bool]netip.Addr{true: netip.MustParseAddr("172.20.0.1"), false: netip.MustParseAddr("fd00:20::1")}

// TestP1ForgedTunnelPackets has a pod with a raw socket and a container of another program send
// packets that pretend to be a peer's. None may reach a victim.
func TestP1ForgedTunnelPackets(t *testing.T) {
	for _, c := range []struct {
		name, config string
		flags        []string
	}{
		{"vxlan/kernel", dualConfig, fastEnds[1].flags},
		{"vxlan/fast", dualConfig, fastEnds[0].flags},
		{"vxlan/userspace", dualConfig, fastEnds[2].flags},
		{"ipip/userspace", `{"Network":"10.5.0.0/16","Backend":{"Type":"ipip"}}`, fastEnds[2].flags},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := lab.Options{Nodes: 3, Prefixes: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/24"), netip.MustParsePrefix("fd00:18::/64")}}
			cl := newClusterOf(t, o)
			cl.setConfig(c.config)
			cl.startAll(c.flags...)
			forge(t, cl, strings.HasPrefix(c.name, "vxlan"))
		})
	}
}

func forge(t *testing.T, c *cluster, vxlan bool) {
	families := []bool{true, false}
	if !vxlan {
		families = families[:1]
	}
	pods := make([]*lab.Pod, 0, 3)
	for _, at := range []struct {
		node int
		name string
	}{{0, "attacker"}, {0, "bystander"}, {1, "victim"}} {
		p, err := c.Nodes[at.node].AddPod(t.Context(), at.name)
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, p)
	}
	box := addBox(t, c)
	leases := make([]*api.Lease, 0, 3)
	for _, n := range c.Nodes {
		s, err := c.status(n)
		if err != nil {
			t.Fatal(err)
		}
		leases = append(leases, s.Lease)
	}
	for i, is4 := range families {
		f := &forgery{
			cluster: c, t: t, is4: is4, format: "ipip",
			attacker: pods[0], bystander: pods[1], victim: pods[2], box: box, victims: map[*lab.Pod]net.PacketConn{},
		}
		if vxlan {
			f.format = "vxlan"
		}
		for k, n := range c.Nodes {
			f.nodes = append(f.nodes, n.Addrs[i])
			f.subnets = append(f.subnets, leases[k].Subnets[i])
		}
		for _, p := range pods[1:] {
			l, err := p.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(p.Addr(is4), victimPort).String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			f.victims[p] = l
		}
		if vxlan {
			f.translate(c.Nodes[0], serviceAddr[is4], 99, f.nodes[1])
			f.translate(c.Nodes[1], f.nodes[1], remotePort, f.nodes[1])
		}
		for _, filter := range []string{"0", "2"} {
			name := map[bool]string{true: "ipv4", false: "ipv6"}[is4] + "/rp_filter=" + filter
			if !is4 && filter != "0" {
				continue // rp_filter exists only for IPv4
			}
			t.Run(name, func(t *testing.T) {
				f.t = t
				for _, n := range c.Nodes {
					for _, dev := range []string{"all", "cni0", n.Link} {
						err := n.SetSysctl("net/ipv4/conf/"+dev+"/rp_filter", filter)
						if err != nil && !errors.Is(err, fs.ErrNotExist) {
							t.Fatal(err)
						}
					}
				}
				f.attacks()
			})
		}
	}
}

// attack is one kind of forged packet.
type attack struct {
	name   string
	from   *lab.Namespace
	source netip.Addr     // of the outer packet
	to     netip.AddrPort // of the outer packet
	inner  netip.Addr     // source of the inner packet
	victim *lab.Pod
	reason string // expected drop reason; empty if culvert does not see the packet
	at     int    // index of the node that counts it
	cut    bool   // send it in two fragments
	mac    bool   // send it with another source MAC
}

func (f *forgery) attacks() {
	tunnel := uint16(0)
	if f.format == "vxlan" {
		tunnel = 8472
	}
	other := func(subnet int) netip.Addr { // a pod's address that is not the attacker's
		a := f.subnets[subnet].Addr()
		for range 77 {
			a = a.Next()
		}
		return a
	}
	n1, n2, n3 := f.nodes[0], f.nodes[1], f.nodes[2]
	own, boxAddr := f.attacker.Addr(f.is4), boxAddr(f.is4)
	at := netip.AddrPortFrom
	pod := f.attacker.Namespace
	martian := "egress-forged"
	if f.is4 {
		martian = "" // the kernel drops it first, as a martian: the source is a local address
	}
	all := []attack{
		{name: "as n3 to n2", from: pod, source: n3, to: at(n2, tunnel), inner: other(2), victim: f.victim, reason: "egress-forged"},
		{name: "as n3 to n2 in fragments", from: pod, source: n3, to: at(n2, tunnel), inner: other(2), victim: f.victim, reason: "egress-forged", cut: true},
		{name: "as n3 to n2 with another MAC", from: pod, source: n3, to: at(n2, tunnel), inner: other(2), victim: f.victim, reason: "egress-forged", mac: true},
		{name: "as n1 to n2", from: pod, source: n1, to: at(n2, tunnel), inner: other(0), victim: f.victim, reason: martian},
		{name: "as itself to n2", from: pod, source: own, to: at(n2, tunnel), inner: other(0), victim: f.victim, reason: "egress-encapsulated"},
		{name: "as n3 to its own node", from: pod, source: n3, to: at(n1, tunnel), inner: other(2), victim: f.bystander, reason: "egress-forged"},
		{name: "as itself to its own node", from: pod, source: own, to: at(n1, tunnel), inner: other(2), victim: f.bystander, reason: "egress-encapsulated"},
		{name: "a container as n3 to n2", from: f.box, source: n3, to: at(n2, tunnel), inner: other(2), victim: f.victim, reason: "egress-forged"},
		{name: "a masqueraded container to n2", from: f.box, source: boxAddr, to: at(n2, tunnel), inner: other(0), victim: f.victim, reason: "egress-encapsulated"},
	}
	if f.format == "vxlan" {
		service, remote := at(serviceAddr[f.is4], 99), at(n2, remotePort)
		all = append(
			all,
			attack{name: "as n3 by a Service", from: pod, source: n3, to: service, inner: other(2), victim: f.victim, reason: "egress-forged"},
			attack{name: "as itself by a Service", from: pod, source: own, to: service, inner: other(0), victim: f.victim, reason: "egress-encapsulated"},
			attack{name: "as n3 by n2's translation", from: pod, source: n3, to: remote, inner: other(2), victim: f.victim, reason: "ingress-translated", at: 1},
			attack{name: "masqueraded by n2's translation", from: pod, source: own, to: remote, inner: other(0), victim: f.victim, reason: "ingress-translated", at: 1},
		)
	}
	for _, a := range all {
		before := f.count(a)
		f.strike(a)
		if a.reason == "" {
			continue
		}
		after := uint64(0)
		for end := time.Now().Add(3 * time.Second); after == before || after == 0; time.Sleep(10 * time.Millisecond) {
			if after = f.count(a); time.Now().After(end) {
				break
			}
		}
		if after <= before {
			s, _ := f.status(f.Nodes[a.at])
			f.t.Errorf("%s: not counted as %s on n%d: %v", a.name, a.reason, a.at+1, s.Datapath.Drops)
		}
	}
	// A legitimate packet sent after all attacks must be the first to arrive.
	for victim, l := range f.victims {
		c, err := f.attacker.Dial(f.t.Context(), "udp", netip.AddrPortFrom(victim.Addr(f.is4), victimPort).String())
		if err != nil {
			f.t.Fatal(err)
		}
		if _, err := c.Write([]byte("by right")); err != nil {
			f.t.Error(err)
		}
		c.Close()
		b := make([]byte, 200)
		for {
			if err := l.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
				f.t.Fatal(err)
			}
			n, from, err := l.ReadFrom(b)
			if err != nil {
				f.t.Fatalf("a legitimate packet does not arrive in %s: %v", victim.ID, err)
			}
			if string(b[:n]) == "by right" {
				break
			}
			f.t.Errorf("%s received the forged packet %q from %s", victim.ID, b[:n], from)
		}
	}
	for i, n := range f.Nodes[1:] { // nodes still reach other nodes' pods
		if _, err := n.Ping(f.t.Context(), f.subnets[i+1].Addr(), f.bystander.Addr(f.is4)); err != nil {
			f.t.Error(err)
		}
	}
}

func (f *forgery) count(a attack) uint64 {
	s, err := f.status(f.Nodes[a.at])
	if err != nil {
		f.t.Fatal(err)
	}
	return drops(s, a.reason)
}

// strike sends the attack's packet three times.
func (f *forgery) strike(a attack) {
	f.t.Helper()
	to := a.victim.Addr(f.is4)
	packet := ipPacket(a.inner, to, unix.IPPROTO_UDP, udpDatagram(a.inner, to, 5000, victimPort, []byte(a.name)))
	protocol := unix.IPPROTO_IPIP
	if f.format == "vxlan" {
		n := 0
		if a.victim.Node != f.Nodes[0] {
			n = 1
		}
		mac := subnet.DeriveMAC(f.Nodes[n].ID, 1, !f.is4)
		ethertype := []byte{0x08, 0x00}
		if !f.is4 {
			ethertype = []byte{0x86, 0xdd}
		}
		frame := append([]byte{8, 0, 0, 0, 0, 0, 1, 0}, mac[:]...)
		frame = append(append(frame, 2, 0, 0, 0, 0, 9), ethertype...)
		packet = udpDatagram(a.source, a.to.Addr(), 50000, a.to.Port(), append(frame, packet...))
		protocol = unix.IPPROTO_UDP
	}
	whole := [][]byte{ipPacket(a.source, a.to.Addr(), byte(protocol), packet)}
	if a.cut {
		whole = fragmentsOf(a.source, a.to.Addr(), byte(protocol), packet)
	}
	if err := a.from.Do(func() error {
		if a.mac {
			return sendFrames("eth0", [6]byte{2, 0, 0, 0, 0, 0x33}, a.to.Addr().Is4(), whole)
		}
		return sendRaw(a.to.Addr(), whole)
	}); err != nil {
		f.t.Fatalf("%s: %v", a.name, err)
	}
}

// sendRaw sends complete IP packets, three times each.
func sendRaw(to netip.Addr, packets [][]byte) error {
	family, name := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: to.As16()})
	if to.Is4() {
		family, name = unix.AF_INET, &unix.SockaddrInet4{Addr: to.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for range 3 {
		for _, p := range packets {
			if err := unix.Sendto(fd, p, 0, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// sendFrames sends IP packets to the gateway of a pod's link, three times each, in frames
// with the given source MAC, which need not be the pod's.
func sendFrames(link string, from [6]byte, is4 bool, packets [][]byte) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	family, ethertype := netlink.FAMILY_V4, []byte{0x08, 0x00}
	if !is4 {
		family, ethertype = netlink.FAMILY_V6, []byte{0x86, 0xdd}
	}
	// Send to the gateway, so that its MAC gets into the neighbour table.
	routes, err := netlink.RouteList(l, family)
	if err != nil {
		return err
	}
	var gateway netip.Addr
	for _, r := range routes {
		if a, ok := netip.AddrFromSlice(r.Gw); ok {
			gateway = a.Unmap()
		}
	}
	c, err := net.Dial("udp", netip.AddrPortFrom(gateway, 9).String())
	if err != nil {
		return err
	}
	defer c.Close()
	var to net.HardwareAddr
	for range 100 {
		if _, err := c.Write([]byte{0}); err == nil {
			time.Sleep(10 * time.Millisecond)
		}
		all, err := netlink.NeighList(l.Attrs().Index, family)
		if err != nil {
			return err
		}
		for _, n := range all {
			if a, ok := netip.AddrFromSlice(n.IP); ok && a.Unmap() == gateway && len(n.HardwareAddr) == 6 {
				to = n.HardwareAddr
			}
		}
		if to != nil {
			break
		}
	}
	if to == nil {
		return fmt.Errorf("no MAC address of the gateway %s in the neighbour table", gateway)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for range 3 {
		for _, p := range packets {
			frame := append(append(append([]byte{}, to...), from[:]...), ethertype...)
			if err := unix.Sendto(fd, append(frame, p...), 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index}); err != nil {
				return err
			}
		}
	}
	return nil
}

func ipPacket(from, to netip.Addr, protocol byte, payload []byte) []byte {
	if from.Is4() {
		b := make([]byte, 20, 20+len(payload))
		b[0], b[8], b[9] = 0x45, 64, protocol
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
		copy(b[12:], from.AsSlice())
		copy(b[16:], to.AsSlice())
		binary.BigEndian.PutUint16(b[10:], ^onesSum(b))
		return append(b, payload...)
	}
	b := make([]byte, 40, 40+len(payload))
	b[0], b[6], b[7] = 0x60, protocol, 64
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	copy(b[8:], from.AsSlice())
	copy(b[24:], to.AsSlice())
	return append(b, payload...)
}

// fragmentsOf returns the packet that ipPacket would return as two fragments.
func fragmentsOf(from, to netip.Addr, protocol byte, payload []byte) [][]byte {
	const at, id = 16, 4711
	if from.Is4() {
		parts := [][]byte{ipPacket(from, to, protocol, payload[:at]), ipPacket(from, to, protocol, payload[at:])}
		for i, b := range parts {
			binary.BigEndian.PutUint16(b[4:], id)
			binary.BigEndian.PutUint16(b[6:], []uint16{0x2000, at / 8}[i])
			b[10], b[11] = 0, 0
			binary.BigEndian.PutUint16(b[10:], ^onesSum(b[:20]))
		}
		return parts
	}
	head := func(offset, more uint16) []byte { // RFC 8200, section 4.5
		b := []byte{protocol, 0, 0, 0, 0, 0, 0, 0}
		binary.BigEndian.PutUint16(b[2:], offset<<3|more)
		binary.BigEndian.PutUint32(b[4:], id)
		return b
	}
	return [][]byte{
		ipPacket(from, to, unix.IPPROTO_FRAGMENT, append(head(0, 1), payload[:at]...)),
		ipPacket(from, to, unix.IPPROTO_FRAGMENT, append(head(at/8, 0), payload[at:]...)),
	}
}

func udpDatagram(from, to netip.Addr, source, destination uint16, payload []byte) []byte {
	b := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(b, source)
	binary.BigEndian.PutUint16(b[2:], destination)
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	b = append(b, payload...)
	pseudo := append(from.AsSlice(), to.AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(b)))
	pseudo = append(pseudo, 0, 0, 0, unix.IPPROTO_UDP)
	binary.BigEndian.PutUint16(b[6:], ^onesSum(append(pseudo, b...)))
	return b
}

func boxAddr(is4 bool) netip.Addr {
	if is4 {
		return netip.MustParseAddr("172.31.0.2")
	}
	return netip.MustParseAddr("fd00:31::2")
}

// addBox adds another program's container to n1: a namespace on a veth pair, with
// masqueraded traffic.
func addBox(t *testing.T, c *cluster) *lab.Namespace {
	t.Helper()
	box, err := c.AddNamespace("box")
	if err != nil {
		t.Fatal(err)
	}
	n := c.Nodes[0]
	gateways := []string{"172.31.0.1/24", "fd00:31::1/64"}
	var peer netlink.Link
	if err := n.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "box0"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "box1"}); err != nil {
			return err
		}
		if peer, err = netlink.LinkByName("box1"); err != nil {
			return err
		}
		return address("box0", gateways...)
	}); err != nil {
		t.Fatal(err)
	}
	var handle int
	if err := box.Do(func() (err error) {
		handle, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(handle)
	if err := n.Do(func() error { return netlink.LinkSetNsFd(peer, handle) }); err != nil {
		t.Fatal(err)
	}
	if err := box.Do(func() error {
		if err := address("box1", boxAddr(true).String()+"/24", boxAddr(false).String()+"/64"); err != nil {
			return err
		}
		l, err := netlink.LinkByName("box1")
		if err != nil {
			return err
		}
		for _, g := range gateways {
			p := netip.MustParsePrefix(g)
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: p.Addr().AsSlice()}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := n.Do(func() error {
		nft, err := nftables.New()
		if err != nil {
			return err
		}
		table := nft.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "box"})
		chain := nft.AddChain(&nftables.Chain{
			Name: "postrouting", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
		})
		for _, is4 := range []bool{true, false} {
			exprs := append(addressIs(is4, boxAddr(is4), true), &expr.Masq{})
			nft.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs})
		}
		return nft.Flush()
	}); err != nil {
		t.Fatal(err)
	}
	return box
}

// address adds addresses to a link, without duplicate address detection, and sets it up.
func address(link string, prefixes ...string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	for _, p := range prefixes {
		a, err := netlink.ParseAddr(p)
		if err != nil {
			return err
		}
		if a.IP.To4() == nil {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(l)
}

// addressIs returns expressions that match a packet's source or destination address.
func addressIs(is4 bool, a netip.Addr, source bool) []expr.Any {
	proto, offset, n := byte(unix.NFPROTO_IPV4), uint32(12), uint32(4)
	if !is4 {
		proto, offset, n = unix.NFPROTO_IPV6, 8, 16
	}
	if !source {
		offset += n
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a.AsSlice()},
	}
}

// translate makes a node translate (DNAT) UDP to an address and port to another node's
// tunnel port, as for a Service with that port as endpoint.
func (f *forgery) translate(n *lab.Node, at netip.Addr, port uint16, to netip.Addr) {
	f.t.Helper()
	if err := n.Do(func() error {
		nft, err := nftables.New()
		if err != nil {
			return err
		}
		table := nft.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "service"})
		chain := nft.AddChain(&nftables.Chain{
			Name: "prerouting", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest,
		})
		family := uint32(unix.NFPROTO_IPV4)
		if !f.is4 {
			family = unix.NFPROTO_IPV6
		}
		exprs := append(
			addressIs(f.is4, at, false),
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
			&expr.Immediate{Register: 1, Data: to.AsSlice()},
			&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(8472)},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: 1, RegProtoMin: 2},
		)
		nft.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs})
		return nft.Flush()
	}); err != nil {
		f.t.Fatal(err)
	}
}
