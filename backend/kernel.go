package backend

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"culvert/internal/api"
	"culvert/internal/firewall"
	"culvert/internal/host"
	"culvert/subnet"
)

// Kernel is a datapath in which the kernel forwards the packets and this process
// only maintains the devices, routes and rules. Forwarding continues while the
// daemon is not running. vxlan, ipip and host-gw differ only in their Plan.
type Kernel struct {
	options KernelOptions
	keeper  *host.Keeper
	silence Silence
	prober  *Prober

	mu      sync.Mutex
	planned Planned // result of the last successful plan
}

// FastPath forwards packets in eBPF programs before they reach the datapath's
// devices. Packets that it does not handle take the devices, which work without it.
type FastPath interface {
	host.Follower
	// Extend adds the host state that the fast path needs to a plan's state.
	Extend(*host.State)
	// Activity returns, for each peer, whether packets were sent or received
	// since the last call.
	Activity() []host.PeerActivity
	// Counts reports whether the programs count what is sent, so that nftables need
	// not.
	Counts() bool
	// Exchanged returns what was sent to each peer, by the fast path or by the
	// device, and what the fast path has received from it, since the programs were
	// loaded. It is nil while the fast path is off.
	Exchanged() map[firewall.Source]firewall.Exchanged
	// Status reports whether the fast path is on, and its traffic counters.
	Status() api.FastPath
	// Close closes this process's descriptors; attached programs keep running.
	Close()
}

// KernelOptions configure a Kernel. All fields but Replaces and FastPath are
// required.
type KernelOptions struct {
	Node   Node
	Format string // wire format
	Plan   Planner
	Why    string // why this datapath was chosen, for the status
	// Replaces names devices of other programs to delete just before ours are
	// created.
	Replaces []string
	FastPath FastPath // nil if there is none for this format
	// Sources are this node's subnets, whose first addresses its own packets come from.
	Sources []netip.Prefix
	Log     *slog.Logger
}

// NewKernel returns a datapath without peers; Apply sets it up.
func NewKernel(o KernelOptions) *Kernel {
	var followers []host.Follower
	if o.FastPath != nil {
		followers = append(followers, o.FastPath)
	}
	k := &Kernel{options: o, keeper: host.NewKeeper(o.Node.Underlay.Index, o.Log, followers...)}
	k.prober = NewProber(ProberOptions{Sources: o.Sources, Silence: &k.silence, Interval: o.Node.ProbeInterval, Log: o.Log})
	return k
}

// Apply makes the kernel's state match the snapshot.
func (k *Kernel) Apply(_ context.Context, s subnet.Snapshot) error {
	err := k.keeper.Apply(func(v host.View) (host.State, error) {
		w, err := k.options.Plan(k.options.Node, s, v)
		if err != nil {
			return host.State{}, err
		}
		w.State.Replaces = k.options.Replaces
		w.count(k.options.FastPath != nil && k.options.FastPath.Counts())
		if k.options.FastPath != nil {
			k.options.FastPath.Extend(&w.State)
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		for _, warning := range w.Warnings {
			if !slices.Contains(k.planned.Warnings, warning) {
				k.options.Log.Warn(warning.Text, "check", warning.Check, "fix", warning.Fix)
			}
		}
		k.planned = w
		return w.State, nil
	})
	k.prober.Set(k.probeTargets())
	return err
}

// Run repairs changes that other programs make, and looks for silent peers.
func (k *Kernel) Run(ctx context.Context) error {
	if k.options.Format == "vxlan" { // with other formats the kernel does not report which peers it sends to
		stop, err := k.listen(ctx)
		if err != nil {
			return err
		}
		defer stop()
	}
	asking, stop := context.WithCancel(ctx)
	var prober sync.WaitGroup
	if k.options.Node.ProbeInterval > 0 {
		prober.Go(func() { k.prober.Run(asking) })
	}
	defer prober.Wait()
	defer stop()
	return k.keeper.Run(ctx)
}

// listen looks for silent peers every SilenceInterval until stop is called. It
// opens its sockets in the network namespace of the calling thread.
func (k *Kernel) listen(ctx context.Context) (stop func(), err error) {
	watch, err := host.WatchPeers()
	if err != nil {
		return nil, err
	}
	sender := OpenEchoSender(k.options.Log)
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() {
		tick := time.NewTicker(SilenceInterval)
		defer tick.Stop()
		last, waiting := "", false
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			k.mu.Lock()
			tunnels := k.planned.State.Firewall.Tunnels
			k.mu.Unlock()
			var fast []host.PeerActivity
			if k.options.FastPath != nil {
				fast = k.options.FastPath.Activity()
			}
			activity, err := watch.Read(tunnels, k.silence.asking(time.Now()), waiting || slices.ContainsFunc(fast, func(p host.PeerActivity) bool { return p.Sent }))
			activity = mergeActivity(activity, fast)
			if err != nil && err.Error() != last { // for example while a device is recreated
				last = err.Error()
				k.options.Log.Debug("cannot read the peers' traffic counters", "error", err)
			}
			waiting = k.silence.observe(activity, sender)
		}
	})
	return func() {
		cancel()
		running.Wait()
		_ = watch.Close()
		sender.Close()
	}, nil
}

// mergeActivity merges two lists: a peer in both was sent to, or received from, if it
// was in either. It appends to a and overwrites its entries.
func mergeActivity(a, b []host.PeerActivity) []host.PeerActivity {
	at := make(map[firewall.Source]int, len(a))
	for i, p := range a {
		at[p.Source] = i
	}
	for _, p := range b {
		i, there := at[p.Source]
		if !there {
			a = append(a, p)
			continue
		}
		a[i].Sent = a[i].Sent || p.Sent
		a[i].Received = a[i].Received || p.Received
	}
	return a
}

// Look implements Backend.
func (k *Kernel) Look(ctx context.Context) { k.keeper.Look(ctx) }

// Status returns the datapath's devices, peers, counters and warnings.
func (k *Kernel) Status() api.Datapath {
	k.mu.Lock()
	w := k.planned
	k.mu.Unlock()
	var devices []string
	for _, l := range w.State.Links {
		if l.Veth == "" { // veth devices belong to the fast path
			devices = append(devices, l.Name)
		}
	}
	s := api.Datapath{
		WireFormat: k.options.Format, Kind: "kernel", Why: k.options.Why, MTU: w.MTU,
		Device: cmp.Or(strings.Join(devices, " and "), k.options.Node.Underlay.Name),
	}
	peers := make(map[string]bool)
	for _, r := range w.State.Routes {
		if r.Link != "" {
			peers[r.To.String()] = true
		}
	}
	s.Peers = len(peers)
	t := host.DeviceTraffic(devices...)
	s.Egress = api.Traffic{Packets: t.SentPackets, Bytes: t.SentBytes}
	s.Ingress = api.Traffic{Packets: t.ReceivedPackets, Bytes: t.ReceivedBytes}
	if k.options.FastPath != nil {
		DescribeFastPath(&s, k.options.FastPath.Status())
	}
	s.SetDrops(firewall.Drops(w.State.Firewall))
	s.Warnings = append(s.Warnings, w.Warnings...)
	Describe(&s, k.keeper.Status())
	DescribeSilence(&s, &k.silence, "the tunnel's UDP port")
	probes := k.prober.Count()
	s.Probes = &probes
	return s
}

// DescribeFastPath adds the fast path's state, and its traffic, which the datapath's
// own counters do not include.
func DescribeFastPath(s *api.Datapath, fast api.FastPath) {
	s.FastPath = &fast
	s.Egress.Packets += fast.Egress.Packets
	s.Egress.Bytes += fast.Egress.Bytes
	s.Ingress.Packets += fast.Ingress.Packets
	s.Ingress.Bytes += fast.Ingress.Bytes
	if fast.Mode == "on" && !fast.On {
		s.Warnings = append(s.Warnings, api.Warning{Check: "fast-path", Text: "--fast-path=on is set, but the fast path is off: " + fast.Why})
	}
}

// Describe adds the Keeper's repairs, obstacles and error to a datapath's status.
func Describe(s *api.Datapath, standing host.Status) {
	s.Repairs, s.RepairTimes = make(map[string]uint64), standing.Took
	for kind, n := range standing.Repairs {
		s.Repairs[string(kind)] = n
	}
	s.Warnings = append(s.Warnings, standing.Obstacles...)
	if standing.Err != nil {
		s.Warnings = append(s.Warnings, api.Warning{Check: "host-state", Text: "the host's network state cannot be set up: " + strings.ReplaceAll(standing.Err.Error(), "\n", "; ")})
	}
}

// Close with Keep leaves the kernel's state in place, and the kernel goes on
// forwarding.
func (k *Kernel) Close(how How) error {
	if k.options.FastPath != nil {
		k.options.FastPath.Close()
	}
	if how != Remove {
		return nil
	}
	_, err := host.Apply(host.State{})
	return err
}
