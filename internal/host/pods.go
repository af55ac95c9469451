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
	ports, err := PortsOf(func(a netip.Prefix) bool { return inside(a.Addr()) })
	if err != nil {
		return 0, err
	}
	routes, err := Retry(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return 0, fmt.Errorf("listing the routes: %w", err)
	}
	pods := len(ports)
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
	ports, err := PortsOf(func(a netip.Prefix) bool { return slices.Contains(gateways, a) })
	if err != nil {
		return nil, err
	}
	var stale []string
	for _, l := range ports {
		if a := l.Attrs(); a.MTU != mtu {
			stale = append(stale, fmt.Sprintf("%s has MTU %d", a.Name, a.MTU))
		}
	}
	return stale, nil
}

// Port is a port of a bridge.
type Port struct {
	netlink.Link
	Bridge netlink.Link
}

// PortsOf returns the ports of the bridges that have an address for which has reports
// true, by interface index.
func PortsOf(has func(netip.Prefix) bool) ([]Port, error) {
	addrs, err := Retry(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("listing the addresses: %w", err)
	}
	bridges := make(map[int]netlink.Link)
	for _, a := range addrs {
		if p, ok := prefixOf(a.IPNet); ok && has(p) {
			bridges[a.LinkIndex] = nil
		}
	}
	if len(bridges) == 0 {
		return nil, nil
	}
	links, err := Retry(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing the network interfaces: %w", err)
	}
	for _, l := range links {
		if _, is := bridges[l.Attrs().Index]; is {
			bridges[l.Attrs().Index] = l
		}
	}
	var ports []Port
	for _, l := range links {
		if bridge := bridges[l.Attrs().MasterIndex]; bridge != nil {
			ports = append(ports, Port{l, bridge})
		}
	}
	slices.SortFunc(ports, func(a, b Port) int { return cmp.Compare(a.Attrs().Index, b.Attrs().Index) })
	return ports, nil
}
