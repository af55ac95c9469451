package host_test

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"culvert/internal/host"
)

// A Keeper reads other programs' routes again only after a change that concerns
// an address that the plan asked about.
func TestD5OnlyRoutesThatMatter(t *testing.T) {
	n := node(t)
	var looks, onLink atomic.Int64
	k := host.NewKeeper(linkIndex(t, n, n.Link), slog.New(slog.DiscardHandler))
	asked := netip.MustParseAddr("203.0.113.3")
	plan := func(v host.View) (host.State, error) {
		looks.Add(1)
		onLink.Store(0)
		if v.OnLink(asked) {
			onLink.Store(1)
		}
		return host.State{}, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- n.Do(func() error {
			if err := k.Apply(plan); err != nil {
				return err
			}
			return k.Run(ctx)
		})
	}()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	route := func(do func(*netlink.Route) error, to string, scope netlink.Scope) {
		t.Helper()
		inside(t, n, func() error {
			l, err := netlink.LinkByName(n.Link)
			if err != nil {
				return err
			}
			r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: host.IPNet(netip.MustParsePrefix(to)), Scope: scope, Protocol: 186}
			if scope == netlink.SCOPE_UNIVERSE {
				r.Gw = net.IPv4(198, 18, 0, 254)
			}
			return do(r)
		})
	}
	sees := func(want int64, what string) {
		t.Helper()
		for end := time.Now().Add(3 * time.Second); onLink.Load() != want; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal(what)
			}
		}
	}
	// Wait until the initial reconciliations are over.
	for last := int64(-1); looks.Load() != last; time.Sleep(400 * time.Millisecond) {
		last = looks.Load()
	}
	before := looks.Load()
	for range 20 {
		route(netlink.RouteAdd, "192.0.2.0/24", netlink.SCOPE_UNIVERSE)
		route(netlink.RouteDel, "192.0.2.0/24", netlink.SCOPE_UNIVERSE)
		time.Sleep(20 * time.Millisecond)
	}
	if more := looks.Load() - before; more > 1 { // a periodic one
		t.Errorf("routes that lead to nothing of ours caused %d looks", more)
	}
	route(netlink.RouteAdd, "203.0.113.0/24", netlink.SCOPE_LINK)
	sees(1, "a route that puts the address on the link is not seen")
	route(netlink.RouteAdd, "203.0.113.0/28", netlink.SCOPE_UNIVERSE)
	sees(0, "a longer one by a gateway is not seen")
	route(netlink.RouteDel, "203.0.113.0/28", netlink.SCOPE_UNIVERSE)
	sees(1, "that it is gone is not seen")
	// The kernel does not announce the removal of routes of a link that goes
	// down.
	inside(t, n, func() error {
		l, err := netlink.LinkByName(n.Link)
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(l)
	})
	sees(0, "that the link went down is not seen")
}
