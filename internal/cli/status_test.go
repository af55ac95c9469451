package cli

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"culvert/internal/api"
)

// TestStatusTable compares the table with a golden file.
func TestStatusTable(t *testing.T) {
	now := time.Date(2026, 1, 2, 15, 0, 0, 0, time.UTC)
	s := api.Status{
		Version: "1.0", Node: "n1", Started: now.Add(-time.Hour), Ready: true,
		Networks:   []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16")},
		SubnetFile: "/run/culvert/subnet.env",
		Lease: &api.Lease{
			Subnets:   []netip.Prefix{netip.MustParsePrefix("10.5.7.0/24")},
			PublicIPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")},
			Expires:   now.Add(24 * time.Hour),
		},
		Store:    api.Store{Endpoints: []string{"http://192.0.2.9:2379"}, Prefix: "/coreos.com/network", Since: now.Add(-time.Minute), Error: "no answer", Revision: 7, Snapshot: now.Add(-2 * time.Minute)},
		Underlay: api.Underlay{Interface: "eth0", MTU: 1500, Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Why: "default route"},
		Datapath: api.Datapath{
			WireFormat: "vxlan", Kind: "userspace", Why: "--datapath=userspace", Device: "culvert0", MTU: 1450, Peers: 1,
			Mechanisms: []api.Mechanism{{Name: "gso", On: true}, {Name: "uso", Why: "the kernel does not offer it"}},
			Egress:     api.Traffic{Packets: 1000, Bytes: 1450000, Syscalls: 50},
			Drops:      []api.Drop{{Reason: "ingress-stranger", Packets: 3}},
			NarrowPaths: []api.NarrowPath{{
				Subnet: netip.MustParsePrefix("10.5.8.0/24"), PublicIP: netip.MustParseAddr("192.0.2.2"), MTU: 1350,
				By: netip.MustParseAddr("203.0.113.1"), Since: now.Add(-90 * time.Second),
			}},
		},
		Peers:    []api.Peer{{Node: "n2", Backend: "vxlan", Subnets: []netip.Prefix{netip.MustParsePrefix("10.5.8.0/24")}, PublicIPs: []netip.Addr{netip.MustParseAddr("192.0.2.2")}}},
		Rejected: []api.Rejection{{Key: "10.5.99.0-24", Reason: "not JSON"}},
	}
	golden, err := os.ReadFile("testdata/status.golden")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := writeStatus(&b, s, nil, now); err != nil {
		t.Fatal(err)
	}
	if b.String() != string(golden) {
		t.Errorf("the table is\n%s\nwant\n%s", b.String(), golden)
	}
}
