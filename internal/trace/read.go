package trace

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"culvert/internal/firewall"
	"culvert/internal/host"
)

// Read adds the kernel's facts to p, which has the two addresses, the leases
// and the datapath's configuration.
func Read(p Path) (Path, error) {
	is4 := p.Local.Is4()
	links, err := host.Retry(netlink.LinkList)
	if err != nil {
		return p, fmt.Errorf("listing the network interfaces: %w", err)
	}
	byName, byIndex := make(map[string]netlink.Link), make(map[int]netlink.Link)
	for _, l := range links {
		byName[l.Attrs().Name], byIndex[l.Attrs().Index] = l, l
	}
	facts, err := host.ReadFacts()
	if err != nil {
		return p, err
	}
	p.Self = facts.HasAddrs([]netip.Addr{p.Local})
	if !p.Self {
		if p.Pod, err = findPod(p, byIndex, facts); err != nil {
			return p, err
		}
	}
	bridge := bridgeOf(p.Pod)
	if p.Pod == nil { // the device with the gateway's address
		for _, a := range facts.Addrs {
			if name, ok := facts.LinkName(a.Link); ok && p.Subnet.IsValid() && a.Prefix.Addr() == p.Subnet.Masked().Addr().Next() {
				bridge = name
			}
		}
	}
	own, _ := netlink.NewHandle()
	defer own.Close()
	ask := netlink.RouteGetOptions{SrcAddr: p.Local.AsSlice()}
	if !p.Self {
		ask.Iif = bridge
	}
	p.Out = lookUp(own, p.Remote, &ask, byIndex)
	p.In = lookUp(own, p.Local, nil, byIndex)
	p.settings(bridge)

	if l, ok := byName[p.Tunnel]; ok && p.Tunnel != "" {
		a := l.Attrs()
		p.TunnelThere, p.TunnelMTU = true, a.MTU
		p.TunnelUp = a.RawFlags&unix.IFF_UP != 0 && (p.Kind != "userspace" || a.RawFlags&unix.IFF_LOWER_UP != 0)
		if v, ok := l.(*netlink.Vxlan); ok {
			local, _ := netip.AddrFromSlice(v.SrcAddr)
			p.TunnelLocal = local.Unmap()
		}
		if p.Peer != nil && p.Kind == "kernel" && p.Format == "vxlan" {
			p.readPeer(a.Index)
		}
	}
	if p.Peer != nil {
		p.Underlay = lookUp(own, p.Peer.Public, &netlink.RouteGetOptions{SrcAddr: p.Public.AsSlice()}, byIndex)
		if l, ok := byName[p.Underlay.Link]; ok {
			p.UnderlayMTU = l.Attrs().MTU
			p.Underlay.nextHop(l.Attrs().Index, p.Peer.Public)
		}
	}
	for _, b := range host.IPsecBlocks(is4) {
		if from, to := netip.PrefixFrom(p.Local, p.Local.BitLen()), netip.PrefixFrom(p.Remote, p.Remote.BitLen()); b.Matches(from, to) || b.Matches(to, from) {
			p.Blocks = append(p.Blocks, b)
		}
	}
	p.readRules(bridge, is4)
	return p, nil
}

// lookUp asks the kernel for the route to an address, like `ip route get`.
func lookUp(h *netlink.Handle, to netip.Addr, o *netlink.RouteGetOptions, byIndex map[int]netlink.Link) Route {
	routes, err := h.RouteGetWithOptions(to.AsSlice(), o)
	switch {
	case errors.Is(err, unix.EINVAL):
		return Route{Err: errors.New("a blackhole route drops them")}
	case errors.Is(err, unix.EACCES):
		return Route{Err: errors.New("a prohibit route rejects them")}
	case errors.Is(err, unix.EHOSTUNREACH):
		return Route{Err: errors.New("it is unreachable")}
	case errors.Is(err, unix.ENETUNREACH):
		return Route{Err: errors.New("no route leads there")}
	case errors.Is(err, unix.EXDEV):
		return Route{Err: errors.New("the route back uses another device (reverse path filter)")}
	case err != nil:
		return Route{Err: err}
	case len(routes) == 0:
		return Route{Err: errors.New("the kernel returned no route")}
	}
	r := routes[0]
	switch r.Type {
	case unix.RTN_UNREACHABLE:
		return Route{Err: errors.New("it is unreachable")}
	case unix.RTN_BLACKHOLE:
		return Route{Err: errors.New("a blackhole route drops them")}
	case unix.RTN_PROHIBIT:
		return Route{Err: errors.New("a prohibit route rejects them")}
	}
	found := Route{MTU: r.MTU}
	if a, ok := netip.AddrFromSlice(r.Gw); ok {
		found.Via = a.Unmap()
	}
	if l, ok := byIndex[r.LinkIndex]; ok {
		found.Link = l.Attrs().Name
	}
	return found
}

// nextHop reads the neighbour entry of the next hop.
func (r *Route) nextHop(index int, to netip.Addr) {
	if r.Via.IsValid() {
		to = r.Via
	}
	family := netlink.FAMILY_V4
	if to.Is6() {
		family = netlink.FAMILY_V6
	}
	all, err := host.Retry(func() ([]netlink.Neigh, error) { return netlink.NeighList(index, family) })
	if err != nil {
		return
	}
	for _, n := range all {
		if a, ok := netip.AddrFromSlice(n.IP); ok && a.Unmap() == to {
			r.Next = n.HardwareAddr.String()
			if n.State&netlink.NUD_FAILED != 0 {
				r.NextState = "failed"
			}
		}
	}
}

func (p *Path) readPeer(index int) {
	family := netlink.FAMILY_V4
	if p.Peer.VTEP.Is6() {
		family = netlink.FAMILY_V6
	}
	all, err := host.Retry(func() ([]netlink.Neigh, error) { return netlink.NeighList(index, family) })
	if err == nil {
		for _, n := range all {
			if a, ok := netip.AddrFromSlice(n.IP); ok && a.Unmap() == p.Peer.VTEP && n.State&netlink.NUD_PERMANENT != 0 {
				p.Neighbour = n.HardwareAddr.String()
			}
		}
	}
	all, err = host.Retry(func() ([]netlink.Neigh, error) { return netlink.NeighList(index, unix.AF_BRIDGE) })
	if err == nil {
		for _, n := range all {
			if a, ok := netip.AddrFromSlice(n.IP); ok && n.HardwareAddr.String() == p.Peer.MAC {
				p.FDB = a.Unmap().String()
			}
		}
	}
}

func (p *Path) settings(bridge string) {
	note := func(key, why string) {
		if v := host.Sysctl(key); v != "" {
			p.Settings = append(p.Settings, Setting{key, v, "1", why})
		}
	}
	if !p.Local.Is4() {
		note("net/ipv6/conf/all/forwarding", "this host forwards no IPv6 packets")
		return
	}
	note("net/ipv4/ip_forward", "this host forwards no packets")
	if p.Self {
		return
	}
	note("net/ipv4/conf/"+bridge+"/forwarding", "packets from pods are not forwarded")
	if in := p.cameBy(); in != "" {
		note("net/ipv4/conf/"+in+"/forwarding", "packets from the peer are not forwarded to pods")
	}
}

// cameBy returns the link on which the remote's packets arrive, as rules see
// it.
func (p *Path) cameBy() string {
	if p.WantLink != "" {
		return p.WantLink
	}
	return p.Out.Link
}

// findPod searches this host's network namespaces, named ones and those of
// processes, for the address. If several have it, it returns the one whose veth
// has its peer on this host.
func findPod(p Path, byIndex map[int]netlink.Link, facts host.Facts) (*Pod, error) {
	var self unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &self); err != nil {
		return nil, err
	}
	seen := map[[2]uint64]bool{{self.Dev, self.Ino}: true}
	for _, pattern := range []string{"/run/netns/*", "/var/run/docker/netns/*", "/proc/[0-9]*/ns/net"} {
		paths, _ := filepath.Glob(pattern) // constant: no error
		for _, path := range paths {
			var st unix.Stat_t
			var fs unix.Statfs_t
			if unix.Stat(path, &st) != nil || seen[[2]uint64{st.Dev, st.Ino}] || unix.Statfs(path, &fs) != nil || fs.Type != unix.NSFS_MAGIC {
				continue
			}
			seen[[2]uint64{st.Dev, st.Ino}] = true
			if pod := podAt(path, p, byIndex, facts); pod != nil {
				return pod, nil
			}
		}
	}
	return nil, nil
}

// podAt returns the pod in a namespace; nil if the address is not there or is
// another node's.
func podAt(path string, p Path, byIndex map[int]netlink.Link, facts host.Facts) *Pod {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil // deleted meanwhile
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil
	}
	defer h.Close()
	links, err := host.Retry(h.LinkList)
	if err != nil {
		return nil
	}
	within := make(map[int]netlink.Link, len(links))
	for _, l := range links {
		within[l.Attrs().Index] = l
	}
	addrs, err := host.Retry(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil
	}
	i := slices.IndexFunc(addrs, func(a netlink.Addr) bool {
		ip, ok := netip.AddrFromSlice(a.IP)
		return ok && ip.Unmap() == p.Local
	})
	if i < 0 || within[addrs[i].LinkIndex] == nil {
		return nil
	}
	link := within[addrs[i].LinkIndex]
	a := link.Attrs()
	pod := &Pod{Netns: path, Link: a.Name, Up: a.RawFlags&unix.IFF_UP != 0, MTU: a.MTU}
	id, err := netlink.GetNetNsIdByFd(int(ns))
	if link.Type() == "veth" {
		end, ok := byIndex[a.ParentIndex]
		if err != nil || !ok || end.Type() != "veth" || end.Attrs().ParentIndex != a.Index || end.Attrs().NetNsID != id {
			return nil // a pod of another node on this machine
		}
		e := end.Attrs()
		pod.Veth, pod.VethUp = e.Name, e.RawFlags&unix.IFF_UP != 0
		if b, ok := byIndex[e.MasterIndex]; ok {
			pod.Bridge, pod.BridgeUp = b.Attrs().Name, b.Attrs().RawFlags&unix.IFF_UP != 0
			state, err := os.ReadFile("/sys/class/net/" + e.Name + "/brport/state")
			pod.Blocked = err == nil && pod.VethUp && strings.TrimSpace(string(state)) != "3" // BR_STATE_FORWARDING
		}
	}
	pod.Out = lookUp(h, p.Remote, &netlink.RouteGetOptions{SrcAddr: p.Local.AsSlice()}, within)
	pod.Gateway = pod.Out.Via
	if pod.Gateway.IsValid() {
		pod.HasGW = facts.HasAddrs([]netip.Addr{pod.Gateway})
	}
	return pod
}

// readRules evaluates the rules for packets of both directions and for the
// tunnel packets that carry them, and notes what could not be read.
func (p *Path) readRules(bridge string, is4 bool) {
	rules, err := firewall.ReadRules()
	if err != nil {
		p.Limit = append(p.Limit, "the rules cannot be read: "+err.Error())
		return
	}
	walk := func(layer string, packet firewall.Packet, hooks ...firewall.Hook) {
		for _, hook := range hooks {
			q := packet
			switch hook {
			case firewall.Prerouting, firewall.Input:
				q.Out = ""
			case firewall.Postrouting:
				q.In = ""
			}
			p.Rules = append(p.Rules, RuleStep{layer, hook, q, rules.Walk(hook, q)})
		}
	}
	way := p.cameBy()
	out := firewall.Packet{From: p.Local, To: p.Remote, Proto: p.Proto, In: bridge, Out: way, Answer: !p.Toward}
	in := firewall.Packet{From: p.Remote, To: p.Local, Proto: p.Proto, In: way, Out: bridge, Answer: p.Toward}
	if p.Toward {
		out.Port = p.Port
	} else {
		in.Port = p.Port
	}
	first, second := LayerRules, LayerReverseRules
	if !p.Toward {
		first, second = second, first
	}
	switch {
	case p.Self:
		out.In, in.Out, in.ToHost = "", "", true
		walk(first, out, firewall.Output, firewall.Postrouting)
		walk(second, in, firewall.Prerouting, firewall.Input)
	default:
		walk(first, out, firewall.Prerouting, firewall.Forward, firewall.Postrouting)
		if p.Peer != nil { // otherwise both ends are on the same bridge
			walk(second, in, firewall.Prerouting, firewall.Forward, firewall.Postrouting)
		}
	}
	if p.Peer == nil || p.Format == "host-gw" {
		return
	}
	proto, port := byte(unix.IPPROTO_UDP), p.TunnelPort
	if p.Format == "ipip" {
		proto, port = unix.IPPROTO_IPIP, 0
	}
	if p.Public.Is4() != p.Peer.Public.Is4() {
		return
	}
	walk(LayerTunnelRules, firewall.Packet{From: p.Public, To: p.Peer.Public, Proto: proto, Port: port, Out: p.Underlay.Link}, firewall.Output, firewall.Postrouting)
	walk(LayerTunnelRules, firewall.Packet{From: p.Peer.Public, To: p.Public, Proto: proto, Port: port, In: p.Underlay.Link, ToHost: true}, firewall.Prerouting, firewall.Input)
}
