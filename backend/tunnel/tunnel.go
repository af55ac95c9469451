// Package tunnel is the userspace datapath: a TUN device on the side of the
// pods, UDP sockets on the side of the underlay, and encap's loop between.
//
// The host gets one route, the cluster network into the device; which peer a
// packet goes to is looked up in the loop's own table. So a lease event is one
// pointer swap, and no kernel state can be stale.
package tunnel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"culvert/backend"
	"culvert/encap"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// DeviceName is the TUN device's name.
const DeviceName = "culvert0"

// Options is what a Tunnel is made of.
type Options struct {
	Node   backend.Node
	Config subnet.Config
	Lease  subnet.Lease // this node's own
	Why    string       // the choice of this datapath, for the status
	// Replaces names devices of other programs that have our UDP port.
	Replaces []string
	Switches
	// Inherited are the descriptors that a predecessor left open (Descriptors),
	// which Open takes over or closes.
	Inherited []int
	Log       *slog.Logger
}

// Switches are the kill switches: each turns one mechanism off that would be
// used wherever the kernel has it.
type Switches struct {
	NoGSO, NoGRO, NoUSO, NoSuperFrame bool
}

// Tunnel is the userspace datapath.
type Tunnel struct {
	options Options
	format  encap.Format
	mtu     int
	device  *device
	sockets []int        // descriptors
	super   *superDevice // nil if there is none, and then noSuper says why
	noSuper string
	uplink  *uplink // watches for super; nil if super is
	loop    *encap.Loop
	offload encap.Offload
	egress  encap.Counters
	ingress encap.Counters

	keeper    *host.Keeper
	inherited inherited
	applied   chan struct{} // closed by the first Apply
	once      sync.Once
}

// Open makes the device and the sockets. The error names the step, and what to
// do where that is known. Nothing is left open after an error.
func Open(o Options) (*Tunnel, error) {
	format, ok := map[string]encap.Format{"vxlan": encap.FormatVXLAN, "ipip": encap.FormatIPIP}[o.Config.Backend.Type]
	if !ok {
		return nil, fmt.Errorf("the userspace datapath carries vxlan and ipip, not %s", o.Config.Backend.Type)
	}
	t := &Tunnel{
		options: o, format: format, keeper: host.NewKeeper(o.Node.Underlay.Name, o.Log),
		inherited: inherited{o.Inherited}, applied: make(chan struct{}),
	}
	defer func() { _ = t.inherited.close() }()
	var err error
	if t.mtu, err = t.podMTU(o.Node.Underlay); err != nil {
		return nil, err
	}
	t.device, err = t.inherited.openDevice(DeviceName, t.mtu, o.Log)
	if err != nil {
		return nil, err
	}
	if err := t.makeWay(); err != nil {
		return nil, errors.Join(err, t.Close(backend.Keep))
	}
	loop := encap.Options{
		Format: format, Device: encap.NewDescriptor(t.device.fd), MTU: t.mtu,
		Offload: &t.offload, Egress: &t.egress, Ingress: &t.ingress,
	}
	for _, e := range o.Lease.Endpoints {
		side, err := t.listen(e)
		if err != nil {
			return nil, errors.Join(err, t.Close(backend.Keep))
		}
		if e.Public.Is4() {
			loop.IPv4 = side
		} else {
			loop.IPv6 = side
		}
	}
	t.offload.GSO.Store(!o.NoGSO)
	t.offload.GRO.Store(!o.NoGRO)
	t.offload.USO.Store(!o.NoGRO && !o.NoUSO && t.device.uso)
	if err := t.openSuper(); err != nil {
		return nil, errors.Join(err, t.Close(backend.Keep))
	}
	if t.super != nil {
		loop.Super = encap.NewDescriptor(t.super.fd)
	}
	t.loop = encap.NewLoop(loop)
	return t, nil
}

// listen opens the sockets of one family.
func (t *Tunnel) listen(e subnet.Endpoint) (encap.Underlay, error) {
	u := t.options.Node.Underlay
	local := u.Addr(e.Public.Is4())
	if t.format == encap.FormatIPIP {
		link, err := net.InterfaceByName(u.Name)
		if err != nil {
			return encap.Underlay{}, fmt.Errorf("looking up %s: %w", u.Name, err)
		}
		raw, packets, err := t.inherited.listenIPIP(local, link.Index)
		if err != nil {
			return encap.Underlay{}, err
		}
		t.sockets = append(t.sockets, raw, packets)
		side := encap.Underlay{Socket: encap.NewDescriptor(raw), Packets: encap.NewDescriptor(packets)}
		if len(link.HardwareAddr) == 6 {
			side.LinkHeader = 14 // Ethernet's; what has no addresses has no header
		}
		return side, nil
	}
	socket, err := t.inherited.listenUDP(netip.AddrPortFrom(local, t.options.Config.Backend.Port))
	if err != nil {
		return encap.Underlay{}, err
	}
	t.sockets = append(t.sockets, socket)
	return encap.Underlay{Socket: encap.NewDescriptor(socket), VNI: e.VTEP.VNI, MAC: e.VTEP.MAC}, nil
}

// openSuper makes the device for super-frames, where it is wanted and to be
// had; they are not sent before the uplink has been looked at.
func (t *Tunnel) openSuper() error {
	o := t.options
	if o.NoSuperFrame || o.NoGSO {
		t.noSuper = "turned off by flag"
		return nil
	}
	var err error
	t.super, err = openSuperDevice(t.format)
	if errors.Is(err, errNoSuperFrames) {
		t.noSuper = errNoSuperFrames.Error()
		return nil
	}
	if err != nil {
		return err
	}
	t.uplink = &uplink{
		node: o.Node, port: o.Config.Backend.Port, device: t.super, offload: &t.offload,
		table: func() *encap.Table { return t.loop.Table() }, log: o.Log, why: "not looked at yet",
	}
	return nil
}

// podMTU is what remains of the underlay's MTU.
func (t *Tunnel) podMTU(u host.Underlay) (int, error) {
	cost := 0
	for _, e := range t.options.Lease.Endpoints {
		if t.format == encap.FormatIPIP {
			cost = max(cost, encap.IPIPCost)
			continue
		}
		cost = max(cost, encap.VXLANCost(e.Public.Is4()))
	}
	_, ipv6 := t.options.Lease.Endpoint(false)
	return backend.MTU(t.options.Config.Backend.MTU, u, cost, ipv6)
}

// Apply swaps the peer table, and makes the host's addresses, routes and
// masquerading right.
func (t *Tunnel) Apply(_ context.Context, s subnet.Snapshot) error {
	table := t.table(s)
	if t.uplink != nil {
		t.uplink.prepare(table)
	}
	t.loop.SetTable(table)
	t.once.Do(func() { close(t.applied) })
	return t.keeper.Apply(func(host.View) (host.State, error) { return t.state(s), nil })
}

// table is the loop's view of a snapshot.
func (t *Tunnel) table(s subnet.Snapshot) *encap.Table {
	var local []netip.Prefix
	for _, e := range t.options.Lease.Endpoints {
		local = append(local, e.Subnet)
	}
	var peers []*encap.Peer
	for _, l := range s.Peers {
		for _, e := range l.Endpoints {
			self, ok := t.options.Lease.Endpoint(e.Subnet.Addr().Is4())
			if !ok || l.Reserved {
				continue
			}
			if t.format == encap.FormatIPIP {
				peers = append(peers, encap.IPIPPeer(e.Subnet, e.Public))
				continue
			}
			to := netip.AddrPortFrom(e.Public, t.options.Config.Backend.Port)
			peers = append(peers, encap.PeerTo(e.Subnet, to, self.VTEP.VNI, e.VTEP.MAC, self.VTEP.MAC))
		}
	}
	return encap.NewTable(local, peers)
}

// state is what the host must be like, given a snapshot: the cluster network is
// reached through the device, and is unreachable while it is gone.
func (t *Tunnel) state(s subnet.Snapshot) host.State {
	state := backend.Base(t.options.Node, s)
	link := host.Link{Name: DeviceName, MTU: t.mtu, GSOMaxSegs: gsoMaxSegments}
	for _, e := range t.options.Lease.Endpoints {
		network, ok := backend.NetworkOf(s, e)
		if !ok {
			continue
		}
		link.Addrs = append(link.Addrs, backend.HostAddrs(e)...)
		state.Routes = append(state.Routes, host.Route{To: network, Link: DeviceName, Source: e.Subnet.Addr()})
		guard := host.Tunnel{Network: network} // of IPIP, which has no port
		if t.format == encap.FormatVXLAN {
			guard.Port, guard.VNI = t.options.Config.Backend.Port, e.VTEP.VNI
		}
		state.Firewall.Tunnels = append(state.Firewall.Tunnels, guard)
	}
	state.Links = []host.Link{link}
	return state
}

// Run carries packets, and repairs what others do to the host, until ctx ends.
// What comes before the first Apply waits in the kernel: without a peer it
// would be dropped.
func (t *Tunnel) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-t.applied:
	}
	parts, ctx := errgroup.WithContext(ctx)
	parts.Go(func() error {
		if err := t.loop.Run(ctx); err != nil {
			return fmt.Errorf("%w: %w", backend.ErrBroken, err)
		}
		return nil
	})
	parts.Go(func() error { return t.keeper.Run(ctx) })
	if t.uplink != nil {
		parts.Go(func() error { return t.uplink.run(ctx) })
	}
	return parts.Wait()
}

// Status says what the datapath does.
func (t *Tunnel) Status() api.Datapath {
	s := api.Datapath{
		WireFormat: t.options.Config.Backend.Type,
		Kind:       "userspace",
		Why:        t.options.Why,
		Device:     DeviceName,
		MTU:        t.mtu,
		Peers:      t.loop.Table().Peers(),
		Egress:     traffic(&t.egress),
		Ingress:    traffic(&t.ingress),
		Mechanisms: []api.Mechanism{
			mechanism("gso", t.offload.GSO.Load(), t.options.NoGSO, true),
			mechanism("gro", t.offload.GRO.Load(), t.options.NoGRO, true),
			mechanism("uso", t.offload.USO.Load(), t.options.NoUSO || t.options.NoGRO, t.device.uso),
			t.superMechanism(),
		},
	}
	for _, r := range encap.Reasons() {
		if n := t.egress.Drops[r].Load() + t.ingress.Drops[r].Load(); n != 0 {
			s.Drops = append(s.Drops, api.Drop{Reason: r.String(), Packets: n})
		}
	}
	slices.SortStableFunc(s.Drops, func(a, b api.Drop) int { return cmp.Compare(b.Packets, a.Packets) })
	backend.Describe(&s, t.keeper.Standing())
	return s
}

// mechanism says why one is off: by order, for want of it, or refused in use.
func mechanism(name string, on, ordered, offered bool) api.Mechanism {
	m := api.Mechanism{Name: name, On: on}
	switch {
	case on:
	case ordered:
		m.Why = "turned off by flag"
	case !offered:
		m.Why = "the kernel does not offer it"
	default:
		m.Why = "the kernel refused it in use"
	}
	return m
}

func (t *Tunnel) superMechanism() api.Mechanism {
	m := api.Mechanism{Name: "super-frame", Why: t.noSuper}
	if t.uplink != nil {
		m.On, m.Why = t.uplink.status()
	}
	return m
}

func traffic(c *encap.Counters) api.Traffic {
	return api.Traffic{
		Packets: c.Packets.Load(), Bytes: c.Bytes.Load(), Frames: c.Frames.Load(), SuperFrames: c.Super.Load(),
		Syscalls: c.Syscalls.Load(), Waits: c.Waits.Load(),
	}
}

// Close closes the device, which takes its addresses and routes with it, and
// the sockets. The masquerading and the unreachable route stay with Keep.
func (t *Tunnel) Close(how backend.How) error {
	var errs []error
	for _, s := range t.sockets {
		errs = append(errs, unix.Close(s))
	}
	if t.super != nil {
		errs = append(errs, t.super.close())
	}
	errs = append(errs, t.device.close())
	if how == backend.Remove {
		_, err := host.Apply(host.State{})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// makeWay removes what has our UDP port and can be removed: the devices of the
// kernel datapath, if that ran here before, and those that we are to replace.
func (t *Tunnel) makeWay() error {
	var catchAll []host.Route
	for _, n := range t.options.Config.Networks {
		catchAll = append(catchAll, host.Route{To: n.Prefix, Metric: host.UnreachableMetric})
	}
	ours := func(device string) bool { return device != DeviceName }
	changes, err := host.MakeWay(t.options.Replaces, ours, catchAll)
	for _, c := range changes {
		t.options.Log.Info("host changed", "command", c.Command)
	}
	if err != nil {
		return fmt.Errorf("making way for the tunnel: %w", err)
	}
	return nil
}

// listenUDP opens a UDP socket bound to the node's underlay address, and returns
// its descriptor.
func listenUDP(at netip.AddrPort) (int, error) {
	network := "udp4"
	if at.Addr().Is6() {
		network = "udp6"
	}
	lc := net.ListenConfig{Control: setSocketOptions}
	c, err := lc.ListenPacket(context.Background(), network, at.String())
	if errors.Is(err, unix.EADDRINUSE) {
		return -1, fmt.Errorf("UDP port %d is taken: is a kernel vxlan device up (`ip -d link show type vxlan`), or flanneld running?: %w", at.Port(), err)
	}
	if err != nil {
		return -1, fmt.Errorf("opening the tunnel's socket: %w", err)
	}
	return detach(c.(*net.UDPConn))
}
