package backend_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"culvert/backend"
	"culvert/internal/api"
	"culvert/internal/firewall"
	"culvert/internal/host"
)

// TestSilence plays the traffic with one peer, one character per observation, 5 s
// apart: s sent, r received, b both, . neither.
func TestSilence(t *testing.T) {
	for _, c := range []struct {
		looks  string
		silent bool
		asked  int
	}{
		{"......................", false, 0},
		{"bbbbbbbbbb", false, 0},
		{"sssss", false, 3},
		{"sssssss", true, 5},           // 30 s from the first packet to the last
		{"s......", false, 5},          // a single packet
		{"s.s...s", true, 5},           // a connection attempt and its retries
		{"bbbbsssssss", true, 5},       // the peer fell silent
		{"sssssssr", false, 5},         // it answered
		{"sssssssrssss", false, 5 + 2}, // after an answer the time starts again
		{"sssssss........................", true, 5 + 24},
		{"sssssss.........................", false, 5 + 24}, // forgotten: nothing sent for two minutes
	} {
		var s backend.Silence
		now, asked := time.Unix(1000, 0), 0
		for _, look := range c.looks {
			asked += len(s.Observe(now, []host.PeerActivity{{
				Source: firewall.Source{Inner: netip.MustParsePrefix("10.5.2.0/24"), Outer: netip.MustParseAddr("192.168.50.12")},
				Sent:   look == 's' || look == 'b', Received: look == 'r' || look == 'b',
			}}))
			now = now.Add(backend.SilenceInterval)
		}
		if got := len(s.Peers()) == 1; got != c.silent || asked != c.asked {
			t.Errorf("%s: silent %t, want %t; asked %d times, want %d", c.looks, got, c.silent, asked, c.asked)
		}
		s.Observe(now, nil)
		if len(s.Peers()) != 0 {
			t.Errorf("%s: a removed peer is still reported as silent", c.looks)
		}
	}
	var s backend.Silence
	for i := range 8 {
		var all []host.PeerActivity
		for k := range 30 {
			all = append(all, host.PeerActivity{
				Source: firewall.Source{Inner: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(k), 0}), 24), Outer: netip.AddrFrom4([4]byte{192, 168, 50, byte(k)})}, Sent: true,
			})
		}
		s.Observe(time.Unix(int64(5*i), 0), all)
	}
	var d api.Datapath
	backend.DescribeSilence(&d, &s, "UDP port 8472")
	if len(d.SilentPeers) != 30 || len(d.Warnings) != 11 || d.Warnings[10].Text != "no packet has arrived from 20 more peers that this node sends to" {
		t.Errorf("%d silent peers, warnings %s", len(d.SilentPeers), fmt.Sprint(d.Warnings))
	}
}
