package subnet_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"culvert/subnet"
)

// peer returns the vxlan lease of node-n, with subnet 10.5.n.0/24, created at
// revision 100+n.
func peer(n int, change ...func(*subnet.Lease)) subnet.Entry {
	l := subnet.Lease{
		Node: fmt.Sprintf("node-%d", n), Backend: "vxlan",
		Endpoints: []subnet.Endpoint{end(fmt.Sprintf("10.5.%d.0/24", n), fmt.Sprintf("192.0.2.%d", n),
			subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(fmt.Sprintf("node-%d", n), 1, false)})},
	}
	for _, c := range change {
		c(&l)
	}
	value, err := l.Value()
	if err != nil {
		panic(err)
	}
	return subnet.Entry{Key: l.Key(), Value: value, CreateRevision: int64(100 + n), ModRevision: int64(200 + n), ID: int64(n)}
}

func vxlanConfig(t testing.TB, text string) subnet.Config {
	t.Helper()
	cfg, _, err := subnet.ParseConfig([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestSnapshotSetsAsideWhatCannotStand(t *testing.T) {
	cfg := vxlanConfig(t, `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`)
	own := peer(50)
	self, err := own.Lease()
	if err != nil {
		t.Fatal(err)
	}
	raw := func(key, value string) subnet.Entry {
		return subnet.Entry{Key: key, Value: []byte(value), CreateRevision: 300}
	}
	for name, c := range map[string]struct {
		entry  subnet.Entry
		reason string // part of the rejection; "": accepted
	}{
		"another node":        {peer(9), ""},
		"without identity":    {peer(9, func(l *subnet.Lease) { l.Node = "" }), ""},
		"another length":      {peer(9, func(l *subnet.Lease) { l.Endpoints[0].Subnet = netip.MustParsePrefix("10.5.8.0/23") }), ""},
		"malformed":           {raw("10.5.9.0-24", "oops"), "malformed: the value is not a lease"},
		"oversize":            {raw("10.5.9.0-24", strings.Repeat("x", subnet.MaxValueLen+1)), "over the limit"},
		"no subnet":           {raw("hello", "{}"), "not of the form"},
		"everything":          {raw("0.0.0.0-0", `{"PublicIP":"192.0.2.9","BackendType":"vxlan"}`), "whole address space"},
		"outside":             {peer(9, func(l *subnet.Lease) { l.Endpoints[0].Subnet = netip.MustParsePrefix("10.6.9.0/24") }), "outside 10.5.0.0/16"},
		"wider":               {peer(9, func(l *subnet.Lease) { l.Endpoints[0].Subnet = netip.MustParsePrefix("10.4.0.0/15") }), "outside"},
		"over the older":      {peer(9, func(l *subnet.Lease) { l.Endpoints[0].Subnet = netip.MustParsePrefix("10.5.1.0/25") }), "overlaps 10.5.1.0-24"},
		"around the older":    {peer(9, func(l *subnet.Lease) { l.Endpoints[0].Subnet = netip.MustParsePrefix("10.5.0.0/23") }), "overlaps 10.5.1.0-24"},
		"over ours":           {peer(9, func(l *subnet.Lease) { l.Endpoints[0].Subnet = netip.MustParsePrefix("10.5.50.0/25") }), "overlaps 10.5.50.0-24"},
		"our address":         {peer(9, func(l *subnet.Lease) { l.Endpoints[0].Public = self.Endpoints[0].Public }), "192.0.2.50 belongs to 10.5.50.0-24"},
		"an older's address":  {peer(9, func(l *subnet.Lease) { l.Endpoints[0].Public = netip.MustParseAddr("192.0.2.1") }), "192.0.2.1 belongs to 10.5.1.0-24"},
		"our MAC":             {peer(9, func(l *subnet.Lease) { l.Endpoints[0].VTEP = self.Endpoints[0].VTEP }), "VtepMAC"},
		"an older's MAC":      {peer(9, func(l *subnet.Lease) { l.Endpoints[0].VTEP.MAC = subnet.DeriveMAC("node-1", 1, false) }), "belongs to 10.5.1.0-24"},
		"another backend":     {peer(9, func(l *subnet.Lease) { l.Backend = "host-gw"; l.Endpoints[0].VTEP = subnet.VTEP{} }), `backend is "host-gw", the network uses "vxlan"`},
		"another VNI":         {peer(9, func(l *subnet.Lease) { l.Endpoints[0].VTEP.VNI = 2 }), "VNI is 2, the network uses 1"},
		"loopback":            {peer(9, func(l *subnet.Lease) { l.Endpoints[0].Public = netip.MustParseAddr("127.0.0.9") }), "not a unicast host address"},
		"within the network":  {peer(9, func(l *subnet.Lease) { l.Endpoints[0].Public = netip.MustParseAddr("10.5.9.1") }), "inside the cluster network"},
		"the other family":    {peer(9, func(l *subnet.Lease) { l.Endpoints[0] = end("fd00::/64", "fd01::1", l.Endpoints[0].VTEP) }), "not enabled"},
		"our own key, stolen": {peer(50, func(l *subnet.Lease) { l.Node = "thief" }), "overlaps 10.5.50.0-24"},
	} {
		t.Run(name, func(t *testing.T) {
			entries := []subnet.Entry{peer(1), peer(2), c.entry}
			if name != "our own key, stolen" {
				entries = append(entries, own)
			}
			rand.Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
			s := subnet.BuildSnapshot(cfg, self, entries, 7)
			if s.Revision != 7 || s.Self.Key() != self.Key() || s.Self.Node != "node-50" {
				t.Errorf("self %+v at %d", s.Self, s.Revision)
			}
			want := 2
			if c.reason == "" {
				want = 3
			}
			if len(s.Peers) != want || s.Peers[0].Node != "node-1" || s.Peers[1].Node != "node-2" {
				t.Errorf("peers %v", s.Peers)
			}
			switch {
			case c.reason == "" && len(s.Rejected) != 0:
				t.Errorf("rejected %v", s.Rejected)
			case c.reason != "" && (len(s.Rejected) != 1 || s.Rejected[0].Key != c.entry.Key || !strings.Contains(s.Rejected[0].Reason, c.reason)):
				t.Errorf("rejected %v, want %q", s.Rejected, c.reason)
			}
		})
	}
}

// A newer lease does not evict an older one, whatever the order of their keys.
func TestSnapshotOlderLeaseWins(t *testing.T) {
	cfg := vxlanConfig(t, `{"Network":"10.5.0.0/16"}`)
	for _, newer := range []int{1, 9} {
		older := 10 - newer
		a := peer(older)
		b := peer(newer, func(l *subnet.Lease) { l.Endpoints[0].Public = netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", older)) })
		a.CreateRevision, b.CreateRevision = 5, 6
		s := subnet.BuildSnapshot(cfg, subnet.Lease{}, []subnet.Entry{b, a}, 7)
		if len(s.Peers) != 1 || s.Peers[0].Key() != a.Key || len(s.Rejected) != 1 || s.Rejected[0].Key != b.Key {
			t.Errorf("peers %v, rejected %v", s.Peers, s.Rejected)
		}
	}
}

func TestSnapshotReservations(t *testing.T) {
	cfg := vxlanConfig(t, `{"Network":"10.5.0.0/16"}`)
	reserved := subnet.Entry{Key: "10.5.9.0-24", Value: []byte(`{"PublicIP":"0.0.0.0","PublicIPv6":null,"NodeID":"x"}`), CreateRevision: 1}
	inside := peer(3, func(l *subnet.Lease) { l.Endpoints[0].Subnet = netip.MustParsePrefix("10.5.9.128/25") })
	s := subnet.BuildSnapshot(cfg, subnet.Lease{}, []subnet.Entry{reserved, inside, peer(1)}, 7)
	if len(s.Peers) != 1 || len(s.Rejected) != 1 || !strings.Contains(s.Rejected[0].Reason, "overlaps 10.5.9.0-24") {
		t.Errorf("%+v", s)
	}
	// A reservation does not evict an older lease either, and is rejected by name.
	reserved.CreateRevision = 1000
	s = subnet.BuildSnapshot(cfg, subnet.Lease{}, []subnet.Entry{reserved, inside, peer(1)}, 7)
	if len(s.Peers) != 2 || len(s.Rejected) != 1 || s.Rejected[0].Key != reserved.Key || !strings.Contains(s.Rejected[0].Reason, "overlaps "+inside.Key) {
		t.Errorf("%+v", s)
	}
}

// In a single-family network the other endpoint of a dual-stack lease is removed.
func TestSnapshotDualStack(t *testing.T) {
	both := peer(3, func(l *subnet.Lease) {
		l.Endpoints = append(l.Endpoints, end("fd00:5:0:3::/64", "2001:db8::3", subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC("node-3", 1, true)}))
	})
	for text, want := range map[string]string{
		`{"Network":"10.5.0.0/16"}`: "10.5.3.0-24",
		`{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48"}`:        "10.5.3.0-24&fd00:5:0:3::-64",
		`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48"}`:             "fd00:5:0:3::-64",
		`{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5:0:ff00::/56"}`: "",
		`{"Network":"10.50.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48"}`:       "",
	} {
		s := subnet.BuildSnapshot(vxlanConfig(t, text), subnet.Lease{}, []subnet.Entry{both}, 7)
		got := ""
		if len(s.Peers) == 1 {
			got = s.Peers[0].Key()
		}
		if got != want {
			t.Errorf("%s: %q, want %q; %v", text, got, want, s.Rejected)
		}
	}
}

// The snapshot depends neither on the order of the entries nor on whether they
// were parsed before.
func TestSnapshotDependsOnlyOnEntries(t *testing.T) {
	cfg := vxlanConfig(t, `{"Network":"10.5.0.0/16"}`)
	var entries []subnet.Entry
	for n := 1; n < 30; n++ {
		entries = append(entries, peer(n, func(l *subnet.Lease) {
			if n%5 == 0 {
				l.Endpoints[0].Public = netip.MustParseAddr("192.0.2.200")
			}
		}))
	}
	self, err := peer(50).Lease()
	if err != nil {
		t.Fatal(err)
	}
	want := subnet.BuildSnapshot(cfg, self, entries, 7)
	if len(want.Peers) != 25 || len(want.Rejected) != 4 {
		t.Fatalf("%d peers, %d rejected", len(want.Peers), len(want.Rejected))
	}
	for i := range entries {
		entries[i] = subnet.NewEntry(entries[i])
	}
	rand.Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
	if got := subnet.BuildSnapshot(cfg, self, entries, 7); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

func BenchmarkBuildSnapshot5000(b *testing.B) {
	cfg := vxlanConfig(b, `{"Network":"10.0.0.0/8"}`)
	entries := make([]subnet.Entry, 5000)
	for n := range entries {
		entries[n] = subnet.NewEntry(peer(1, func(l *subnet.Lease) {
			l.Endpoints[0] = end(fmt.Sprintf("10.%d.%d.0/24", n>>8, n&255), fmt.Sprintf("192.%d.%d.9", n>>8, n&255),
				subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(fmt.Sprint(n), 1, false)})
		}))
		entries[n].CreateRevision = int64(n)
	}
	b.ReportAllocs()
	for b.Loop() {
		if s := subnet.BuildSnapshot(cfg, subnet.Lease{}, entries, 1); len(s.Peers) != 5000 {
			b.Fatal(s.Rejected[0])
		}
	}
}
