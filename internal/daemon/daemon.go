// Package daemon is the node daemon. It connects the store, the datapath and
// subnet.env, and decides the order in which they start and stop. It owns
// subnet.env, its records in the run directory and the status. It implements no store,
// datapath or host configuration: subnet/etcd and subnet/kube own the leases, backend
// and encap the packets, internal/host the kernel's configuration.
//
// Lease events take one path:
//
//	store ── Registry.Watch ── Snapshot ── Backend.Apply ── kernel or peer table
//
// The start, every change and a reconnection to the store use the same path, since a
// snapshot is always complete.
package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"time"

	"culvert/backend"
	"culvert/backend/tunnel"
	"culvert/internal/api"
	"culvert/internal/handover"
	"culvert/internal/host"
	"culvert/internal/httpd"
	"culvert/internal/remedy"
	"culvert/subnet"
	"culvert/subnet/etcd"
	"culvert/subnet/etcd/embedded"
	"culvert/subnet/kube"
)

// Options configures the daemon. Fields are required unless they say otherwise.
type Options struct {
	Version string
	Node    string // stable identity
	RunDir  string // of the socket and the state
	// SocketGroup is the group that may use the socket besides root; "" for none.
	SocketGroup string
	// Confine drops the capabilities and system calls that the daemon does not need.
	Confine    Confine
	SubnetFile string // path of subnet.env, which the CNI plugin reads
	// CNIConfDir is the directory in which to publish the CNI network configuration
	// that `culvert cni install --when-ready` left there; "" to publish none.
	CNIConfDir string
	Etcd       etcd.Options
	// Kubernetes selects the Kubernetes API as the store; nil selects etcd.
	Kubernetes *kube.Options
	Underlay   host.UnderlaySelector
	// PublicIPs are the addresses that peers send to, if they differ from the
	// underlay's; empty, or at most one per family.
	PublicIPs []netip.Addr
	IPMasq    bool
	NoMasq    []netip.Prefix // destinations that are not masqueraded
	LeaseTTL  time.Duration
	// OnLost is what to do if another node holds our subnet.
	OnLost OnLost
	// ReleaseOnExit releases the lease on exit, for a node that is drained and will
	// not return.
	ReleaseOnExit bool
	// StartJitter bounds a random delay before the first request to the store, for
	// sites that boot thousands of nodes at once. A node with a usable snapshot on
	// disk does not wait.
	StartJitter time.Duration
	Datapath    Datapath
	FastPath    FastPath
	// TakeOverFlannel removes flannel's device if it conflicts with ours.
	TakeOverFlannel bool
	// Replace takes over from the daemon that runs with the same run directory.
	Replace bool
	// HandedOver is what to do after a successor has taken over.
	HandedOver HandedOver
	// Metrics is the listen address of metrics and probes, "" for none.
	Metrics string
	// MetricsAccess is the TLS certificate and token of that address.
	MetricsAccess httpd.Access
	// Embedded is the etcd server to run beside the daemon, or nil.
	Embedded *embedded.Server
	Tunnel   Tuning
	// ProbeInterval is how often a peer without traffic is probed; 0: not at all.
	ProbeInterval time.Duration
	Log           *slog.Logger
	// Recent holds the last lines of Log, for `culvert report`; may be nil.
	Recent *api.Ring
}

// ProbeInterval is the default of Options.ProbeInterval.
const ProbeInterval = backend.ProbeInterval

// Tuning is that of the userspace datapath.
type Tuning = tunnel.Tuning

// Run runs the daemon. It returns nil after ctx has ended and everything has
// stopped in order, or after a handover, or the error that stopped it.
func Run(ctx context.Context, o Options) error {
	// Check privileges before any request to the store or change of the host.
	if err := host.MayConfigure(); err != nil {
		return err
	}
	limitHeap()
	for {
		err := runOnce(ctx, o)
		switch {
		case !errors.Is(err, errHandedOver):
			return err
		case o.HandedOver != Wait:
			return nil
		}
		debug.FreeOSMemory()
		if err := standBy(ctx, o); err != nil {
			return stopped(ctx, err)
		}
		o.Log.Warn("the successor exited; taking its place")
	}
}

// standBy waits until the successor has ended.
func standBy(ctx context.Context, o Options) error {
	o.Log.Info("a successor runs; waiting in case it exits")
	own, err := host.AwaitOwn(ctx, o.owner(), 1<<62)
	if err != nil {
		return cmp.Or(ctx.Err(), err)
	}
	own.Release()
	return nil
}

func runOnce(ctx context.Context, o Options) error {
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	d := &node{options: o, log: o.Log, state: newState(o), store: newFDStore(), requests: make(chan request)}
	// The socket is served from start to end: status matters most while the daemon
	// waits for the store.
	defer func() {
		d.sockets.close()
		if d.successor != nil {
			_ = d.successor.Close() // last: it tells the successor that this daemon has ended
		}
	}()
	err := d.start(ctx, abort)
	if err == nil {
		if err := o.save(); err != nil {
			d.log.Warn("cannot save this daemon's options: `culvert doctor` knows less while no daemon runs", "error", err)
		}
		o.raisePriority()
		o.confine() // after the socket's group is set
		err = d.run(ctx)
	}
	if errors.Is(err, errHandedOver) {
		return errors.Join(errHandedOver, d.store.keep(nil))
	}
	if back, ok := errors.AsType[takenBack](context.Cause(ctx)); ok {
		d.sockets.passed = true
		return back
	}
	return err
}

// start opens the sockets, or gets them from the running daemon.
func (d *node) start(ctx context.Context, abort context.CancelCauseFunc) error {
	if d.options.Replace {
		return d.replace(ctx, abort)
	}
	return d.openSockets(ctx)
}

// ownerTimeout is how long to wait for another daemon or a cleanup to end.
const ownerTimeout = time.Second

// owner describes this daemon to other processes that want the namespace.
func (o Options) owner() host.Owner {
	return host.Owner{
		PID: os.Getpid(), What: "culvert run", Node: o.Node, RunDir: o.RunDir,
		Store: fmt.Sprint(o.describeStore()), Since: time.Now(),
	}
}

// node is one run of the daemon.
type node struct {
	options Options
	log     *slog.Logger
	state   *state
	store   *fdStore
	// embedded is the embedded etcd server, or nil.
	embedded *embedded.Process
	// leasedSubnets are the subnets that this daemon has leased.
	leasedSubnets []netip.Prefix
	// storeAddrs are the addresses that the store gives this node, at most one per family.
	storeAddrs []netip.Addr
	// flannel are the addresses of flannel's devices that ours replace.
	flannel   map[string]subnet.MAC
	sockets   sockets
	requests  chan request   // from successors
	takeover  *takeover      // with --replace beside a running daemon, else nil
	successor *handover.Conn // the daemon that this one has handed over to
	found     string         // the underlay as last logged
}

// run starts the parts in the order of their dependencies and stops them in the
// reverse order.
func (d *node) run(ctx context.Context) error {
	last := d.lastPlace()
	d.storeAddrs, d.flannel = last.StoreAddrs, last.Flannel
	at, err := d.locate(nil, nil)
	if err != nil {
		return err
	}
	if d.options.Embedded != nil {
		var after <-chan struct{}
		if d.takeover != nil { // the running daemon's server serves until it ends
			after = d.takeover.gone
		}
		d.embedded = d.options.Embedded.Start(ctx, after, d.log)
		defer d.embedded.Stop()
	}
	registry, err := d.openStore()
	if err != nil {
		return err
	}
	defer func() { _ = registry.Close() }()
	d.state.setWarnings("store", d.staleRoutes(ctx)...)
	if _, old, err := host.Release(); err == nil && old != "" {
		w := api.Warning{Check: "kernel", Text: old, Fix: host.KernelFix}
		d.log.Warn(w.Text, "check", w.Check, "fix", w.Fix)
		d.state.setWarnings("kernel", w)
	}
	return d.live(ctx, registry, at)
}

// stopped returns nil if the daemon was told to stop and err is only a consequence.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, errHandoverFailed)) {
		return nil
	}
	return err
}

// requestLease waits for the network configuration, selects the node's place for it and
// leases a subnet.
func (d *node) requestLease(ctx context.Context, r store) (grant, error) {
	waiting := "waiting for the network configuration in " + d.options.configPlace()
	d.state.notReady(waiting)
	told := d.reportTrouble(ctx, r, waiting)
	d.log.Info("asking for the network configuration", "store", d.options.storeName(), "at", d.options.servers().URLs)
	config, err := r.Config(ctx)
	told()
	if err != nil {
		return grant{}, err
	}
	at, err := d.locate(&config, d.leased(ctx, r))
	if err != nil {
		return grant{}, err
	}
	nets, err := d.checkOverlaps(ctx, config, at)
	if err != nil {
		return grant{}, err
	}
	changed, err := d.askAddrs(ctx, r)
	if err == nil && changed {
		if at, err = d.locate(&config, nil); err == nil {
			nets, err = d.checkOverlaps(ctx, config, at)
		}
	}
	if err != nil {
		return grant{}, err
	}
	claim, err := d.claim(config, at)
	if err != nil {
		return grant{}, err
	}
	for _, h := range nets {
		claim.Avoid = append(claim.Avoid, h.Prefix.Masked())
	}
	d.state.setConfig(config)
	claim.Previous = d.previousSubnets()
	d.state.notReady("leasing a subnet")
	lease, err := r.Acquire(ctx, claim)
	if errors.Is(err, subnet.ErrExhausted) {
		err = remedy.Errorf("see `culvert lease check`, or make room with `culvert config set` and a Network that contains the present one", "%w", err)
	}
	if err != nil {
		return grant{}, fmt.Errorf("leasing a subnet: %w", err)
	}
	d.log.Info("subnet leased", "subnet", lease.Subnets(), "node", d.options.Node)
	d.state.setLease(lease)
	return grant{config, lease, at, nets}, nil
}

// troubleInterval is how often reportTrouble checks the store's connection.
const troubleInterval = 250 * time.Millisecond

// reportTrouble reports in status and log why the store cannot be reached, until done
// is called; while there is no trouble the status is otherwise. A node that waits at
// its first start most often has a wrong address or certificate.
func (d *node) reportTrouble(ctx context.Context, r subnet.Registry, otherwise string) (done func()) {
	store, ok := r.(interface{ Trouble() error })
	if !ok {
		return func() {}
	}
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(troubleInterval)
		defer tick.Stop()
		for said := ""; ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			why := store.Trouble()
			switch {
			case why == nil && said != "":
				said = ""
				d.state.notReady(otherwise)
			case why != nil && why.Error() != said:
				said = why.Error()
				d.state.notReady(said)
				d.log.Warn("waiting for the store", "error", said)
			}
		}
	}()
	return func() {
		stop()
		<-ended
	}
}

// vtepMAC returns the address of this node's VTEP: that of flannel's device if ours
// replaces it, or has done so since the machine booted, so that peers have nothing to
// learn; else the one derived from the node's name.
func (d *node) vtepMAC(vni uint32, is4 bool) subnet.MAC {
	device := fmt.Sprintf("flannel.%d", vni)
	if !is4 {
		device = fmt.Sprintf("flannel-v6.%d", vni)
	}
	if d.options.TakeOverFlannel {
		if l, err := net.InterfaceByName(device); err == nil && len(l.HardwareAddr) == len(subnet.MAC{}) {
			if mac := subnet.MAC(l.HardwareAddr); mac.IsUnicast() {
				if d.flannel == nil {
					d.flannel = make(map[string]subnet.MAC)
				}
				d.flannel[device] = mac
			}
		}
	}
	if mac, ok := d.flannel[device]; ok {
		return mac
	}
	return subnet.DeriveMAC(d.options.Node, vni, !is4)
}

// claim builds this node's request for a lease, without its previous subnets.
func (d *node) claim(config subnet.Config, at place) (subnet.Claim, error) {
	if err := config.CheckUnderlay(at.underlay.Networks); err != nil {
		return subnet.Claim{}, err
	}
	claim := subnet.Claim{Node: d.options.Node, Config: config, TTL: d.options.LeaseTTL}
	for _, n := range config.Networks {
		is4 := n.Prefix.Addr().Is4()
		e := subnet.Endpoint{}
		for _, a := range at.publics {
			if a.Is4() == is4 {
				e.Public = a
			}
		}
		if !e.Public.IsValid() {
			return subnet.Claim{}, fmt.Errorf("the network %s needs an underlay address of its family, and %s has none", n.Prefix, at.underlay.Name)
		}
		if config.Backend.Type == "vxlan" {
			e.VTEP = subnet.VTEP{VNI: config.Backend.VNI, MAC: d.vtepMAC(config.Backend.VNI, is4)}
		}
		claim.Ends = append(claim.Ends, e)
	}
	return claim, nil
}
