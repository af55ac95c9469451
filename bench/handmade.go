package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// kernel is a datapath that the kernel forwards, set up here through netlink: a
// device, or routes only.
type kernel struct {
	format string
	undo   []func() error
}

func (k *kernel) Run(ctx context.Context) error { <-ctx.Done(); return nil }

func (k *kernel) Status() api.Datapath { return api.Datapath{WireFormat: k.format, Kind: "kernel"} }

func (k *kernel) Close() error {
	var errs []error
	for i := len(k.undo) - 1; i >= 0; i-- {
		errs = append(errs, k.undo[i]())
	}
	k.undo = nil
	return errors.Join(errs...)
}

// device creates a device, adds the part's inner address and sets it up.
func (k *kernel) device(p Part, dev netlink.Link) error {
	if old, err := netlink.LinkByName(p.device()); err == nil { // left by a run that was killed
		if err := netlink.LinkDel(old); err != nil {
			return fmt.Errorf("removing an earlier %s: %w", p.device(), err)
		}
	}
	if err := netlink.LinkAdd(dev); err != nil {
		switch {
		case errors.Is(err, unix.EOPNOTSUPP):
			return unavailable(fmt.Sprintf("the kernel has no %s device", dev.Type()))
		case errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EEXIST):
			return fmt.Errorf("creating a %s device: another device or a socket uses its port or addresses: %w", dev.Type(), err)
		}
		return fmt.Errorf("creating a %s device: %w", dev.Type(), err)
	}
	k.undo = append(k.undo, func() error { return netlink.LinkDel(dev) })
	return k.address(p, dev)
}

func (k *kernel) address(p Part, dev netlink.Link) error {
	self := netip.PrefixFrom(p.self().subnet.Addr(), 32)
	if err := netlink.AddrAdd(dev, &netlink.Addr{IPNet: host.IPNet(self)}); err != nil {
		return fmt.Errorf("address %s: %w", self, err)
	}
	if err := netlink.LinkSetUp(dev); err != nil {
		return fmt.Errorf("setting %s up: %w", dev.Attrs().Name, err)
	}
	return nil
}

func (k *kernel) route(r *netlink.Route) error {
	if err := netlink.RouteReplace(r); err != nil {
		return fmt.Errorf("route %s: %w", r.Dst, err)
	}
	k.undo = append(k.undo, func() error {
		if err := netlink.RouteDel(r); !errors.Is(err, unix.ESRCH) {
			return err
		}
		return nil // the kernel removed it with its device
	})
	return nil
}

// openKernelVXLAN creates a vxlan device as flannel does, and for each peer:
//
//	ip neigh add <peer.0> lladdr <mac> nud permanent dev cvbench0
//	bridge fdb add <mac> dev cvbench0 dst <B> self permanent
//	ip route add <peer subnet> via <peer.0> dev cvbench0 onlink
func openKernelVXLAN(p Part) (carrier, error) {
	const vni = 1
	mac := func(index int) subnet.MAC { return subnet.DeriveMAC(fmt.Sprintf("bench-%d", index), vni, false) }
	under, err := netlink.LinkByName(p.Link)
	if err != nil {
		return nil, fmt.Errorf("underlay link %s: %w", p.Link, err)
	}
	self := mac(p.Index)
	k := &kernel{format: "vxlan"}
	dev := &netlink.Vxlan{
		LinkAttrs:    netlink.LinkAttrs{Name: p.device(), MTU: under.Attrs().MTU - 50, HardwareAddr: self[:], TxQLen: 1000},
		VxlanId:      vni,
		VtepDevIndex: under.Attrs().Index,
		SrcAddr:      p.self().underlay.AsSlice(),
		Port:         int(p.Port),
	}
	err = k.device(p, dev)
	for _, o := range p.others() {
		peer := mac(o.index)
		if err == nil {
			err = netlink.NeighSet(&netlink.Neigh{
				LinkIndex: dev.Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST,
				IP: o.subnet.Addr().AsSlice(), HardwareAddr: peer[:],
			})
		}
		if err == nil {
			err = netlink.NeighSet(&netlink.Neigh{
				LinkIndex: dev.Index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF,
				IP: o.underlay.AsSlice(), HardwareAddr: peer[:],
			})
		}
		if err == nil {
			err = k.route(&netlink.Route{
				LinkIndex: dev.Index, Dst: host.IPNet(o.subnet), Gw: o.subnet.Addr().AsSlice(), Flags: int(netlink.FLAG_ONLINK),
			})
		}
	}
	if err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

// openKernelIPIP creates an ipip device without a remote address, and for each peer:
//
//	ip route add <peer subnet> via <B> dev cvbench0 onlink src <subnet.0>
func openKernelIPIP(p Part) (carrier, error) {
	k := &kernel{format: "ipip"}
	dev := &netlink.Iptun{
		LinkAttrs: netlink.LinkAttrs{Name: p.device(), TxQLen: 1000},
		Local:     p.self().underlay.AsSlice(), PMtuDisc: 1,
	}
	err := k.device(p, dev)
	for _, o := range p.others() {
		if err == nil {
			err = k.route(&netlink.Route{
				LinkIndex: dev.Index, Dst: host.IPNet(o.subnet), Gw: o.underlay.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
				Src: p.self().subnet.Addr().AsSlice(),
			})
		}
	}
	if err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

// openHostGateway routes each peer's subnet to the peer, without a tunnel:
//
//	ip addr add <subnet.0>/32 dev lo
//	ip route add <peer subnet> via B dev eth0 src <subnet.0>
func openHostGateway(p Part) (carrier, error) {
	k := &kernel{format: "host-gw"}
	under, err := netlink.LinkByName(p.Link)
	if err != nil {
		return nil, fmt.Errorf("underlay link %s: %w", p.Link, err)
	}
	undo, err := addLoopbackAddr(p)
	if err != nil {
		return nil, err
	}
	k.undo = append(k.undo, undo)
	for _, o := range p.others() {
		if err := k.route(&netlink.Route{
			LinkIndex: under.Attrs().Index, Dst: host.IPNet(o.subnet), Gw: o.underlay.AsSlice(), Src: p.self().subnet.Addr().AsSlice(),
		}); err != nil {
			return nil, errors.Join(err, k.Close())
		}
	}
	return k, nil
}

// addLoopbackAddr adds the part's inner address to lo, for datapaths without a device.
func addLoopbackAddr(p Part) (undo func() error, err error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	self := &netlink.Addr{IPNet: host.IPNet(netip.PrefixFrom(p.self().subnet.Addr(), 32))}
	if err := netlink.AddrReplace(lo, self); err != nil {
		return nil, fmt.Errorf("address %s: %w", p.self().subnet.Addr(), err)
	}
	return func() error { return netlink.AddrDel(lo, self) }, nil
}
