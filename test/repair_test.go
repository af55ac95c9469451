package test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/names"
)

// TestRepairs damages a kernel node's network state as other programs do, under traffic.
// The daemon repairs everything and counts it by kind, and the TCP connection
// survives.
//
//	pod ── n1 cvt.1 ── underlay ── cvt.1 n2 ── pod
//	        ▲ harm
func TestRepairs(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.datapath = "kernel"
	c.setConfig(config)
	c.startAll()
	n := c.Nodes[0]
	pods := c.pods()
	flow := startFlow(t, pods[0], pods[1])
	ping(t, pods[0], pods[1])

	device := func() netlink.Link {
		l, err := netlink.LinkByName("cvt.1")
		if err != nil {
			t.Error(err)
			return &netlink.GenericLink{}
		}
		return l
	}
	ours := func(harm func(netlink.Route) error) error {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: names.RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
		for _, r := range routes {
			if err == nil {
				err = harm(r)
			}
		}
		return err
	}
	neighbours := func(family int) error {
		all, err := netlink.NeighList(device().Attrs().Index, family)
		for _, e := range all {
			if err == nil && e.State&netlink.NUD_PERMANENT != 0 {
				err = netlink.NeighDel(&e)
			}
		}
		return err
	}
	for _, harm := range []struct {
		what string
		kind host.Kind
		do   func() error
	}{
		{"the routes are deleted, as by systemd-networkd", host.KindRoute, func() error { return ours(func(r netlink.Route) error { return netlink.RouteDel(&r) }) }},
		{"the neighbours are deleted", host.KindNeighbour, func() error { return neighbours(netlink.FAMILY_V4) }},
		{"the FDB entries are deleted", host.KindFDB, func() error { return neighbours(unix.AF_BRIDGE) }},
		{"the device is deleted", host.KindLink, func() error { return netlink.LinkDel(device()) }},
		{"the device is set down", host.KindLink, func() error { return netlink.LinkSetDown(device()) }},
		{"the device's MTU is changed", host.KindLink, func() error { return netlink.LinkSetMTU(device(), 1300) }},
		{"the addresses are deleted", host.KindAddress, func() error {
			addrs, err := netlink.AddrList(device(), netlink.FAMILY_ALL)
			for _, a := range addrs {
				if err == nil {
					err = netlink.AddrDel(device(), &a)
				}
			}
			return err
		}},
		{"nft flush ruleset", host.KindNFTables, func() error {
			c, err := nftables.New()
			if err != nil {
				return err
			}
			c.FlushRuleset()
			return c.Flush()
		}},
		{"forwarding is turned off", host.KindSysctl, func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0) }},
		{"the device is made a port of a bridge", host.KindLink, func() error {
			return ipCommands("link add br9 type bridge", "link set cvt.1 master br9", "link set br9 up")()
		}},
		{"another device has our name", host.KindLink, func() error {
			for { // the daemon may be faster, and replace the device in between
				l, err := netlink.LinkByName("cvt.1")
				if err == nil {
					err = netlink.LinkDel(l)
				}
				if err == nil {
					err = netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "cvt.1"}})
				}
				if gone := (netlink.LinkNotFoundError{}); !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) && !errors.As(err, &gone) {
					return err
				}
			}
		}},
	} {
		t.Run(harm.what, func(t *testing.T) {
			s, err := c.status(n)
			if err != nil {
				t.Fatal(err)
			}
			before := s.Datapath.Repairs[string(harm.kind)]
			if err := n.Do(harm.do); err != nil {
				t.Fatal(err)
			}
			c.wait(n, "repairs it", func(s api.Status) bool { return s.Datapath.Repairs[string(harm.kind)] > before })
			ping(t, pods[1], pods[0])
			c.goesOn(flow)
		})
	}
	turns, longest, err := flow.stop()
	t.Logf("the connection made %d round trips, the longest took %s", turns, longest)
	if err != nil {
		t.Errorf("the connection broke: %v", err)
	}
}

// TestRepairsInUserspace is TestRepairs for the userspace datapath. When its TUN device is
// deleted, the daemon opens another.
func TestRepairsInUserspace(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.setConfig(config)
	c.startAll()
	n := c.Nodes[0]
	pods := c.pods()
	flow := startFlow(t, pods[0], pods[1])
	for _, harm := range []struct {
		what string
		kind host.Kind
		do   func(netlink.Link) error
	}{
		{"the device is set down", host.KindLink, netlink.LinkSetDown},
		{"the device is deleted", host.KindLink, netlink.LinkDel},
		{"the addresses are deleted", host.KindAddress, func(l netlink.Link) error {
			addrs, err := netlink.AddrList(l, netlink.FAMILY_V4)
			for _, a := range addrs {
				if err == nil {
					err = netlink.AddrDel(l, &a)
				}
			}
			return err
		}},
		{"the device is deleted again", host.KindLink, netlink.LinkDel},
		{"nft flush ruleset", host.KindNFTables, func(netlink.Link) error {
			c, err := nftables.New()
			if err != nil {
				return err
			}
			c.FlushRuleset()
			return c.Flush()
		}},
	} {
		t.Run(harm.what, func(t *testing.T) {
			s, err := c.status(n)
			if err != nil {
				t.Fatal(err)
			}
			before := s.Datapath.Repairs[string(harm.kind)]
			if err := n.Do(func() error {
				l, err := netlink.LinkByName("culvert0")
				if err != nil {
					return err
				}
				return harm.do(l)
			}); err != nil {
				t.Fatal(err)
			}
			c.wait(n, "repairs it", func(s api.Status) bool { return s.Datapath.Repairs[string(harm.kind)] > before })
			ping(t, pods[1], pods[0])
			c.goesOn(flow)
		})
	}
	if _, longest, err := flow.stop(); err != nil {
		t.Errorf("the connection broke, after a longest round trip of %s: %v", longest, err)
	}
}

// TestForwardDrop sets the policy of a node's FORWARD chain to drop, as Docker does, while
// pods communicate: the daemon adds rules that accept the cluster network.
func TestForwardDrop(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"kernel", "userspace"} {
		t.Run(kind, func(t *testing.T) {
			c := newCluster(t, 2)
			c.datapath = kind
			c.setConfig(config)
			for _, n := range c.Nodes {
				c.start(n)
			}
			for _, n := range c.Nodes {
				c.waitReady(n, 1)
			}
			pods := c.pods()
			flow := startFlow(t, pods[0], pods[1])
			if err := c.Nodes[0].Do(func() error {
				nft, err := nftables.New()
				if err != nil {
					return err
				}
				drop := nftables.ChainPolicyDrop
				nft.AddChain(&nftables.Chain{
					Name: "FORWARD", Table: nft.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "filter"}), Type: nftables.ChainTypeFilter,
					Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop,
				})
				return nft.Flush()
			}); err != nil {
				t.Fatal(err)
			}
			c.wait(c.Nodes[0], "accepts the cluster network", func(s api.Status) bool { return s.Datapath.Repairs[string(host.KindForward)] == 2 })
			ping(t, pods[1], pods[0])
			c.goesOn(flow)
		})
	}
}

// goesOn waits until a connection has made five more round trips.
func (c *cluster) goesOn(f *flow) {
	c.t.Helper()
	turns := func() uint64 {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.turns
	}
	before := turns()
	eventually(c.t, "the connection makes progress", func() error {
		if turns() < before+5 {
			return fmt.Errorf("%d round trips", turns()-before)
		}
		return nil
	})
}

// TestOthersAreLeftAlone adds a device, a route and a table that resemble culvert's: neither
// the daemon nor `culvert cleanup` changes them.
func TestOthersAreLeftAlone(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.datapath = "kernel"
	c.setConfig(config)
	n := c.Nodes[0]
	other := netip.MustParsePrefix("10.5.222.0/24")
	if err := n.Do(func() error {
		if err := netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "cvt.x1"}, VxlanId: 77, Port: 8472}); err != nil {
			return err
		}
		under, err := netlink.LinkByName(n.Link)
		if err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: under.Attrs().Index, Dst: host.IPNet(other), Protocol: 66, Scope: netlink.SCOPE_LINK}); err != nil {
			return err
		}
		nft, err := nftables.New()
		if err != nil {
			return err
		}
		nft.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "culvert"})
		return nft.Flush()
	}); err != nil {
		t.Fatal(err)
	}
	p := c.start(n, "--fast-path", "off")
	c.waitReady(n, 0)
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	state := func() (all []string) {
		if err := n.Do(func() (err error) { all, err = kernelState(); return err }); err != nil {
			t.Fatal(err)
		}
		return all
	}
	if got := fmt.Sprint(state()); got != "[unreachable 10.5.0.0/16 index 0 link cvt.x1 link cvt.1]" {
		t.Errorf("after SIGTERM the kernel has %s: what forwards must stay", got)
	}
	c.cleanup(n)
	if got := fmt.Sprint(state()); got != "[link cvt.x1]" {
		t.Errorf("after culvert cleanup the kernel has %s", got)
	}
	if err := n.Do(func() error {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: 66}, netlink.RT_FILTER_PROTOCOL)
		if err == nil && len(routes) != 1 {
			err = fmt.Errorf("another program's route was deleted: %v", routes)
		}
		if err != nil {
			return err
		}
		nft, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := nft.ListTables()
		if err == nil && (len(tables) != 1 || tables[0].Family != nftables.TableFamilyIPv4) {
			err = fmt.Errorf("another program's table was deleted, or ours was not: %v", tables)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}
