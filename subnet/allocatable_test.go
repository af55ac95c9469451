package subnet_test

import (
	"fmt"
	"net/netip"
	"testing"

	"culvert/subnet"
)

func TestGiven(t *testing.T) {
	for text, want := range map[string]string{
		`{"Network":"10.5.0.0/16"}`: "[10.5.0.0/16]",
		`{"Network":"10.0.0.0/8","SubnetMin":"10.5.0.0","SubnetMax":"10.5.255.0"}`:                                                  "[10.5.0.0/16]",
		`{"Network":"10.5.0.0/16","SubnetMin":"10.5.3.0","SubnetMax":"10.5.8.0"}`:                                                   "[10.5.3.0/24 10.5.4.0/22 10.5.8.0/24]",
		`{"Network":"10.5.0.0/16","SubnetMax":"10.5.127.0"}`:                                                                        "[10.5.0.0/17]",
		`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetMin":"fd00::","IPv6SubnetMax":"fd00:0:0:ff::"}`: "[fd00::/56]",
	} {
		c, _, err := subnet.ParseConfig([]byte(text))
		if err != nil {
			t.Fatal(text, err)
		}
		if got := fmt.Sprint(c.Networks[0].Allocatable()); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}

func TestCoveredAndSetAside(t *testing.T) {
	c, _, err := subnet.ParseConfig([]byte(`{"Network":"10.0.0.0/8","SubnetLen":24,"SubnetMin":"10.5.0.0","SubnetMax":"10.5.255.0"}`))
	if err != nil {
		t.Fatal(err)
	}
	lease := func(text string) subnet.Lease {
		return subnet.Lease{Node: text, Backend: "vxlan", Endpoints: []subnet.Endpoint{{Subnet: netip.MustParsePrefix(text), Public: netip.MustParseAddr("192.0.2.1")}}}
	}
	s := subnet.Snapshot{Config: c, Self: lease("10.5.1.0/24"), Peers: []subnet.Lease{lease("10.5.7.0/24"), lease("10.9.1.0/24")}}
	if got := fmt.Sprint(s.Covered(c.Networks[0])); got != "[10.5.0.0/16 10.9.1.0/24]" {
		t.Errorf("covered %s", got)
	}
	s = s.WithoutOverlaps([]subnet.HostNetwork{{Link: "eth1", Prefix: netip.MustParsePrefix("10.5.7.9/25")}})
	if len(s.Peers) != 1 || len(s.Rejected) != 1 || s.Rejected[0].Key != "10.5.7.0-24" || s.Rejected[0].Reason != "overlaps 10.5.7.0/25 on eth1 of this node, which would become unreachable" {
		t.Errorf("%+v", s)
	}
}
