package cli

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"culvert/internal/daemon"
)

// D1: status.hostIP has the cluster's first address family, status.hostIPs has both.
func TestD1PublicIPOfEitherFamily(t *testing.T) {
	for _, c := range []struct{ ip, ipv6, want string }{
		{"10.0.0.1", "", "10.0.0.1"},
		{"fd00::11", "", "fd00::11"},
		{"", "fd00::11", "fd00::11"},
		{"fd00::11, 10.0.0.1", "", "10.0.0.1 fd00::11"},
		{"10.0.0.1", "fd00::11", "10.0.0.1 fd00::11"},
		{"10.0.0.1,fd00::11,", "fd00::11", "10.0.0.1 fd00::11"},
		{"::ffff:10.0.0.1", "", "10.0.0.1"},
		{"", "", ""},
	} {
		var o daemon.Options
		f := runFlags{publicIP: c.ip, publicIPv6: c.ipv6}
		var want []netip.Addr
		for _, w := range strings.Fields(c.want) {
			want = append(want, netip.MustParseAddr(w))
		}
		if err := f.underlay(&o); err != nil || !slices.Equal(o.PublicIPs, want) || !slices.Equal(o.Underlay.PublicIPs, want) {
			t.Errorf("%q %q: %v, %v", c.ip, c.ipv6, o.PublicIPs, err)
		}
	}
	for _, bad := range []string{"fe80::1%eth0", "fe80::1", "0.0.0.0", "ff02::1", "127.0.0.1", "host", "fd00::1,fd00::2"} {
		if err := (&runFlags{publicIP: bad}).underlay(&daemon.Options{}); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}
