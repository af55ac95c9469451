package daemon

import (
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"culvert/backend"
	"culvert/internal/api"
	"culvert/internal/api/readiness"
	"culvert/internal/host"
	"culvert/internal/page"
	"culvert/subnet"
)

// health is the daemon's state as it reports it. The daemon's parts write it; status,
// metrics and probes read it.
type health struct {
	mu   sync.Mutex
	said api.Status
	path backend.Backend
	// repairs counts the repairs of earlier datapaths, by kind.
	repairs map[string]uint64
	// warnings are the daemon's warnings, by the part that reports them.
	warnings map[string][]api.Warning
	warned   map[netip.Prefix]float64 // share in use at the last warning; follow's goroutine only
	requests *requestTimes
}

func newHealth(o Options) *health {
	return &health{requests: newRequestTimes(), warned: map[netip.Prefix]float64{}, warnings: map[string][]api.Warning{}, said: api.Status{
		Version: o.Version, Node: o.Node, Started: time.Now(), SubnetFile: o.SubnetFile,
		NotReady: "starting",
		Store:    o.describeStore(),
		Peers:    []api.Peer{},
		Networks: []netip.Prefix{},
	}}
}

func (h *health) change(f func(*api.Status)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f(&h.said)
}

func (h *health) notReady(why string) {
	h.change(func(s *api.Status) { s.Ready, s.NotReady = false, why })
}

func (h *health) ready() {
	h.change(func(s *api.Status) { s.Ready, s.NotReady = true, "" })
}

func (h *health) setUnderlay(u host.Underlay) {
	h.change(func(s *api.Status) {
		s.Underlay = api.Underlay{Interface: u.Name, MTU: u.MTU, Addrs: u.Addrs, Why: u.Why}
	})
}

func (h *health) setConfig(c subnet.Config) {
	h.change(func(s *api.Status) {
		s.Networks = s.Networks[:0:0]
		for _, n := range c.Networks {
			s.Networks = append(s.Networks, n.Prefix)
		}
	})
}

func (h *health) setLease(l subnet.Lease) {
	h.change(func(s *api.Status) {
		s.Lease = &api.Lease{Subnets: l.Subnets(), PublicIPs: l.Publics(), Expires: l.Expires}
	})
}

// setDatapath sets the datapath, and keeps the repair counts of the one before.
func (h *health) setDatapath(b backend.Backend) {
	h.mu.Lock()
	old := h.path
	h.path = b
	h.mu.Unlock()
	if old == nil {
		return
	}
	for kind, n := range old.Status().Repairs {
		h.repaired(kind, n)
	}
}

// repaired counts repairs that the current datapath does not count.
func (h *health) repaired(kind string, n uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.repairs == nil {
		h.repairs = make(map[string]uint64)
	}
	h.repairs[kind] += n
}

// setFenced records that the node is fenced, or with nil that it no longer is.
func (h *health) setFenced(f *api.Fenced) {
	h.change(func(s *api.Status) {
		s.Fenced = f
		if f == nil {
			s.NotReady = "leaving the fence"
			return
		}
		s.Ready, s.Lease, s.Peers, h.path = false, nil, []api.Peer{}, nil
		s.NotReady = fmt.Sprintf("FENCED: this node had %v: %s", f.Subnets, f.Reason)
		if f.Pods > 0 {
			s.NotReady += fmt.Sprintf("; %d pods of it are left: delete them, or start the daemon with --on-lost=release", f.Pods)
		}
	})
}

// setWarnings replaces the warnings of one part of the daemon.
func (h *health) setWarnings(part string, all ...api.Warning) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.warnings[part] = all
}

// refuseConfig records why the configuration in the store cannot be applied.
func (h *health) refuseConfig(why error) {
	h.change(func(s *api.Status) { s.Store.ConfigRefused = why.Error() })
}

func (h *health) networks() []netip.Prefix {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.said.Networks
}

// setNetworks sets the networks if the configuration is not known yet.
func (h *health) setNetworks(networks []netip.Prefix) {
	h.change(func(s *api.Status) {
		if len(s.Networks) == 0 {
			s.Networks = networks
		}
	})
}

// setUsage records the usage, and warns when a network becomes nearly full and at
// every further 5 %.
func (h *health) setUsage(usage []subnet.Usage, log *slog.Logger) {
	const step = 0.05
	const fix = "make room with `culvert config set` and a Network that contains the present one, or see `culvert lease check`"
	var full []api.Warning
	for _, u := range usage {
		share, warned := u.Share(), h.warned[u.Network]
		if share >= subnet.NearlyFull {
			full = append(full, api.Warning{
				Check: "network-nearly-full", Fix: fix,
				Text: fmt.Sprintf("%d of %d subnets in %s are leased or reserved", u.Used, u.Capacity, u.Network),
			})
		}
		switch {
		case share < subnet.NearlyFull:
			delete(h.warned, u.Network)
		case share >= warned+step:
			h.warned[u.Network] = share
			log.Warn("the cluster network is nearly full: "+fix, "network", u.Network, "used", u.Used, "capacity", u.Capacity)
		}
	}
	h.setWarnings("usage", full...)
	h.change(func(s *api.Status) {
		s.Usage = nil
		for _, u := range usage {
			s.Usage = append(s.Usage, api.Usage{Network: u.Network, Used: u.Used, Capacity: u.Capacity})
		}
	})
}

// setSnapshot records a snapshot: from the connected store, or, if Kept is set, from
// disk.
func (h *health) setSnapshot(snapshot subnet.Snapshot, log *slog.Logger) {
	h.setConfig(snapshot.Config)
	h.setUsage(snapshot.Usage, log)
	if len(snapshot.Self.Endpoints) > 0 {
		h.setLease(snapshot.Self)
	}
	h.change(func(s *api.Status) {
		s.Store.Snapshot, s.Store.Error = snapshot.Kept, ""
		if !snapshot.Kept.IsZero() {
			s.Store.Error = "it was away when this daemon started"
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
func (h *health) storeLost(err error) {
	h.change(func(s *api.Status) {
		if s.Store.Connected || s.Store.Since.IsZero() {
			s.Store.Connected, s.Store.Since = false, time.Now()
		}
		s.Store.Error = err.Error()
	})
}

// status returns the status, including the datapath's. The caller owns it.
func (h *health) status() api.Status {
	h.mu.Lock()
	s, path, earlier := h.said, h.path, maps.Clone(h.repairs)
	s.Warnings = slices.Concat(slices.Collect(maps.Values(h.warnings))...)
	h.mu.Unlock()
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
	} else if why := ranOut(s, time.Now()); why != "" {
		s.Ready, s.NotReady = false, why
	}
	return s
}

// ranOut returns a sentence if the lease has expired as far as this node knows, else
// "". The node goes on forwarding for its pods.
func ranOut(s api.Status, now time.Time) string {
	if s.Lease == nil || s.Lease.Expires.IsZero() || !now.After(s.Lease.Expires) {
		return ""
	}
	why := "it was not renewed"
	if s.Store.Error != "" {
		why = s.Store.Name() + " is out of reach: " + s.Store.Error
	} else if s.Store.Kind == "kubernetes" {
		why = "there is no Node " + s.Node + " with these podCIDRs"
	}
	return fmt.Sprintf("the lease of %v ran out at %s (%s): its addresses may be another node's; the pods that are here keep theirs",
		s.Lease.Subnets, s.Lease.Expires.Format(time.RFC3339), why)
}

// readiness answers the CNI plugin and /readyz. It does not query the datapath, which
// may hang.
func (h *health) readiness(now time.Time) readiness.Answer {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.said
	switch {
	case s.Fenced != nil:
		return readiness.Answer{Code: readiness.Fenced, Reason: s.NotReady}
	case s.Lease == nil:
		return readiness.Answer{Code: readiness.NoLease, Reason: "this node has no lease yet: " + s.NotReady}
	case ranOut(s, now) != "":
		return readiness.Answer{Code: readiness.Fenced, Reason: ranOut(s, now)}
	case !s.Ready:
		return readiness.Answer{Code: readiness.DatapathDown, Reason: "the datapath does not carry packets: " + s.NotReady}
	}
	return readiness.Answer{Ready: true}
}

// socket serves status, peers, page and readiness on the daemon's unix socket.
func (h *health) socket() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", api.Handler(h.status, h.peers))
	mux.Handle("GET /page/", http.StripPrefix("/page", page.Handler(h.status, h.peers)))
	mux.Handle(readiness.Path, api.ReadinessHandler(func() readiness.Answer { return h.readiness(time.Now()) }))
	return mux
}

// probes serves /metrics and, to loopback clients, the page, both guarded by access,
// and /livez and /readyz.
func probes(h *health, access Access) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), metrics{h})
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", access.guard(promhttp.HandlerFor(registry, promhttp.HandlerOpts{})))
	mux.Handle("GET /", page.LoopbackOnly(access.guard(page.Handler(h.status, h.peers))))
	// A daemon that answers is alive. An unreachable store does not count: a restart
	// would not bring it back.
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	// The same answer as the CNI plugin's, which does not query the datapath: a probe
	// that waits for a repair would time out.
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if a := h.readiness(time.Now()); !a.Ready {
			http.Error(w, a.Reason, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}
