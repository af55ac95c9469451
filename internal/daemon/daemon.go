// Package daemon is the node daemon: it joins the registry, the datapath and
// subnet.env, and decides the order in which they start and stop.
//
// A lease event takes one way through it:
//
//	store ── Registry.Watch ── Snapshot ── Backend.Apply ── kernel or peer table
//
// and the same way serves the start, every change, and the return of the
// store after an absence, since a snapshot is always whole.
package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime/debug"
	"time"

	"culvert/backend/tunnel"
	"culvert/internal/api"
	"culvert/internal/handover"
	"culvert/internal/host"
	"culvert/subnet"
	"culvert/subnet/etcd"
	"culvert/subnet/kube"
)

// Options is everything that a daemon is told. Every field is required unless
// it says otherwise.
type Options struct {
	Version string
	Node    string // stable identity
	RunDir  string // of the socket and the state
	// SocketGroup may ask the daemon, beside root; "" for none.
	SocketGroup string
	// Confine gives up the rights and system calls that the daemon does not need.
	Confine    Confine
	SubnetFile string // where the CNI plugin looks for subnet.env
	// CNIConfDir is where to put in place the network configuration that
	// `culvert cni install --when-ready` left there; "" for nowhere.
	CNIConfDir string
	Etcd       etcd.Options
	// Kubernetes is where the leases are instead of in etcd, or nil.
	Kubernetes *kube.Options
	Underlay   host.UnderlaySelector
	// PublicIPs are what other nodes send to, where that is not the underlay's
	// own address; empty, or at most one per family.
	PublicIPs []netip.Addr
	IPMasq    bool
	NoMasq    []netip.Prefix // destinations that see the pods' own addresses
	LeaseTTL  time.Duration
	// OnLost is what to do when another node has our subnet.
	OnLost OnLost
	// ReleaseOnExit gives the lease back when the daemon is told to stop, for a
	// node that is drained and will not be back.
	ReleaseOnExit bool
	// StartJitter bounds a random pause before the store is first asked, for sites
	// where thousands of nodes are booted at one moment; a node that has a
	// snapshot on its disk does not wait.
	StartJitter time.Duration
	Datapath    Datapath
	FastPath    FastPath
	// TakeOverFlannel removes flannel's device where ours cannot be beside it.
	TakeOverFlannel bool
	// Replace takes over from a daemon that runs with the same run directory.
	Replace bool
	// HandedOver is what to do when another has taken over from this one.
	HandedOver HandedOver
	// Metrics is where metrics and probes are served, "" for nowhere.
	Metrics string
	// MetricsAccess guards them.
	MetricsAccess Access
	// Embedded is the etcd server to carry along, or nil.
	Embedded *EmbeddedEtcd
	Tunnel   Tunnel
	NoProbe  bool // peers are not asked whether they are there
	Log      *slog.Logger
	// Recent has the last lines of Log, for `culvert report`; nil if nothing has.
	Recent *api.Ring
}

// Tunnel is what an operator can say of the userspace datapath.
type Tunnel = tunnel.Tuning

// Run is the daemon. It returns nil after ctx ended and everything has
// stopped, in order, or the error that made it stop.
func Run(ctx context.Context, o Options) error {
	// Before anything is asked of etcd or changed on the host.
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
		o.Log.Warn("the successor has ended; taking its place")
	}
}

// standBy waits until the successor has ended.
func standBy(ctx context.Context, o Options) error {
	o.Log.Info("waiting to be told to stop")
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
	d := &node{options: o, log: o.Log, health: newHealth(o), store: newFDStore(), requests: make(chan request)}
	// What is asked about is served from the first moment to the last: while
	// waiting for the store is when people ask.
	defer func() {
		d.possessions.close()
		if d.successor != nil {
			_ = d.successor.Close() // last: it says that all of this is done
		}
	}()
	err := d.start(ctx, abort)
	if err == nil {
		if err := o.remember(); err != nil {
			d.log.Warn("what this daemon was told is not recorded: `culvert doctor` knows less while no daemon runs", "error", err)
		}
		o.confine() // a socket's group is set by then
		err = d.run(ctx)
	}
	if errors.Is(err, errHandedOver) {
		return errors.Join(errHandedOver, d.store.keep(nil))
	}
	if back, ok := errors.AsType[takenBack](context.Cause(ctx)); ok {
		d.possessions.passed = true
		return back
	}
	return err
}

// start takes what only one daemon of a node has: from the kernel, or from a
// daemon that runs.
func (d *node) start(ctx context.Context, abort context.CancelCauseFunc) error {
	if d.options.Replace {
		return d.replace(ctx, abort)
	}
	return d.possess(ctx)
}

// ownerPatience is how long another daemon, or a cleanup, may take to end.
const ownerPatience = time.Second

// owner is what is said of this daemon to another that is started beside it.
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
	health  *health
	store   *fdStore
	// embedded is the etcd server that is carried along, nil if there is none.
	embedded *supervised
	// had are the subnets that this daemon has leased.
	had         []netip.Prefix
	possessions possessions
	requests    chan request   // of successors
	takeover    *takeover      // of a start beside a running daemon, else nil
	successor   *handover.Conn // of the daemon that this one has handed over to
}

// run goes through the start in the order in which things need each other, and
// stops what it started in the opposite order.
func (d *node) run(ctx context.Context) error {
	at, err := d.locate(nil, nil)
	if err != nil {
		return err
	}
	if d.options.Embedded != nil {
		var after <-chan struct{}
		if d.takeover != nil { // which has one that serves until then
			after = d.takeover.gone
		}
		d.embedded = d.options.Embedded.start(ctx, after, d.log)
		defer d.embedded.stop()
	}
	registry, err := d.openStore()
	if err != nil {
		return err
	}
	defer func() { _ = registry.Close() }()
	d.health.setWarnings("store", d.leftBehind(ctx)...)
	if _, old, err := host.Release(); err == nil && old != "" {
		w := api.Warning{Check: "kernel", Text: old, Fix: host.KernelFix}
		d.log.Warn(w.Text, "check", w.Check, "fix", w.Fix)
		d.health.setWarnings("kernel", w)
	}
	return d.live(ctx, registry, at)
}

// stopped returns nil where an error only says that the daemon was told to
// stop.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, errKept)) {
		return nil
	}
	return err
}

// join waits for a network configuration, chooses the node's place for it and
// leases a subnet under it.
func (d *node) join(ctx context.Context, r store) (tenure, error) {
	waiting := "waiting for the network configuration in " + d.options.configPlace()
	d.health.notReady(waiting)
	told := d.tellTrouble(ctx, r, waiting)
	config, err := r.Config(ctx)
	told()
	if err != nil {
		return tenure{}, err
	}
	at, err := d.locate(&config, d.leased(ctx, r))
	if err != nil {
		return tenure{}, err
	}
	claim, err := d.claim(config, at)
	if err != nil {
		return tenure{}, err
	}
	nets, err := d.survey(ctx, config, at)
	if err != nil {
		return tenure{}, err
	}
	for _, h := range nets {
		claim.Avoid = append(claim.Avoid, h.Prefix.Masked())
	}
	d.health.setConfig(config)
	claim.Previous = d.previous()
	d.health.notReady("leasing a subnet")
	lease, err := r.Acquire(ctx, claim)
	if errors.Is(err, subnet.ErrExhausted) {
		err = fmt.Errorf("%w: see `culvert lease check`, or make room with `culvert config set` and a Network that contains the present one", err)
	}
	if err != nil {
		return tenure{}, fmt.Errorf("leasing a subnet: %w", err)
	}
	d.log.Info("subnet leased", "subnet", lease.Subnets(), "node", d.options.Node)
	d.health.setLease(lease)
	return tenure{config, lease, at, nets}, nil
}

// troubleLook is how often a node that waits for its configuration looks whether
// the store is reached.
const troubleLook = 250 * time.Millisecond

// tellTrouble says, in the status and the log, why the store is not reached,
// until done is called, and otherwise that: what a node waits for at its first start is most often
// a wrong address or certificate.
func (d *node) tellTrouble(ctx context.Context, r subnet.Registry, otherwise string) (done func()) {
	store, ok := r.(interface{ Trouble() error })
	if !ok {
		return func() {}
	}
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(troubleLook)
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
				d.health.notReady(otherwise)
			case why != nil && why.Error() != said:
				said = why.Error()
				d.health.notReady(said)
				d.log.Warn("waiting for the store", "error", said)
			}
		}
	}()
	return func() {
		stop()
		<-ended
	}
}

// claim is what this node asks for under a configuration, without the subnets
// that it had.
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
			e.VTEP = subnet.VTEP{VNI: config.Backend.VNI, MAC: subnet.DeriveMAC(d.options.Node, config.Backend.VNI, !is4)}
		}
		claim.Ends = append(claim.Ends, e)
	}
	return claim, nil
}
