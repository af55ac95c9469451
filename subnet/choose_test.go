package subnet_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"culvert/subnet"
)

const plainConfig = `{"Network":"10.5.0.0/16","Backend":{"Type":"ipip"}}`

func claimOf(t testing.TB, node, public string) subnet.Claim {
	t.Helper()
	cfg, _, err := subnet.ParseConfig([]byte(plainConfig))
	if err != nil {
		t.Fatal(err)
	}
	return subnet.Claim{Node: node, Config: cfg, Ends: []subnet.Endpoint{{Public: netip.MustParseAddr(public)}}}
}

// held returns a stored lease of subnet 10.5.n.0/24.
func held(n int, node, public string, created int64) subnet.Lease {
	return subnet.Lease{
		Node: node, Backend: "ipip", CreateRevision: created, ModRevision: created + 100, ID: created,
		Endpoints: []subnet.Endpoint{end(fmt.Sprintf("10.5.%d.0/24", n), public)},
	}
}

func TestChoose(t *testing.T) {
	reserved := held(7, "us", "192.0.2.1", 1)
	reserved.Reserved, reserved.Backend, reserved.ID = true, "", 0
	isID := func(id int64) func(subnet.Lease) bool { return func(l subnet.Lease) bool { return l.ID == id } }
	previous := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }

	for name, c := range map[string]struct {
		occupancy subnet.Occupancy
		previous  []netip.Prefix
		want      string // the key; "": any free subnet
		keep      bool
		drop      string
		err       error
		names     []string // what the error must name
	}{
		"an empty store":             {},
		"the previous subnet":        {previous: previous("10.5.9.0/24"), want: "10.5.9.0-24"},
		"a previous one outside":     {previous: previous("10.9.9.0/24")},
		"a previous one of a /25":    {previous: previous("10.5.9.0/25")},
		"a previous one taken":       {previous: previous("10.5.9.0/24"), occupancy: subnet.Occupancy{Leases: []subnet.Lease{held(9, "b", "192.0.2.2", 1)}}},
		"a previous one unreadable":  {previous: previous("10.5.9.0/24"), occupancy: subnet.Occupancy{Unreadable: previous("10.5.9.0/24")}},
		"a previous one reserved":    {previous: previous("10.5.7.0/24"), occupancy: subnet.Occupancy{Leases: []subnet.Lease{reserved}}},
		"ours by identity":           {occupancy: subnet.Occupancy{Leases: []subnet.Lease{held(3, "us", "192.0.2.1", 5)}}, want: "10.5.3.0-24", keep: true},
		"identity before previous":   {occupancy: subnet.Occupancy{Leases: []subnet.Lease{held(3, "us", "192.0.2.1", 5)}}, previous: previous("10.5.9.0/24"), want: "10.5.3.0-24", keep: true},
		"flannel's with our address": {occupancy: subnet.Occupancy{Leases: []subnet.Lease{held(3, "", "192.0.2.1", 5)}}, want: "10.5.3.0-24", keep: true},
		"ours by handle, moved":      {occupancy: subnet.Occupancy{Leases: []subnet.Lease{held(3, "us", "192.0.2.99", 5)}, Mine: isID(5)}, want: "10.5.3.0-24", keep: true},
		"ours by handle, renamed":    {occupancy: subnet.Occupancy{Leases: []subnet.Lease{held(3, "old-name", "192.0.2.1", 5)}, Mine: isID(5)}, want: "10.5.3.0-24", keep: true},
		"our identity elsewhere": {
			occupancy: subnet.Occupancy{Leases: []subnet.Lease{held(3, "us", "192.0.2.99", 5)}},
			err:       subnet.ErrConflict, names: []string{`"us"`, "192.0.2.1", "192.0.2.99", "10.5.3.0/24"},
		},
		"our address elsewhere": {
			occupancy: subnet.Occupancy{Leases: []subnet.Lease{held(3, "b", "192.0.2.1", 5)}},
			err:       subnet.ErrConflict, names: []string{`"us"`, `"b"`, "192.0.2.1", "10.5.3.0/24"},
		},
		"a newcomer with our address": {
			occupancy: subnet.Occupancy{Leases: []subnet.Lease{held(3, "us", "192.0.2.1", 5), held(4, "b", "192.0.2.1", 6)}},
			want:      "10.5.3.0-24", keep: true,
		},
		"one before us with our address": {
			occupancy: subnet.Occupancy{Leases: []subnet.Lease{held(3, "us", "192.0.2.1", 5), held(4, "b", "192.0.2.1", 4)}},
			err:       subnet.ErrConflict,
		},
		"two of ours": {
			occupancy: subnet.Occupancy{Leases: []subnet.Lease{held(3, "", "192.0.2.1", 5), held(4, "us", "192.0.2.1", 6)}},
			want:      "10.5.4.0-24", keep: true, drop: "10.5.3.0-24",
		},
		"ours outside the network now": {
			occupancy: subnet.Occupancy{Leases: []subnet.Lease{{Node: "us", Backend: "ipip", CreateRevision: 1, Endpoints: []subnet.Endpoint{end("10.9.3.0/24", "192.0.2.1")}}}},
			drop:      "10.9.3.0-24",
		},
		"ours under an older overlapping one": {
			occupancy: subnet.Occupancy{Leases: []subnet.Lease{
				held(3, "us", "192.0.2.1", 5),
				{Node: "b", Backend: "ipip", CreateRevision: 1, Endpoints: []subnet.Endpoint{end("10.5.2.0/23", "192.0.2.2")}},
			}},
			drop: "10.5.3.0-24",
		},
		"all taken": {
			occupancy: subnet.Occupancy{Leases: []subnet.Lease{{Node: "b", Backend: "ipip", Endpoints: []subnet.Endpoint{end("10.5.0.0/16", "192.0.2.2")}}}},
			err:       subnet.ErrExhausted, names: []string{"255 subnets of /24"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			claim := claimOf(t, "us", "192.0.2.1")
			claim.Previous = c.previous
			got, err := subnet.Choose(claim, c.occupancy)
			if !errors.Is(err, c.err) || err == nil != (c.err == nil) {
				t.Fatalf("error %v, want %v", err, c.err)
			}
			for _, name := range c.names {
				if !strings.Contains(err.Error(), name) {
					t.Errorf("%q does not name %s", err, name)
				}
			}
			if err != nil {
				return
			}
			if c.want != "" && got.Lease.Key() != c.want {
				t.Errorf("chose %s, want %s", got.Lease.Key(), c.want)
			}
			if (got.Keep != nil) != c.keep {
				t.Errorf("keeps %v", got.Keep)
			}
			if got.Keep != nil && (got.Keep.Key() != c.want || got.Lease.ModRevision != got.Keep.ModRevision || got.Lease.ID != got.Keep.ID) {
				t.Errorf("keeps %+v as %+v", got.Keep, got.Lease)
			}
			if len(got.Drop) > 1 || c.drop != "" && (len(got.Drop) != 1 || got.Drop[0].Key() != c.drop) || c.drop == "" && len(got.Drop) != 0 {
				t.Errorf("drops %v, want %s", got.Drop, c.drop)
			}
			if l := got.Lease; l.Node != "us" || l.Backend != "ipip" || l.Endpoints[0].Public != claim.Ends[0].Public {
				t.Errorf("would write %+v", l)
			}
			for _, l := range c.occupancy.Leases {
				if got.Keep == nil && l.Overlaps(got.Lease) && l.Key() != c.drop {
					t.Errorf("%s overlaps %s", got.Lease, l)
				}
			}
		})
	}
}

// A node that gains an address family keeps its existing subnet.
func TestChooseGrowsToDualStack(t *testing.T) {
	c := claimOf(t, "us", "192.0.2.1")
	dual, _, err := subnet.ParseConfig([]byte(`{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"host-gw"}}`))
	if err != nil {
		t.Fatal(err)
	}
	c.Config = dual
	c.Ends = append(c.Ends, subnet.Endpoint{Public: netip.MustParseAddr("2001:db8::1")})
	got, err := subnet.Choose(c, subnet.Occupancy{Leases: []subnet.Lease{held(3, "us", "192.0.2.1", 5)}})
	if err != nil || got.Keep != nil || len(got.Drop) != 1 || got.Lease.Endpoints[0].Subnet.String() != "10.5.3.0/24" || len(got.Lease.Endpoints) != 2 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestClaimCheck(t *testing.T) {
	for name, change := range map[string]func(*subnet.Claim){
		"no identity":                   func(c *subnet.Claim) { c.Node = "" },
		"no configuration":              func(c *subnet.Claim) { c.Config = subnet.Config{} },
		"no address":                    func(c *subnet.Claim) { c.Ends = nil },
		"an invalid address":            func(c *subnet.Claim) { c.Ends[0].Public = netip.Addr{} },
		"0.0.0.0":                       func(c *subnet.Claim) { c.Ends[0].Public = netip.IPv4Unspecified() },
		"loopback":                      func(c *subnet.Claim) { c.Ends[0].Public = netip.MustParseAddr("127.0.0.1") },
		"the wrong family":              func(c *subnet.Claim) { c.Ends[0].Public = netip.MustParseAddr("2001:db8::1") },
		"an address within the network": func(c *subnet.Claim) { c.Ends[0].Public = netip.MustParseAddr("10.5.1.1") },
		"vxlan without a MAC": func(c *subnet.Claim) {
			c.Config.Backend = subnet.BackendConfig{Type: "vxlan", VNI: 1}
			c.Ends[0].VTEP.VNI = 1
		},
		"vxlan with the wrong VNI": func(c *subnet.Claim) { c.Config.Backend = subnet.BackendConfig{Type: "vxlan", VNI: 1} },
	} {
		c := claimOf(t, "us", "192.0.2.1")
		change(&c)
		if _, err := subnet.Choose(c, subnet.Occupancy{}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
