package lab_test

import (
	"crypto/rand"
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// received returns how many packets a link has received.
func received(t *testing.T, ns *lab.Namespace, link string) uint64 {
	t.Helper()
	var packets uint64
	err := ns.Do(func() error {
		l, err := netlink.LinkByName(link)
		if err == nil {
			packets = l.Attrs().Statistics.RxPackets
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return packets
}

// TestProfilesCutPackets checks by packet counts where each profile segments: 10 MB
// are 7,000 packets of 1,500 bytes, or a few hundred of up to 64 KB.
func TestProfilesCutPackets(t *testing.T) {
	const size = 10_000_000
	payload, into := make([]byte, size), make([]byte, size)
	_, _ = rand.Read(payload)
	for _, under := range []lab.Underlay{lab.Bridged, lab.Direct} {
		l := labtest.New(t, lab.Options{Nodes: 2, Underlay: under})
		a, b := l.Nodes[0], l.Nodes[1]
		subnets := []netip.Prefix{netip.MustParsePrefix("10.42.1.0/24"), netip.MustParsePrefix("10.42.2.0/24")}
		var tunnels []*lab.HandmadeVXLAN
		for i, n := range l.Nodes {
			v, err := n.AddHandmadeVXLAN(lab.VXLANOptions{Subnet: subnets[i]})
			if err != nil {
				t.Fatal(err)
			}
			tunnels = append(tunnels, v)
		}
		for i := range tunnels {
			if err := tunnels[i].AddPeer(tunnels[1-i].Self); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range []struct {
			profile          lab.Profile
			cutTCP, cutVXLAN bool
		}{
			{lab.Offload, false, false},
			{lab.Cloud, false, true},
			{lab.Plain, true, true},
			{lab.Bare, true, true},
			{lab.Offload, false, false},
		} {
			t.Run(fmt.Sprintf("%s/%s", under, c.profile), func(t *testing.T) {
				links, err := l.SetProfile(c.profile)
				if err != nil {
					t.Fatal(err)
				}
				want, err := c.profile.Features()
				if err != nil {
					t.Fatal(err)
				}
				for _, o := range links[:2] {
					for name, on := range want {
						if got, known := o.Features[name]; known && got != on {
							t.Errorf("%s of %s is %t", name, o.Link, got)
						}
					}
				}
				for _, path := range []struct {
					what string
					to   netip.Addr
					cut  bool
				}{{"TCP", b.Addrs[0], c.cutTCP}, {"TCP in VXLAN", subnets[1].Addr(), c.cutVXLAN}} {
					before := received(t, b.Namespace, b.Link)
					if _, err := lab.Transfer(t.Context(), a.Namespace, b.Namespace, path.to, payload, into); err != nil {
						t.Fatal(err)
					}
					packets := received(t, b.Namespace, b.Link) - before
					if cut := packets >= size/1500; cut != path.cut {
						t.Errorf("%d bytes of %s arrived in %d packets", size, path.what, packets)
					}
				}
			})
		}
	}
}

func TestUnknownProfile(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	if _, err := l.SetProfile("fast"); err == nil {
		t.Error("SetProfile accepted an unknown profile")
	}
}
