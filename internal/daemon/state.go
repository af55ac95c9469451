package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"culvert/backend"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/metrics"
	"culvert/subnet"
)

// state is the daemon's state as it reports it. The daemon's parts write it; status,
// metrics and probes read it.
type state struct {
	mu      sync.Mutex
	current api.Status
	path    backend.Backend
	// repairs counts the repairs of earlier datapaths, by kind.
	repairs map[string]uint64
	// warnings are the daemon's warnings, by the part that reports them.
	warnings map[string][]api.Warning
	warned   map[netip.Prefix]float64 // share in use at the last warning; follow's goroutine only
	requests *metrics.Requests
}

func newState(o Options) *state {
	return &state{requests: metrics.NewRequests(), warned: map[netip.Prefix]float64{}, warnings: map[string][]api.Warning{}, current: api.Status{
		Version: o.Version, Node: o.Node, Started: time.Now(), SubnetFile: o.SubnetFile,
		NotReady: "starting",
		Store:    o.describeStore(),
		Peers:    []api.Peer{},
		Networks: []netip.Prefix{},
	}}
}

func (st *state) change(f func(*api.Status)) {
	st.mu.Lock()
	defer st.mu.Unlock()
	f(&st.current)
}

func (st *state) notReady(why string) {
	st.change(func(s *api.Status) { s.Ready, s.NotReady = false, why })
}

func (st *state) ready() {
	st.change(func(s *api.Status) { s.Ready, s.NotReady = true, "" })
}

func (st *state) setUnderlay(u host.Underlay) {
	st.change(func(s *api.Status) {
		s.Underlay = api.Underlay{Interface: u.Name, MTU: u.MTU, Addrs: u.Addrs, Why: u.Why}
	})
}

func (st *state) setConfig(c subnet.Config) {
	st.change(func(s *api.Status) {
		s.Networks = s.Networks[:0:0]
		for _, n := range c.Networks {
			s.Networks = append(s.Networks, n.Prefix)
		}
	})
}

func (st *state) setLease(l subnet.Lease) {
	st.change(func(s *api.Status) {
		s.Lease = &api.Lease{Subnets: l.Subnets(), PublicIPs: l.Publics(), Expires: l.Expires}
	})
}

// setDatapath sets the datapath, and keeps the repair counts of the one before.
func (st *state) setDatapath(b backend.Backend) {
	st.mu.Lock()
	old := st.path
	st.path = b
	st.mu.Unlock()
	if old == nil {
		return
	}
	for kind, n := range old.Status().Repairs {
		st.repaired(kind, n)
	}
}

// repaired counts repairs that the current datapath does not count.
func (st *state) repaired(kind string, n uint64) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.repairs == nil {
		st.repairs = make(map[string]uint64)
	}
	st.repairs[kind] += n
}

// setFenced records that the node is fenced, or with nil that it no longer is.
func (st *state) setFenced(f *api.Fenced) {
	st.change(func(s *api.Status) {
		s.Fenced = f
		if f == nil {
			s.NotReady = "no longer fenced; a subnet is being leased"
			return
		}
		s.Ready, s.Lease, s.Peers, st.path = false, nil, []api.Peer{}, nil
		s.NotReady = fmt.Sprintf("FENCED: this node had %v: %s", f.Subnets, f.Reason)
		if f.Pods > 0 {
			s.NotReady += fmt.Sprintf("; %d pods of it are left: delete them, or start the daemon with --on-lost=release", f.Pods)
		}
	})
}

// setWarnings replaces the warnings of one part of the daemon.
func (st *state) setWarnings(part string, all ...api.Warning) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.warnings[part] = all
}

// refuseConfig records why the configuration in the store cannot be applied.
func (st *state) refuseConfig(why error) {
	st.change(func(s *api.Status) { s.Store.ConfigRefused = why.Error() })
}

func (st *state) networks() []netip.Prefix {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.current.Networks
}

// setNetworks sets the networks if the configuration is not known yet.
func (st *state) setNetworks(networks []netip.Prefix) {
	st.change(func(s *api.Status) {
		if len(s.Networks) == 0 {
			s.Networks = networks
		}
	})
}

// setUsage records the usage, and warns when a network becomes nearly full and at
// every further 5 %.
func (st *state) setUsage(usage []subnet.Usage, log *slog.Logger) {
	const step = 0.05
	const fix = "make room with `culvert config set` and a Network that contains the present one, or see `culvert lease check`"
	var full []api.Warning
	for _, u := range usage {
		share, warned := u.Share(), st.warned[u.Network]
		if share >= subnet.NearlyFull {
			full = append(full, api.Warning{
				Check: "network-nearly-full", Fix: fix,
				Text: fmt.Sprintf("%d of %d subnets in %s are leased or reserved", u.Used, u.Capacity, u.Network),
			})
		}
		switch {
		case share < subnet.NearlyFull:
			delete(st.warned, u.Network)
		case share >= warned+step:
			st.warned[u.Network] = share
			log.Warn("the cluster network is nearly full: "+fix, "network", u.Network, "used", u.Used, "capacity", u.Capacity)
		}
	}
	st.setWarnings("usage", full...)
	st.change(func(s *api.Status) {
		s.Usage = nil
		for _, u := range usage {
			s.Usage = append(s.Usage, api.Usage{Network: u.Network, Used: u.Used, Capacity: u.Capacity})
		}
	})
}

// setSnapshot records a snapshot: from the connected store, or, if Kept is set, from
// disk.
func (st *state) setSnapshot(snapshot subnet.Snapshot, log *slog.Logger) {
	st.setConfig(snapshot.Config)
	st.setUsage(snapshot.Usage, log)
	if len(snapshot.Self.Endpoints) > 0 {
		st.setLease(snapshot.Self)
	}
	st.change(func(s *api.Status) {
		s.Store.Snapshot, s.Store.Error = snapshot.Kept, ""
		if !snapshot.Kept.IsZero() {
			s.Store.Error = "it was unreachable when this daemon started"
		}
		if connected := snapshot.Kept.IsZero(); s.Store.Connected != connected || s.Store.Since.IsZero() {
			s.Store.Connected, s.Store.Since = connected, time.Now()
		}
		s.Store.Revision, s.Store.ConfigRefused = snapshot.Revision, snapshot.ConfigRefused
		s.Peers = make([]api.Peer, 0, len(snapshot.Peers))
		for _, l := range snapshot.Peers {
			s.Peers = append(s.Peers, api.Peer{Node: l.Node, Backend: l.Backend, Subnets: l.Subnets(), PublicIPs: l.Publics()})
		}
		s.Rejected = nil
		for _, r := range snapshot.Rejected {
			s.Rejected = append(s.Rejected, api.Rejection{Key: r.Key, Reason: r.Reason})
		}
	})
}

// storeLost records that the store is unreachable. The node stays ready: its lease
// and peers are still valid.
func (st *state) storeLost(err error) {
	st.change(func(s *api.Status) {
		if s.Store.Connected || s.Store.Since.IsZero() {
			s.Store.Connected, s.Store.Since = false, time.Now()
		}
		s.Store.Error = err.Error()
	})
}

// look has the datapath compare the host with what it wants.
func (st *state) look(ctx context.Context) {
	st.mu.Lock()
	path := st.path
	st.mu.Unlock()
	if path != nil {
		path.Look(ctx)
	}
}

// status returns the status, including the datapath's. The caller owns it.
func (st *state) status() api.Status {
	st.mu.Lock()
	s, path, earlier := st.current, st.path, maps.Clone(st.repairs)
	s.Warnings = slices.Concat(slices.Collect(maps.Values(st.warnings))...)
	st.mu.Unlock()
	// Without the lock: the datapath queries the kernel, which may be slow.
	if path != nil {
		s.Datapath = path.Status()
		if s.Lease != nil && s.Datapath.MTU != 0 {
			s.Datapath.StalePods = stalePods(gateways(s.Lease.Subnets), s.Datapath.MTU)
		}
		for kind, n := range earlier {
			if s.Datapath.Repairs == nil {
				s.Datapath.Repairs = make(map[string]uint64)
			}
			s.Datapath.Repairs[kind] += n
		}
	}
	s.Warnings = api.SortWarnings(append(s.Warnings, s.Datapath.Warnings...))
	if s.Fenced != nil {
		s.Ready = false
	} else if why := leaseExpired(s, time.Now()); why != "" {
		s.Ready, s.NotReady = false, why
	}
	return s
}
