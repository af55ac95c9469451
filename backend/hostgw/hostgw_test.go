package hostgw_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"

	"culvert/backend"
	"culvert/backend/hostgw"
	"culvert/backend/vxlan"
	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
	"culvert/subnet"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// lease returns the k-th node's lease with the given underlay address.
func lease(k int, at string) subnet.Lease {
	name := fmt.Sprintf("n%d", k)
	return subnet.Lease{Node: name, Endpoints: []subnet.Endpoint{{
		Subnet: netip.MustParsePrefix(fmt.Sprintf("10.5.%d.0/24", k)), Public: netip.MustParseAddr(at),
		VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(name, 1, false)},
	}}}
}

// TestOnLink has one peer on the underlay's link and one behind a router. host-gw
// routes to the first and warns about the second; vxlan with DirectRouting sends
// the second through the tunnel. Once a link-scope route covers the second, both
// route to it directly.
func TestOnLink(t *testing.T) {
	n := labtest.New(t, lab.Options{Nodes: 1, Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}).Nodes[0]
	const here, there = "10.5.2.0/24 via 192.0.2.2 dev eth0 proto 67", "10.5.3.0/24 via 203.0.113.3 dev eth0 proto 67"
	for _, c := range []struct {
		name, backend string
		plan          backend.Planner
		before, after []string
		warnings      int
	}{
		{"host-gw", `{"Type":"host-gw"}`, hostgw.Plan, []string{here}, []string{here, there}, 1},
		{
			"DirectRouting", `{"Type":"vxlan","DirectRouting":true}`, vxlan.Plan,
			[]string{here, "10.5.3.0/24 via 10.5.3.0 dev cvt.1 proto 67 onlink"},
			[]string{here, there},
			0,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg, _, err := subnet.ParseConfig([]byte(`{"Network":"10.5.0.0/16","Backend":` + c.backend + `}`))
			if err != nil {
				t.Fatal(err)
			}
			s := subnet.Snapshot{Config: cfg, Self: lease(1, "192.0.2.1"), Peers: []subnet.Lease{lease(2, "192.0.2.2"), lease(3, "203.0.113.3")}}
			u := host.Underlay{Name: "eth0", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}
			if err := n.Do(func() error {
				l, err := netlink.LinkByName("eth0")
				if err == nil {
					u.Index = l.Attrs().Index
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
			k := host.NewKeeper(u.Index, slog.New(slog.DiscardHandler))
			var wanted backend.Planned
			routes := func() []string {
				t.Helper()
				if err := n.Do(func() error {
					return k.Apply(func(v host.View) (host.State, error) {
						wanted, err = c.plan(backend.Node{Underlay: u}, s, v)
						return wanted.State, err
					})
				}); err != nil {
					t.Fatal(err)
				}
				var all []string
				for _, r := range wanted.State.Routes {
					if r.Link != "" {
						all = append(all, r.String())
					}
				}
				return all
			}
			if got := routes(); !slices.Equal(got, c.before) || len(wanted.Warnings) != c.warnings {
				t.Errorf("routes %q, warnings %q", got, wanted.Warnings)
			}
			route := func(do func(*netlink.Route) error) {
				t.Helper()
				if err := n.Do(func() error {
					l, err := netlink.LinkByName("eth0")
					if err != nil {
						return err
					}
					return do(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: host.IPNet(netip.MustParsePrefix("203.0.113.0/24")), Scope: netlink.SCOPE_LINK})
				}); err != nil {
					t.Fatal(err)
				}
			}
			route(netlink.RouteAdd)
			if got := routes(); !slices.Equal(got, c.after) || len(wanted.Warnings) != 0 {
				t.Errorf("with both peers on the link: routes %q, warnings %q", got, wanted.Warnings)
			}
			route(netlink.RouteDel)
			if got := routes(); !slices.Equal(got, c.before) {
				t.Errorf("after deleting the link-scope route: routes %q, warnings %s", got, fmt.Sprint(wanted.Warnings))
			}
			if err := n.Do(func() error { _, err := host.Apply(host.State{}); return err }); err != nil {
				t.Fatal(err)
			}
		})
	}
}
