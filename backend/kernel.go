package backend

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// Kernel is a datapath whose packets the kernel carries, and this process only
// keeps what they need: vxlan, ipip and host-gw differ in their Plan alone. So
// nothing is lost while no process runs.
type Kernel struct {
	options KernelOptions
	keeper  *host.Keeper
	silence Silence

	mu     sync.Mutex
	wanted Wanted // of the last plan that succeeded
}

// FastPath carries, before a datapath's devices, what it can of their packets.
// The datapath below it is complete without it.
type FastPath interface {
	host.Follower
	// Want adds to a plan's state what the fast path needs of the host.
	Want(*host.State)
	// Passed returns what has passed with each peer since the last call.
	Passed() []host.Passed
	// Status says whether it is on, and what it has carried.
	Status() api.FastPath
	// Close gives up what this process holds; what is attached stays.
	Close()
}

// KernelOptions is what a Kernel is made of. All fields are required, but for
// Replaces and FastPath.
type KernelOptions struct {
	Node   Node
	Format string // on the wire
	Plan   Plan
	Why    string // the choice of this datapath, for the status
	// Replaces names devices of other programs that go when ours come.
	Replaces []string
	FastPath FastPath // nil: there is none for this format
	Log      *slog.Logger
}

// NewKernel returns a datapath that carries nothing until Apply.
func NewKernel(o KernelOptions) *Kernel {
	var followers []host.Follower
	if o.FastPath != nil {
		followers = append(followers, o.FastPath)
	}
	return &Kernel{options: o, keeper: host.NewKeeper(o.Node.Underlay.Index, o.Log, followers...)}
}

// Apply makes the kernel carry what the snapshot says.
func (k *Kernel) Apply(_ context.Context, s subnet.Snapshot) error {
	return k.keeper.Apply(func(v host.View) (host.State, error) {
		w, err := k.options.Plan(k.options.Node, s, v)
		if err != nil {
			return host.State{}, err
		}
		w.State.Replaces = k.options.Replaces
		if k.options.FastPath != nil {
			k.options.FastPath.Want(&w.State)
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		for _, warning := range w.Warnings {
			if !slices.Contains(k.wanted.Warnings, warning) {
				k.options.Log.Warn(warning.Text, "check", warning.Check, "fix", warning.Fix)
			}
		}
		k.wanted = w
		return w.State, nil
	})
}

// Run repairs what others do to the kernel's half, and looks for silent peers.
func (k *Kernel) Run(ctx context.Context) error {
	if k.options.Format == "vxlan" { // of others the kernel does not say whom it sends to
		stop, err := k.listen(ctx)
		if err != nil {
			return err
		}
		defer stop()
	}
	return k.keeper.Run(ctx)
}

// listen looks for silent peers until stop. It opens its sockets in the network
// namespace of the calling thread.
func (k *Kernel) listen(ctx context.Context) (stop func(), err error) {
	watch, err := host.WatchPassed()
	if err != nil {
		return nil, err
	}
	asker := OpenAsker(k.options.Log)
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
			tunnels := k.wanted.State.Firewall.Tunnels
			k.mu.Unlock()
			var fast []host.Passed
			if k.options.FastPath != nil {
				fast = k.options.FastPath.Passed()
			}
			passed, err := watch.Look(tunnels, waiting || slices.ContainsFunc(fast, func(p host.Passed) bool { return p.Sent }))
			passed = together(passed, fast)
			if err != nil && err.Error() != last { // such as while a device is made anew
				last = err.Error()
				k.options.Log.Debug("what has passed with peers cannot be looked at", "error", err)
			}
			waiting = k.silence.observe(passed, asker)
		}
	})
	return func() {
		cancel()
		running.Wait()
		_ = watch.Close()
		asker.Close()
	}, nil
}

// together is what has passed by either of two ways.
func together(a, b []host.Passed) []host.Passed {
	at := make(map[host.Source]int, len(a))
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

// Status says what the kernel carries.
func (k *Kernel) Status() api.Datapath {
	k.mu.Lock()
	w := k.wanted
	k.mu.Unlock()
	var devices []string
	for _, l := range w.State.Links {
		if l.Veth == "" { // of the fast path
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
		fast := k.options.FastPath.Status()
		s.FastPath = &fast
		// The device counts what its own half of the kernel sends and receives.
		s.Egress.Packets += fast.Egress.Packets
		s.Egress.Bytes += fast.Egress.Bytes
		s.Ingress.Packets += fast.Ingress.Packets
		s.Ingress.Bytes += fast.Ingress.Bytes
		if fast.Mode == "on" && !fast.On {
			w.Warnings = append(slices.Clip(w.Warnings), api.Warning{Check: "fast-path", Text: "--fast-path=on, and it is off: " + fast.Why})
		}
	}
	for reason, n := range host.Drops(w.State.Firewall) {
		s.Drops = append(s.Drops, api.Drop{Reason: reason, Packets: n})
	}
	slices.SortFunc(s.Drops, func(a, b api.Drop) int {
		return cmp.Or(cmp.Compare(b.Packets, a.Packets), cmp.Compare(a.Reason, b.Reason))
	})
	s.Warnings = slices.Clone(w.Warnings)
	Describe(&s, k.keeper.Standing())
	DescribeSilence(&s, &k.silence, "the tunnel's UDP port")
	return s
}

// Describe adds to a datapath's status what its Keeper has to say.
func Describe(s *api.Datapath, standing host.Standing) {
	s.Repairs = make(map[string]uint64)
	for kind, n := range standing.Repairs {
		s.Repairs[string(kind)] = n
	}
	s.Warnings = append(s.Warnings, standing.Obstacles...)
	if standing.Err != nil {
		s.Warnings = append(s.Warnings, api.Warning{Check: "host-state", Text: "the host cannot be made as it should be: " + strings.ReplaceAll(standing.Err.Error(), "\n", "; ")})
	}
}

// Close leaves the kernel as it is with Keep: it goes on forwarding.
func (k *Kernel) Close(how How) error {
	if k.options.FastPath != nil {
		k.options.FastPath.Close()
	}
	if how != Remove {
		return nil
	}
	_, err := host.Apply(host.State{})
	return errors.Join(err)
}
