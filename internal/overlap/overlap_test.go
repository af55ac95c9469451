package overlap

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

func parseConfig(t *testing.T, text string) subnet.Config {
	t.Helper()
	c, _, err := subnet.ParseConfig([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestCutOff places what a node needs inside and outside the cluster network.
func TestCutOff(t *testing.T) {
	const whole, part = `{"Network":"10.0.0.0/8"}`, `{"Network":"10.0.0.0/8","SubnetMin":"10.5.0.0","SubnetMax":"10.5.255.0"}`
	facts := host.Facts{
		Links: []host.LinkFact{{Index: 2, Name: "eth0"}, {Index: 9, Name: "culvert0"}},
		Addrs: []host.AddrFact{{Link: 2, Prefix: netip.MustParsePrefix("192.168.50.11/24"), Global: true}, {Link: 2, Prefix: netip.MustParsePrefix("10.77.0.1/32"), Global: true}},
		Routes: []host.RouteFact{
			{To: netip.MustParsePrefix("0.0.0.0/0"), Link: 2, Via: netip.MustParseAddr("192.168.50.1")},
			{To: netip.MustParsePrefix("10.9.1.0/24"), Link: 2, Via: netip.MustParseAddr("192.168.50.1")},
			{To: netip.MustParsePrefix("10.8.0.0/16"), Link: 9},                                   // of our own device
			{To: netip.MustParsePrefix("10.7.0.0/16"), Link: 2, Ours: true},                       // our own
			{To: netip.MustParsePrefix("10.0.0.0/8"), Metric: host.UnreachableMetric, Ours: true}, // our own
		},
	}
	for _, c := range []struct {
		name, config, addr string
		soft               bool
		refused, warned    int
	}{
		{"behind the router", whole, "10.9.0.5", false, 1, 0},
		{"by a more specific route", whole, "10.9.1.5", false, 0, 0},
		{"by one into our device", whole, "10.8.1.5", false, 1, 0},
		{"by one of ours", whole, "10.7.1.5", false, 1, 0},
		{"the host's own", whole, "10.77.0.1", false, 0, 0},
		{"loopback", whole, "127.0.0.53", false, 0, 0},
		{"elsewhere", whole, "203.0.113.5", false, 0, 0},
		{"of the other family", whole, "fd00::5", false, 0, 0},
		{"not in the part that is given out", part, "10.9.0.5", false, 0, 0},
		{"in that part", part, "10.5.9.5", false, 1, 0},
		{"a resolver that the node itself does not use", whole, "10.9.0.5", true, 0, 1},
	} {
		warned, err := CutOff(parseConfig(t, c.config), facts, []Need{{What: "the etcd server " + c.addr, Addr: netip.MustParseAddr(c.addr), Soft: c.soft}})
		if (err != nil) != (c.refused > 0) || len(warned) != c.warned {
			t.Errorf("%s: %v, %v", c.name, err, warned)
		}
		if err != nil && (!strings.Contains(err.Error(), c.addr) || !strings.Contains(err.Error(), "10.0.0.0/8")) {
			t.Errorf("%s: both are to be named: %v", c.name, err)
		}
	}
}

func TestOverlapping(t *testing.T) {
	own := []netip.Prefix{netip.MustParsePrefix("10.5.72.0/24")}
	for network, want := range map[string]int{"10.5.7.1/24": 1, "10.0.0.5/8": 1, "10.5.0.9/16": 1, "192.168.1.1/24": 0, "10.5.72.9/32": 0, "10.6.0.1/16": 0} {
		got := Networks(parseConfig(t, `{"Network":"10.5.0.0/16"}`), own, []host.LinkNetwork{{Link: "docker0", Prefix: netip.MustParsePrefix(network)}})
		if len(got) != want || want == 1 && (got[0].Check != "network-overlap" || !strings.Contains(got[0].Text, "docker0")) {
			t.Errorf("%s: %v", network, got)
		}
	}
	var none []api.Warning
	if got := Networks(parseConfig(t, `{"Network":"10.0.0.0/8","SubnetMin":"10.5.0.0","SubnetMax":"10.5.255.0"}`), own,
		[]host.LinkNetwork{{Link: "eth1", Prefix: netip.MustParsePrefix("10.240.0.5/16")}}); fmt.Sprint(got) != fmt.Sprint(none) {
		t.Errorf("beside the part that is given out: %v", got)
	}
}

func TestResolvers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte("# mine\nsearch example\nnameserver 10.0.0.2\nnameserver fe80::1%eth0\nnameserver\noptions edns0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%v %s %s %s", resolvers(path), hostOf("https://[fd00::5]:2379"), hostOf("etcd.example:2379"), hostOf("10.9.0.5")); got != "[10.0.0.2 fe80::1] fd00::5 etcd.example 10.9.0.5" {
		t.Error(got)
	}
}
