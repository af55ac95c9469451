// Package metrics exports the daemon's status as Prometheus metrics. It derives all of
// them from the status at each scrape, so that the two cannot differ, except the
// durations of requests to the store, which it owns (Requests).
package metrics

import (
	"net/http"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"culvert/internal/api"
	"culvert/internal/host"
)

// Source is what the metrics are derived from.
type Source struct {
	Status   func() api.Status
	Peers    func() api.Peers
	Requests *Requests
}

// Handler serves the source's metrics, and those of the process and the Go runtime.
func Handler(s Source) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collector{s})
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
}

type collector struct{ Source }

// metric describes one metric. docs/metrics.md lists them.
type metric struct {
	name, kind, help string
	labels           []string
	desc             *prometheus.Desc
}

// allMetrics lists all metrics, in the order of docs/metrics.md.
var allMetrics []*metric

func define(kind, name, help string, labels ...string) *metric {
	m := &metric{name, kind, help, labels, prometheus.NewDesc(name, help, labels, nil)}
	allMetrics = append(allMetrics, m)
	return m
}

var (
	metricReady       = define("gauge", "culvert_ready", "Whether pods can be added on this node.")
	metricConnected   = define("gauge", "culvert_store_connected", "Whether the store (etcd, or the Kubernetes API) is in reach.")
	metricSnapshot    = define("gauge", "culvert_serving_from_snapshot", "Whether this node serves from what it keeps on disk, since the store has been unreachable from its start on.")
	metricRevision    = define("gauge", "culvert_store_revision", "Revision of the store that this node follows.")
	metricPeers       = define("gauge", "culvert_peers", "Leases of other nodes in force.")
	metricRejected    = define("gauge", "culvert_rejected_leases", "Keys in etcd, or Nodes, that were set aside.")
	metricFenced      = define("gauge", "culvert_fenced", "Whether another has the subnet that this node had.")
	metricExpires     = define("gauge", "culvert_lease_expires_seconds", "When the lease ends unless it is renewed, in Unix time.")
	metricUsed        = define("gauge", "culvert_subnets_used", "Subnets of the cluster network that are leased or reserved.", "network")
	metricCapacity    = define("gauge", "culvert_subnets_capacity", "Subnets that the cluster network has.", "network")
	metricPackets     = define("counter", "culvert_packets_total", "Inner packets carried, as on the wire.", "direction")
	metricBytes       = define("counter", "culvert_bytes_total", "Bytes of inner packets carried.", "direction")
	metricSyscalls    = define("counter", "culvert_syscalls_total", "System calls of the packet loop, waits apart.", "direction")
	metricDrops       = define("counter", "culvert_drops_total", "Packets dropped, by reason.", "reason")
	metricRepairs     = define("counter", "culvert_repairs_total", "What others did to this host's network and was undone, by kind.", "kind")
	metricWarnings    = define("gauge", "culvert_warnings", "Conditions that keep packets from being carried, or may, by check; the status says what and how to mend it.", "check")
	metricStale       = define("gauge", "culvert_stale_pods", "Pods that were made for another MTU.")
	metricNarrow      = define("gauge", "culvert_narrow_paths", "Peers whose path takes less than the pods' MTU, as routers on it said.")
	metricSilent      = define("gauge", "culvert_silent_peers", "Peers to which this node sends and from which nothing comes.")
	metricInfo        = define("gauge", "culvert_info", "What runs here.", "version", "wire_format", "datapath")
	metricFast        = define("gauge", "culvert_fast_path", "Whether the fast path stands before the datapath.")
	metricFastPackets = define("counter", "culvert_fast_path_packets_total", "Of culvert_packets_total, those that took the fast path.", "direction")
	metricFastBytes   = define("counter", "culvert_fast_path_bytes_total", "Of culvert_bytes_total, those that took the fast path.", "direction")
	metricPodFrames   = define("counter", "culvert_fast_path_pod_frames_total", "Frames of the fast path that went the short way from pod to pod.", "direction")
	metricFastLeft    = define("counter", "culvert_fast_path_left_total", "Packets that the fast path left to the datapath, by reason.", "reason")

	metricBuild    = define("gauge", "culvert_build_info", "What was built: 1.", "version", "revision", "goversion")
	metricStates   = define("gauge", "culvert_peer_subnets", "Subnets of peers, by what is known of them: active, idle, silent (asked, and no answer) or unknown (not asked yet).", "state")
	metricTooSmall = define("gauge", "culvert_peer_subnets_small_path", "Subnets of peers to which packets as large as pods may send do not pass.")
	metricProbes   = define("counter", "culvert_probes_total", "Echo requests that were sent to peers.")
	metricLost     = define("counter", "culvert_probes_lost_total", "Of culvert_probes_total, those without an answer.")
	metricRTT      = define("histogram", "culvert_probe_round_trip_seconds", "Round-trip time of echo requests to peers, through the tunnel.")
	metricRequests = define("histogram", "culvert_store_request_duration_seconds", "How long requests to the store (etcd, or the Kubernetes API) took, by operation and result.", "operation", "result")
	metricRepair   = define("histogram", "culvert_repair_duration_seconds", "How long it took to undo what others did to this host's network.")
)

// Describe implements prometheus.Collector.
func (collector) Describe(c chan<- *prometheus.Desc) {
	for _, m := range allMetrics {
		c <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (m collector) Collect(c chan<- prometheus.Metric) {
	s := m.Status()
	gauge := func(m *metric, v float64, labels ...string) {
		c <- prometheus.MustNewConstMetric(m.desc, prometheus.GaugeValue, v, labels...)
	}
	counter := func(m *metric, v uint64, labels ...string) {
		c <- prometheus.MustNewConstMetric(m.desc, prometheus.CounterValue, float64(v), labels...)
	}
	gauge(metricInfo, 1, s.Version, s.Datapath.WireFormat, s.Datapath.Kind)
	gauge(metricReady, truth(s.Ready))
	gauge(metricConnected, truth(s.Store.Connected))
	gauge(metricSnapshot, truth(!s.Store.Snapshot.IsZero()))
	gauge(metricRevision, float64(s.Store.Revision))
	gauge(metricPeers, float64(len(s.Peers)))
	gauge(metricRejected, float64(len(s.Rejected)))
	gauge(metricFenced, truth(s.Fenced != nil))
	if s.Lease != nil && !s.Lease.Expires.IsZero() {
		gauge(metricExpires, float64(s.Lease.Expires.Unix()))
	}
	for _, u := range s.Usage {
		gauge(metricUsed, float64(u.Used), u.Network.String())
		gauge(metricCapacity, float64(u.Capacity), u.Network.String())
	}
	for direction, t := range map[string]api.Traffic{"egress": s.Datapath.Egress, "ingress": s.Datapath.Ingress} {
		counter(metricPackets, t.Packets, direction)
		counter(metricBytes, t.Bytes, direction)
		counter(metricSyscalls, t.Syscalls, direction)
	}
	for _, kind := range host.Kinds() {
		counter(metricRepairs, s.Datapath.Repairs[string(kind)], string(kind))
	}
	warnings := make(map[string]int)
	for _, w := range s.Warnings {
		warnings[w.Check]++
	}
	for check, n := range warnings {
		gauge(metricWarnings, float64(n), check)
	}
	gauge(metricStale, float64(len(s.Datapath.StalePods)))
	gauge(metricNarrow, float64(len(s.Datapath.NarrowPaths)))
	gauge(metricSilent, float64(len(s.Datapath.SilentPeers)))
	drops := make(map[string]uint64)
	for _, d := range s.Datapath.Drops {
		drops[d.Reason] = d.Packets
	}
	for _, r := range s.Datapath.Reasons {
		counter(metricDrops, drops[r], r)
	}
	revision, goversion := built()
	gauge(metricBuild, 1, s.Version, revision, goversion)
	states, small := map[string]int{api.PeerActive: 0, api.PeerIdle: 0, api.PeerSilent: 0, api.PeerUnknown: 0}, 0
	peers := m.Peers()
	for _, p := range peers.Peers {
		states[p.State]++
		if p.State != api.PeerSilent && p.Problem != "" {
			small++
		}
	}
	for state, n := range states {
		gauge(metricStates, float64(n), state)
	}
	gauge(metricTooSmall, float64(small))
	if p := s.Datapath.Probes; p != nil {
		counter(metricProbes, p.Sent)
		counter(metricLost, p.Lost)
		c <- histogram(metricRTT, p.Seconds)
	}
	if len(s.Datapath.RepairTimes.Counts) > 0 {
		c <- histogram(metricRepair, s.Datapath.RepairTimes)
	}
	m.Requests.collect(c)
	if f := s.Datapath.FastPath; f != nil {
		gauge(metricFast, truth(f.On))
		for direction, t := range map[string]api.Traffic{"egress": f.Egress, "ingress": f.Ingress} {
			counter(metricFastPackets, t.Packets, direction)
			counter(metricFastBytes, t.Bytes, direction)
		}
		if f.Pods != nil {
			counter(metricPodFrames, f.Pods.Egress, "egress")
			counter(metricPodFrames, f.Pods.Ingress, "ingress")
		}
		for _, d := range f.Slow {
			counter(metricFastLeft, d.Packets, d.Reason)
		}
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// histogram converts h to a Prometheus histogram, whose buckets are cumulative.
func histogram(m *metric, h api.Histogram, labels ...string) prometheus.Metric {
	buckets, sum := make(map[float64]uint64), uint64(0)
	for i, bound := range h.Bounds {
		sum += h.Counts[i]
		buckets[bound] = sum
	}
	return prometheus.MustNewConstHistogram(m.desc, sum+h.Counts[len(h.Bounds)], h.Sum, buckets, labels...)
}

// built returns the commit and the Go version of the binary.
func built() (revision, goversion string) {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				revision = s.Value
			}
		}
	}
	return revision, runtime.Version()
}

// Requests records the durations of requests to the store.
type Requests struct {
	mu sync.Mutex
	by map[requestKind]*api.Histogram
}

type requestKind struct{ operation, result string }

// NewRequests returns an empty record.
func NewRequests() *Requests {
	return &Requests{by: make(map[requestKind]*api.Histogram)}
}

// Observe records one request.
func (r *Requests) Observe(operation string, took time.Duration, failed bool) {
	kind := requestKind{operation, "ok"}
	if failed {
		kind.result = "error"
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.by[kind] == nil { // both, so that the first error is an increase
		for _, result := range []string{"ok", "error"} {
			h := api.NewHistogram(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
			r.by[requestKind{operation, result}] = &h
		}
	}
	r.by[kind].Observe(took.Seconds())
}

func (r *Requests) collect(c chan<- prometheus.Metric) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for kind, h := range r.by {
		c <- histogram(metricRequests, *h, kind.operation, kind.result)
	}
}
