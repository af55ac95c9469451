package host

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
)

// The bridge plugin sets the pods' bridge up when it adds the first pod: this node's
// gateway addresses, and with them the kernel's routes to the subnets. If another
// program takes any of that away, or sets the bridge down, no packet reaches a pod until
// the next pod is added. So the Keeper restores it, as long as pods are on the bridge.

// bridgeFact is a bridge that is not culvert's, or a port of one.
type bridgeFact struct {
	index int
	name  string
	up    bool
	mac   MAC
}

// podBridge is what a reading and earlier ones tell about the pods' bridge.
type podBridge struct {
	bridgeFact
	noIPv6 bool           // IPv6 is disabled on it
	absent []netip.Prefix // addresses that it lacks: gateways, and IPv6's link-local one
	unled  []netip.Prefix // gateway addresses without a route to their subnet
}

// podBridges remembers the pods' bridges between readings.
type podBridges struct {
	gateways map[netip.Prefix]bridgeFact // which bridge last had a gateway address
	ports    map[int]map[int]string      // by the bridge's index; names by index
	// doubts counts the readings in a row that lacked a gateway's route, or an address
	// that no reading has seen: the plugin may just be adding them, and routes are cached.
	doubts map[netip.Prefix]int
	// unlinked is since when a bridge has no IPv6 link-local address. The kernel makes it,
	// but not at once. Without it, it cannot ask for the pods' Ethernet addresses.
	unlinked map[int]time.Time
}

// linkLocalAfter is how long the kernel may take to make a link-local address.
const linkLocalAfter = 2 * time.Second

// gatewayOf returns the pods' gateway in a subnet, its first host address.
func gatewayOf(subnet netip.Prefix) netip.Prefix {
	return netip.PrefixFrom(subnet.Masked().Addr().Next(), subnet.Bits())
}

// find returns the pods' bridges of a reading. One is recognized by a gateway address,
// by an earlier reading, by the gateway address of the other family, or, unless it has
// other addresses of the family, by the name in the CNI records (State.Bridges).
func (m *podBridges) find(have reading, want State, routed func(subnet netip.Prefix, link int) bool) []podBridge {
	if m.gateways == nil {
		m.gateways, m.doubts, m.unlinked = make(map[netip.Prefix]bridgeFact), make(map[netip.Prefix]int), make(map[int]time.Time)
	}
	bearing := func(match func(netip.Prefix) bool) (bridgeFact, bool) {
		for _, b := range have.bearers {
			if f, ok := have.bridges[b.Index]; ok && match(b.addr) {
				return f, true
			}
		}
		return bridgeFact{}, false
	}
	found := make(map[int]*podBridge)
	wanted := make(map[netip.Prefix]bool)
	for _, s := range want.Subnets {
		gateway := gatewayOf(s)
		wanted[gateway] = true
		b, has := bearing(func(a netip.Prefix) bool { return a == gateway })
		ok := has
		if !ok {
			b, ok = have.bridges[m.gateways[gateway].index]
		}
		if !ok {
			b, ok = bearing(func(a netip.Prefix) bool {
				return slices.ContainsFunc(want.Subnets, func(s netip.Prefix) bool { return gatewayOf(s) == a })
			})
		}
		for _, f := range have.bridges {
			if !ok && slices.Contains(want.Bridges, f.name) {
				other := slices.ContainsFunc(have.bearers, func(x bearer) bool {
					return x.Index == f.index && x.addr.Addr().Is4() == s.Addr().Is4() && !x.addr.Addr().IsLinkLocalUnicast()
				})
				b, ok = f, !other
			}
		}
		if !ok || len(have.ports[b.index]) == 0 {
			continue
		}
		seen := m.gateways[gateway].index == b.index
		m.gateways[gateway] = b
		p := found[b.index]
		if p == nil {
			p = &podBridge{bridgeFact: b}
			found[b.index] = p
		}
		if !s.Addr().Is4() {
			p.noIPv6 = sysctl("net/ipv6/conf/"+b.name+"/disable_ipv6") == "1"
			if m.lacksLinkLocal(have, p) {
				p.absent = append(p.absent, linkLocal(b.mac))
			}
		}
		switch {
		case has && (!b.up || routed(s.Masked(), b.index)):
			delete(m.doubts, gateway)
		case !has && seen:
			delete(m.doubts, gateway)
			p.absent = append(p.absent, gateway)
		default:
			if m.doubts[gateway]++; has && m.doubts[gateway] > 1 {
				p.unled = append(p.unled, gateway)
			}
		}
	}
	maps.DeleteFunc(m.gateways, func(g netip.Prefix, _ bridgeFact) bool { return !wanted[g] })
	all := make([]podBridge, 0, len(found))
	for _, i := range slices.Sorted(maps.Keys(found)) {
		all = append(all, *found[i])
	}
	return all
}

// lacksLinkLocal reports whether a bridge should have had a link-local address for long.
func (m *podBridges) lacksLinkLocal(have reading, b *podBridge) bool {
	has := slices.ContainsFunc(have.bearers, func(x bearer) bool {
		return x.Index == b.index && x.addr.Addr().Is6() && x.addr.Addr().IsLinkLocalUnicast()
	})
	if has || !b.up || b.noIPv6 {
		delete(m.unlinked, b.index)
		return false
	}
	if m.unlinked[b.index].IsZero() {
		m.unlinked[b.index] = time.Now()
	}
	return time.Since(m.unlinked[b.index]) > linkLocalAfter
}

// linkLocal returns the link-local address made of an Ethernet address (RFC 4291,
// appendix A).
func linkLocal(mac MAC) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfe, 0x80, 8: mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]}), 64)
}

// again reports whether another reading must confirm that something is missing.
func (m *podBridges) again() bool {
	for _, n := range m.doubts {
		if n == 1 {
			return true
		}
	}
	return false
}

// cutOff warns of pods' links that are not ports of the pods' bridge any more, or are
// down. It remembers the ports for the next reading. If a bridge was deleted, the links
// to other namespaces that have no address are pods'.
func (m *podBridges) cutOff(have reading, want State) []api.Warning {
	before := m.ports
	m.ports = make(map[int]map[int]string)
	var all []api.Warning
	warn := func(fix, format string, args ...any) {
		all = append(all, api.Warning{Check: "host-pods", Text: fmt.Sprintf(format, args...), Fix: fix})
	}
	known, deleted := m.known(), make(map[string]bool)
	for _, name := range want.Bridges {
		if _, ok := have.indexes[name]; !ok && len(known) == 0 {
			deleted[name] = true
		}
	}
	for _, b := range known {
		now := make(map[int]string)
		var detached, down []string
		for _, p := range have.ports[b.index] {
			now[p.index] = p.name
			if !p.up {
				down = append(down, p.name)
			}
		}
		for index := range before[b.index] {
			if name, ok := have.loose[index]; ok {
				now[index] = name
				detached = append(detached, name)
			}
		}
		m.ports[b.index] = now
		if at, ok := have.bridges[b.index]; ok {
			b = at // it may have been renamed
		} else if have.nameOf(b.index) == "" {
			deleted[b.name] = true
			continue
		}
		slices.Sort(detached)
		if len(detached) > 0 {
			warn(fmt.Sprintf("ip link set %s master %s", detached[0], b.name), "%s is not a port of the pods' bridge %s any more: nothing reaches that pod", some(detached), b.name)
		}
		if len(down) > 0 {
			warn(fmt.Sprintf("ip link set %s up", down[0]), "%s, a port of the pods' bridge %s, is down: nothing reaches that pod", some(down), b.name)
		}
	}
	if left := have.unattached(); len(left) > 0 {
		for _, name := range slices.Sorted(maps.Keys(deleted)) {
			warn("recreate the pods: the first one makes the bridge anew", "the pods' bridge %s was deleted: nothing reaches the pods at %s", name, some(left))
		}
	}
	return all
}

// unattached returns the links to other namespaces that have neither a master nor an
// address.
func (r reading) unattached() []string {
	var all []string
	for index, name := range r.loose {
		if !slices.ContainsFunc(r.bearers, func(b bearer) bool { return b.Index == index && !b.addr.Addr().IsLinkLocalUnicast() }) {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all
}

// known returns the bridges that last had a gateway address.
func (m *podBridges) known() []bridgeFact {
	byIndex := make(map[int]bridgeFact)
	for _, b := range m.gateways {
		byIndex[b.index] = b
	}
	return slices.SortedFunc(maps.Values(byIndex), func(a, b bridgeFact) int { return a.index - b.index })
}

// some lists the first of names.
func some(names []string) string {
	const most = 3
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

// podBridgeSteps returns the steps that restore the pods' bridges.
func podBridgeSteps(have reading) []step {
	var steps []step
	for _, b := range have.podBridges {
		add := func(do func(*writer) error, format string, args ...any) {
			steps = append(steps, step{Change: Change{KindPods, fmt.Sprintf(format, args...)}, link: b.name, do: do})
		}
		if !b.up {
			add(func(w *writer) error { return w.setUp(b.name) }, "ip link set %s up", b.name)
		}
		if b.noIPv6 {
			key := "net/ipv6/conf/" + b.name + "/disable_ipv6"
			add(func(*writer) error { return setSysctl(key, "0") }, "%s", sysctlCommand(key, "0"))
		}
		for _, g := range b.absent {
			add(func(w *writer) error {
				if err := w.address(b.name, g, true); !errors.Is(err, unix.EEXIST) {
					return err
				}
				return nil
			}, "ip address add %s dev %s%s", g, b.name, nodad(g))
		}
		for _, g := range b.unled {
			add(func(*writer) error { return leadTo(g, b.index) }, "ip route add %s dev %s proto kernel src %s", g.Masked(), b.name, g.Addr())
		}
	}
	return steps
}

// leadTo adds the route to a subnet that the kernel had added with the gateway address.
func leadTo(gateway netip.Prefix, link int) error {
	r := &netlink.Route{
		Dst: IPNet(gateway.Masked()), LinkIndex: link, Protocol: unix.RTPROT_KERNEL, Scope: netlink.SCOPE_LINK, Src: gateway.Addr().AsSlice(),
	}
	if gateway.Addr().Is6() {
		r.Src, r.Scope, r.Priority = nil, netlink.SCOPE_UNIVERSE, connected6
	}
	if err := netlink.RouteAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
