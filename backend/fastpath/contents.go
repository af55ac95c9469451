package fastpath

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"culvert/internal/firewall"
	"culvert/internal/host"
)

// The maps' keys and values, laid out as in bpf/fastpath.c.
type (
	address [16]byte // IPv4: the first four bytes, then zeros

	tunnel struct {
		Device, Uplink, Joiner, MTU uint32
		VNI                         [4]byte
		Port                        [2]byte
		FirstPort, Ports            uint16
		Hops, Lengths               uint8
		MAC                         host.MAC
		Pods                        uint8
		_                           uint8
		Local, Subnet, Mask         address
		Bits                        [mostLengths]uint32
		Masks                       [mostLengths]address
	}
	peerKey struct {
		MAC    host.MAC
		Family uint16
	}
	peer struct {
		Outer address
		MTU   uint32
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
}

// facts is what the contents depend on besides the host state.
type facts struct {
	links            map[string]link
	firstPort, ports uint16           // the namespace's local port range
	hops             map[uint32]uint8 // TTL or hop limit, by family
	// path returns the MTU of the path to a peer, and whether the fast path may use it.
	path func(outer netip.Addr, uplink string) (mtu int, ok bool)
	pods []podLink // with the short way from pod to pod
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

// contentsOf computes the contents for a state, without I/O. The error says why the
// fast path cannot be used with it.
func contentsOf(s host.State, f facts) (contents, error) {
	c := contents{tunnels: make(map[uint32]tunnel), peers: make(map[peerKey]peer), counted: make(map[peerKey]struct{}), sources: make(map[sourceKey]struct{})}
	macs := make(map[netip.Addr]host.MAC, len(s.Neighbours))
	for _, n := range s.Neighbours {
		macs[n.IP] = n.MAC
	}
	families := make(map[string]uint32)
	c.pods = f.pods
	for _, l := range f.pods {
		c.podHooks = append(c.podHooks, hook{l.name, l.index, netlink.HANDLE_MIN_EGRESS, programPodIn},
			hook{l.name, l.index, netlink.HANDLE_MIN_INGRESS, programPodOut})
	}
	for _, l := range s.Links {
		if l.VXLAN == nil {
			continue
		}
		v := l.VXLAN
		i := slices.IndexFunc(s.Firewall.Tunnels, func(t firewall.TunnelRule) bool { return t.Device == l.Name })
		device, there := f.links[l.Name]
		uplink, up := f.links[v.Device]
		switch {
		case i < 0 || !there:
			return c, fmt.Errorf("%s is not there", l.Name)
		case !up:
			return c, fmt.Errorf("the uplink %s is not there", v.Device)
		case !uplink.ethernet:
			return c, fmt.Errorf("the uplink %s is no Ethernet interface", v.Device)
		case v.Learning:
			return c, fmt.Errorf("%s learns addresses from what it receives (Learning)", l.Name)
		case v.GBP:
			return c, fmt.Errorf("%s sends group policy in its headers (GBP)", l.Name)
		}
		guard := s.Firewall.Tunnels[i]
		family := uint32(6)
		if guard.Subnet.Addr().Is4() {
			family = 4
		}
		if v.Local.Is4() != (family == 4) {
			return c, fmt.Errorf("%s carries another IP version than it is carried by", l.Name)
		}
		families[l.Name] = family
		t := tunnel{
			Device: uint32(device.index), Uplink: uint32(uplink.index), MTU: uint32(uplink.mtu), FirstPort: f.firstPort, Ports: f.ports,
			Hops: f.hops[family], MAC: v.MAC, Local: addressOf(v.Local), Subnet: addressOf(guard.Subnet.Masked().Addr()), Mask: maskOf(guard.Subnet.Bits()),
		}
		if len(f.pods) > 0 {
			t.Pods = 1
		}
		if near, ok := f.links[host.JoinNear]; ok {
			t.Joiner = uint32(near.index)
		}
		binary.BigEndian.PutUint32(t.VNI[:], v.VNI<<8)
		binary.BigEndian.PutUint16(t.Port[:], v.Port)
		for _, p := range guard.Peers {
			bits := uint32(p.Inner.Bits())
			if !slices.Contains(t.Bits[:t.Lengths], bits) {
				if t.Lengths == mostLengths {
					continue
				}
				t.Bits[t.Lengths], t.Masks[t.Lengths] = bits, maskOf(p.Inner.Bits())
				t.Lengths++
			}
			key := keyOf(p)
			c.sources[key] = struct{}{}
			c.pairs = append(c.pairs, pair{p, key, peerKey{macs[p.Inner.Masked().Addr()], uint16(family)}})
		}
		c.tunnels[family] = t
		c.hooks = append(c.hooks,
			hook{l.Name, device.index, netlink.HANDLE_MIN_EGRESS, programOut},
			hook{v.Device, uplink.index, netlink.HANDLE_MIN_INGRESS, programIn})
	}
	if len(c.tunnels) == 0 {
		return c, errNoTunnel
	}
	if far, ok := f.links[host.JoinFar]; ok {
		c.hooks = append(c.hooks, hook{host.JoinFar, far.index, netlink.HANDLE_MIN_INGRESS, programJoin})
	}
	for _, e := range s.FDB {
		family := families[e.Link]
		device := slices.IndexFunc(s.Links, func(l host.Link) bool { return l.Name == e.Link })
		if family == 0 || device < 0 {
			continue
		}
		uplink := s.Links[device].VXLAN.Device
		c.counted[peerKey{e.MAC, uint16(family)}] = struct{}{}
		mtu, ok := f.path(e.To, uplink)
		if !ok {
			continue
		}
		mtu = min(mtu, f.links[uplink].mtu)
		if family == 6 {
			mtu = min(mtu, narrowest)
		}
		c.peers[peerKey{e.MAC, uint16(family)}] = peer{Outer: addressOf(e.To), MTU: uint32(mtu)}
	}
	slices.SortFunc(c.hooks, compareHooks)
	c.hooks = slices.Compact(c.hooks) // two tunnels may share an uplink
	return c, nil
}

// compareHooks orders receivers before senders: join, in, out.
func compareHooks(a, b hook) int {
	order := func(h hook) int { return slices.Index([]string{programJoin, programIn, programOut}, h.program) }
	if d := order(a) - order(b); d != 0 {
		return d
	}
	return a.index - b.index
}
