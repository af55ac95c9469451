package fastpath

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/names"
)

// look reads the facts from the host. The error says why the fast path must not be used
// on this host.
func (p *Path) look(s host.State, v host.View) (facts, error) {
	f := facts{links: make(map[string]link), hops: make(map[uint32]uint8)}
	ends, err := endsOf(s)
	if err != nil {
		return f, err
	}
	names := []string{names.JoinNear, names.JoinFar}
	queues := readQdiscs()
	var uplink string
	for _, e := range ends {
		uplink = e.Device
		names = append(names, e.device, uplink)
	}
	for _, name := range names {
		found, err := netlink.LinkByName(name)
		if err != nil {
			continue // contentsOf reports a missing link
		}
		a := found.Attrs()
		f.links[name] = link{a.Index, a.MTU, a.EncapType == "ether" && len(a.HardwareAddr) == 6}
		if slices.ContainsFunc(ends, func(e end) bool { return e.device == name }) {
			if kind := queues.shaped[a.Index]; kind != "" {
				return f, fmt.Errorf("the qdisc %s on %s shapes what leaves (`tc qdisc show dev %s`)", kind, name, name)
			}
		}
	}
	if err := noIPsec(); err != nil {
		return f, err
	}
	if chain, err := firewall.IngressChain(); err != nil || chain != "" {
		if err == nil {
			err = fmt.Errorf("the nftables chain %s sees what comes in, which the fast path would pass by (`nft list chain %s`)", chain, chain)
		}
		return f, err
	}
	text := strings.Fields(setting("net/ipv4/ip_local_port_range"))
	if len(text) != 2 {
		return f, errors.New("the range of local ports is not to be read")
	}
	first, err1 := strconv.ParseUint(text[0], 10, 16)
	last, err2 := strconv.ParseUint(text[1], 10, 16)
	if err := errors.Join(err1, err2); err != nil || last < first {
		return f, fmt.Errorf("the range of local ports is %q", text)
	}
	f.firstPort, f.ports = uint16(first), uint16(last-first)
	for family, key := range map[uint32]string{4: "net/ipv4/ip_default_ttl", 6: "net/ipv6/conf/" + uplink + "/hop_limit"} {
		f.hops[family] = 64
		if n, err := strconv.ParseUint(setting(key), 10, 8); err == nil && n > 0 {
			f.hops[family] = uint8(n)
		}
	}
	if p.mode.shortens() && p.mayShorten(v) {
		registry := p.registry
		if host.TCX() && p.podLinks == nil { // with programs of an earlier daemon
			if registry, err = host.ReadRegistry(); err != nil {
				return f, err
			}
		}
		if f.pods, f.left, err = podLinks(s.Subnets, queues, registry.Programs); err != nil {
			return f, err
		}
	}
	p.paths.refresh(ends)
	f.path = p.paths.of
	return f, nil
}

// mayShorten reports whether pods may have the short way on this host.
func (p *Path) mayShorten(v host.View) bool {
	why := ""
	if p.mode == Auto && v.EachPacket != "" {
		why = v.EachPacket + " counts on seeing each packet"
	} else if err := conntrackAnswers(); err != nil {
		why = fmt.Sprintf("conntrack does not answer (%v): load it (`modprobe nf_conntrack_netlink`)", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if why != p.whyNotShort && why != "" {
		p.log.Info("packets between pods take the host's way", "why", why)
	}
	p.whyNotShort = why
	return why == ""
}

func setting(key string) string {
	b, err := os.ReadFile("/proc/sys/" + key)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// qdiscs are the host's queueing disciplines, by index of their link.
type qdiscs struct {
	// shaped has the type of a root qdisc that another program added, which the fast path
	// would bypass. The kernel's default one has no handle.
	shaped map[int]string
	clsact map[int]bool
}

func readQdiscs() qdiscs {
	q := qdiscs{make(map[int]string), make(map[int]bool)}
	all, err := host.Retry(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(nil) })
	if err != nil {
		return q
	}
	for _, d := range all {
		switch a := d.Attrs(); {
		case a.Parent == netlink.HANDLE_ROOT && a.Handle != 0:
			q.shaped[a.LinkIndex] = d.Type()
		case d.Type() == "clsact":
			q.clsact[a.LinkIndex] = true
		}
	}
	return q
}

// noIPsec returns an error if there is an outgoing IPsec policy, which might apply to
// underlay packets: the kernel's vxlan device honours it, bpf_redirect_neigh does not.
func noIPsec() error {
	policies, err := host.Retry(func() ([]netlink.XfrmPolicy, error) { return netlink.XfrmPolicyList(netlink.FAMILY_ALL) })
	if err != nil {
		return nil // a kernel without IPsec
	}
	if slices.ContainsFunc(policies, func(x netlink.XfrmPolicy) bool { return x.Dir == netlink.XFRM_DIR_OUT }) {
		return errors.New("this host has IPsec policies, which the fast path would pass by (`ip xfrm policy`)")
	}
	return nil
}

// pathMTUs caches the path MTUs of the routes to peers. They must be polled: the kernel
// sends no notification when an ICMP error changes one.
type pathMTUs struct {
	known map[netip.Addr]pathMTU
	turn  int
	asked time.Time
}

type pathMTU struct {
	mtu    int // 0: the uplink's
	usable bool
}

// askedAtOnce is how many cached routes one refresh looks up again, in turn, and askAgain
// the minimum interval between such refreshes.
const (
	askedAtOnce = 256
	askAgain    = 3 * time.Second
)

func (m *pathMTUs) refresh(ends []end) {
	type peer struct {
		outer netip.Addr
		way
	}
	var peers []peer
	for _, e := range ends {
		var by way
		if uplink, err := netlink.LinkByName(e.Device); err == nil {
			by = way{e.Local, uplink.Attrs().Index}
		}
		for _, t := range e.targets {
			peers = append(peers, peer{t.outer, by})
		}
	}
	old, again := m.known, time.Since(m.asked) > askAgain
	if again {
		m.asked = time.Now()
	}
	m.known = make(map[netip.Addr]pathMTU, len(peers))
	for i, p := range peers {
		known, there := old[p.outer]
		if !there || again && (len(peers) <= askedAtOnce || (i-m.turn+len(peers))%len(peers) < askedAtOnce) {
			known = ask(p.outer, p.way)
		}
		m.known[p.outer] = known
	}
	if again && len(peers) > 0 {
		m.turn = (m.turn + askedAtOnce) % len(peers)
	}
}

// way is the source address and the uplink of a tunnel's outer packets.
type way struct {
	local  netip.Addr
	uplink int
}

// ask looks up the route to a peer as the vxlan device does: from its source address,
// by any link that the host's routes and rules select (FDB entries name none). A route of
// another type or by another link than the uplink is left to the device:
// bpf_redirect_neigh is given the uplink, and would treat the peer of a blackhole route
// as on-link.
func ask(to netip.Addr, tunnel way) pathMTU {
	if tunnel.uplink == 0 {
		return pathMTU{}
	}
	routes, err := netlink.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{SrcAddr: tunnel.local.AsSlice()})
	if err != nil || len(routes) != 1 {
		return pathMTU{}
	}
	r := routes[0]
	plain := r.Type == unix.RTN_UNICAST && r.Encap == nil && r.LinkIndex == tunnel.uplink
	return pathMTU{r.MTU, plain}
}

func (m *pathMTUs) of(to netip.Addr, _ string) (mtu int, usable bool) {
	known := m.known[to]
	if known.mtu == 0 {
		known.mtu = 1 << 16
	}
	return known.mtu, known.usable
}
