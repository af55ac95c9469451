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
	metricReady       = define("gauge", "culvert_ready", "1 if the node is ready: pods can be added.")
	metricConnected   = define("gauge", "culvert_store_connected", "1 if the store (etcd, or the Kubernetes API) is reachable.")
	metricSnapshot    = define("gauge", "culvert_serving_from_snapshot", "1 if the daemon started from its snapshot on disk because the store was unreachable, and has not reached it since.")
	metricRevision    = define("gauge", "culvert_store_revision", "Revision of the store that was last applied.")
	metricPeers       = define("gauge", "culvert_peers", "Valid leases of other nodes.")
	metricRejected    = define("gauge", "culvert_rejected_leases", "Malformed or conflicting leases in the store, which are ignored.")
	metricFenced      = define("gauge", "culvert_fenced", "1 if this node is fenced because another node holds its subnet.")
	metricExpires     = define("gauge", "culvert_lease_expires_seconds", "Unix time at which the lease expires unless it is renewed.")
	metricUsed        = define("gauge", "culvert_subnets_used", "Subnets of the cluster network that are leased or reserved.", "network")
	metricCapacity    = define("gauge", "culvert_subnets_capacity", "Subnets that the cluster network can provide.", "network")
	metricPackets     = define("counter", "culvert_packets_total", "Inner packets sent and received through the tunnel, counted as on the wire.", "direction")
	metricBytes       = define("counter", "culvert_bytes_total", "Bytes of inner packets sent and received through the tunnel.", "direction")
	metricSyscalls    = define("counter", "culvert_syscalls_total", "System calls of the packet loop, without those that wait.", "direction")
	metricDrops       = define("counter", "culvert_drops_total", "Packets dropped, by reason.", "reason")
	metricRepairs     = define("counter", "culvert_repairs_total", "Repairs: changes by other programs to culvert's kernel state that were undone, by kind.", "kind")
	metricWarnings    = define("gauge", "culvert_warnings", "Active warnings by check: conditions that drop packets or may; `culvert status` has the details and the fix.", "check")
	metricStale       = define("gauge", "culvert_stale_pods", "Pods whose MTU differs from that of new pods.")
	metricNarrow      = define("gauge", "culvert_narrow_paths", "Peers whose path MTU, reported by routers, is below the pods' MTU.")
	metricSilent      = define("gauge", "culvert_silent_peers", "Peers that this node sends to and receives nothing from.")
	metricInfo        = define("gauge", "culvert_info", "Version, wire format and datapath of this node; always 1.", "version", "wire_format", "datapath")
	metricFast        = define("gauge", "culvert_fast_path", "1 if the eBPF fast path is on.")
	metricFastPackets = define("counter", "culvert_fast_path_packets_total", "The part of culvert_packets_total that took the fast path.", "direction")
	metricFastBytes   = define("counter", "culvert_fast_path_bytes_total", "The part of culvert_bytes_total that took the fast path.", "direction")
	metricPodFrames   = define("counter", "culvert_fast_path_pod_frames_total", "Frames of the fast path that went the short way from pod to pod.", "direction")
	metricFastLeft    = define("counter", "culvert_fast_path_left_total", "Packets that the fast path passed on to the datapath, by reason.", "reason")

	metricBuild    = define("gauge", "culvert_build_info", "Version, commit and Go version of the binary; always 1.", "version", "revision", "goversion")
	metricStates   = define("gauge", "culvert_peer_subnets", "Subnets of peers by state: active, idle, silent (probed, no answer) or unknown (not probed yet).", "state")
	metricTooSmall = define("gauge", "culvert_peer_subnets_small_path", "Subnets of peers that packets of the pods' MTU do not reach.")
	metricProbes   = define("counter", "culvert_probes_total", "Echo requests sent to peers.")
	metricLost     = define("counter", "culvert_probes_lost_total", "The part of culvert_probes_total that was not answered.")
	metricRTT      = define("histogram", "culvert_probe_round_trip_seconds", "Round-trip time of echo requests to peers, through the tunnel.")
	metricRequests = define("histogram", "culvert_store_request_duration_seconds", "Duration of requests to the store (etcd, or the Kubernetes API), by operation and result.", "operation", "result")
	metricRepair   = define("histogram", "culvert_repair_duration_seconds", "Duration of repairs of culvert's kernel state.")
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
