package lab

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/host"
	"culvert/subnet"
)

// HandmadeVXLAN is a tunnel without a daemon: a kernel vxlan device, and per peer a
// neighbour, an FDB entry and a route, set up as flannel does (flannel,
// pkg/backend/vxlan). Tests use it to check that culvert interoperates with flannel.
//
// One device carries one family of pod addresses; a dual-stack node needs two.
type HandmadeVXLAN struct {
	// Self is the node's endpoint as a lease in the store would have it.
	Self subnet.Endpoint

	node *Node
	dev  string
}

// VXLANOptions describe a HandmadeVXLAN.
type VXLANOptions struct {
	Name   string       // device name; if empty, "flannel.1", or "flannel-v6.1" for IPv6 subnets
	VNI    uint32       // 1 if zero
	Port   uint16       // UDP port; 8472 if zero
	Subnet netip.Prefix // the node's
	Local  netip.Addr   // outer source address; the node's first underlay address if zero
	MTU    int          // of the device; if zero, the underlay's minus 50 (70 with an IPv6 outer header)
	// MAC is the device's address; derived from the node's name if zero.
	MAC subnet.MAC
}

// AddHandmadeVXLAN creates the device in the node and enables forwarding.
func (n *Node) AddHandmadeVXLAN(o VXLANOptions) (*HandmadeVXLAN, error) {
	if o.Name == "" {
		o.Name = "flannel.1"
		if o.Subnet.Addr().Is6() {
			o.Name = "flannel-v6.1"
		}
	}
	if o.VNI == 0 {
		o.VNI = 1
	}
	if o.Port == 0 {
		o.Port = 8472
	}
	if !o.Local.IsValid() {
		o.Local = n.Addrs[0]
	}
	if o.MAC == (subnet.MAC{}) {
		o.MAC = subnet.DeriveMAC(n.Name, o.VNI, o.Subnet.Addr().Is6())
	}
	err := n.Do(func() error {
		under, err := netlink.LinkByName(n.Link)
		if err != nil {
			return err
		}
		if o.MTU == 0 {
			o.MTU = under.Attrs().MTU - 50
			if o.Local.Is6() {
				o.MTU -= 20
			}
		}
		dev := &netlink.Vxlan{
			LinkAttrs:    netlink.LinkAttrs{Name: o.Name, MTU: o.MTU, HardwareAddr: o.MAC[:], TxQLen: 1000},
			VxlanId:      int(o.VNI),
			VtepDevIndex: under.Attrs().Index,
			SrcAddr:      o.Local.AsSlice(),
			Port:         int(o.Port),
			Learning:     false,
		}
		if err := netlink.LinkAdd(dev); err != nil {
			return fmt.Errorf("creating it: %w", err)
		}
		own := netip.PrefixFrom(o.Subnet.Addr(), o.Subnet.Addr().BitLen())
		addr := &netlink.Addr{IPNet: host.IPNet(own)}
		if o.Subnet.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(dev, addr); err != nil {
			return fmt.Errorf("address %s: %w", own, err)
		}
		return netlink.LinkSetUp(dev)
	})
	if err != nil {
		return nil, fmt.Errorf("vxlan device %s in %s: %w", o.Name, n.Name, err)
	}
	forward := "net/ipv4/ip_forward"
	if o.Subnet.Addr().Is6() {
		forward = "net/ipv6/conf/all/forwarding"
	}
	if err := n.SetSysctl(forward, "1"); err != nil {
		return nil, err
	}
	return &HandmadeVXLAN{
		Self: subnet.Endpoint{
			Subnet: o.Subnet, Public: o.Local,
			VTEP: subnet.VTEP{VNI: o.VNI, MAC: o.MAC},
		},
		node: n, dev: o.Name,
	}, nil
}

// Device returns the name of the device.
func (v *HandmadeVXLAN) Device() string { return v.dev }

// AddPeer adds the peer's entries:
//
//	ip neigh replace <subnet.0> lladdr <mac> nud permanent dev flannel.1
//	bridge fdb replace <mac> dev flannel.1 dst <public> self permanent
//	ip route replace <subnet> via <subnet.0> dev flannel.1 onlink
func (v *HandmadeVXLAN) AddPeer(peer subnet.Endpoint) error {
	err := v.each(peer, netlink.NeighSet, netlink.NeighSet, netlink.RouteReplace)
	if err != nil {
		return fmt.Errorf("adding peer %s to %s in %s: %w", peer.Subnet, v.dev, v.node.Name, err)
	}
	return nil
}

// RemovePeer removes the peer's entries.
func (v *HandmadeVXLAN) RemovePeer(peer subnet.Endpoint) error {
	err := v.each(peer, netlink.NeighDel, netlink.NeighDel, netlink.RouteDel)
	if err != nil {
		return fmt.Errorf("removing peer %s from %s in %s: %w", peer.Subnet, v.dev, v.node.Name, err)
	}
	return nil
}

// each applies the given operations to the peer's neighbour, FDB entry and route, and
// stops at the first error.
func (v *HandmadeVXLAN) each(peer subnet.Endpoint, neigh, fdb func(*netlink.Neigh) error, route func(*netlink.Route) error) error {
	return v.node.Do(func() error {
		dev, err := netlink.LinkByName(v.dev)
		if err != nil {
			return err
		}
		index := dev.Attrs().Index
		vtep := peer.Subnet.Masked().Addr()
		mac := net.HardwareAddr(peer.VTEP.MAC[:])
		family := netlink.FAMILY_V4
		if vtep.Is6() {
			family = netlink.FAMILY_V6
		}
		if err := neigh(&netlink.Neigh{
			LinkIndex: index, Family: family, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST,
			IP: vtep.AsSlice(), HardwareAddr: mac,
		}); err != nil {
			return fmt.Errorf("neighbour %s: %w", vtep, err)
		}
		if err := fdb(&netlink.Neigh{
			LinkIndex: index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF,
			IP: peer.Public.AsSlice(), HardwareAddr: mac,
		}); err != nil {
			return fmt.Errorf("FDB entry %s: %w", mac, err)
		}
		if err := route(&netlink.Route{
			LinkIndex: index, Dst: host.IPNet(peer.Subnet), Gw: vtep.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
		}); err != nil {
			return fmt.Errorf("route %s: %w", peer.Subnet, err)
		}
		return nil
	})
}

// Remove deletes the device, and with it all peers' entries.
func (v *HandmadeVXLAN) Remove() error {
	err := v.node.Do(func() error {
		dev, err := netlink.LinkByName(v.dev)
		if err != nil {
			return err
		}
		return netlink.LinkDel(dev)
	})
	if err != nil {
		return fmt.Errorf("removing %s in %s: %w", v.dev, v.node.Name, err)
	}
	return nil
}
