package host_test

import (
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
	"culvert/internal/names"
)

func source(outer, inner string) firewall.Source {
	return firewall.Source{Outer: netip.MustParseAddr(outer), Inner: netip.MustParsePrefix(inner)}
}

// tunnels has one tunnel of each kind, on a node 192.0.2.1 and 2001:db8:1::1.
func tunnels() map[string]firewall.TunnelRule {
	net4, net6 := netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("fd00:5::/48")
	sub4, sub6 := netip.MustParsePrefix("10.5.7.0/24"), netip.MustParsePrefix("fd00:5:0:7::/64")
	peers4 := []firewall.Source{
		source("192.0.2.2", "10.5.2.0/24"), source("192.0.2.2", "10.5.32.0/20"), source("192.0.2.2", "10.5.9.9/32"),
		source("192.0.2.3", "10.5.3.0/24"),
	}
	peers6 := []firewall.Source{
		source("2001:db8:1::2", "fd00:5:0:2::/64"), source("2001:db8:1::2", "fd00:5:0:80::/57"), source("2001:db8:1::2", "fd00:5:0:9::9/128"),
		source("2001:db8:1::3", "fd00:5:0:3::/64"),
	}
	return map[string]firewall.TunnelRule{
		"vxlan4": {Port: 8472, VNI: 1, Network: net4, Device: "cvt.1", Subnet: sub4, Peers: peers4},
		"vxlan6": {Port: 8472, VNI: 1, Network: net6, Device: "cvt6.1", Subnet: sub6, Peers: peers6},
		"ipip":   {Network: net4, Device: "cvt.ipip", Subnet: sub4, Peers: peers4},
	}
}

func rules(t firewall.TunnelRule) host.State {
	return host.State{Firewall: firewall.Policy{Tunnels: []firewall.TunnelRule{t}}}
}

// packet is the payload of the outer IP header: VXLAN and Ethernet headers, or
// none for IPIP, and an inner IP header.
func packet(t firewall.TunnelRule, inner string) []byte {
	from, to := netip.MustParseAddr(inner), t.Subnet.Addr().Next()
	ip := make([]byte, 20)
	ethertype := []byte{0x08, 0x00}
	if from.Is4() {
		ip[0] = 0x45
		copy(ip[12:], from.AsSlice())
		copy(ip[16:], to.AsSlice())
	} else {
		ethertype = []byte{0x86, 0xdd}
		ip = append([]byte{0x60}, make([]byte, 39)...)
		copy(ip[8:], from.AsSlice())
		copy(ip[24:], to.AsSlice())
	}
	if t.Port == 0 {
		return ip
	}
	return slices.Concat([]byte{8, 0, 0, 0, 0, 0, 1, 0}, make([]byte, 12), ethertype, ip)
}

// TestOnlyValidSourcePairsArrive sends encapsulated packets to a node whose peers lease
// subnets of several sizes: those with a matching pair of sources arrive, the
// others are counted.
func TestOnlyValidSourcePairsArrive(t *testing.T) {
	l := labtest.New(t, lab.Options{Nodes: 2, Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8:1::/64")}})
	for name, tunnel := range tunnels() {
		t.Run(name, func(t *testing.T) {
			at, network := "192.0.2.1:8472", "udp4"
			right := []string{"10.5.2.1", "10.5.2.255", "10.5.32.0", "10.5.47.255", "10.5.9.9"}
			wrong := []string{"10.5.1.255", "10.5.3.1", "10.5.31.255", "10.5.48.0", "10.5.9.8", "10.5.9.10", "192.0.2.2"}
			switch name {
			case "ipip":
				at, network = "192.0.2.1", "ip4:4"
			case "vxlan6":
				at, network = "[2001:db8:1::1]:8472", "udp6"
				right = []string{"fd00:5:0:2::1", "fd00:5:0:2:ffff:ffff:ffff:ffff", "fd00:5:0:80::", "fd00:5:0:ff::1", "fd00:5:0:9::9"}
				wrong = []string{"fd00:5:0:1::1", "fd00:5:0:3::1", "fd00:5:0:7f::1", "fd00:5:0:100::1", "fd00:5:0:9::8", "fd00:5:0:9::a", "2001:db8:1::2"}
			}
			apply(t, l.Nodes[0], rules(tunnel))
			var in net.PacketConn
			var out net.Conn
			inside(t, l.Nodes[0], func() (err error) { in, err = net.ListenPacket(network, at); return err })
			defer func() { _ = in.Close() }()
			inside(t, l.Nodes[1], func() (err error) { out, err = net.Dial(network, at); return err })
			defer func() { _ = out.Close() }()

			// A valid packet follows each invalid one; they arrive in order.
			buf := make([]byte, 2048)
			arrives := func(inner string) {
				t.Helper()
				p := packet(tunnel, inner)
				if _, err := out.Write(p); err != nil {
					t.Fatal(err)
				}
				if err := in.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
					t.Fatal(err)
				}
				n, _, err := in.ReadFrom(buf)
				if err != nil || string(buf[:n]) != string(p) {
					t.Fatalf("of the packet from %s arrived %x (%v)", inner, buf[:n], err)
				}
			}
			for _, inner := range right {
				arrives(inner)
			}
			for i, inner := range wrong {
				if _, err := out.Write(packet(tunnel, inner)); err != nil {
					t.Fatal(err)
				}
				arrives(right[0])
				inside(t, l.Nodes[0], func() error {
					if got := firewall.Drops(rules(tunnel).Firewall); got["ingress-source"] != uint64(i+1) {
						t.Errorf("after one from %s there are the drops %v", inner, got)
					}
					return nil
				})
			}

			tunnel.Peers = nil
			apply(t, l.Nodes[0], rules(tunnel))
			if _, err := out.Write(packet(tunnel, right[0])); err != nil {
				t.Fatal(err)
			}
			if err := in.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if n, _, err := in.ReadFrom(buf); err == nil {
				t.Errorf("without peers arrived %x", buf[:n])
			}
			apply(t, l.Nodes[0], host.State{})
		})
	}
}

// TestSetsFollow changes the peers: only elements change while the subnet sizes
// stay the same; otherwise there is one set per size.
func TestSetsFollow(t *testing.T) {
	n := node(t)
	tunnel := tunnels()["vxlan4"]
	for _, c := range []struct {
		peers []firewall.Source
		alone bool // only elements change
		sets  string
	}{
		{nil, false, ""},
		{[]firewall.Source{source("192.0.2.2", "10.5.2.0/24")}, false, "peers4_24"},
		{[]firewall.Source{source("192.0.2.2", "10.5.2.0/24"), source("192.0.2.3", "10.5.3.0/24")}, true, "peers4_24"},
		{[]firewall.Source{source("192.0.2.2", "10.5.16.0/20"), source("192.0.2.3", "10.5.3.0/24")}, false, "peers4_20 peers4_24"},
		{[]firewall.Source{source("192.0.2.2", "10.5.3.0/24"), source("192.0.2.3", "10.5.16.0/20")}, true, "peers4_20 peers4_24"},
		{[]firewall.Source{source("192.0.2.2", "10.5.16.0/20")}, false, "peers4_20"},
	} {
		tunnel.Peers = c.peers
		changes := apply(t, n, rules(tunnel))
		alone := !slices.ContainsFunc(changes, func(s string) bool { return !strings.Contains(s, " element ") })
		if alone != c.alone {
			t.Errorf("%v: changed %q", c.peers, changes)
		}
		settled(t, n, tunnel, c.sets)
	}
}

// settled checks that nothing is left to change, and which sets there are.
func settled(t *testing.T, n *lab.Node, tunnel firewall.TunnelRule, want string) {
	t.Helper()
	if again := apply(t, n, rules(tunnel)); len(again) > 0 {
		t.Errorf("a second time changed %q", again)
	}
	inside(t, n, func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		sets, err := c.GetSets(&nftables.Table{Family: nftables.TableFamilyINet, Name: names.Table})
		if err != nil {
			return err
		}
		var got []string
		for _, s := range sets {
			got = append(got, s.Name)
			if s.Interval {
				t.Errorf("%s is a set of ranges", s.Name)
			}
		}
		slices.Sort(got)
		if got := strings.Join(got, " "); got != want {
			t.Errorf("the sets are %q, want %q", got, want)
		}
		return nil
	})
}

// TestCounted sends packets to subnets of several sizes in both address families: each
// is counted for the subnet that it goes to, by rules that nft can print.
func TestCounted(t *testing.T) {
	l := labtest.New(t, lab.Options{Nodes: 2, Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8:1::/64")}})
	n, other := l.Nodes[0], l.Nodes[1]
	to := []netip.Prefix{netip.MustParsePrefix("10.5.2.0/24"), netip.MustParsePrefix("10.5.32.0/20"), netip.MustParsePrefix("fd00:5:0:2::/64")}
	state := host.State{Firewall: firewall.Policy{
		Forward: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("fd00:5::/48")},
		Count:   firewall.Counted{Sent: to, Direct: to, Underlay: n.Link},
	}}
	for _, p := range to {
		state.Routes = append(state.Routes, host.Route{To: p, Via: other.Addrs[map[bool]int{true: 0, false: 1}[p.Addr().Is4()]], Link: n.Link})
	}
	apply(t, n, state)
	if again := apply(t, n, state); len(again) > 0 {
		t.Errorf("a second time changed %q", again)
	}
	send := func(n *lab.Node, from, to string, count int) {
		t.Helper()
		inside(t, n, func() error {
			c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0)))
			if err != nil {
				return err
			}
			for range count {
				if _, err := c.WriteToUDPAddrPort(make([]byte, 72), netip.AddrPortFrom(netip.MustParseAddr(to), 9)); err != nil {
					return err
				}
			}
			return c.Close()
		})
	}
	for _, a := range []string{"10.5.47.9/32", "fd00:5:0:2::9/128"} {
		if out, err := other.Run(t.Context(), "ip", "address", "add", a, "dev", "lo", "nodad"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	inside(t, n, func() error { // or this node would send ICMP errors
		c, err := net.ListenUDP("udp", &net.UDPAddr{Port: 9})
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
		}
		return err
	})
	send(n, "0.0.0.0", "10.5.2.200", 1)
	send(n, "0.0.0.0", "10.5.47.200", 2)
	send(n, "::", "fd00:5:0:2::1", 3)
	send(other, "10.5.47.9", n.Addrs[0].String(), 4)
	send(other, "fd00:5:0:2::9", n.Addrs[1].String(), 5)
	count := func(packets, header uint64) firewall.Count {
		return firewall.Count{Packets: packets, Bytes: packets * (header + 8 + 72)}
	}
	want := firewall.Counters{
		Received: map[firewall.Source]firewall.Count{}, Dropped: map[netip.Addr]uint64{},
		Sent:   map[netip.Prefix]firewall.Count{to[0]: count(1, 20), to[1]: count(2, 20), to[2]: count(3, 40)},
		Direct: map[netip.Prefix]firewall.Count{to[0]: {}, to[1]: count(4, 20), to[2]: count(5, 40)},
	}
	inside(t, n, func() error {
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) { // neighbours are looked for first
			got, err := firewall.Counts(state.Firewall)
			if err != nil || reflect.DeepEqual(got, want) {
				return err
			}
			if time.Now().After(end) {
				return fmt.Errorf("%+v, want %+v", got, want)
			}
		}
	})
}

// TestOtherSets starts with an older version's table with an interval set, then
// an interval set with the name of one of ours, then an unknown element.
func TestOtherSets(t *testing.T) {
	tunnel := tunnels()["vxlan4"]
	tunnel.Peers = tunnel.Peers[:1]
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: names.Table}
	for _, c := range []struct{ name, set, first string }{
		{"older version", "peers4", "nft add set "},
		{"same name", "peers4_24", "nft delete table "},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := node(t)
			inside(t, n, func() error {
				conn, err := nftables.New()
				if err != nil {
					return err
				}
				conn.AddTable(table)
				kind := nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInteger)
				s := &nftables.Set{Table: table, Name: c.set, KeyType: kind, Concatenation: true, Interval: true}
				key := []byte{192, 0, 2, 2, 10, 5, 2, 0}
				if err := conn.AddSet(s, []nftables.SetElement{{Key: key, KeyEnd: []byte{192, 0, 2, 2, 10, 5, 2, 255}}}); err != nil {
					return err
				}
				chain := conn.AddChain(&nftables.Chain{
					Name: "input", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
				})
				conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
					&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 8},
					&expr.Lookup{SourceRegister: 1, SetName: c.set},
				}})
				return conn.Flush()
			})
			if changes := apply(t, n, rules(tunnel)); len(changes) == 0 || !strings.HasPrefix(changes[0], c.first) {
				t.Errorf("changed %q", changes)
			}
			settled(t, n, tunnel, "peers4_24")
		})
	}

	n := node(t)
	apply(t, n, rules(tunnel))
	inside(t, n, func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		if err := conn.SetAddElements(&nftables.Set{Table: table, Name: "peers4_24"}, []nftables.SetElement{{Key: []byte{192, 0, 2, 66, 10, 5, 2, 1}}}); err != nil {
			return err
		}
		return conn.Flush()
	})
	want := []string{"nft flush set inet culvert peers4_24", "nft add element inet culvert peers4_24 { 192.0.2.2 . 0x0a050200 }"}
	if changes := apply(t, n, rules(tunnel)); !slices.Equal(changes, want) {
		t.Errorf("changed %q, want %q", changes, want)
	}
	settled(t, n, tunnel, "peers4_24")
}
