package host

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/firewall"
	"culvert/internal/names"
)

// reading is the result of one read of the kernel: culvert's objects as a
// State, and what a plan depends on.
type reading struct {
	State
	devices map[string]device // culvert's
	indexes map[string]int    // of all devices
	others  map[string]bool   // linkNames of devices that are not culvert's
	view    View
	// settings are the relevant kernel settings by key, without those that the
	// kernel lacks.
	settings map[string]string
	filters  []Filter // culvert's
	firewall firewall.Reading
	bearers  []bearer             // addresses of devices that are not culvert's
	bridges  map[int]bridgeFact   // by index
	ports    map[int][]bridgeFact // of bridges, by the bridge's index
	loose    map[int]string       // names of veth devices to other namespaces, without a master, by index
	// podBridges are set by the Keeper, which remembers them.
	podBridges []podBridge
	foreign    []foreignRoute
	// advertisers are the links that may use router advertisements: the
	// underlay, and those with routes from them (advertisedBy, by index).
	advertisers  []string
	advertisedBy map[int]bool
}

// bearer is a device that has an address.
type bearer struct {
	firewall.Device
	addr netip.Prefix
}

// device is the actual state of a device of culvert's.
type device struct {
	index int
	up    bool
	port  bool   // of a bridge, bond or VRF
	owner string // what created it: vxlan, ipip, tuntap
	// plain is set if a kernel device has none of the options that culvert
	// never sets.
	plain bool
}

// View has the facts about the host that a plan may use and that are not
// culvert's.
type View struct {
	// Underlay has the link's current name and MTU; the name is empty if the
	// link is gone. It has no addresses: a plan does not choose them.
	Underlay Underlay
	// NoFIB is set if the kernel lacks nftables' fib expression.
	NoFIB bool
	// InputDrop is the text of another program's rule that drops the tunnel's packets on
	// input, or empty. It is set only for a Follower, since it depends on the plan.
	InputDrop string
	// EachPacket is the text of another program's rule that must see each packet of
	// connections between pods, or empty. It is set only for a Follower, too.
	EachPacket string
	survey     *survey
}

type onLink struct {
	onLink bool
	metric int
}

// OnLink reports whether the most specific route to an address leads to the
// underlay's link without a gateway.
func (v View) OnLink(a netip.Addr) bool { return v.survey != nil && v.survey.onLink(a) }

// read reads the kernel once. underlay is the interface index, or 0.
func read(underlay int, others *survey) (reading, error) {
	r := reading{
		devices: make(map[string]device), indexes: make(map[string]int), others: make(map[string]bool),
		settings: make(map[string]string), advertisedBy: make(map[int]bool),
		bridges: make(map[int]bridgeFact), ports: make(map[int][]bridgeFact), loose: make(map[int]string),
	}
	links, err := Retry(netlink.LinkList)
	if err != nil {
		return r, fmt.Errorf("listing the network interfaces: %w", err)
	}
	linkNames := make(map[int]string, len(links))
	for _, l := range links {
		linkNames[l.Attrs().Index] = l.Attrs().Name
		r.indexes[l.Attrs().Name] = l.Attrs().Index
	}
	addrs, err := Retry(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return r, fmt.Errorf("listing the addresses: %w", err)
	}
	for _, l := range links {
		name := l.Attrs().Name
		if l.Attrs().Index == underlay {
			r.view.Underlay = Underlay{Name: name, Index: underlay, MTU: l.Attrs().MTU}
		}
		if !names.Managed(name) {
			r.noteBridge(l)
			r.others[name] = true
			for _, a := range addrs {
				if p, ok := prefixOf(a.IPNet); ok && a.LinkIndex == l.Attrs().Index {
					r.bearers = append(r.bearers, bearer{firewall.Device{Name: name, Index: a.LinkIndex}, p})
				}
			}
			continue
		}
		link, dev := linkOf(l, linkNames)
		for _, a := range addrs {
			// The kernel adds IPv6 link-local addresses itself; IPv4 ones (RFC
			// 3927) come from a program, such as a DHCP client that found no
			// server.
			if p, ok := prefixOf(a.IPNet); ok && a.LinkIndex == dev.index && (p.Addr().Is4() || !p.Addr().IsLinkLocalUnicast()) {
				link.Addrs = append(link.Addrs, p)
			}
		}
		r.Links = append(r.Links, link)
		r.devices[name] = dev
		if link.VXLAN != nil {
			if err := r.readPeers(name, dev.index); err != nil {
				return r, err
			}
		}
	}
	r.view.NoFIB = !firewall.HasFIB()
	if err := r.readRoutes(linkNames); err != nil {
		return r, err
	}
	others.begin(linkNames, underlay)
	r.view.survey = others
	r.advertisers = r.advertised(linkNames)
	if err := r.readSettings(linkNames); err != nil {
		return r, err
	}
	// Search all links the first time: an earlier daemon may have had another underlay.
	everywhere := underlay == 0 || !others.filters
	others.filters = true
	var bearing []netlink.Link
	for _, l := range links {
		if everywhere || names.Managed(l.Attrs().Name) || l.Attrs().Index == underlay {
			bearing = append(bearing, l)
		}
	}
	if r.filters, err = readFilters(bearing); err != nil {
		return r, err
	}
	r.firewall, err = firewall.Read()
	return r, err
}

// noteBridge notes a device that is a bridge, or may be a port of one.
func (r *reading) noteBridge(l netlink.Link) {
	a := l.Attrs()
	f := bridgeFact{index: a.Index, name: a.Name, up: a.RawFlags&unix.IFF_UP != 0}
	copy(f.mac[:], a.HardwareAddr)
	switch {
	case a.MasterIndex != 0:
		r.ports[a.MasterIndex] = append(r.ports[a.MasterIndex], f)
	case l.Type() == "bridge":
		r.bridges[f.index] = f
	case l.Type() == "veth" && a.NetNsID >= 0:
		r.loose[f.index] = f.name
	}
}

func (r *reading) note(key string) {
	if v := sysctl(key); v != "" {
		r.settings[key] = v
	}
}

// linkOf describes a device of ours.
func linkOf(l netlink.Link, linkNames map[int]string) (Link, device) {
	a := l.Attrs()
	link := Link{Name: a.Name, MTU: a.MTU, GSOMaxSegs: int(a.GSOMaxSegs)}
	dev := device{index: a.Index, up: a.RawFlags&unix.IFF_UP != 0, port: a.MasterIndex != 0, owner: l.Type(), plain: true}
	switch l := l.(type) {
	case *netlink.Veth:
		link.Veth = linkNames[a.ParentIndex]
	case *netlink.Vxlan:
		local, _ := netip.AddrFromSlice(l.SrcAddr)
		v := &VXLAN{
			VNI: uint32(l.VxlanId), Local: local.Unmap(), Device: linkNames[l.VtepDevIndex], Port: uint16(l.Port),
			Learning: l.Learning, GBP: l.GBP, NoChecksum: !l.UDPCSum,
		}
		if local.Is6() {
			v.NoChecksum = l.UDP6ZeroCSumTx
			dev.plain = l.UDP6ZeroCSumRx
		}
		copy(v.MAC[:], a.HardwareAddr)
		link.VXLAN = v
		dev.plain = dev.plain && !l.Proxy && !l.RSC && !l.L2miss && !l.L3miss && !l.FlowBased && l.Group == nil
	case *netlink.Iptun:
		local, _ := netip.AddrFromSlice(l.Local)
		link.IPIP = &IPIP{Local: local.Unmap()}
		remote, ok := netip.AddrFromSlice(l.Remote)
		dev.plain = !l.FlowBased && l.Link == 0 && (!ok || remote.Unmap().IsUnspecified())
	}
	return link, dev
}

// readPeers reads the permanent neighbours and FDB entries of a vxlan device;
// it ignores those that the kernel learned.
func (r *reading) readPeers(name string, index int) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		all, err := Retry(func() ([]netlink.Neigh, error) { return netlink.NeighList(index, family) })
		if err != nil {
			return fmt.Errorf("listing the neighbours on %s: %w", name, err)
		}
		for _, n := range all {
			ip, ok := netip.AddrFromSlice(n.IP)
			if !ok || n.State&netlink.NUD_PERMANENT == 0 {
				continue
			}
			entry := Neighbour{Link: name, IP: ip.Unmap()}
			copy(entry.MAC[:], n.HardwareAddr)
			r.Neighbours = append(r.Neighbours, entry)
		}
	}
	all, err := Retry(func() ([]netlink.Neigh, error) { return netlink.NeighList(index, unix.AF_BRIDGE) })
	if err != nil {
		return fmt.Errorf("listing the FDB of %s: %w", name, err)
	}
	for _, n := range all {
		to, ok := netip.AddrFromSlice(n.IP)
		if !ok || n.State&netlink.NUD_PERMANENT == 0 {
			continue
		}
		entry := FDBEntry{Link: name, To: to.Unmap()}
		copy(entry.MAC[:], n.HardwareAddr)
		r.FDB = append(r.FDB, entry)
	}
	return nil
}

// readRoutes reads our routes and those from router advertisements.
func (r *reading) readRoutes(linkNames map[int]string) error {
	ours, err := listRoutes(names.RouteProtocol, unix.AF_INET, unix.AF_INET6)
	if err != nil {
		return err
	}
	for _, o := range ours {
		r.Routes = append(r.Routes, routeOf(o, linkNames))
	}
	advertised, err := listRoutes(unix.RTPROT_RA, unix.AF_INET6)
	if err != nil {
		return err
	}
	for _, a := range advertised {
		r.advertisedBy[a.index] = true
	}
	return nil
}

func routeOf(r rawRoute, linkNames map[int]string) Route {
	got := Route{To: r.to, Metric: r.metric, Via: r.via.Unmap(), Source: r.source.Unmap()}
	if r.kind != unix.RTN_UNREACHABLE {
		got.Link = linkNames[r.index]
		got.OnLink = r.flags&unix.RTNH_F_ONLINK != 0
	}
	return got
}

// ErrNoUnderlay means that the underlay's interface does not exist.
var ErrNoUnderlay = errors.New("the underlay's interface no longer exists")
