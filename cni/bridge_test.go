package cni_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"culvert/cni"
	inside "culvert/internal/host"
)

// dual writes a dual-stack subnet.env.
func (h host) dual(t *testing.T) {
	t.Helper()
	if err := cni.WriteSubnetEnv(h.SubnetFile(), cni.SubnetEnv{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd00:42::/48")},
		Gateways: []netip.Prefix{netip.MustParsePrefix("10.42.7.1/24"), netip.MustParsePrefix("fd00:42:0:7::1/64")},
		MTU:      1450, IPMasq: true,
	}); err != nil {
		t.Fatal(err)
	}
}

// A bridge was created or modified by another program: ADD repairs it if no pod can
// depend on the change; otherwise it fails with the reason.
func TestUnusableBridge(t *testing.T) {
	bridge := func() netlink.Link { return &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "cni0"}} }
	address := func(s string) func() error {
		return func() error {
			l, err := netlink.LinkByName("cni0")
			if err != nil {
				return err
			}
			return netlink.AddrAdd(l, &netlink.Addr{IPNet: inside.IPNet(netip.MustParsePrefix(s)), Flags: 0x02 /* nodad */})
		}
	}
	add := func(l func() netlink.Link) func() error { return func() error { return netlink.LinkAdd(l()) } }
	for _, c := range []struct {
		name string
		pod  bool // with a pod on the bridge
		dual bool
		do   []func() error
		has  []string // addresses after the ADD; nil if it must fail
		says string   // part of the error
	}{
		{name: "link-local", do: []func() error{add(bridge), address("169.254.9.9/16")}, has: []string{"10.42.7.1/24"}},
		{name: "another network's address", do: []func() error{add(bridge), address("192.0.2.1/24")}, has: []string{"10.42.7.1/24"}},
		{name: "several", do: []func() error{add(bridge), address("192.0.2.1/24"), address("169.254.9.9/16"), address("10.42.7.1/24")}, has: []string{"10.42.7.1/24"}},
		{name: "the gateway with another prefix length", do: []func() error{add(bridge), address("10.42.7.1/16")}, has: []string{"10.42.7.1/24"}},
		{name: "made by hand", do: []func() error{add(bridge)}, has: []string{"10.42.7.1/24"}},
		{name: "made by hand, and a port has come and gone", do: []func() error{add(bridge), func() error {
			l, err := netlink.LinkByName("cni0")
			if err != nil {
				return err
			}
			port := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "port", MasterIndex: l.Attrs().Index}, PeerName: "trop"}
			if err := netlink.LinkAdd(port); err != nil {
				return err
			}
			return netlink.LinkDel(port)
		}}, has: []string{"10.42.7.1/24"}},
		{name: "link-local beside a pod", pod: true, do: []func() error{func() error {
			l, err := netlink.LinkByName("cni0")
			if err != nil {
				return err
			}
			// Make it the first that the kernel lists.
			if err := netlink.AddrDel(l, &netlink.Addr{IPNet: inside.IPNet(netip.MustParsePrefix("10.42.7.1/24"))}); err != nil {
				return err
			}
			if err := address("169.254.9.9/16")(); err != nil {
				return err
			}
			return address("10.42.7.1/24")()
		}}, has: []string{"10.42.7.1/24"}},
		{name: "the gateway behind another address, beside a pod", pod: true, do: []func() error{func() error {
			l, err := netlink.LinkByName("cni0")
			if err != nil {
				return err
			}
			if err := netlink.AddrDel(l, &netlink.Addr{IPNet: inside.IPNet(netip.MustParsePrefix("10.42.7.1/24"))}); err != nil {
				return err
			}
			return address("10.42.9.1/24")()
		}}, says: "the bridge cni0 has the address 10.42.9.1/24"},
		{name: "not a bridge", do: []func() error{add(func() netlink.Link {
			return &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "cni0"}, PeerName: "0inc"}
		})}, says: "cni0 is a veth device, not a bridge"},
		{name: "a port of another bridge", do: []func() error{add(func() netlink.Link { return &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}} }), func() error {
			l, err := netlink.LinkByName("br0")
			if err != nil {
				return err
			}
			// A bridge cannot be a port of a bridge, but a veth with its name can.
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "cni0", MasterIndex: l.Attrs().Index}, PeerName: "0inc"})
		}}, says: "cni0 is"},
		{name: "IPv6 of the cluster's", dual: true, do: []func() error{add(bridge), address("fd00:42:0:9::1/64")}, has: []string{"10.42.7.1/24", "fd00:42:0:7::1/64"}},
		{name: "IPv6 that overlaps", dual: true, do: []func() error{add(bridge), address("fd00::9/16")}, has: []string{"10.42.7.1/24", "fd00:42:0:7::1/64"}},
		{name: "IPv6 of another network", dual: true, do: []func() error{add(bridge), address("fd77::9/64")}, has: []string{"10.42.7.1/24", "fd77::9/64", "fd00:42:0:7::1/64"}},
		{name: "IPv6 off on the bridge", dual: true, do: []func() error{add(bridge), func() error {
			return os.WriteFile("/proc/sys/net/ipv6/conf/cni0/disable_ipv6", []byte("1"), 0)
		}}, has: []string{"10.42.7.1/24", "fd00:42:0:7::1/64"}},
		{name: "F7: IPv6 off on new links", dual: true, do: []func() error{func() error {
			return os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
		}}, has: []string{"10.42.7.1/24", "fd00:42:0:7::1/64"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t, "10.42.7.0/24")
			if c.dual {
				h.dual(t)
			}
			if c.pod {
				h.must(t, call{verb: "ADD", id: "first", netns: sandbox(t, h).Path})
			}
			for _, do := range c.do {
				if err := h.Do(do); err != nil {
					t.Fatal(err)
				}
			}
			status := h.run(t, call{verb: "STATUS"})
			a := h.run(t, call{verb: "ADD", id: "c1", netns: sandbox(t, h).Path})
			if c.says != "" {
				if a.err == nil || a.err.Code != types.ErrTryAgainLater || !strings.Contains(a.err.Msg, c.says) || a.err.Details == "" {
					t.Errorf("ADD: %+v, want %q", a.err, c.says)
				}
				if status.err == nil || status.err.Code != 50 || !strings.Contains(status.err.Msg, c.says) {
					t.Errorf("STATUS: %+v", status.err)
				}
				return
			}
			if a.err != nil || status.err != nil {
				t.Fatalf("ADD: %+v, STATUS: %+v", a.err, status.err)
			}
			var has []string
			if err := h.Do(func() error {
				cni0, err := netlink.LinkByName("cni0")
				if err != nil {
					return err
				}
				addresses, err := netlink.AddrList(cni0, netlink.FAMILY_ALL)
				for _, a := range addresses {
					if !a.IP.IsLinkLocalUnicast() || a.IP.To4() != nil {
						has = append(has, a.IPNet.String())
					}
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
			slices.Sort(has)
			slices.Sort(c.has)
			if !slices.Equal(has, c.has) {
				t.Errorf("the bridge has %q, want %q", has, c.has)
			}
		})
	}
}

// old sets a file time before the boot.
func old(t *testing.T, path string) {
	t.Helper()
	long := time.Unix(1_500_000_000, 0)
	if err := os.Chtimes(path, long, long); err != nil {
		t.Fatal(err)
	}
}

// fill reserves every address except the gateway's and those in but, for containers
// of an earlier boot.
func (h host) fill(t *testing.T, but ...int) {
	t.Helper()
	for i := 2; i < 255; i++ {
		if slices.Contains(but, i) {
			continue
		}
		path := h.store(fmt.Sprintf("10.42.7.%d", i))
		leave(t, path, fmt.Sprintf("gone%d\r\neth0", i))
		old(t, path)
	}
}

// The subnet is full of stale reservations, and the runtime never calls GC.
func TestReservationsOfAnEarlierBoot(t *testing.T) {
	t.Run("without records", func(t *testing.T) {
		h := newHost(t, "10.42.7.0/24")
		first := sandbox(t, h)
		h.must(t, call{verb: "ADD", id: "first", netns: first.Path})
		// The clock may have been wrong when first was added, but its record has the
		// current boot ID.
		old(t, h.store("10.42.7.2"))
		h.fill(t, 2, 9)
		// This address is in the neighbour table.
		if err := h.Do(func() error {
			l, err := netlink.LinkByName("cni0")
			if err != nil {
				return err
			}
			return netlink.NeighAdd(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: []byte{10, 42, 7, 77}, HardwareAddr: []byte{2, 0, 0, 0, 0, 7}, State: netlink.NUD_REACHABLE})
		}); err != nil {
			t.Fatal(err)
		}
		leave(t, h.store("10.42.7.9"), "young\r\neth0")
		leave(t, h.store("notes.txt"), "not an address")
		a := h.must(t, call{verb: "ADD", id: "c1", netns: sandbox(t, h).Path})
		if !strings.Contains(a.stderr, "left by an earlier boot") {
			t.Errorf("the release is not reported: %s", a.stderr)
		}
		got := h.addresses()
		if len(got) != 5 || !slices.Contains(h.records(), "first:eth0") || !slices.Contains(got, "10.42.7.2") || !slices.Contains(got, "10.42.7.9") || !slices.Contains(got, "10.42.7.77") || !slices.Contains(got, "notes.txt") {
			t.Errorf("addresses left: %q", got)
		}
	})
	t.Run("GC without a list", func(t *testing.T) {
		h := newHost(t, "10.42.7.0/24")
		h.must(t, call{verb: "ADD", id: "first", netns: sandbox(t, h).Path})
		h.fill(t, 2)
		settle()
		h.must(t, call{verb: "GC", stdin: h.valid()})
		h.expect(t, "after GC", []string{"first:eth0"}, []string{"10.42.7.2"})
	})
	t.Run("records of an earlier boot, and of namespaces that are gone", func(t *testing.T) {
		h := newHost(t, "10.42.7.0/24")
		gone := sandbox(t, h)
		for id, path := range map[string]string{"lives": sandbox(t, h).Path, "gone": gone.Path, "before": sandbox(t, h).Path} {
			h.must(t, call{verb: "ADD", id: id, netns: path})
			old(t, filepath.Join(h.dataDir(), id+":eth0"))
		}
		path := filepath.Join(h.dataDir(), "before:eth0")
		fromEarlierBoot(t, path)
		old(t, path)
		leave(t, filepath.Join(h.dataDir(), "damaged:eth0"), `{"cont`)
		for i := 5; i < 255; i++ {
			leave(t, h.store(fmt.Sprintf("10.42.7.%d", i)), fmt.Sprintf("young%d\r\neth0", i))
		}
		if err := gone.Delete(); err != nil {
			t.Fatal(err)
		}
		h.must(t, call{verb: "ADD", id: "c1", netns: sandbox(t, h).Path})
		if got := h.records(); !slices.Equal(got, []string{"c1:eth0", "damaged:eth0", "lives:eth0"}) {
			t.Errorf("records %q", got)
		}
		h.must(t, call{verb: "ADD", id: "c2", netns: sandbox(t, h).Path})
		a := h.run(t, call{verb: "ADD", id: "c3", netns: sandbox(t, h).Path})
		if a.err == nil || a.err.Code != types.ErrTryAgainLater || !strings.Contains(a.err.Details, "253 addresses are reserved in "+strings.TrimSuffix(h.store(""), "/")) {
			t.Errorf("full: %+v", a.err)
		}
	})
	t.Run("a damaged record of the same container", func(t *testing.T) {
		h := newHost(t, "10.42.7.0/24")
		if err := os.MkdirAll(h.dataDir(), 0o700); err != nil {
			t.Fatal(err)
		}
		leave(t, filepath.Join(h.dataDir(), "c1:eth0"), `{"cont`)
		h.must(t, call{verb: "ADD", id: "c1", netns: sandbox(t, h).Path})
	})
	t.Run("a store full of garbage", func(t *testing.T) {
		h := newHost(t, "10.42.7.0/24")
		if err := os.MkdirAll(h.store(""), 0o700); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{"last_reserved_ip.0": "what?", "10.42.7.2": "", "10.42.7.3": "\x00\x01\xff", "10.42.7.": "x", "readme": "x"} {
			leave(t, h.store(name), text)
			old(t, h.store(name))
		}
		if err := os.Mkdir(h.store("10.42.7.4"), 0o700); err != nil {
			t.Fatal(err)
		}
		h.must(t, call{verb: "ADD", id: "c1", netns: sandbox(t, h).Path})
	})
}
