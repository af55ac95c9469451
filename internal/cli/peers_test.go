package cli

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"culvert/internal/api"
)

// somePeers returns an active peer, one with a small path MTU, and a silent one.
func somePeers(now time.Time) api.Peers {
	drops := uint64(2)
	return api.Peers{Node: "n1", At: now, MTU: 1450, Peers: []api.PeerState{
		{
			Node: "n2", Backend: "vxlan", Subnet: netip.MustParsePrefix("10.5.19.0/24"), PublicIP: netip.MustParseAddr("192.0.2.2"),
			Way: api.WayUserspace, State: api.PeerActive, RTTSeconds: 0.00014, PathMTU: 1450, Heard: now.Add(-3 * time.Second), Asked: now.Add(-20 * time.Second),
			Sent: &api.PeerCount{Packets: 1000, Bytes: 1_450_000}, Received: &api.PeerCount{Packets: 10, Bytes: 700}, Drops: &drops,
		},
		{
			Node: "n3", Backend: "vxlan", Subnet: netip.MustParsePrefix("10.5.140.0/24"), PublicIP: netip.MustParseAddr("192.0.2.3"),
			Way: api.WayFastPath, State: api.PeerIdle, RTTSeconds: 0.012, PathMTU: 1350, Heard: now.Add(-12 * time.Second), Asked: now.Add(-12 * time.Second),
			Problem: "packets of more than 1350 bytes do not pass, and pods send up to 1450",
		},
		{
			Backend: "vxlan", Subnet: netip.MustParsePrefix("fd00:5::/64"), PublicIP: netip.MustParseAddr("2001:db8::4"),
			Way: api.WayKernel, State: api.PeerSilent, Asked: now.Add(-time.Second), Problem: "no answer", Received: &api.PeerCount{},
		},
	}}
}

func TestWritePeerStates(t *testing.T) {
	now := time.Date(2026, 1, 2, 15, 0, 0, 0, time.UTC)
	all := somePeers(now)
	const problems = "BAD n3 10.5.140.0/24: packets of more than 1350 bytes do not pass, and pods send up to 1450: `culvert ping 10.5.140.0/24` says more\n" +
		"BAD fd00:5::/64: no answer: `culvert ping fd00:5::/64` says more\n3 peers' subnets: 1 active, 1 idle, 1 silent\n"
	before := somePeers(now.Add(-2 * time.Second))
	before.Peers[0].Sent.Bytes -= 1_000_000
	before.Peers[0].Sent.Packets -= 700
	for _, c := range []struct {
		before *api.Peers
		wide   bool
		want   string
	}{
		{nil, false, `NODE  SUBNET         STATE   WAY        RTT       HEARD  SENT    RECEIVED  DROPS
n2    10.5.19.0/24   active  userspace  0.14 ms   3s     1.4 MB  700 B     2
n3    10.5.140.0/24  idle    fast path  12.00 ms  12s    -       -         -
-     fd00:5::/64    silent  kernel     -         -      -       0 B       -
`},
		{&before, true, `NODE  SUBNET         ADDRESS      STATE   WAY        RTT       MTU   HEARD  SENT                       RECEIVED            DROPS  FORMAT  ASKED
n2    10.5.19.0/24   192.0.2.2    active  userspace  0.14 ms   1450  3s     350 packets/s, 500.0 kB/s  0 packets/s, 0 B/s  2      vxlan   20s
n3    10.5.140.0/24  192.0.2.3    idle    fast path  12.00 ms  1350  12s    -                          -                   -      vxlan   12s
-     fd00:5::/64    2001:db8::4  silent  kernel     -         -     -      -                          0 packets/s, 0 B/s  -      vxlan   1s
`},
	} {
		var b strings.Builder
		if err := writePeerStates(&b, all, c.before, c.wide); err != nil {
			t.Fatal(err)
		}
		if b.String() != c.want+problems {
			t.Errorf("%s\nwant\n%s", b.String(), c.want+problems)
		}
	}
}

func TestPeerFilterAndOrder(t *testing.T) {
	all := somePeers(time.Unix(1000, 0)).Peers
	for _, c := range []struct {
		filters string // separated by spaces
		want    string // subnets, or part of an error
	}{
		{"", "10.5.19.0/24 10.5.140.0/24 fd00:5::/64"},
		{"n2", "10.5.19.0/24"},
		{"192.0.2", "10.5.19.0/24 10.5.140.0/24"},
		{"node=n?", "10.5.19.0/24 10.5.140.0/24"},
		{"state=silent,idle", "10.5.140.0/24 fd00:5::/64"},
		{"state=silent,idle node=n*", "10.5.140.0/24"},
		{"subnet=10.5.128.0/17", "10.5.140.0/24"},
		{"address=2001:db8::4", "fd00:5::/64"},
		{"address=10.5.19.7", "10.5.19.0/24"},
		{"way=kernel", "fd00:5::/64"},
		{"mtu=9", "one of node"},
		{"node=[", "syntax error"},
		{"subnet=x", "not a prefix"},
	} {
		keep, err := peerFilter(strings.Fields(c.filters))
		if err != nil {
			if !strings.Contains(err.Error(), c.want) || !isUsage(err) {
				t.Errorf("%s: %v", c.filters, err)
			}
			continue
		}
		var got []string
		for _, p := range all {
			if keep(p) {
				got = append(got, p.Subnet.String())
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %s, want %s", c.filters, got, c.want)
		}
	}
	for order, first := range map[string]int{"node": 2, "rtt": 1, "sent": 0, "received": 0, "drops": 0, "state": 2, "mtu": 0, "heard": 0} {
		best := 0
		for i := range all {
			if peerOrder[order](all[i], all[best]) < 0 {
				best = i
			}
		}
		if best != first {
			t.Errorf("--sort %s has %d first, want %d", order, best, first)
		}
	}
}
