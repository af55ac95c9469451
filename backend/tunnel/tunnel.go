// Package tunnel is the userspace datapath: it opens a TUN device on the pods' side,
// UDP or raw sockets on the underlay's side, and runs package encap's loop between
// them. It owns these descriptors; encap owns the packets and the peer table, and
// internal/host the device's addresses, routes and firewall rules.
//
// Routes lead the whole cluster network into the device, and the loop's table selects
// the peer. So a lease event is one pointer swap, and no per-peer route can be stale.
package tunnel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"culvert/backend"
	"culvert/encap"
	"culvert/internal/api"
	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/internal/names"
	"culvert/internal/priority"
	"culvert/subnet"
)

// Options configures a Tunnel.
type Options struct {
	Node   backend.Node
	Config subnet.Config
	Lease  subnet.Lease // of this node
	Why    string       // why this datapath was chosen, for the status
	// Replaces names other programs' devices to remove, which conflict with ours.
	Replaces []string
	Tuning
	FastPath backend.FastPath // nil if there is none for this format; the Tunnel closes it
	// Inherited are a predecessor's open descriptors (Descriptors). Open takes
	// ownership: it uses or closes them.
	Inherited []int
	Log       *slog.Logger
}

// Tuning is the operator's settings of the loop. The zero value is the default.
type Tuning struct {
	// Kill switches: each disables a mechanism that is otherwise used if the kernel
	// supports it.
	NoGSO, NoGRO, NoUSO, NoSuperFrame, NoMultiQueue, NoBusyPoll bool

	Priority    bool // the daemon raises its priority (internal/priority)
	Queues      int  // threads that serve the device; 0: by the number of CPUs
	SourcePorts int  // over which flows are spread, at most 16; 0: by the number of CPUs
	CopyDSCP    bool // copy the inner DSCP to the outer header
	// DontFragment sets DF on outer VXLAN packets and enables path MTU discovery. IPIP
	// always does both.
	DontFragment bool
}

// queues returns the number of threads; by default one CPU is left to the pods.
func (t Tuning) queues() int {
	switch {
	case t.NoMultiQueue:
		return 1
	case t.Queues > 0:
		return t.Queues
	}
	return min(max(runtime.NumCPU()-1, 1), 8)
}

func (t Tuning) sourcePorts() int {
	switch {
	case t.SourcePorts > 0:
		return t.SourcePorts
	case runtime.NumCPU() <= 2:
		return 1 // a batch of small packets then needs one call
	}
	return 8
}

// Shape describes the tuning that a tunnel's descriptors depend on: a successor can
// inherit them only if its Shape is equal.
func (t Tuning) Shape() string {
	return fmt.Sprintf("%d queues, pairs %t, DF %t", t.queues(), !t.NoMultiQueue, t.DontFragment)
}

// Tunnel is the userspace datapath.
type Tunnel struct {
	options Options
	format  encap.Format
	mtu     int
	device  *device
	sockets []int // descriptors
	// receivers are those of sockets that receive the tunnel's packets.
	receivers []int
	super     *superDevice // nil if super-frames are off; noSuper says why
	noSuper   string
	uplink    *uplink // nil if super is nil
	loop      *encap.Loop
	offload   encap.Offload
	egress    encap.Counters
	ingress   encap.Counters

	keeper    *host.Keeper
	silence   backend.Silence
	prober    *backend.Prober
	inherited inherited
	applied   chan struct{} // closed by the first Apply
	once      sync.Once
}

// Open opens the device and the sockets. An error names the step, and the remedy if it
// is known; nothing is left open then.
func Open(o Options) (*Tunnel, error) {
	format, ok := encap.FormatNamed(o.Config.Backend.Type)
	if !ok {
		return nil, fmt.Errorf("the userspace datapath carries %s, not %s", strings.Join(encap.FormatNames(), " and "), o.Config.Backend.Type)
	}
	t := &Tunnel{
		options: o, format: format,
		inherited: inherited{o.Inherited}, applied: make(chan struct{}),
	}
	var followers []host.Follower
	if o.FastPath != nil {
		followers = append(followers, fastPath{o.FastPath, t})
	}
	t.keeper = host.NewKeeper(o.Node.Underlay.Index, o.Log, followers...)
	t.prober = backend.NewProber(backend.ProberOptions{Sources: o.Lease.Subnets(), Silence: &t.silence, Interval: o.Node.ProbeInterval, Log: o.Log})
	defer func() { _ = t.inherited.close() }()
	var err error
	if t.mtu, err = PodMTU(o.Config.Backend, o.Lease, o.Node.Underlay); err != nil {
		return nil, err
	}
	t.device, err = t.inherited.openDevice(names.TUN, t.mtu, deviceSize{threads: o.queues(), sparse: !o.NoMultiQueue}, o.Log)
	if err != nil {
		return nil, err
	}
	if err := t.makeWay(); err != nil {
		return nil, errors.Join(err, t.Close(backend.Keep))
	}
	loop := encap.Options{
		Format: format, MTU: t.mtu, Threads: t.device.threads, Steering: t.device.steered(), Spread: t.device.spread, CopyDSCP: o.CopyDSCP, DontFragment: o.DontFragment, NoBusyPoll: o.NoBusyPoll,
		Offload: &t.offload, Egress: &t.egress, Ingress: &t.ingress,
	}
	for _, fd := range t.device.queues {
		loop.Devices = append(loop.Devices, encap.NewDescriptor(fd))
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
	t.coalesce(o.FastPath == nil) // what an earlier daemon attached may carry packets already
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

// overUDP reports whether the wire format's packets are UDP datagrams; otherwise they
// have an IP protocol of their own, and pass through raw and packet sockets.
func (t *Tunnel) overUDP() bool { return t.format.Protocol() == unix.IPPROTO_UDP }

// listen opens the sockets of one family.
func (t *Tunnel) listen(e subnet.Endpoint) (encap.Underlay, error) {
	local := t.options.Node.Underlay.Addr(e.Public.Is4())
	open := t.listenRaw
	if t.overUDP() {
		open = t.listenUDP
	}
	side, err := open(local)
	side.Self = encap.VTEP{VNI: e.VTEP.VNI, MAC: e.VTEP.MAC}
	return side, err
}

// listenUDP opens the UDP sockets at an address.
func (t *Tunnel) listenUDP(local netip.Addr) (side encap.Underlay, err error) {
	at := netip.AddrPortFrom(local, t.options.Config.Backend.Port)
	for range t.device.threads {
		socket, _, err := t.openUDP(udpSocket{at: at, shared: t.device.threads > 1, df: t.options.DontFragment})
		if err != nil {
			return side, err
		}
		side.Receive = append(side.Receive, socket)
		t.receivers = append(t.receivers, t.sockets[len(t.sockets)-1])
	}
	side.Send = []encap.Source{{Socket: side.Receive[0], Port: at.Port()}}
	for len(side.Send) < t.options.sourcePorts() {
		socket, port, err := t.openUDP(udpSocket{at: netip.AddrPortFrom(local, 0), df: t.options.DontFragment, sends: true})
		if err != nil {
			return side, err
		}
		side.Send = append(side.Send, encap.Source{Socket: socket, Port: port})
	}
	if t.options.DontFragment {
		socket, port, err := t.openUDP(udpSocket{at: netip.AddrPortFrom(local, 0), sends: true, fragments: true})
		if err != nil {
			return side, err
		}
		side.Fragment = encap.Source{Socket: socket, Port: port}
	}
	return side, nil
}

// openUDP opens a socket, which the tunnel owns, and returns its port.
func (t *Tunnel) openUDP(s udpSocket) (encap.Descriptor, uint16, error) {
	fd, port, err := t.inherited.listenUDP(s)
	if err != nil {
		return encap.Descriptor{}, 0, err
	}
	t.sockets = append(t.sockets, fd)
	return encap.NewDescriptor(fd), port, nil
}

// openSuper opens the device for super-frames if enabled and supported. None is sent
// before the uplink has been checked.
func (t *Tunnel) openSuper() error {
	o := t.options
	if o.NoSuperFrame || o.NoGSO {
		t.noSuper = "turned off by flag"
		return nil
	}
	if !t.format.SuperFrames() {
		t.noSuper = "not with " + t.format.Name()
		return nil
	}
	var err error
	t.super, err = t.inherited.openSuperDevice(t.overUDP())
	if errors.Is(err, errNoSuperFrames) {
		t.noSuper = errNoSuperFrames.Error()
		return nil
	}
	if err != nil {
		return err
	}
	t.uplink = &uplink{
		node: o.Node, device: t.super, offload: &t.offload,
		table: func() *encap.Table { return t.loop.Table() }, log: o.Log, why: "not looked at yet",
	}
	return nil
}

// PodMTU returns the pods' MTU: the underlay's, or the configured one, less the tunnel's
// overhead. It is the same for every datapath.
func PodMTU(c subnet.BackendConfig, l subnet.Lease, u host.Underlay) (int, error) {
	cost := 0
	for _, e := range l.Endpoints {
		if f, ok := encap.FormatNamed(c.Type); ok {
			cost = max(cost, encap.Overhead(f, e.Public.Is4()))
		}
	}
	_, ipv6 := l.Endpoint(false)
	return backend.MTU(c.MTU, u, cost, ipv6)
}

// Apply replaces the peer table, and applies the host's addresses, routes and firewall
// rules.
func (t *Tunnel) Apply(_ context.Context, s subnet.Snapshot) error {
	table := t.table(s)
	if t.uplink != nil {
		t.uplink.prepare(table)
	}
	targets := t.probeTargets(table)
	t.prober.Retain(targets)
	t.loop.SetTable(table)
	t.once.Do(func() { close(t.applied) })
	err := t.keeper.Apply(func(v host.View) (host.State, error) {
		state := t.state(s, v)
		if t.options.FastPath != nil {
			state.Process = t.processTunnels(s, v)
			t.options.FastPath.Extend(&state)
		}
		return state, nil
	})
	t.prober.Set(targets)
	return err
}

// table builds the loop's table from a snapshot.
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
			peers = append(peers, encap.NewPeer(encap.PeerOptions{
				Format: t.format, Subnet: e.Subnet, Underlay: netip.AddrPortFrom(e.Public, t.options.Config.Backend.Port),
				VTEP: encap.VTEP{VNI: e.VTEP.VNI, MAC: e.VTEP.MAC}, Self: encap.VTEP{VNI: self.VTEP.VNI, MAC: self.VTEP.MAC},
			}))
		}
	}
	return encap.NewTable(local, peers)
}

// state returns the desired host state for a snapshot.
func (t *Tunnel) state(s subnet.Snapshot, v host.View) host.State {
	return state(t.options.Node, t.options.Config.Backend, t.options.Lease, t.mtu, s, v)
}

// Plan returns the desired host state for a tunnel that is not open.
func Plan(n backend.Node, s subnet.Snapshot, v host.View) (backend.Planned, error) {
	mtu, err := PodMTU(s.Config.Backend, s.Self, n.Underlay)
	if err != nil {
		return backend.Planned{}, err
	}
	return backend.Planned{State: state(n, s.Config.Backend, s.Self, mtu, s, v), MTU: mtu}, nil
}

// state routes the cluster network through the device; an unreachable route remains if
// the device is gone.
func state(n backend.Node, c subnet.BackendConfig, self subnet.Lease, mtu int, s subnet.Snapshot, v host.View) host.State {
	state := backend.Base(n, s)
	link := host.Link{Name: names.TUN, MTU: mtu, GSOMaxSegs: gsoMaxSegments}
	for _, e := range self.Endpoints {
		network, ok := backend.NetworkOf(s, e)
		if !ok {
			continue
		}
		link.Addrs = append(link.Addrs, backend.HostAddrs(e)...)
		for _, p := range backend.Covered(s, e) {
			if p == e.Subnet {
				continue // this node's pods; their bridge has the route
			}
			state.Routes = append(state.Routes, host.Route{To: p, Link: names.TUN, Source: e.Subnet.Addr()})
		}
		is4 := network.Addr().Is4()
		guard := firewall.TunnelRule{ // without a port: IPIP
			Network: network, Subnet: e.Subnet, Peers: backend.Sources(backend.Peers(s, is4)),
			Underlay: cmp.Or(v.Underlay.Name, n.Underlay.Name), Local: n.Underlay.Addr(is4), NoFIB: v.NoFIB,
		}
		if c.Type == "vxlan" {
			guard.Port, guard.VNI = c.Port, e.VTEP.VNI
		}
		state.Firewall.Tunnels = append(state.Firewall.Tunnels, guard)
	}
	state.Links = []host.Link{link}
	return state
}

// Run carries packets and repairs changes that others make to the host's state, until
// ctx ends. It waits for the first Apply: until then the kernel queues packets, which
// the loop would drop without peers.
func (t *Tunnel) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-t.applied:
	}
	if err := t.device.start(); err != nil {
		return fmt.Errorf("%w: %w", backend.ErrBroken, err)
	}
	sender := backend.OpenEchoSender(t.options.Log)
	defer sender.Close()
	// The loop stops last: it carries packets while the other parts end.
	carrying, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	broken := make(chan error, 1)
	var loop sync.WaitGroup
	loop.Go(func() {
		if err := t.loop.Run(carrying); err != nil {
			broken <- fmt.Errorf("%w: %w", backend.ErrBroken, err)
		}
	})
	parts, ctx := errgroup.WithContext(ctx)
	parts.Go(func() error { t.listenForPeers(ctx, sender); return nil })
	if t.options.Node.ProbeInterval > 0 {
		parts.Go(func() error { t.prober.Run(ctx); return nil })
	}
	parts.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case err := <-broken:
			return err
		}
	})
	parts.Go(func() error { return t.keeper.Run(ctx) })
	if t.uplink != nil {
		parts.Go(func() error { return t.uplink.run(ctx) })
	}
	err := parts.Wait()
	stop()
	loop.Wait()
	return err
}

// listenForPeers detects silent peers until ctx ends.
func (t *Tunnel) listenForPeers(ctx context.Context, sender *backend.EchoSender) {
	tick := time.NewTicker(backend.SilenceInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		fast := t.fastPassed()
		var all []host.PeerActivity
		for _, p := range t.loop.Table().Peers() {
			e := host.PeerActivity{Source: firewall.Source{Outer: p.Underlay.Addr(), Inner: p.Subnet}}
			e.Sent, e.Received = p.Activity()
			f := fast[p.Subnet]
			e.Sent, e.Received = e.Sent || f.Sent, e.Received || f.Received
			all = append(all, e)
		}
		for _, subnet := range t.silence.Observe(time.Now(), all) {
			sender.Send(subnet)
		}
	}
}

// Look implements backend.Backend.
func (t *Tunnel) Look(ctx context.Context) { t.keeper.Look(ctx) }

// Status returns the datapath's part of the status.
func (t *Tunnel) Status() api.Datapath {
	gso, super, gro, uso := t.loop.Table().Suspended()
	s := api.Datapath{
		WireFormat: t.options.Config.Backend.Type,
		Kind:       "userspace",
		Why:        t.options.Why,
		Device:     names.TUN,
		MTU:        t.mtu,
		Peers:      t.loop.Table().Len(),
		Egress:     traffic(&t.egress),
		Ingress:    traffic(&t.ingress),
		Mechanisms: []api.Mechanism{
			mechanism("gso", t.offload.GSO.Load(), t.options.NoGSO, gso),
			mechanism("gro", t.offload.GRO.Load(), t.options.NoGRO, gro),
			mechanism("uso", t.offload.USO.Load(), t.options.NoUSO || t.options.NoGRO, uso),
			t.superMechanism(super),
			t.queueMechanism(),
			t.sparseMechanism(),
			mechanism("busy-poll", !t.options.NoBusyPoll, t.options.NoBusyPoll, 0),
			t.priorityMechanism(),
		},
	}
	t.describeFastPath(&s)
	standing := t.keeper.Status()
	// The loop's drops and those of our nftables rules, which drop pods' forged packets
	// before the loop sees them.
	drops := make(map[string]uint64)
	maps.Copy(drops, firewall.Drops(standing.State.Firewall))
	for _, r := range encap.Reasons() {
		drops[r.String()] += t.egress.Drops[r].Load() + t.ingress.Drops[r].Load()
	}
	s.SetDrops(drops)
	for _, p := range t.loop.Table().Peers() {
		if k, ok := p.PathMTU(); ok {
			s.NarrowPaths = append(s.NarrowPaths, api.NarrowPath{
				Subnet: p.Subnet, PublicIP: p.Underlay.Addr(), MTU: k.MTU, By: k.By, Since: k.Since, Until: k.Until,
			})
		}
	}
	slices.SortFunc(s.NarrowPaths, func(a, b api.NarrowPath) int { return a.Subnet.Compare(b.Subnet) })
	backend.Describe(&s, standing)
	packets := fmt.Sprintf("IP protocol %d", t.format.Protocol())
	if t.overUDP() {
		packets = fmt.Sprintf("UDP port %d", t.options.Config.Backend.Port)
	}
	backend.DescribeSilence(&s, &t.silence, packets)
	probes := t.prober.Count()
	s.Probes = &probes
	return s
}

// mechanism reports whether an offload is on, and if not, why: disabled by flag, or
// unsupported. refused is for how many peers it is suspended.
func mechanism(name string, on, disabled bool, refused int) api.Mechanism {
	m := api.Mechanism{Name: name, On: on}
	switch {
	case on:
		m.Why = refusedBy(refused)
	case disabled:
		m.Why = "turned off by flag"
	default:
		m.Why = "the kernel does not offer it"
	}
	return m
}

// refusedBy describes for how many peers a mechanism is suspended; "" for none.
func refusedBy(peers int) string {
	if peers == 0 {
		return ""
	}
	return fmt.Sprintf("the kernel refuses it with %d peers, and is asked again within a minute", peers)
}

func (t *Tunnel) superMechanism(refused int) api.Mechanism {
	m := api.Mechanism{Name: "super-frame", Why: t.noSuper}
	if t.uplink != nil {
		m.On, m.Why = t.uplink.status()
	}
	if m.On && refused > 0 {
		m.Why = refusedBy(refused)
	}
	return m
}

func (t *Tunnel) queueMechanism() api.Mechanism {
	m := api.Mechanism{Name: "multi-queue", On: t.device.threads > 1}
	switch {
	case m.On:
		m.Why = fmt.Sprintf("%d queues", t.device.threads)
	case t.device.noMore != "":
		m.Why = t.device.noMore
	case t.options.NoMultiQueue || t.options.Queues == 1:
		m.Why = "turned off by flag"
	default:
		m.Why = fmt.Sprintf("%d processors", runtime.NumCPU())
	}
	return m
}

// sparseMechanism reports whether sparse flows have a separate queue.
func (t *Tunnel) sparseMechanism() api.Mechanism {
	m := api.Mechanism{Name: "sparse-queue", On: t.device.sparse, Why: t.device.noSparse}
	if t.options.NoMultiQueue {
		m.Why = "turned off by flag"
	}
	return m
}

// priorityMechanism reports whether the process has a higher priority than others.
func (t *Tunnel) priorityMechanism() api.Mechanism {
	m := api.Mechanism{Name: "priority"}
	nice, err := priority.Current()
	switch m.On = err == nil && nice < 0; {
	case m.On:
		m.Why = fmt.Sprintf("nice %d", nice)
	case err != nil:
		m.Why = err.Error()
	case nice > 0:
		m.Why = fmt.Sprintf("started at nice %d", nice)
	case !t.options.Priority:
		m.Why = "off by default"
	default:
		m.Why = "needs CAP_SYS_NICE at the start, or LimitNICE=-10 of the systemd unit"
	}
	return m
}

func traffic(c *encap.Counters) api.Traffic {
	return api.Traffic{
		Packets: c.Packets.Load(), Bytes: c.Bytes.Load(), Frames: c.Frames.Load(), SuperFrames: c.Super.Load(),
		Syscalls: c.Syscalls.Load(), Waits: c.Waits.Load(),
	}
}

// Close closes the descriptors. With Keep the device, its addresses and routes, the
// unreachable route and the firewall rules stay; with Remove they are removed.
func (t *Tunnel) Close(how backend.How) error {
	var errs []error
	if t.options.FastPath != nil {
		t.options.FastPath.Close()
	}
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

// makeWay removes devices that conflict with the tunnel: the kernel datapath's, if it
// ran here before, and Options.Replaces.
func (t *Tunnel) makeWay() error {
	var catchAll []host.Route
	for _, n := range t.options.Config.Networks {
		for _, p := range n.Allocatable() {
			catchAll = append(catchAll, host.Route{To: p, Metric: host.UnreachableMetric})
		}
	}
	ours := func(device string) bool { return device != names.TUN }
	changes, err := host.RemoveConflicting(t.options.Replaces, ours, catchAll)
	for _, c := range changes {
		t.options.Log.Info("host changed", "command", c.Command)
	}
	if err != nil {
		return fmt.Errorf("making way for the tunnel: %w", err)
	}
	return nil
}
