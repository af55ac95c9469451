package test

import (
	"fmt"

	"github.com/vishvananda/netlink"

	"culvert/internal/names"
)

// kernelState lists culvert's routes and devices in the current network namespace.
func kernelState() ([]string, error) {
	var lines []string
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: names.RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return nil, err
	}
	for _, r := range routes {
		kind := "route "
		if r.Type == 7 { // RTN_UNREACHABLE
			kind = "unreachable "
		}
		lines = append(lines, fmt.Sprintf("%s%s index %d", kind, r.Dst, r.LinkIndex))
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if name := l.Attrs().Name; len(name) > 2 && (name[:3] == "cvt" || name == "culvert0") {
			lines = append(lines, "link "+name)
		}
	}
	return lines, nil
}
