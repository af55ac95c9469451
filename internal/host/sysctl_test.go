package host_test

import (
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/lab"
)

// settingsNode is a node whose settings the test changes, with a Keeper and the state of
// a dual-stack datapath.
type settingsNode struct {
	*lab.Node
	k    *host.Keeper
	want host.State
}

func newSettingsNode(t *testing.T) settingsNode {
	t.Helper()
	n := node(t)
	return settingsNode{Node: n, k: host.NewKeeper(linkIndex(t, n, n.Link), slog.New(slog.DiscardHandler)), want: host.State{
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.5.1.0/24"), netip.MustParsePrefix("fd00:5:0:1::/64")},
		Links: []host.Link{{
			Name: "cvt.1", MTU: 1450, Addrs: []netip.Prefix{netip.MustParsePrefix("10.5.1.0/32"), netip.MustParsePrefix("fd00:5:0:1::/128")},
			VXLAN: &host.VXLAN{MAC: host.MAC{2, 0, 0, 0, 0, 1}, VNI: 1, Local: n.Addrs[0], Device: n.Link, Port: 8472},
		}},
		Routes: []host.Route{
			{To: netip.MustParsePrefix("10.5.0.0/16"), Link: "cvt.1"}, {To: netip.MustParsePrefix("fd00:5::/48"), Link: "cvt.1"},
		},
		Firewall: firewall.Policy{Forward: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("fd00:5::/48")}},
	}}
}

func (w settingsNode) apply(t *testing.T) {
	t.Helper()
	inside(t, w.Node, func() error { return w.k.Apply(func(host.View) (host.State, error) { return w.want, nil }) })
}

func (w settingsNode) expect(t *testing.T, settings map[string]string) {
	t.Helper()
	for key, want := range settings {
		got, err := w.Sysctl(key)
		if err != nil || got != want {
			t.Errorf("%s is %q (%v), want %q", key, got, err, want)
		}
	}
}

func (w settingsNode) set(t *testing.T, key, value string) {
	t.Helper()
	if err := w.SetSysctl(key, value); err != nil {
		t.Fatal(err)
	}
}

// TestF3F7SettingsOfOurDevices changes settings that block packets, before and
// after the device is created.
func TestF3F7SettingsOfOurDevices(t *testing.T) {
	w := newSettingsNode(t)
	inside(t, w.Node, func() error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br7"}}
		if err := netlink.LinkAdd(bridge); err != nil {
			return err
		}
		return netlink.AddrAdd(bridge, &netlink.Addr{IPNet: host.IPNet(netip.MustParsePrefix("10.5.1.1/24"))})
	})
	w.set(t, "net/ipv4/ip_forward", "1")
	w.set(t, "net/ipv4/conf/default/forwarding", "0")
	w.set(t, "net/ipv6/conf/default/disable_ipv6", "1")
	w.set(t, "net/ipv4/conf/all/rp_filter", "1")
	harm := map[string]string{
		"net/ipv4/conf/cvt.1/forwarding":   "0",
		"net/ipv4/conf/br7/forwarding":     "0",
		"net/ipv6/conf/cvt.1/disable_ipv6": "1",
		"net/ipv4/conf/cvt.1/rp_filter":    "1",
	}
	harm["net/ipv4/conf/"+w.Link+"/forwarding"] = "0"
	right := map[string]string{"net/ipv4/ip_forward": "1", "net/ipv4/conf/default/forwarding": "0"}
	for key := range harm {
		right[key] = map[string]string{"forwarding": "1", "disable_ipv6": "0", "rp_filter": "2"}[key[strings.LastIndex(key, "/")+1:]]
	}
	w.apply(t)
	w.expect(t, right)
	for key, value := range harm {
		w.set(t, key, value)
		w.apply(t)
		w.expect(t, right)
	}
	if got := w.k.Status().Repairs[host.KindSysctl]; got != uint64(len(harm)) {
		t.Errorf("%d settings counted as repaired, want %d", got, len(harm))
	}
	w.set(t, "net/ipv4/ip_forward", "0")
	w.apply(t)
	right["net/ipv4/conf/default/forwarding"] = "1" // set by the kernel
	w.expect(t, right)
	if got := w.k.Status().Repairs[host.KindSysctl]; got != uint64(len(harm)+1) {
		t.Errorf("one switch, and %d repairs", got-uint64(len(harm)))
	}
	inside(t, w.Node, func() error {
		l, err := netlink.LinkByName("cvt.1")
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_V6)
		if len(addrs) == 0 {
			t.Error("the IPv6 address is not there")
		}
		return err
	})
}

// TestF4RouterAdvertisements enables forwarding on a host whose default route
// is from a router advertisement: the route stays, because accept_ra is set to
// 2 first.
func TestF4RouterAdvertisements(t *testing.T) {
	for _, lives := range []bool{true, false} {
		w := newSettingsNode(t)
		w.set(t, "net/ipv6/conf/"+w.Link+"/accept_ra", "1")
		add := func() error {
			l, err := netlink.LinkByName(w.Link)
			if err != nil {
				return err
			}
			return netlink.RouteAdd(&netlink.Route{
				Dst: &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}, Gw: net.ParseIP("fe80::1"), LinkIndex: l.Attrs().Index, Protocol: unix.RTPROT_RA, Priority: 1024,
			})
		}
		if !lives {
			// A host that forwards already ignores advertisements, perhaps
			// intentionally.
			w.set(t, "net/ipv6/conf/all/forwarding", "1")
		} else {
			inside(t, w.Node, add)
		}
		w.apply(t)
		want := "2"
		if !lives {
			want = "1"
		}
		w.expect(t, map[string]string{"net/ipv6/conf/" + w.Link + "/accept_ra": want, "net/ipv6/conf/all/forwarding": "1"})
		if !lives {
			inside(t, w.Node, add)
			w.apply(t)
			w.expect(t, map[string]string{"net/ipv6/conf/" + w.Link + "/accept_ra": "2"})
		}
		w.set(t, "net/ipv6/conf/"+w.Link+"/accept_ra", "0") // by a program that handles them itself
		w.apply(t)
		w.expect(t, map[string]string{"net/ipv6/conf/" + w.Link + "/accept_ra": "0"})
	}
}

// TestF6ForeignRoutes adds other programs' routes within the cluster network:
// those that divert packets are reported, and removed if a lease shows that
// they are stale.
func TestF6ForeignRoutes(t *testing.T) {
	w := newSettingsNode(t)
	w.want.Routes = append(w.want.Routes, host.Route{To: netip.MustParsePrefix("10.5.2.0/24"), Via: netip.MustParseAddr("10.5.2.0"), Link: "cvt.1", OnLink: true})
	w.apply(t)
	peer, gateway := w.Addrs[0].Next(), ""
	inside(t, w.Node, func() error {
		l, err := netlink.LinkByName(w.Link)
		if err != nil {
			return err
		}
		pod := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pod"}, PeerName: "dop"}
		if err := netlink.LinkAdd(pod); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(pod); err != nil {
			return err
		}
		gateway = " via " + peer.String() + " dev " + w.Link
		for _, r := range []netlink.Route{
			{Dst: ipnet("10.5.1.0/24"), Gw: peer.AsSlice(), LinkIndex: l.Attrs().Index},                            // own subnet
			{Dst: ipnet("10.5.1.128/25"), Type: unix.RTN_BLACKHOLE},                                                // part of it
			{Dst: ipnet("10.5.1.9/32"), LinkIndex: pod.Attrs().Index, Scope: netlink.SCOPE_LINK},                   // a pod of the ptp plugin
			{Dst: ipnet("10.5.2.0/24"), Gw: peer.AsSlice(), LinkIndex: l.Attrs().Index, Priority: 50},              // less preferred than ours
			{Dst: ipnet("10.5.2.64/26"), Gw: peer.AsSlice(), LinkIndex: l.Attrs().Index, Priority: 50},             // more specific than ours
			{Dst: ipnet("10.5.3.0/24"), Gw: peer.AsSlice(), LinkIndex: l.Attrs().Index},                            // more specific than ours
			{Dst: ipnet("10.5.9.5/32"), Gw: peer.AsSlice(), LinkIndex: l.Attrs().Index},                            // a server at an address that is not leased
			{Dst: ipnet("10.6.0.0/16"), Gw: peer.AsSlice(), LinkIndex: l.Attrs().Index},                            // elsewhere
			{Dst: ipnet("10.0.0.0/8"), Gw: peer.AsSlice(), LinkIndex: l.Attrs().Index},                             // less specific
			{Dst: ipnet("fd00:5:0:1::/64"), Gw: net.ParseIP("fe80::7"), LinkIndex: l.Attrs().Index, Priority: 100}, // own
			{Dst: ipnet("fd00:5:0:9::/64"), Gw: net.ParseIP("fe80::7"), LinkIndex: l.Attrs().Index},                // another node's
			{Dst: ipnet("fd00:6::/48"), Gw: net.ParseIP("fe80::7"), LinkIndex: l.Attrs().Index, Priority: 10},      // elsewhere
		} {
			if err := netlink.RouteAdd(&r); err != nil {
				t.Errorf("%v: %v", r, err)
			}
		}
		return nil
	})
	w.apply(t)
	named := func() (all []string) {
		for _, o := range w.k.Status().Obstacles {
			if o.Check == "foreign-route" {
				all = append(all, strings.Fields(strings.TrimPrefix(strings.TrimPrefix(o.Text, "the route "), "blackhole "))[0])
			}
		}
		slices.Sort(all)
		return all
	}
	want := []string{"10.5.1.0/24", "10.5.1.128/25", "10.5.2.64/26", "10.5.3.0/24", "fd00:5:0:1::/64", "fd00:5:0:9::/64"}
	if got := named(); !slices.Equal(got, want) {
		t.Errorf("named %q, want %q", got, want)
	}
	if text := w.k.Status().Obstacles[0]; !strings.Contains(text.Fix, "ip route del 10.5.1.0/24"+gateway) || !strings.Contains(text.Text, "this node's own pods") {
		t.Errorf("said %q, %q", text.Text, text.Fix)
	}
	w.want.Stale = []host.StaleRoute{{To: netip.MustParsePrefix("10.5.1.0/24"), Via: peer}, {To: netip.MustParsePrefix("10.5.3.0/24"), Via: w.Addrs[0]}}
	w.apply(t)
	if got := named(); !slices.Equal(got, want[1:]) {
		t.Errorf("with one of them stale, named %q", got)
	}
	writes := w.k.Status().Writes
	if w.apply(t); w.k.Status().Writes != writes {
		t.Error("a second time, there was to change")
	}
}

func ipnet(s string) *net.IPNet { return host.IPNet(netip.MustParsePrefix(s)) }
