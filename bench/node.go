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

// Part is one node's part of a datapath. All parts follow from it: nothing
// else is agreed between the nodes.
type Part struct {
	Datapath string       `json:"datapath"`
	Slot     int          `json:"slot"`     // tells datapaths apart that share their nodes
	Index    int          `json:"index"`    // the node's, in Underlay
	Link     string       `json:"link"`     // the underlay's
	Underlay []netip.Addr `json:"underlay"` // addresses of all nodes
	Port     uint16       `json:"port"`     // of the tunnel
	RunDir   string       `json:"run_dir"`  // for the socket that tells the counters
	Absent   int          `json:"absent"`   // peers in the table that are not there
}

// innerNetwork holds the subnets of all datapaths of a benchmark, and wideNetwork
// those of the peers that are in a table only, too.
var (
	innerNetwork = netip.MustParsePrefix("10.213.0.0/16")
	wideNetwork  = netip.MustParsePrefix("10.192.0.0/10")
)

// innerSubnet is the k-th subnet, from 0, of those that nodes have of datapaths;
// its first address is the node's.
func innerSubnet(k int) netip.Prefix {
	a := innerNetwork.Addr().As4()
	a[2] = byte(k + 1)
	return netip.PrefixFrom(netip.AddrFrom4(a), 24)
}

// absentSubnet is the subnet of a peer that is in the table only.
func absentSubnet(k int) netip.Prefix {
	a := wideNetwork.Addr().As4()
	a[1] += byte(k >> 8)
	a[2] = byte(k)
	return netip.PrefixFrom(netip.AddrFrom4(a), 24)
}

// member is a node of a datapath.
type member struct {
	index    int
	underlay netip.Addr
	subnet   netip.Prefix // its first address is the node's
}

func (p Part) member(index int) member {
	return member{index, p.Underlay[index], innerSubnet(len(p.Underlay)*p.Slot + index)}
}

func (p Part) self() member { return p.member(p.Index) }

// others are the nodes but this one, sorted by subnet.
func (p Part) others() []member {
	var all []member
	for i := range p.Underlay {
		if i != p.Index {
			all = append(all, p.member(i))
		}
	}
	return all
}

// device is the name of the device that the part makes.
func (p Part) device() string { return fmt.Sprintf("cvbench%d", p.Slot) }

// ErrUnavailable says that a datapath is not to be had on this machine.
var ErrUnavailable = errors.New("not available")

// unavailable is an ErrUnavailable with its own words only.
type unavailable string

func (u unavailable) Error() string { return string(u) }
func (unavailable) Is(e error) bool { return e == ErrUnavailable }

// carrier is an open part.
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

// RunNode carries a part of a datapath in the network namespace of this
// process until ctx ends. It prints "ready" when traffic may come.
func RunNode(ctx context.Context, p Part, out io.Writer, log *slog.Logger) error {
	c, err := openCarrier(p, log)
	if errors.Is(err, ErrUnavailable) {
		fmt.Fprintf(out, "%s%s\n", nodeUnavailable, err)
		return err
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.Datapath, err)
	}
	defer func() { _ = c.Close() }()

	socket, err := api.Listen(p.RunDir)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: api.Handler(func() api.Status { return api.Status{Ready: true, Datapath: c.Status()} })}
	go func() { _ = server.Serve(socket) }()
	defer func() { _ = server.Close() }()

	fmt.Fprintf(out, "%s%s\n", nodeReady, p.self().subnet.Addr())
	err = c.Run(ctx)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func openCarrier(p Part, log *slog.Logger) (carrier, error) {
	switch p.Datapath {
	case "vxlan/userspace", "ipip/userspace":
		return openUserspace(p, log)
	case "vxlan/kernel", "ipip/kernel", "host-gw":
		if p.Slot == 0 { // which nobody shares
			return openOwnKernel(p, log)
		}
	}
	switch p.Datapath {
	case "vxlan/kernel":
		return openKernelVXLAN(p)
	case "ipip/kernel":
		return openKernelIPIP(p)
	case "host-gw":
		return openHostGateway(p)
	case "naive":
		return openNaive(p)
	case "wireguard-go":
		return openWireGuard(p, log)
	}
	return nil, fmt.Errorf("no node carries the datapath %q", p.Datapath)
}

// userspace is culvert's own userspace datapath.
type userspace struct{ *tunnel.Tunnel }

func (u userspace) Close() error { return u.Tunnel.Close(backend.Remove) }

func openUserspace(p Part, log *slog.Logger) (carrier, error) {
	format, _, _ := strings.Cut(p.Datapath, "/")
	s, under, err := snapshot(p, format)
	if err != nil {
		return nil, err
	}
	t, err := tunnel.Open(tunnel.Options{
		Node:   backend.Node{Underlay: under, PublicIPs: []netip.Addr{p.self().underlay}},
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

// snapshot is what a datapath of culvert's own is given: the other nodes, and
// the peers that are in the table only.
func snapshot(p Part, format string) (subnet.Snapshot, host.Underlay, error) {
	network := innerNetwork
	if p.Absent > 0 {
		network = wideNetwork
	}
	wire := fmt.Sprintf(`{"Type":%q}`, format)
	if format == "vxlan" {
		wire = fmt.Sprintf(`{"Type":%q,"Port":%d}`, format, p.Port)
	}
	cfg, _, err := subnet.ParseConfig(fmt.Appendf(nil, `{"Network":%q,"SubnetLen":24,"Backend":%s}`, network, wire))
	if err != nil {
		return subnet.Snapshot{}, host.Underlay{}, err
	}
	lease := func(m member) subnet.Lease {
		name := "bench-" + m.subnet.Addr().String()
		e := subnet.Endpoint{Subnet: m.subnet, Public: m.underlay}
		if format == "vxlan" {
			e.VTEP = subnet.VTEP{VNI: cfg.Backend.VNI, MAC: subnet.DeriveMAC(name, cfg.Backend.VNI, false)}
		}
		return subnet.Lease{Node: name, Backend: format, Endpoints: []subnet.Endpoint{e}}
	}
	under, err := host.FindUnderlay(host.UnderlaySelector{Interfaces: []string{p.self().underlay.String()}})
	if err == nil {
		err = cfg.CheckUnderlay(under.Networks)
	}
	if err != nil {
		return subnet.Snapshot{}, host.Underlay{}, err
	}
	s := subnet.Snapshot{Config: cfg, Self: lease(p.self())}
	for k := 1; k <= p.Absent; k++ {
		s.Peers = append(s.Peers, lease(member{underlay: absent(k), subnet: absentSubnet(k)}))
	}
	for _, o := range p.others() { // after those: sorted by subnet
		s.Peers = append(s.Peers, lease(o))
	}
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

// device makes a device with the part's inner address and sets it up.
func (k *kernel) device(p Part, dev netlink.Link) error {
	if old, err := netlink.LinkByName(p.device()); err == nil { // of a run that was killed
		if err := netlink.LinkDel(old); err != nil {
			return fmt.Errorf("removing an earlier %s: %w", p.device(), err)
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
		return nil // the device has taken it along
	})
	return nil
}

// openKernelVXLAN makes a vxlan device as flannel does, and for each peer:
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

// openKernelIPIP makes an ipip device without a remote end, and for each peer:
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

// openHostGateway routes each peer's subnet to the peer, in no tunnel:
//
//	ip addr add <subnet.0>/32 dev lo
//	ip route add <peer subnet> via B dev eth0 src <subnet.0>
func openHostGateway(p Part) (carrier, error) {
	k := &kernel{format: "host-gw"}
	under, err := netlink.LinkByName(p.Link)
	if err != nil {
		return nil, fmt.Errorf("underlay link %s: %w", p.Link, err)
	}
	undo, err := bear(p)
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

// bear puts the part's address on the loopback, where there is no device of its
// own for it.
func bear(p Part) (undo func() error, err error) {
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
