package metrics

import (
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"culvert/internal/api"
)

// busy is the status of a node in which every metric has a value.
func busy() Source {
	times := api.NewHistogram(0.01, 0.1)
	times.Observe(0.05)
	rtt := times.Clone()
	rtt.Observe(3)
	requests := NewRequests()
	requests.Observe("renew", 20*time.Millisecond, false)
	silent := []api.SilentPeer{{}}
	return Source{
		Requests: requests,
		Status: func() api.Status {
			return api.Status{
				Version: "v1.2.3", Ready: true, Fenced: &api.Fenced{},
				Lease:    &api.Lease{Expires: time.Unix(1800000000, 0)},
				Store:    api.Store{Connected: true, Revision: 7, Snapshot: time.Unix(1, 0)},
				Peers:    make([]api.Peer, 3),
				Rejected: make([]api.Rejection, 2),
				Usage:    []api.Usage{{Network: netip.MustParsePrefix("10.5.0.0/16"), Used: 4, Capacity: 256}},
				Warnings: []api.Warning{{Check: "forward-drop", Text: "one"}, {Check: "forward-drop", Text: "two"}},
				Datapath: api.Datapath{
					WireFormat: "vxlan", Kind: "userspace",
					Egress: api.Traffic{Packets: 10, Bytes: 1000, Syscalls: 2}, Ingress: api.Traffic{Packets: 20},
					Drops: []api.Drop{{Reason: "ingress-vni", Packets: 5}}, Reasons: []string{"ingress-vni", "egress-full"},
					Repairs: map[string]uint64{"route": 9}, RepairTimes: times,
					StalePods: []string{"veth1"}, NarrowPaths: make([]api.NarrowPath, 1), SilentPeers: silent,
					Probes: &api.Probes{Sent: 8, Lost: 1, Seconds: rtt},
					FastPath: &api.FastPath{
						On: true, Egress: api.Traffic{Packets: 6}, Slow: []api.Drop{{Reason: "fragment", Packets: 3}}, Pods: &api.PodPath{Egress: 4},
					},
				},
			}
		},
		Peers: func() api.Peers {
			return api.Peers{Peers: []api.PeerState{
				{State: api.PeerActive}, {State: api.PeerIdle, Problem: "packets of more than 1400 bytes do not pass"}, {State: api.PeerSilent, Problem: "no reply"},
			}}
		},
	}
}

// scrape returns what Prometheus reads from a source: the value of each series.
func scrape(t *testing.T, s Source) map[string]float64 {
	t.Helper()
	w := httptest.NewRecorder()
	Handler(s).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	all := make(map[string]float64)
	for line := range strings.Lines(w.Body.String()) {
		at := strings.LastIndexByte(line, ' ')
		if strings.HasPrefix(line, "#") || at < 0 {
			continue
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(line[at:]), 64)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all[line[:at]] = v
	}
	return all
}

// TestScrape checks that each metric is served, with the value that the status has.
func TestScrape(t *testing.T) {
	got := scrape(t, busy())
	for _, m := range allMetrics {
		name := m.name
		if m.kind == "histogram" {
			name += "_count"
		}
		served := false
		for series := range got {
			served = served || series == name || strings.HasPrefix(series, name+"{")
		}
		if !served {
			t.Errorf("%s is not served", name)
		}
	}
	for series, want := range map[string]float64{
		"culvert_ready":                                                                  1,
		"culvert_fenced":                                                                 1,
		"culvert_serving_from_snapshot":                                                  1,
		"culvert_peers":                                                                  3,
		"culvert_lease_expires_seconds":                                                  1800000000,
		`culvert_subnets_used{network="10.5.0.0/16"}`:                                    4,
		`culvert_packets_total{direction="egress"}`:                                      10,
		`culvert_packets_total{direction="ingress"}`:                                     20,
		`culvert_drops_total{reason="ingress-vni"}`:                                      5,
		`culvert_drops_total{reason="egress-full"}`:                                      0, // a reason without drops
		`culvert_repairs_total{kind="route"}`:                                            9,
		`culvert_repairs_total{kind="sysctl"}`:                                           0,
		`culvert_warnings{check="forward-drop"}`:                                         2,
		`culvert_peer_subnets{state="active"}`:                                           1,
		`culvert_peer_subnets{state="unknown"}`:                                          0,
		"culvert_peer_subnets_small_path":                                                1, // a silent peer's problem is another one
		"culvert_probe_round_trip_seconds_count":                                         2,
		`culvert_store_request_duration_seconds_count{operation="renew",result="ok"}`:    1,
		`culvert_store_request_duration_seconds_count{operation="renew",result="error"}`: 0,
		`culvert_fast_path_left_total{reason="fragment"}`:                                3,
		`culvert_fast_path_pod_frames_total{direction="egress"}`:                         4,
		`culvert_info{datapath="userspace",version="v1.2.3",wire_format="vxlan"}`:        1,
	} {
		if v, ok := got[series]; !ok || v != want {
			t.Errorf("%s is %v (%t), want %v", series, v, ok, want)
		}
	}
}

// TestScrapeOfAStartingDaemon checks that a daemon without lease, datapath and peers can
// be scraped, and serves no value that it does not have.
func TestScrapeOfAStartingDaemon(t *testing.T) {
	got := scrape(t, Source{
		Requests: NewRequests(), Status: func() api.Status { return api.Status{} }, Peers: func() api.Peers { return api.Peers{} },
	})
	if got["culvert_ready"] != 0 {
		t.Error("it is ready")
	}
	for _, absent := range []string{"culvert_lease_expires_seconds", "culvert_fast_path", "culvert_probes_total", "culvert_repair_duration_seconds"} {
		if v, ok := got[absent]; ok {
			t.Errorf("%s is %v", absent, v)
		}
	}
}
