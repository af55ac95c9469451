package fastpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/names"
)

// The maps' keys and values, laid out as in bpf/fastpath.c.
type (
	address [16]byte // IPv4: the first four bytes, then zeros

	tunnel struct {
		Device, Uplink, Joiner, Queue, MTU uint32
		VNI                                [4]byte
		Port                               [2]byte
		FirstPort, Ports                   uint16
		Hops, Lengths                      uint8
		MAC                                host.MAC
		Pods, Layer3, Process, IPIP        uint8
		_                                  [2]uint8
		Local, Subnet, Mask                address
		Bits                               [mostLengths]uint32
		Masks                              [mostLengths]address
	}
	peerKey struct {
		Family, Bits uint16
		To           address // an Ethernet address, or with Bits an inner prefix
	}
	peer struct {
		Outer address
		MAC   host.MAC // for a tunnel with Layer3
		_     [2]uint8
		MTU   uint32 // 0: there is no plain route
	}
	sourceKey struct {
		Bits         uint32
		Outer, Inner address
	}
	traffic struct {
		Packets, Bytes uint64
	}
)

// mostLengths is how many prefix lengths of peers' subnets the program looks up.
// Packets of peers with other lengths are left to the kernel datapath.
const mostLengths = 8

// narrowest is the minimum IPv6 MTU (RFC 8200, section 5). Longer IPv6 packets are left
// to the kernel, which knows the path MTU.
const narrowest = 1280

// contents are the desired contents of the maps and the hooks of the programs.
type contents struct {
	tunnels map[uint32]tunnel // by family, 4 or 6
	peers   map[peerKey]peer
	counted map[peerKey]struct{} // peers, and those that are left to the device
	sources map[sourceKey]struct{}
	hooks   []hook
	pairs   []pair // one for each of sources

	pods     []podLink
	left     map[string]int // pods that are left out, by reason
	podHooks []hook
}

// pair is a peer's subnet, and its keys in the maps.
type pair struct {
	firewall.Source
	source sourceKey
	peer   peerKey
}

// hook is where a program is attached.
type hook struct {
	link    string
	index   int
	parent  uint32
	program string
	clsact  bool // a pod's link has the qdisc
}

// facts is what the contents depend on besides the host state.
type facts struct {
	links            map[string]link
	firstPort, ports uint16           // the namespace's local port range
	hops             map[uint32]uint8 // TTL or hop limit, by family
	// path returns the MTU of the path to a peer, and whether the fast path may use it.
	path func(outer netip.Addr, uplink string) (mtu int, ok bool)
	pods []podLink      // with the short way from pod to pod
	left map[string]int // pods without it, by reason
}

type link struct {
	index, mtu int
	ethernet   bool
}

func addressOf(a netip.Addr) (b address) {
	copy(b[:], a.AsSlice())
	return b
}

func maskOf(bits int) (m address) {
	for i := range bits {
		m[i/8] |= 0x80 >> (i % 8)
	}
	return m
}

func keyOf(s firewall.Source) sourceKey {
	return sourceKey{Bits: uint32(s.Inner.Bits()), Outer: addressOf(s.Outer), Inner: addressOf(s.Inner.Masked().Addr())}
}

// macKey is a peer's key if the device's packets have Ethernet headers.
func macKey(family uint32, mac host.MAC) peerKey {
	key := peerKey{Family: uint16(family)}
	copy(key.To[:], mac[:])
	return key
}

// prefixKey is a peer's key if they have none.
func prefixKey(inner netip.Prefix) peerKey {
	key := peerKey{Family: 6, Bits: uint16(inner.Bits()), To: addressOf(inner.Masked().Addr())}
	if inner.Addr().Is4() {
		key.Family = 4
	}
	return key
}

// end is this node's end of the tunnel of one address family: a vxlan or ipip device, or
// the userspace datapath's TUN device.
type end struct {
	device  string
	process bool // the userspace datapath's
	ipip    bool // otherwise VXLAN; only Local and Device of it are set
	host.VXLAN
	subnet  netip.Prefix
	sources []pair
	targets []target
	unfit   string // why the fast path cannot carry it
}

// layer3 reports whether the device has no link headers.
func (e end) layer3() bool { return e.process || e.ipip }

// target is a peer of an end.
type target struct {
	key   peerKey
	outer netip.Addr
	mac   host.MAC // of a userspace datapath's peer
}

func (e end) family() uint32 {
	if e.subnet.Addr().Is4() {
		return 4
	}
	return 6
}

// endsOf finds the ends in a state.
func endsOf(s host.State) ([]end, error) {
	var all []end
	macs := make(map[netip.Addr]host.MAC, len(s.Neighbours))
	for _, n := range s.Neighbours {
		macs[n.IP] = n.MAC
	}
	for _, l := range s.Links {
		if l.VXLAN == nil && l.IPIP == nil {
			continue
		}
		i := slices.IndexFunc(s.Firewall.Tunnels, func(t firewall.TunnelRule) bool { return t.Device == l.Name })
		if i < 0 {
			return nil, fmt.Errorf("%s is not there", l.Name)
		}
		guard := s.Firewall.Tunnels[i]
		if l.IPIP != nil {
			all = append(all, ipipEnd(guard, *l.IPIP))
			continue
		}
		e := end{device: l.Name, VXLAN: *l.VXLAN, subnet: guard.Subnet}
		for _, p := range guard.Peers {
			e.sources = append(e.sources, pair{p, keyOf(p), macKey(e.family(), macs[p.Inner.Masked().Addr()])})
		}
		for _, f := range s.FDB {
			if f.Link == l.Name {
				e.targets = append(e.targets, target{key: macKey(e.family(), f.MAC), outer: f.To})
			}
		}
		all = append(all, e)
	}
	for _, t := range s.Process {
		e := end{device: t.Link, process: true, ipip: t.VXLAN.Port == 0, VXLAN: t.VXLAN, subnet: t.Subnet, unfit: t.Unfit}
		for _, p := range t.Peers {
			source := firewall.Source{Outer: p.Outer, Inner: p.Inner}
			e.sources = append(e.sources, pair{source, keyOf(source), prefixKey(p.Inner)})
			e.targets = append(e.targets, target{prefixKey(p.Inner), p.Outer, p.MAC})
		}
		all = append(all, e)
	}
	return all, nil
}

// ipipEnd returns the end that is an ipip device.
func ipipEnd(t firewall.TunnelRule, l host.IPIP) end {
	e := end{device: t.Device, ipip: true, VXLAN: host.VXLAN{Local: l.Local, Device: t.Underlay}, subnet: t.Subnet}
	for _, p := range t.Peers {
		key := prefixKey(p.Inner)
		e.sources = append(e.sources, pair{p, keyOf(p), key})
		e.targets = append(e.targets, target{key: key, outer: p.Outer})
	}
	return e
}

// joinMAC is the destination of frames in the veth pair that come from an IPIP tunnel,
// which has no Ethernet addresses.
var joinMAC = host.MAC{2, 'c', 'u', 'l', 'v', 4}

// contentsOf computes the contents for a state, without I/O. The error says why the
// fast path cannot be used with it.
func contentsOf(s host.State, f facts) (contents, error) {
	c := contents{tunnels: make(map[uint32]tunnel), peers: make(map[peerKey]peer), counted: make(map[peerKey]struct{}), sources: make(map[sourceKey]struct{})}
	ends, err := endsOf(s)
	if err != nil {
		return c, err
	}
	c.pods, c.left = f.pods, f.left
	for _, l := range f.pods {
		c.podHooks = append(c.podHooks, hook{l.name, l.index, netlink.HANDLE_MIN_EGRESS, programPodIn, l.clsact},
			hook{l.name, l.index, netlink.HANDLE_MIN_INGRESS, programPodOut, l.clsact})
	}
	for _, e := range ends {
		device, there := f.links[e.device]
		uplink, up := f.links[e.Device]
		switch {
		case !there:
			return c, fmt.Errorf("%s is not there", e.device)
		case !up:
			return c, fmt.Errorf("the uplink %s is not there", e.Device)
		case !uplink.ethernet:
			return c, fmt.Errorf("the uplink %s is no Ethernet interface", e.Device)
		case e.unfit != "":
			return c, errors.New(e.unfit)
		case e.Learning:
			return c, fmt.Errorf("%s learns addresses from what it receives (Learning)", e.device)
		case e.GBP:
			return c, fmt.Errorf("%s sends group policy in its headers (GBP)", e.device)
		}
		family := e.family()
		if e.Local.Is4() != (family == 4) {
			return c, fmt.Errorf("%s carries another IP version than it is carried by", e.device)
		}
		t := tunnel{
			Device: uint32(device.index), Uplink: uint32(uplink.index), MTU: uint32(uplink.mtu), FirstPort: f.firstPort, Ports: f.ports,
			Hops: f.hops[family], MAC: e.MAC, Local: addressOf(e.Local), Subnet: addressOf(e.subnet.Masked().Addr()), Mask: maskOf(e.subnet.Bits()),
		}
		if e.layer3() {
			t.Layer3 = 1
		}
		if e.process {
			t.Process = 1
		}
		if e.ipip {
			t.IPIP, t.MAC = 1, joinMAC
			if !e.process {
				t.Hops = 0 // the kernel's ipip device copies the inner TTL
			}
		}
		if len(f.pods) > 0 && !e.layer3() {
			t.Pods = 1
		}
		if near, ok := f.links[names.JoinNear]; ok {
			t.Joiner = uint32(near.index)
		}
		if far, ok := f.links[names.JoinFar]; ok {
			t.Queue = uint32(far.index)
		}
		binary.BigEndian.PutUint32(t.VNI[:], e.VNI<<8)
		binary.BigEndian.PutUint16(t.Port[:], e.Port)
		for _, p := range e.sources {
			c.sources[p.source] = struct{}{}
		}
		c.pairs = append(c.pairs, e.sources...)
		for i, bits := range lengthsOf(e.sources) {
			t.Bits[i], t.Masks[i] = uint32(bits), maskOf(bits)
			t.Lengths++
		}
		for _, to := range e.targets {
			c.counted[to.key] = struct{}{}
			mtu, ok := f.path(to.outer, e.Device)
			if !ok {
				if e.layer3() { // a shorter prefix must not be found in its place
					c.peers[to.key] = peer{}
				}
				continue
			}
			mtu = min(mtu, uplink.mtu)
			if family == 6 {
				mtu = min(mtu, narrowest)
			}
			c.peers[to.key] = peer{Outer: addressOf(to.outer), MAC: to.mac, MTU: uint32(mtu)}
		}
		c.tunnels[family] = t
		c.hooks = append(c.hooks,
			hook{e.device, device.index, netlink.HANDLE_MIN_EGRESS, programOut, false},
			hook{e.Device, uplink.index, netlink.HANDLE_MIN_INGRESS, programIn, false})
	}
	if len(c.tunnels) == 0 {
		return c, errNoTunnel
	}
	if far, ok := f.links[names.JoinFar]; ok {
		c.hooks = append(c.hooks, hook{names.JoinFar, far.index, netlink.HANDLE_MIN_INGRESS, programJoin, false})
	}
	slices.SortFunc(c.hooks, compareHooks)
	c.hooks = slices.Compact(c.hooks) // two tunnels may share a device and an uplink
	return c, nil
}

// lengthsOf returns the lengths of the peers' prefixes that the program looks up, the
// longest first, so that it finds the most specific prefix.
func lengthsOf(sources []pair) []int {
	var all []int
	for _, s := range sources {
		if !slices.Contains(all, s.Inner.Bits()) {
			all = append(all, s.Inner.Bits())
		}
	}
	slices.Sort(all)
	slices.Reverse(all)
	return all[:min(len(all), mostLengths)]
}

// compareHooks orders receivers before senders: join, in, out.
func compareHooks(a, b hook) int {
	order := func(h hook) int { return slices.Index([]string{programJoin, programIn, programOut}, h.program) }
	if d := order(a) - order(b); d != 0 {
		return d
	}
	return a.index - b.index
}
