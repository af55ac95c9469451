package echo_test

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"culvert/internal/echo"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// TestEcho measures, in both families, a neighbour that replies, one whose link
// silently drops packets over 1400 bytes, and an unused address.
func TestEcho(t *testing.T) {
	prefixes := []netip.Prefix{netip.MustParsePrefix("198.18.0.0/24"), netip.MustParsePrefix("fd00:18::/64")}
	l := labtest.New(t, lab.Options{Nodes: 3, Prefixes: prefixes})
	n1, n2, n3 := l.Nodes[0], l.Nodes[1], l.Nodes[2]
	if err := n3.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(link, 1400)
	}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	const timeout = 300 * time.Millisecond
	for family, nobody := range []string{"198.18.0.99", "fd00:18::99"} {
		var p *echo.Pinger
		if err := n1.Do(func() (err error) {
			p, err = echo.Open(n1.Addrs[family])
			return err
		}); err != nil {
			t.Fatal(err)
		}
		s, err := p.Series(ctx, n2.Addrs[family], 3, 0, 10*time.Millisecond, 2*time.Second)
		if err != nil || s.Answered != 3 || s.Median() <= 0 {
			t.Errorf("%s: %+v, %v", n2.Addrs[family], s, err)
		}
		for _, c := range []struct {
			to        netip.Addr
			low, high int
			want      int
		}{
			{n2.Addrs[family], 100, 1500, 1500},
			{n2.Addrs[family], 100, 1600, 1500},  // limited by this host's own link
			{n3.Addrs[family], 1300, 1500, 1404}, // a veth accepts 4 bytes more, for a VLAN tag
			{n3.Addrs[family], 1450, 1500, 0},
		} {
			if got, err := p.PathMTU(ctx, c.to, c.low, c.high, timeout); err != nil || got != c.want {
				t.Errorf("path MTU to %s between %d and %d: %d, %v; want %d", c.to, c.low, c.high, got, err, c.want)
			}
		}
		short, cancel := context.WithTimeout(ctx, timeout)
		if _, err := p.Ping(short, netip.MustParseAddr(nobody), 0); !errors.Is(err, echo.ErrTimeout) {
			t.Errorf("unused address: %v", err)
		}
		cancel()
		if _, err := p.Ping(ctx, n2.Addrs[1-family], 0); err == nil {
			t.Error("got a reply from an address of the other family")
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A router's ICMP error for an unreachable address is returned as Refused.
func TestRefused(t *testing.T) {
	l := labtest.New(t, lab.Options{Nodes: 1})
	n := l.Nodes[0]
	// The fabric is the default gateway and has no route to the address.
	if err := l.Fabric.SetSysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	var p *echo.Pinger
	if err := n.Do(func() (err error) {
		p, err = echo.Open(netip.IPv4Unspecified())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err := p.Ping(ctx, netip.MustParseAddr("203.0.113.7"), 0)
	var refused echo.Refused
	if !errors.As(err, &refused) || refused.By != l.FabricAddrs[0] || refused.Reason != "network unreachable" {
		t.Errorf("%v", err)
	}
}
