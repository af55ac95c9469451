package host

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"culvert/internal/names"
)

// PodsIn counts this host's pods in the subnets, as far as the kernel shows
// them: ports of bridges that have an address in a subnet (the bridge plugin),
// and routes to single addresses that lead to a link (ptp and others). Pods
// that bypass the host's routes, as with macvlan, are not counted.
func PodsIn(subnets []netip.Prefix) (int, error) {
	inside := func(a netip.Addr) bool {
		return slices.ContainsFunc(subnets, func(s netip.Prefix) bool { return s.Contains(a) })
	}
	links, err := Retry(netlink.LinkList)
	if err != nil {
		return 0, fmt.Errorf("listing the network interfaces: %w", err)
	}
	addrs, err := Retry(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return 0, fmt.Errorf("listing the addresses: %w", err)
	}
	routes, err := Retry(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return 0, fmt.Errorf("listing the routes: %w", err)
	}
	gateway := make(map[int]bool) // links with an address in the subnets
	for _, a := range addrs {
		if p, ok := prefixOf(a.IPNet); ok && inside(p.Addr()) {
			gateway[a.LinkIndex] = true
		}
	}
	pods := 0
	for _, l := range links {
		if l.Attrs().MasterIndex != 0 && gateway[l.Attrs().MasterIndex] {
			pods++
		}
	}
	for _, r := range routes {
		if p, ok := prefixOf(r.Dst); ok && p.IsSingleIP() && inside(p.Addr()) && r.Protocol != names.RouteProtocol && r.LinkIndex != 0 && r.Gw == nil {
			pods++
		}
	}
	return pods, nil
}

// StalePods describes the host ends of pods that were created with another MTU:
// ports of a bridge with a gateway address. A bridge plugin gives both ends the
// same MTU.
func StalePods(gateways []netip.Prefix, mtu int) ([]string, error) {
	addrs, err := Retry(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("listing the addresses: %w", err)
	}
	bridges := make(map[int]bool)
	for _, a := range addrs {
		if p, ok := prefixOf(a.IPNet); ok && slices.Contains(gateways, p) {
			bridges[a.LinkIndex] = true
		}
	}
	if len(bridges) == 0 {
		return nil, nil
	}
	links, err := Retry(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing the network interfaces: %w", err)
	}
	slices.SortFunc(links, func(a, b netlink.Link) int { return cmp.Compare(a.Attrs().Index, b.Attrs().Index) })
	var stale []string
	for _, l := range links {
		if a := l.Attrs(); bridges[a.MasterIndex] && a.MTU != mtu {
			stale = append(stale, fmt.Sprintf("%s has MTU %d", a.Name, a.MTU))
		}
	}
	return stale, nil
}
