package host_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"culvert/internal/host"
)

// TestPodBridgeFromRecords starts a Keeper on a host whose pods' bridge has lost its
// addresses and is down. The bridge is known from the CNI records only. It is restored
// if a pod is on it and it has no other address.
func TestPodBridgeFromRecords(t *testing.T) {
	w := newSettingsNode(t)
	w.want.Bridges = []string{"cni7"}
	bridge := func() netlink.Link {
		l, err := netlink.LinkByName("cni7")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	other := &netlink.Addr{IPNet: host.IPNet(netip.MustParsePrefix("172.20.0.1/16"))}
	inside(t, w.Node, func() error {
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "cni7"}}); err != nil {
			return err
		}
		return netlink.AddrAdd(bridge(), other)
	})
	addrs := func() string {
		w.apply(t)
		w.apply(t) // the first reading might be amid the plugin's work
		var all []string
		inside(t, w.Node, func() error {
			got, err := netlink.AddrList(bridge(), netlink.FAMILY_ALL)
			for _, a := range got {
				if !a.IP.IsLinkLocalUnicast() {
					all = append(all, a.IPNet.String())
				}
			}
			return err
		})
		return strings.Join(all, " ")
	}
	if got := addrs(); got != "172.20.0.1/16" {
		t.Errorf("without a pod it has %s", got)
	}
	inside(t, w.Node, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth7", MasterIndex: bridge().Attrs().Index}, PeerName: "pod7"})
	})
	if got := addrs(); got != "172.20.0.1/16 fd00:5:0:1::1/64" {
		t.Errorf("with another IPv4 address it has %s", got)
	}
	inside(t, w.Node, func() error { return netlink.AddrDel(bridge(), other) })
	if got := addrs(); got != "10.5.1.1/24 fd00:5:0:1::1/64" {
		t.Errorf("with a pod it has %s", got)
	}
}
