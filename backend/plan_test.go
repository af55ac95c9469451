package backend_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"culvert/backend"
	"culvert/internal/host"
	"culvert/subnet"
)

func TestMTU(t *testing.T) {
	for _, c := range []struct {
		name                   string
		configured, link, cost int
		ipv6                   bool
		want                   int
		says                   string
	}{
		{"vxlan over Ethernet", 0, 1500, 50, false, 1450, ""},
		{"vxlan over IPv6", 0, 1500, 70, true, 1430, ""},
		{"no tunnel", 0, 1500, 0, false, 1500, ""},
		{"configured, above the link's", 9000, 1500, 50, false, 8950, ""},
		{"configured, below the link's", 1400, 1500, 20, false, 1380, ""},
		{"the least for IPv4", 0, 626, 50, false, 576, ""},
		{"below it", 0, 625, 50, false, 0, "the MTU of eth0 is 625, which leaves 575 bytes for pods, less than 576"},
		{"the least for IPv6", 0, 1350, 70, true, 1280, ""},
		{"below it, configured", 1349, 1500, 70, true, 0, "Backend.MTU is 1349, which leaves 1279 bytes for pods, less than 1280"},
	} {
		got, err := backend.MTU(c.configured, host.Underlay{Name: "eth0", MTU: c.link}, c.cost, c.ipv6)
		if got != c.want || (err != nil) != (c.says != "") || err != nil && !strings.HasPrefix(err.Error(), c.says) {
			t.Errorf("%s: %d, %v", c.name, got, err)
		}
	}
}

// TestLocal checks the source address of tunnel packets, and the error if there is none.
func TestLocal(t *testing.T) {
	four := netip.MustParseAddr("192.0.2.1")
	n := backend.Node{Underlay: host.Underlay{Name: "eth0", Addrs: []netip.Addr{four}}}
	up := host.View{Underlay: host.Underlay{Name: "eth0"}}
	if a, err := n.Local(up, true); a != four || err != nil {
		t.Error(a, err)
	}
	if _, err := n.Local(up, false); err == nil || !strings.Contains(err.Error(), "the underlay eth0 has no address of the network's address family") {
		t.Error(err)
	}
	if _, err := n.Local(host.View{}, true); !errors.Is(err, host.ErrNoUnderlay) || !strings.Contains(err.Error(), "eth0") {
		t.Error(err)
	}
}

// TestOuter checks that a plan keeps the MTU from when the underlay was chosen if the
// link's current one is too small.
func TestOuter(t *testing.T) {
	n := backend.Node{Underlay: host.Underlay{Name: "eth0", MTU: 1500}}
	for now, want := range map[int]int{1500: 1500, 9000: 9000, 1400: 1400, 600: 1500} {
		u := n.Outer(host.View{Underlay: host.Underlay{Name: "eth0", MTU: now}}, func(u host.Underlay) error {
			_, err := backend.MTU(0, u, 50, false)
			return err
		})
		if u.MTU != want {
			t.Errorf("with a link's MTU of %d the plan uses %d, want %d", now, u.MTU, want)
		}
	}
}

// TestPeers checks that the peers of a family are those that have an endpoint of it and
// are nodes, and that each may send from its own subnet only.
func TestPeers(t *testing.T) {
	end := func(subnetOf, public string) subnet.Endpoint {
		return subnet.Endpoint{Subnet: netip.MustParsePrefix(subnetOf), Public: netip.MustParseAddr(public)}
	}
	s := subnet.Snapshot{Peers: []subnet.Lease{
		{Endpoints: []subnet.Endpoint{end("10.5.1.0/24", "192.0.2.1"), end("fd00:1::/64", "2001:db8::1")}},
		{Endpoints: []subnet.Endpoint{end("10.5.2.0/24", "192.0.2.2")}},
		{Endpoints: []subnet.Endpoint{end("10.5.3.0/24", "192.0.2.3")}, Reserved: true},
	}}
	four, six := backend.Peers(s, true), backend.Peers(s, false)
	if len(four) != 2 || four[1].Public.String() != "192.0.2.2" || len(six) != 1 || six[0].Subnet.String() != "fd00:1::/64" {
		t.Errorf("%v, %v", four, six)
	}
	sources := backend.Sources(four)
	if len(sources) != 2 || sources[0].Outer != four[0].Public || sources[0].Inner != four[0].Subnet {
		t.Errorf("%v", sources)
	}
}

func TestHostAddrs(t *testing.T) {
	for subnetOf, want := range map[string]string{"10.5.1.0/24": "10.5.1.0/32", "10.5.1.7/24": "10.5.1.0/32", "fd00:1::/64": "fd00:1::/128"} {
		if got := backend.HostAddrs(subnet.Endpoint{Subnet: netip.MustParsePrefix(subnetOf)}); len(got) != 1 || got[0].String() != want {
			t.Errorf("%s: %v", subnetOf, got)
		}
	}
}

// TestDown checks that the placeholder for a datapath that cannot be opened reports why,
// and requests another attempt after Retry.
func TestDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		why := errors.New("no TUN device")
		d := backend.Down{Format: "vxlan", Err: why, Retry: 10 * time.Second}
		if err := d.Apply(t.Context(), subnet.Snapshot{}); !errors.Is(err, why) {
			t.Error(err)
		}
		began := time.Now()
		if err := d.Run(t.Context()); !errors.Is(err, backend.ErrBroken) || !errors.Is(err, why) || time.Since(began) != 10*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		if s := d.Status(); s.Kind != "none" || s.WireFormat != "vxlan" || s.Why != "no TUN device" {
			t.Errorf("%+v", s)
		}
	})
}
