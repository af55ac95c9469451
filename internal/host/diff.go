package host

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"

	"culvert/internal/firewall"
)

// step is one change and how to apply it: by a call, as a message in a batch,
// or by package firewall, after all others.
type step struct {
	Change
	link    string // the device of ours that the step requires, if any
	caution bool   // a setting whose failure is tolerated
	do      func(*writer) error
	message func(*writer) (netlink.Message, error)
	rules   *firewall.Step
}

// diff returns the steps from the present state to the wanted one. It does no
// I/O. The order ensures that no packet is misrouted in between:
//
//  1. remove leftover fast-path filters, enable forwarding, add catch-all routes
//  2. remove unwanted routes, FDB entries and neighbours
//  3. remove devices that are unwanted or cannot be changed into what is wanted
//  4. add devices and their addresses, FDB entries, neighbours, then routes; remove
//     replaced routes and stale ones of other programs
//  5. restore the pods' bridge
//  6. nftables: add our sets, then change our table in one transaction and other
//     programs' chains in another
func diff(have reading, want State) []step {
	var d differ
	d.before = filterSteps(have, want)
	d.forwarding(have, want)
	gone := d.condemned(have, want)
	d.routes(have, want, gone)
	stale, _ := foreignRoutes(have, want)
	return slices.Concat(d.before, d.down, d.links(have, want, gone), d.up, d.after, stale, podBridgeSteps(have), firewallSteps(have, want))
}

// differ collects the steps before and after those that change devices.
type differ struct{ before, down, up, after []step }

// setting returns the step that sets a sysctl: none if it has the value
// already, or if the kernel lacks it and it is not a setting of one of our
// devices.
func (r reading) setting(key, value, link string) []step {
	have, known := r.settings[key]
	if have == value || !known && link == "" {
		return nil
	}
	return []step{{
		Change: Change{KindSysctl, sysctlCommand(key, value)}, link: link,
		do: func(*writer) error { return setSysctl(key, value) },
	}}
}

// condemned returns our devices that must be removed: they are not wanted, or
// cannot be changed into what is wanted.
func (d *differ) condemned(have reading, want State) map[string]bool {
	gone := make(map[string]bool)
	for _, h := range have.Links {
		i := slices.IndexFunc(want.Links, func(w Link) bool { return w.Name == h.Name })
		if i < 0 || !compatible(h, want.Links[i], have.devices[h.Name]) {
			gone[h.Name] = true
		}
	}
	return gone
}

// compatible reports whether a device can be changed in place into what is
// wanted. Attributes that are fixed at creation cannot.
func compatible(h, w Link, dev device) bool {
	switch {
	case w.VXLAN != nil:
		if h.VXLAN == nil || !dev.plain {
			return false
		}
		a, b := *h.VXLAN, *w.VXLAN
		a.MAC, b.MAC = MAC{}, MAC{} // the MAC can be changed in place
		return a == b
	case w.Veth != "":
		return h.Veth == w.Veth
	case w.IPIP != nil:
		return h.IPIP != nil && dev.plain && *h.IPIP == *w.IPIP
	}
	return h.VXLAN == nil && h.IPIP == nil
}

func (d *differ) routes(have reading, want State, gone map[string]bool) {
	wanted := make(map[Route]bool, len(want.Routes))
	for _, r := range want.Routes {
		wanted[r.normal()] = true
	}
	present := make(map[Route]bool, len(have.Routes))
	// If one of our routes replaces another, add the new one first (the kernel
	// prefers the newest), so that there is always one. Not for IPv6, where the
	// kernel would merge the two into a multipath route.
	type key struct {
		to     netip.Prefix
		metric int
	}
	replaced := make(map[key]bool, len(want.Routes))
	for _, r := range want.Routes {
		r = r.normal()
		replaced[key{r.To, r.Metric}] = r.To.Addr().Is4()
	}
	var down []step
	for _, r := range have.Routes {
		switch {
		case gone[r.Link]: // removed with its device
		case wanted[r] && !present[r]:
			present[r] = true
		case replaced[key{r.To, r.Metric}]:
			d.after = append(d.after, routeStep(r, false))
		default:
			down = append(down, routeStep(r, false))
		}
	}
	d.peers(have, want, gone)
	d.down = append(down, d.down...)
	for _, r := range catchAllFirst(want.Routes) {
		r = r.normal()
		switch {
		case present[r]:
		case r.Link == "":
			d.before = append(d.before, routeStep(r, true))
		default:
			d.up = append(d.up, routeStep(r, true))
		}
	}
}

// peers compares FDB entries and neighbours.
func (d *differ) peers(have reading, want State, gone map[string]bool) {
	fdb := make(map[[2]string]FDBEntry)
	keep := make(map[FDBEntry]bool, len(want.FDB))
	for _, e := range want.FDB {
		keep[e] = true
		fdb[[2]string{e.Link, e.MAC.String()}] = e
	}
	present := make(map[FDBEntry]bool, len(have.FDB))
	for _, e := range have.FDB {
		if gone[e.Link] {
			continue
		}
		present[e] = true
		if _, moved := fdb[[2]string{e.Link, e.MAC.String()}]; !keep[e] && !moved {
			d.down = append(d.down, fdbStep(e, false))
		}
	}
	for _, e := range want.FDB {
		if !present[e] {
			d.up = append(d.up, fdbStep(e, true))
		}
	}

	type at struct {
		link string
		ip   netip.Addr
	}
	macs := make(map[at]MAC, len(want.Neighbours))
	for _, n := range want.Neighbours {
		macs[at{n.Link, n.IP}] = n.MAC
	}
	known := make(map[Neighbour]bool, len(have.Neighbours))
	for _, n := range have.Neighbours {
		if gone[n.Link] {
			continue
		}
		known[n] = true
		if _, wanted := macs[at{n.Link, n.IP}]; !wanted {
			d.down = append(d.down, neighbourStep(n, false))
		}
	}
	for _, n := range want.Neighbours {
		if !known[n] {
			d.up = append(d.up, neighbourStep(n, true))
		}
	}
}

func (d *differ) links(have reading, want State, gone map[string]bool) []step {
	var steps []step
	for _, h := range have.Links {
		if gone[h.Name] {
			steps = append(steps, deleteStep(h.Name))
		}
	}
	for _, name := range want.Replaces {
		if have.others[name] {
			steps = append(steps, deleteStep(name))
		}
	}
	for _, w := range want.Links {
		i := slices.IndexFunc(have.Links, func(h Link) bool { return h.Name == w.Name })
		if i < 0 || gone[w.Name] {
			steps = append(steps, createSteps(have, w)...)
			continue
		}
		steps = append(steps, adjustSteps(have, have.Links[i], w)...)
	}
	return steps
}

// createSteps returns the steps that create a device and configure it.
func createSteps(have reading, w Link) []step {
	steps := []step{{Change: Change{KindLink, w.addCommand()}, link: w.Name, do: func(wr *writer) error { return wr.addLink(w) }}}
	return append(steps, adjustSteps(reading{settings: have.newDevice(w.Name)}, Link{Name: w.Name, MTU: w.MTU, GSOMaxSegs: w.GSOMaxSegs, VXLAN: w.VXLAN}, w)...)
}

// adjustSteps returns the steps that change an existing device into the wanted
// one.
func adjustSteps(have reading, h, w Link) []step {
	var steps []step
	add := func(kind Kind, do func(*writer) error, format string, args ...any) {
		steps = append(steps, step{Change: Change{kind, fmt.Sprintf(format, args...)}, link: w.Name, do: do})
	}
	for _, s := range deviceSettings(w, have.settings) {
		for _, step := range have.setting(s.key, s.value, w.Name) {
			step.caution = s.caution
			steps = append(steps, step)
		}
	}
	if w.VXLAN != nil && h.VXLAN != nil && h.VXLAN.MAC != w.VXLAN.MAC {
		add(KindLink, func(wr *writer) error { return wr.setMAC(w.Name, w.VXLAN.MAC) }, "ip link set %s address %s", w.Name, w.VXLAN.MAC)
	}
	if have.devices[w.Name].port {
		add(KindLink, func(wr *writer) error { return wr.release(w.Name) }, "ip link set %s nomaster", w.Name)
	}
	if w.MTU != 0 && h.MTU != w.MTU {
		add(KindLink, func(wr *writer) error { return wr.setMTU(w.Name, w.MTU) }, "ip link set %s mtu %d", w.Name, w.MTU)
	}
	if w.GSOMaxSegs != 0 && h.GSOMaxSegs != w.GSOMaxSegs {
		add(KindLink, func(wr *writer) error { return wr.setGSOMaxSegs(w.Name, w.GSOMaxSegs) }, "ip link set %s gso_max_segs %d", w.Name, w.GSOMaxSegs)
	}
	for _, p := range h.Addrs {
		if !slices.Contains(w.Addrs, p) {
			add(KindAddress, func(wr *writer) error { return wr.address(w.Name, p, false) }, "ip address del %s dev %s", p, w.Name)
		}
	}
	for _, p := range w.Addrs {
		if !slices.Contains(h.Addrs, p) {
			add(KindAddress, func(wr *writer) error { return wr.address(w.Name, p, true) }, "ip address add %s dev %s%s", p, w.Name, nodad(p))
		}
	}
	if !have.devices[w.Name].up {
		add(KindLink, func(wr *writer) error { return wr.setUp(w.Name) }, "ip link set %s up", w.Name)
	}
	return steps
}

// nodad skips duplicate address detection for an IPv6 address, during which it
// could not be used: no other host is on the link.
func nodad(p netip.Prefix) string {
	if p.Addr().Is4() {
		return ""
	}
	return " nodad"
}

func deleteStep(name string) step {
	return step{Change: Change{KindLink, "ip link del " + name}, do: func(w *writer) error { return w.deleteLink(name) }}
}

func routeStep(r Route, add bool) step {
	s := step{
		Change: Change{KindRoute, "ip route del " + r.String()}, link: r.Link,
		message: func(w *writer) (netlink.Message, error) { return w.routeMessage(r, add) },
	}
	if add {
		s.Command = "ip route prepend " + r.String()
	}
	return s
}

func fdbStep(e FDBEntry, add bool) step {
	s := step{
		Change: Change{KindFDB, "bridge fdb del " + e.String()}, link: e.Link,
		message: func(w *writer) (netlink.Message, error) { return w.fdbMessage(e, add) },
	}
	if add {
		s.Command = "bridge fdb replace " + e.String()
	}
	return s
}

func neighbourStep(n Neighbour, add bool) step {
	s := step{
		Change: Change{KindNeighbour, fmt.Sprintf("ip neigh del %s dev %s", n.IP, n.Link)}, link: n.Link,
		message: func(w *writer) (netlink.Message, error) { return w.neighbourMessage(n, add) },
	}
	if add {
		s.Command = "ip neigh replace " + n.String()
	}
	return s
}

// catchAllFirst sorts the catch-all routes (those with the highest metric)
// first, so that no packet for the cluster network ever takes the default
// route.
func catchAllFirst(routes []Route) []Route {
	return slices.SortedStableFunc(slices.Values(routes), func(a, b Route) int {
		return cmp.Compare(b.Metric, a.Metric)
	})
}

// observe returns what read would return on a host in the given state.
func observe(s State) reading {
	r := reading{
		State: s, devices: make(map[string]device), others: make(map[string]bool), settings: make(map[string]string),
		firewall: s.Firewall.Applied(),
	}
	r.Routes = nil
	for _, route := range s.Routes {
		r.Routes = append(r.Routes, route.normal())
		r.settings[forwardingKey(route.To.Addr().Is4())] = "1"
	}
	for _, is4 := range []bool{true, false} {
		if _, on := r.settings[forwardingKey(is4)]; !on {
			r.settings[forwardingKey(is4)] = "0"
		}
	}
	for i, l := range s.Links {
		r.devices[l.Name] = device{index: i + 1, up: true, plain: true}
		for _, set := range deviceSettings(l, r.settings) {
			r.settings[set.key] = set.value
		}
	}
	return r
}
