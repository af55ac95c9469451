package page

import (
	"fmt"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"culvert/internal/api"
)

// TestGroups checks that many nodes are drawn as some groups, also within one /24, that each
// is in one, and that a group leads to its nodes in the table.
func TestGroups(t *testing.T) {
	for _, n := range []int{29, 200, 5000} {
		var p api.Peers
		first := netip.MustParseAddr("172.16.0.1")
		for i := range n {
			p.Peers = append(p.Peers, api.PeerState{
				Node: fmt.Sprint("n", i), PublicIP: first, State: api.PeerIdle, Subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24),
			})
			first = first.Next()
		}
		all := viewOf(api.Status{}, p, "")
		if len(all.Marks) < 4 || len(all.Marks) > mostGroups {
			t.Errorf("%d nodes: %d groups by %s", n, len(all.Marks), all.Grouped)
		}
		drawn := 0
		for _, m := range all.Marks {
			query, err := url.QueryUnescape(strings.TrimSuffix(strings.TrimPrefix(m.Target, "?q="), "#nodes"))
			if v := viewOf(api.Status{}, p, query); err != nil || v.Matching != m.Count {
				t.Errorf("%d nodes: %s has %d, and %s leads to %d (%v)", n, m.Name, m.Count, m.Target, v.Matching, err)
			}
			drawn += m.Count
		}
		if drawn != n {
			t.Errorf("%d nodes: %d are drawn", n, drawn)
		}
	}
}
