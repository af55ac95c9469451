package host_test

import (
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
	"culvert/internal/names"
)

func TestMain(m *testing.M) { labtest.Main(m) }

func node(t *testing.T, prefixes ...netip.Prefix) *lab.Node {
	t.Helper()
	return labtest.New(t, lab.Options{Nodes: 1, Prefixes: prefixes}).Nodes[0]
}

// wanted is the state of a node in a dual-stack cluster. The device is one end
// of a veth pair, because only addresses, routes and the table matter.
func wanted() host.State {
	net4, net6 := netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("fd00:5::/48")
	sub4, sub6 := netip.MustParsePrefix("10.5.7.0/24"), netip.MustParsePrefix("fd00:5:0:7::/64")
	return host.State{
		Links: []host.Link{{Name: "culvert0", MTU: 1450, Addrs: []netip.Prefix{netip.PrefixFrom(sub4.Addr(), 32), netip.PrefixFrom(sub6.Addr(), 128)}}},
		Routes: []host.Route{
			{To: net4, Link: "culvert0", Source: sub4.Addr()},
			{To: net4, Metric: host.UnreachableMetric},
			{To: net6, Link: "culvert0", Source: sub6.Addr(), Metric: 1024},
			{To: net6, Metric: host.UnreachableMetric},
		},
		Firewall: firewall.Policy{Masquerade: []firewall.Masquerade{{Network: net4, Subnet: sub4}, {Network: net6, Subnet: sub6}}},
	}
}

func addDevice(t *testing.T, n *lab.Node) {
	t.Helper()
	inside(t, n, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "culvert0"}, PeerName: "other"})
	})
	inside(t, n, func() error {
		other, err := netlink.LinkByName("other")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(other)
	})
}

func linkIndex(t *testing.T, n *lab.Node, name string) (index int) {
	t.Helper()
	inside(t, n, func() error {
		l, err := netlink.LinkByName(name)
		if err == nil {
			index = l.Attrs().Index
		}
		return err
	})
	return index
}

func inside(t *testing.T, n *lab.Node, fn func() error) {
	t.Helper()
	if err := n.Do(fn); err != nil {
		t.Fatal(err)
	}
}

func apply(t *testing.T, n *lab.Node, s host.State) []string {
	t.Helper()
	var changes []string
	inside(t, n, func() error {
		done, err := host.Apply(s)
		changes = host.Commands(done)
		return err
	})
	return changes
}

// TestApplyAsCommands compares the changes with a golden list of
// commands. A second Apply must change nothing.
func TestApplyAsCommands(t *testing.T) {
	n := node(t)
	addDevice(t, n)
	golden, err := os.ReadFile("testdata/apply.golden")
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Join(apply(t, n, wanted()), "\n") + "\n"
	if got != string(golden) {
		t.Errorf("the changes are\n%s\nwant\n%s", got, golden)
	}
	if again := apply(t, n, wanted()); len(again) != 0 {
		t.Errorf("the second time changed %q", again)
	}
}

// TestApplyRepairs changes one thing at a time and expects exactly that to be
// repaired.
func TestApplyRepairs(t *testing.T) {
	n := node(t)
	addDevice(t, n)
	apply(t, n, wanted())
	link := func() netlink.Link {
		l, err := netlink.LinkByName("culvert0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	prefix := netip.MustParsePrefix("10.5.0.0/16")
	harm := []struct {
		name string
		do   func() error
		mend []string
	}{
		{
			"route deleted",
			func() error {
				return netlink.RouteDel(&netlink.Route{Dst: host.IPNet(prefix), LinkIndex: link().Attrs().Index, Scope: netlink.SCOPE_LINK})
			},
			[]string{"ip route prepend 10.5.0.0/16 dev culvert0 proto 67 src 10.5.7.0"},
		},
		{
			"route of ours that is not wanted",
			func() error {
				return netlink.RouteAdd(&netlink.Route{Dst: host.IPNet(netip.MustParsePrefix("10.9.0.0/16")), LinkIndex: link().Attrs().Index, Scope: netlink.SCOPE_LINK, Protocol: names.RouteProtocol})
			},
			[]string{"ip route del 10.9.0.0/16 dev culvert0 proto 67"},
		},
		{
			"address added",
			func() error {
				return netlink.AddrAdd(link(), &netlink.Addr{IPNet: host.IPNet(netip.MustParsePrefix("10.5.8.0/32"))})
			},
			[]string{"ip address del 10.5.8.0/32 dev culvert0"},
		},
		{
			"MTU changed",
			func() error { return netlink.LinkSetMTU(link(), 1400) },
			[]string{"ip link set culvert0 mtu 1450"},
		},
	}
	for _, h := range harm {
		t.Run(h.name, func(t *testing.T) {
			inside(t, n, h.do)
			if got := apply(t, n, wanted()); !slices.Equal(got, h.mend) {
				t.Errorf("mended by %q, want %q", got, h.mend)
			}
		})
	}
}

// TestCleanupRemovesOnlyOurs applies the empty state and expects another
// program's route to remain.
func TestCleanupRemovesOnlyOurs(t *testing.T) {
	n := node(t)
	addDevice(t, n)
	apply(t, n, wanted())
	other := netip.MustParsePrefix("10.77.0.0/16")
	inside(t, n, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{Dst: host.IPNet(other), LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK})
	})
	if changes := apply(t, n, host.State{}); len(changes) != 4 {
		t.Errorf("changed %q", changes)
	}
	if changes := apply(t, n, host.State{}); len(changes) != 0 {
		t.Errorf("the second time changed %q", changes)
	}
	inside(t, n, func() error {
		routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		found := false
		for _, r := range routes {
			if r.Protocol == names.RouteProtocol {
				t.Errorf("left over: %s", r)
			}
			found = found || r.Dst != nil && r.Dst.String() == other.String()
		}
		if !found {
			t.Error("somebody else's route is gone")
		}
		return nil
	})
}

// TestNftShowsTheTable compares the table with nft's output.
func TestNftShowsTheTable(t *testing.T) {
	nft, err := exec.LookPath("nft")
	if err != nil {
		if os.Getenv("CULVERT_FULL") != "" {
			t.Fatal(err)
		}
		t.Skip("needs nft: make test-system installs it, and runs this test")
	}
	n := node(t)
	addDevice(t, n)
	apply(t, n, wanted())
	inside(t, n, func() error {
		out, err := exec.Command(nft, "list", "table", "inet", names.Table).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, line := range []string{
			"type nat hook postrouting priority srcnat; policy accept;",
			"ip saddr 10.5.0.0/16 ip daddr 10.5.0.0/16 return",
			"ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random",
			"ip6 saddr fd00:5::/48 ip6 daddr != ff00::/8 masquerade fully-random",
		} {
			if !strings.Contains(string(out), line) {
				t.Errorf("the table lacks %q:\n%s", line, out)
			}
		}
		return nil
	})
}

func TestFindUnderlay(t *testing.T) {
	n := node(t, netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8:1::/64"))
	cases := []struct {
		name     string
		selector host.UnderlaySelector
		want     string // interface and addresses, or part of the error
	}{
		{"default route", host.UnderlaySelector{}, "eth0 [192.0.2.1 2001:db8:1::1]"},
		{"name", host.UnderlaySelector{Interfaces: []string{"eth7", "eth0"}}, "eth0 [192.0.2.1 2001:db8:1::1]"},
		{"address", host.UnderlaySelector{Interfaces: []string{"2001:db8:1::1"}}, "eth0 [192.0.2.1 2001:db8:1::1]"},
		{"regexp", host.UnderlaySelector{Regexes: []string{"^eth"}}, "eth0 [192.0.2.1 2001:db8:1::1]"},
		{"regexp on the address", host.UnderlaySelector{Regexes: []string{`^192\.0\.2\.`}}, "eth0 [192.0.2.1 2001:db8:1::1]"},
		{"can reach", host.UnderlaySelector{CanReach: netip.MustParseAddr("192.0.2.200")}, "eth0 [192.0.2.1 2001:db8:1::1]"},
		{"no such interface", host.UnderlaySelector{Interfaces: []string{"eth7"}}, "interfaces here: eth0 192.0.2.1/24 2001:db8:1::1/64"},
		{"bad regexp", host.UnderlaySelector{Regexes: []string{"("}}, "missing closing )"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			var got string
			inside(t, n, func() error {
				u, err := host.FindUnderlay(c.selector, host.UnderlayContext{})
				if err != nil {
					got = err.Error()
					return nil
				}
				words := make([]string, len(u.Addrs))
				for i, a := range u.Addrs {
					words[i] = a.String()
				}
				got = u.Name + " [" + strings.Join(words, " ") + "]"
				return nil
			})
			if !strings.Contains(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}
