package lab

import (
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"

	"culvert/internal/host"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// join creates the links between the nodes, their addresses and routes.
func (l *Lab) join() error {
	o := l.options
	for i, n := range l.Nodes {
		for _, p := range o.Prefixes {
			n.Addrs = append(n.Addrs, nth(p, i+1))
		}
	}
	if o.Underlay == Bridged {
		return l.bridge("underlay", o.Link, o.Prefixes, o.MTU)
	}

	a, b := l.Nodes[0], l.Nodes[1]
	if err := veth(a.Namespace, o.Link, b.Namespace, o.Link, o.MTU); err != nil {
		return err
	}
	for _, n := range l.Nodes {
		if err := n.configure(o.Link, n.Addrs, o.Prefixes); err != nil {
			return err
		}
	}
	return l.bridge("control", "ctl0", []netip.Prefix{controlPrefix}, 1500)
}

// bridge creates a bridge in the fabric with a link to each node, and each node's
// default route via the bridge's address.
func (l *Lab) bridge(name, link string, prefixes []netip.Prefix, mtu int) error {
	for _, p := range prefixes {
		l.FabricAddrs = append(l.FabricAddrs, gateway(p))
	}
	err := l.Fabric.Do(func() error {
		snooping := false
		br := &netlink.Bridge{
			LinkAttrs:         netlink.LinkAttrs{Name: name, MTU: mtu, TxQLen: 1000},
			MulticastSnooping: &snooping,
		}
		return netlink.LinkAdd(br)
	})
	if err != nil {
		return fmt.Errorf("creating bridge %s: %w", name, err)
	}
	if err := l.Fabric.configure(name, l.FabricAddrs, prefixes); err != nil {
		return err
	}
	for i, n := range l.Nodes {
		if err := veth(l.Fabric, n.ID, n.Namespace, link, mtu); err != nil {
			return err
		}
		var addrs []netip.Addr
		for _, p := range prefixes {
			addrs = append(addrs, nth(p, i+1))
		}
		if err := n.configure(link, addrs, prefixes); err != nil {
			return err
		}
		for _, gw := range l.FabricAddrs {
			if err := n.Do(func() error { return netlink.RouteAdd(&netlink.Route{Dst: defaultDestination(gw), Gw: gw.AsSlice()}) }); err != nil {
				return fmt.Errorf("default route of %s via %s: %w", n.Name, gw, err)
			}
		}
		if err := l.Fabric.Do(func() error { return enslave(n.ID, name) }); err != nil {
			return fmt.Errorf("adding port %s to bridge %s: %w", n.ID, name, err)
		}
	}
	return nil
}

// vethIndex makes the interface index of every pair's first end unique. In two new
// namespaces both ends would get index 2, and the kernel handles a carrier change at
// once only if a link's index differs from its peer's (net/core/link_watch.c,
// linkwatch_urgent_event); otherwise the link stays down for up to a second.
var vethIndex atomic.Int32

// veth creates a veth pair, one end in each namespace.
func veth(a *Namespace, aName string, b *Namespace, bName string, mtu int) error {
	peer, err := netns.GetFromPath(b.Path)
	if err != nil {
		return err
	}
	defer peer.Close()
	err = a.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: aName, MTU: mtu, TxQLen: 1000, Index: int(1000 + vethIndex.Add(1))},
			PeerName:  bName, PeerNamespace: netlink.NsFd(peer), PeerMTU: uint32(mtu),
		})
	})
	if err != nil {
		return fmt.Errorf("creating the veth pair %s in %s, %s in %s: %w", aName, a.Name, bName, b.Name, err)
	}
	return nil
}

func enslave(link, bridge string) error {
	port, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(port); err != nil {
		return err
	}
	return netlink.LinkSetMaster(port, br)
}

// configure adds a link's addresses and sets it up.
func (n *Namespace) configure(link string, addrs []netip.Addr, prefixes []netip.Prefix) error {
	err := n.Do(func() error {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		for i, a := range addrs {
			addr := &netlink.Addr{IPNet: host.IPNet(netip.PrefixFrom(a, prefixes[i].Bits()))}
			if a.Is6() {
				addr.Flags = unix.IFA_F_NODAD
			}
			if err := netlink.AddrAdd(l, addr); err != nil {
				return fmt.Errorf("address %s: %w", a, err)
			}
		}
		return netlink.LinkSetUp(l)
	})
	if err != nil {
		return fmt.Errorf("configuring %s in %s: %w", link, n.Name, err)
	}
	return nil
}

// nth returns a network's base address plus k.
func nth(p netip.Prefix, k int) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := len(b) - 1; i >= 0 && k > 0; i-- {
		k += int(b[i])
		b[i] = byte(k)
		k >>= 8
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// gateway returns the last but one address of a network.
func gateway(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	b[len(b)-1]--
	a, _ := netip.AddrFromSlice(b)
	return a
}

// defaultDestination returns the default route's prefix in the address family of like.
func defaultDestination(like netip.Addr) *net.IPNet {
	if like.Is4() {
		return host.IPNet(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
	}
	return host.IPNet(netip.PrefixFrom(netip.IPv6Unspecified(), 0))
}
