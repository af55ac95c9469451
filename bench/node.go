package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/backend"
	"culvert/backend/tunnel"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// Half is one node's half of a datapath. Both halves follow from it: nothing
// else is agreed between them.
type Half struct {
	Datapath string        `json:"datapath"`
	Slot     int           `json:"slot"`     // tells datapaths apart that share two nodes
	Index    int           `json:"index"`    // 0 or 1
	Link     string        `json:"link"`     // the underlay's
	Underlay [2]netip.Addr `json:"underlay"` // addresses of both nodes
	Port     uint16        `json:"port"`     // of the tunnel
	RunDir   string        `json:"run_dir"`  // for the socket that tells the counters
	Peers    int           `json:"peers"`    // in the table, one of which is there
}

// innerNetwork holds the subnets of all datapaths of a benchmark, and wideNetwork
// those of the peers that are in a table only, too.
var (
	innerNetwork = netip.MustParsePrefix("10.213.0.0/16")
	wideNetwork  = netip.MustParsePrefix("10.192.0.0/10")
)

// innerSubnet is what a node has of a datapath; its first address is the node's.
func innerSubnet(slot, index int) netip.Prefix {
	a := innerNetwork.Addr().As4()
	a[2] = byte(2*slot + index + 1)
	return netip.PrefixFrom(netip.AddrFrom4(a), 24)
}

// absentSubnet is the subnet of a peer that is in the table only.
func absentSubnet(k int) netip.Prefix {
	a := wideNetwork.Addr().As4()
	a[1] += byte(k >> 8)
	a[2] = byte(k)
	return netip.PrefixFrom(netip.AddrFrom4(a), 24)
}

func (h Half) self() netip.Prefix  { return innerSubnet(h.Slot, h.Index) }
func (h Half) other() netip.Prefix { return innerSubnet(h.Slot, 1-h.Index) }

// device is the name of the device that the half makes.
func (h Half) device() string { return fmt.Sprintf("cvbench%d", h.Slot) }

// ErrUnavailable says that a datapath is not to be had on this machine.
var ErrUnavailable = errors.New("not available")

// unavailable is an ErrUnavailable with its own words only.
type unavailable string

func (u unavailable) Error() string { return string(u) }
func (unavailable) Is(e error) bool { return e == ErrUnavailable }

// carrier is an open half.
type carrier interface {
	Run(ctx context.Context) error
	Status() api.Datapath
	Close() error
}

// Marks in what a node prints.
const (
	nodeReady       = "ready "
	nodeUnavailable = "unavailable "
)

// RunNode carries one half of a datapath in the network namespace of this
// process until ctx ends. It prints "ready" when traffic may come.
func RunNode(ctx context.Context, h Half, out io.Writer, log *slog.Logger) error {
	c, err := openCarrier(h, log)
	if errors.Is(err, ErrUnavailable) {
		fmt.Fprintf(out, "%s%s\n", nodeUnavailable, err)
		return err
	}
	if err != nil {
		return fmt.Errorf("%s: %w", h.Datapath, err)
	}
	defer func() { _ = c.Close() }()

	socket, err := api.Listen(h.RunDir)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: api.Handler(func() api.Status { return api.Status{Ready: true, Datapath: c.Status()} })}
	go func() { _ = server.Serve(socket) }()
	defer func() { _ = server.Close() }()

	fmt.Fprintf(out, "%s%s\n", nodeReady, h.self().Addr())
	err = c.Run(ctx)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func openCarrier(h Half, log *slog.Logger) (carrier, error) {
	switch h.Datapath {
	case "vxlan/userspace", "ipip/userspace":
		return openUserspace(h, log)
	case "vxlan/kernel", "ipip/kernel", "host-gw":
		if h.Slot == 0 { // which nobody shares
			return openOwnKernel(h, log)
		}
	}
	switch h.Datapath {
	case "vxlan/kernel":
		return openKernelVXLAN(h)
	case "ipip/kernel":
		return openKernelIPIP(h)
	case "host-gw":
		return openHostGateway(h)
	case "naive":
		return openNaive(h)
	case "wireguard-go":
		return openWireGuard(h, log)
	}
	return nil, fmt.Errorf("no node carries the datapath %q", h.Datapath)
}

// userspace is culvert's own userspace datapath.
type userspace struct{ *tunnel.Tunnel }

func (u userspace) Close() error { return u.Tunnel.Close(backend.Remove) }

func openUserspace(h Half, log *slog.Logger) (carrier, error) {
	format, _, _ := strings.Cut(h.Datapath, "/")
	s, under, err := snapshot(h, format)
	if err != nil {
		return nil, err
	}
	t, err := tunnel.Open(tunnel.Options{
		Node:   backend.Node{Underlay: under, PublicIPs: []netip.Addr{h.Underlay[h.Index]}},
		Config: s.Config, Lease: s.Self, Why: "culvert bench", Log: log,
	})
	if err != nil {
		return nil, err
	}
	if err := t.Apply(context.Background(), s); err != nil {
		return nil, errors.Join(err, t.Close(backend.Remove))
	}
	return userspace{t}, nil
}

// snapshot is what a datapath of culvert's own is given: the other half, and
// the peers that are in the table only.
func snapshot(h Half, format string) (subnet.Snapshot, host.Underlay, error) {
	network := innerNetwork
	if h.Peers > 1 {
		network = wideNetwork
	}
	wire := fmt.Sprintf(`{"Type":%q}`, format)
	if format == "vxlan" {
		wire = fmt.Sprintf(`{"Type":%q,"Port":%d}`, format, h.Port)
	}
	cfg, _, err := subnet.ParseConfig(fmt.Appendf(nil, `{"Network":%q,"SubnetLen":24,"Backend":%s}`, network, wire))
	if err != nil {
		return subnet.Snapshot{}, host.Underlay{}, err
	}
	lease := func(prefix netip.Prefix, public netip.Addr) subnet.Lease {
		name := "bench-" + prefix.Addr().String()
		e := subnet.Endpoint{Subnet: prefix, Public: public}
		if format == "vxlan" {
			e.VTEP = subnet.VTEP{VNI: cfg.Backend.VNI, MAC: subnet.DeriveMAC(name, cfg.Backend.VNI, false)}
		}
		return subnet.Lease{Node: name, Backend: format, Endpoints: []subnet.Endpoint{e}}
	}
	under, err := host.FindUnderlay(host.UnderlaySelector{Interfaces: []string{h.Underlay[h.Index].String()}})
	if err == nil {
		err = cfg.CheckUnderlay(under.Networks)
	}
	if err != nil {
		return subnet.Snapshot{}, host.Underlay{}, err
	}
	s := subnet.Snapshot{Config: cfg, Self: lease(h.self(), h.Underlay[h.Index])}
	for k := 1; k < h.Peers; k++ {
		s.Peers = append(s.Peers, lease(absentSubnet(k), absent(k)))
	}
	s.Peers = append(s.Peers, lease(h.other(), h.Underlay[1-h.Index])) // the last: sorted by subnet
	return s, under, nil
}

// absent is the underlay address of a peer that is in the table only: of
// 100.64.0.0/10 (RFC 6598).
func absent(k int) netip.Addr { return netip.AddrFrom4([4]byte{100, 64, byte(k >> 8), byte(k)}) }

// kernel is a datapath of the kernel's: a device, or routes alone.
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

// device makes a device with the half's inner address and sets it up.
func (k *kernel) device(h Half, dev netlink.Link) error {
	if old, err := netlink.LinkByName(h.device()); err == nil { // of a run that was killed
		if err := netlink.LinkDel(old); err != nil {
			return fmt.Errorf("removing an earlier %s: %w", h.device(), err)
		}
	}
	if err := netlink.LinkAdd(dev); err != nil {
		switch {
		case errors.Is(err, unix.EOPNOTSUPP):
			return unavailable(fmt.Sprintf("the kernel has no %s device", dev.Type()))
		case errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EEXIST):
			return fmt.Errorf("making a %s device: another one, or a socket, has its port or addresses: %w", dev.Type(), err)
		}
		return fmt.Errorf("making a %s device: %w", dev.Type(), err)
	}
	k.undo = append(k.undo, func() error { return netlink.LinkDel(dev) })
	return k.address(h, dev)
}

func (k *kernel) address(h Half, dev netlink.Link) error {
	self := netip.PrefixFrom(h.self().Addr(), 32)
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
		return nil // the device has taken it along
	})
	return nil
}

// openKernelVXLAN makes a vxlan device as flannel does:
//
//	ip link add cvbench0 type vxlan id 1 local A dev eth0 dstport P nolearning
//	ip neigh add <peer.0> lladdr <mac> nud permanent dev cvbench0
//	bridge fdb add <mac> dev cvbench0 dst <B> self permanent
//	ip route add <peer subnet> via <peer.0> dev cvbench0 onlink
func openKernelVXLAN(h Half) (carrier, error) {
	const vni = 1
	mac := func(index int) subnet.MAC { return subnet.DeriveMAC(fmt.Sprintf("bench-%d", index), vni, false) }
	under, err := netlink.LinkByName(h.Link)
	if err != nil {
		return nil, fmt.Errorf("underlay link %s: %w", h.Link, err)
	}
	self, peer := mac(h.Index), mac(1-h.Index)
	k := &kernel{format: "vxlan"}
	dev := &netlink.Vxlan{
		LinkAttrs:    netlink.LinkAttrs{Name: h.device(), MTU: under.Attrs().MTU - 50, HardwareAddr: self[:], TxQLen: 1000},
		VxlanId:      vni,
		VtepDevIndex: under.Attrs().Index,
		SrcAddr:      h.Underlay[h.Index].AsSlice(),
		Port:         int(h.Port),
	}
	err = k.device(h, dev)
	if err == nil {
		err = netlink.NeighSet(&netlink.Neigh{
			LinkIndex: dev.Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST,
			IP: h.other().Addr().AsSlice(), HardwareAddr: peer[:],
		})
	}
	if err == nil {
		err = netlink.NeighSet(&netlink.Neigh{
			LinkIndex: dev.Index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF,
			IP: h.Underlay[1-h.Index].AsSlice(), HardwareAddr: peer[:],
		})
	}
	if err == nil {
		err = k.route(&netlink.Route{
			LinkIndex: dev.Index, Dst: host.IPNet(h.other()), Gw: h.other().Addr().AsSlice(), Flags: int(netlink.FLAG_ONLINK),
		})
	}
	if err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

// openKernelIPIP makes an ipip device:
//
//	ip link add cvbench0 type ipip local A remote B
//	ip route add <peer subnet> dev cvbench0
func openKernelIPIP(h Half) (carrier, error) {
	k := &kernel{format: "ipip"}
	dev := &netlink.Iptun{
		LinkAttrs: netlink.LinkAttrs{Name: h.device(), TxQLen: 1000},
		Local:     h.Underlay[h.Index].AsSlice(), Remote: h.Underlay[1-h.Index].AsSlice(), PMtuDisc: 1,
	}
	err := k.device(h, dev)
	if err == nil {
		err = k.route(&netlink.Route{LinkIndex: dev.Index, Dst: host.IPNet(h.other()), Src: h.self().Addr().AsSlice()})
	}
	if err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

// openHostGateway routes the other subnet to the other node, in no tunnel:
//
//	ip addr add <subnet.0>/32 dev lo
//	ip route add <peer subnet> via B dev eth0 src <subnet.0>
func openHostGateway(h Half) (carrier, error) {
	k := &kernel{format: "host-gw"}
	under, err := netlink.LinkByName(h.Link)
	if err != nil {
		return nil, fmt.Errorf("underlay link %s: %w", h.Link, err)
	}
	undo, err := bear(h)
	if err != nil {
		return nil, err
	}
	k.undo = append(k.undo, undo)
	if err := k.route(&netlink.Route{
		LinkIndex: under.Attrs().Index, Dst: host.IPNet(h.other()), Gw: h.Underlay[1-h.Index].AsSlice(), Src: h.self().Addr().AsSlice(),
	}); err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

// bear puts the half's address on the loopback, where there is no device of its
// own for it.
func bear(h Half) (undo func() error, err error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	self := &netlink.Addr{IPNet: host.IPNet(netip.PrefixFrom(h.self().Addr(), 32))}
	if err := netlink.AddrReplace(lo, self); err != nil {
		return nil, fmt.Errorf("address %s: %w", h.self().Addr(), err)
	}
	return func() error { return netlink.AddrDel(lo, self) }, nil
}
