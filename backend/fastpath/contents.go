package fastpath

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"culvert/internal/host"
)

// The maps' keys and values, as bpf/fastpath.c has them.
type (
	address [16]byte // IPv4: the first four, and zeros

	tunnel struct {
		Device, Uplink, Joiner, MTU uint32
		VNI                         [4]byte
		Port                        [2]byte
		FirstPort, Ports            uint16
		Hops, Lengths               uint8
		MAC                         host.MAC
		_                           [2]uint8
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
		Sent  uint32 // the program sets it
	}
	sourceKey struct {
		Bits         uint32
		Outer, Inner address
	}
)

// mostLengths is how many lengths of peers' prefixes the program tries; peers of
// further ones are left to the datapath below.
const mostLengths = 8

// narrowest is the MTU that every IPv6 path has (RFC 8200, section 5). What is
// longer is left to the kernel, which remembers what routers say of a path.
const narrowest = 1280

// contents are what the maps are to hold, and where the programs are to stand.
type contents struct {
	tunnels map[uint32]tunnel // by family, 4 or 6
	peers   map[peerKey]peer
	sources map[sourceKey]uint32
	hooks   []hook
	pairs   []host.Source // of sources
}

// hook is one place for one program.
type hook struct {
	link    string
	index   int
	parent  uint32
	program string
}

// facts are what the contents depend on besides the state.
type facts struct {
	links            map[string]link
	firstPort, ports uint16           // of this network namespace's local ones
	hops             map[uint32]uint8 // by family
	// path says what a peer's path takes, and whether the fast path may use it.
	path func(outer netip.Addr, uplink string) (mtu int, ok bool)
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

func keyOf(s host.Source) sourceKey {
	return sourceKey{Bits: uint32(s.Inner.Bits()), Outer: addressOf(s.Outer), Inner: addressOf(s.Inner.Masked().Addr())}
}

// contentsOf computes, purely, what a state comes to. The error says why the fast
// path cannot stand before it.
func contentsOf(s host.State, f facts) (contents, error) {
	c := contents{tunnels: make(map[uint32]tunnel), peers: make(map[peerKey]peer), sources: make(map[sourceKey]uint32)}
	families := make(map[string]uint32)
	for _, l := range s.Links {
		if l.VXLAN == nil {
			continue
		}
		v := l.VXLAN
		i := slices.IndexFunc(s.Firewall.Tunnels, func(t host.Tunnel) bool { return t.Device == l.Name })
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
			c.sources[keyOf(p)] = 0
			c.pairs = append(c.pairs, p)
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
	c.hooks = slices.Compact(c.hooks) // the uplink of two tunnels
	return c, nil
}

// compareHooks puts the far ends before what sends to them.
func compareHooks(a, b hook) int {
	order := func(h hook) int { return slices.Index([]string{programJoin, programIn, programOut}, h.program) }
	if d := order(a) - order(b); d != 0 {
		return d
	}
	return a.index - b.index
}
