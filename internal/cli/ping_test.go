package cli

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"culvert/internal/api"
	"culvert/internal/echo"
)

func TestWritePings(t *testing.T) {
	var b strings.Builder
	if err := writePings(&b, []pingResult{
		{
			pingTarget: pingTarget{Node: "n2", Addr: netip.MustParseAddr("10.5.19.0")},
			Summary:    echo.Summary{Sent: 3, Answered: 3, Times: []time.Duration{110 * time.Microsecond, 140 * time.Microsecond, 1200 * time.Microsecond}},
			MTU:        1450, WantMTU: 1450,
		},
		{
			pingTarget: pingTarget{Addr: netip.MustParseAddr("10.5.140.0")},
			Summary:    echo.Summary{Sent: 3},
			Problem:    "no answer, nor does 192.0.2.3 on the underlay: the node is down, or the underlay does not reach it",
		},
	}); err != nil {
		t.Fatal(err)
	}
	const want = `NODE  ADDRESS     ANSWERED  MIN      MEDIAN   MAX      LARGEST
n2    10.5.19.0   3 of 3    0.11 ms  0.14 ms  1.20 ms  1450 of 1450 bytes
-     10.5.140.0  0 of 3    -        -        -        -
BAD 10.5.140.0: no answer, nor does 192.0.2.3 on the underlay: the node is down, or the underlay does not reach it
1 of 2 answer in full
`
	if b.String() != want {
		t.Errorf("%s\nwant\n%s", b.String(), want)
	}
}

func TestPingTargets(t *testing.T) {
	prefix, addr := netip.MustParsePrefix, netip.MustParseAddr
	s := api.Status{
		Node: "n1", Networks: []netip.Prefix{prefix("10.5.0.0/16"), prefix("fd00:5::/48")},
		Lease: &api.Lease{Subnets: []netip.Prefix{prefix("10.5.1.0/24"), prefix("fd00:5:0:1::/64")}},
		Peers: []api.Peer{{
			Node: "n2", Subnets: []netip.Prefix{prefix("10.5.2.0/24"), prefix("fd00:5:0:2::/64")},
			PublicIPs: []netip.Addr{addr("192.0.2.2"), addr("2001:db8::2")},
		}},
	}
	for _, c := range []struct {
		format, arg string
		want        string // addresses, or part of an error
	}{
		{"vxlan", "n2", "10.5.2.0 fd00:5:0:2::"},
		{"host-gw", "n2", "192.0.2.2 2001:db8::2"},
		{"vxlan", "192.0.2.2", "10.5.2.0 fd00:5:0:2::"},
		{"vxlan", "fd00:5:0:2::/64", "10.5.2.0 fd00:5:0:2::"},
		{"vxlan", "10.5.2.9", "10.5.2.9"},
		{"vxlan", "fd00:5:0:2::9", "fd00:5:0:2::9"},
		{"vxlan", "10.5.1.9", "10.5.1.9"}, // a pod of this node
		{"vxlan", "10.5.3.9", "no node leases"},
		{"vxlan", "198.51.100.1", "not in the cluster network"},
		{"vxlan", "n1", "this node"},
		{"vxlan", "", "no node has"},
	} {
		s.Datapath.WireFormat = c.format
		targets, err := pingTargets(s, []string{c.arg})
		var got []string
		for _, target := range targets {
			got = append(got, target.Addr.String())
		}
		if err != nil {
			got = []string{err.Error()}
		}
		if !strings.Contains(strings.Join(got, " "), c.want) {
			t.Errorf("%q: %q, want %q", c.arg, got, c.want)
		}
	}
}

// TestJudge tells what is lost of a node that answers on the underlay only, by what the
// daemon knew of it before the requests and knows after them.
func TestJudge(t *testing.T) {
	now := time.Now()
	subnet, public := netip.MustParsePrefix("10.5.2.0/24"), netip.MustParseAddr("192.0.2.2")
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	count := func(n uint64) *api.PeerCount { return &api.PeerCount{Packets: n} }
	drops := func(n uint64) *uint64 { return &n }
	for _, c := range []struct {
		name          string
		before, after api.PeerState
		check         string // of a warning
		pod           bool
		lost, says    string
	}{
		{"two packets came", api.PeerState{Received: count(7)}, api.PeerState{Received: count(9)}, "", false, "there", ": 2 packets from it arrived here meanwhile"},
		{"one came", api.PeerState{Received: count(7)}, api.PeerState{Received: count(8)}, "", false, "there", ": 1 packet from it arrived"},
		{"they may be the answers", api.PeerState{Received: count(7)}, api.PeerState{Received: count(10)}, "", false, "unknown", "or these are the answers"},
		{"the datapath was opened meanwhile", api.PeerState{Received: count(7)}, api.PeerState{Received: count(1)}, "", false, "unknown", "no packet has arrived from it"},
		{"culvert drops them", api.PeerState{Drops: drops(1)}, api.PeerState{Drops: drops(2)}, "", false, "unknown", "culvert drops them"},
		{"this host drops them", api.PeerState{Received: count(7)}, api.PeerState{Received: count(8)}, "input-drop", false, "unknown", "on their way in"},
		{"this host drops its own", api.PeerState{}, api.PeerState{}, "output-drop", false, "unknown", "on their way out"},
		{
			"they came since it answers nothing",
			api.PeerState{},
			api.PeerState{Unanswered: ago(72 * time.Second), Heard: ago(9 * time.Second)},
			"", false, "there", "it has not answered for 1m12s, but packets from it arrive here through the tunnel, the last one 9s ago",
		},
		{
			"long ago",
			api.PeerState{},
			api.PeerState{Unanswered: ago(5 * time.Minute), Heard: ago(2 * time.Minute)},
			"", false, "unknown", "the last packet from it arrived 2m0s ago",
		},
		{
			"perhaps before",
			api.PeerState{},
			api.PeerState{Unanswered: ago(12 * time.Second), Heard: ago(8 * time.Second)},
			"", false, "unknown", "the last packet from it arrived 8s ago",
		},
		{"it answered last", api.PeerState{}, api.PeerState{Heard: ago(8 * time.Second)}, "", false, "unknown", "the last packet from it arrived 8s ago"},
		{"a pod", api.PeerState{Received: count(7)}, api.PeerState{Received: count(8)}, "", true, "", "or no daemon serves there"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, p := range []*api.PeerState{&c.before, &c.after} {
				p.Subnet, p.PublicIP = subnet, public
			}
			r := pingResult{pingTarget: pingTarget{Node: "n2", Subnet: subnet, Addr: subnet.Addr(), Public: public}, Summary: echo.Summary{Sent: 3}, Problem: "no answer"}
			if c.pod {
				r.Addr = subnet.Addr().Next()
			}
			var s api.Status
			if c.check != "" {
				s.Warnings = []api.Warning{{Check: c.check}}
			}
			r.judge(s, api.Peers{At: now, Peers: []api.PeerState{c.before}}, api.Peers{At: now, Peers: []api.PeerState{c.after}})
			if r.Lost != c.lost || !strings.HasPrefix(r.Problem, "no answer: ") || !strings.Contains(r.Problem, c.says) {
				t.Errorf("%q: %s; want %q: %s", r.Lost, r.Problem, c.lost, c.says)
			}
		})
	}
}
