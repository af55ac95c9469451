package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"culvert/bench/load"
	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/subnet"
)

// ScaleOptions configure Scale.
type ScaleOptions struct {
	Peers            []int // numbers of peers to measure with
	Rounds           int
	Duration, Warmup time.Duration
	Leases           int // how often, per number of peers, to time a new lease until its first packet

	Version, Self string
	Bin           string // directory of culvert's programs
	Progress      func(Progress)
}

// MostPeers is the maximum number of peers: Scale has subnets for no more.
const MostPeers = 5000

// ScaleReport is the result of Scale.
type ScaleReport struct {
	Schema  int      `json:"schema"`
	Machine Machine  `json:"machine"`
	Scale   []Scaled `json:"scale"`
}

// Scaled are the figures for one number of peers.
type Scaled struct {
	Peers int `json:"peers"`
	// The userspace datapath with that many peers in its table:
	Throughput Figures `json:"throughput"`        // Gbit/s, one TCP stream
	Rate       Figures `json:"rate"`              // kpps received, of 64 bytes
	PerPacket  Figures `json:"cpu_us_per_packet"` // CPU time of both daemons per such packet
	// The daemon of a node that joins a cluster with that many leases in etcd:
	ReadyMS     float64 `json:"ready_ms"`      // from its start until it has all peers
	StartCPU    float64 `json:"start_cpu_ms"`  // the daemon's CPU time until then
	DaemonRSS   float64 `json:"daemon_rss_mb"` // resident memory
	EtcdRSS     float64 `json:"etcd_rss_mb"`
	EventCPU    float64 `json:"event_cpu_ms"`       // the daemon's CPU time per lease added or removed
	FirstPacket Figures `json:"lease_to_packet_ms"` // from writing a lease to the first packet through
}

// Figures are the values of several rounds.
type Figures struct {
	Median float64   `json:"median"`
	Min    float64   `json:"min"`
	Max    float64   `json:"max"`
	Rounds []float64 `json:"rounds"`
}

func (f *Figures) add(v float64) {
	f.Rounds = append(f.Rounds, v)
	f.Median, f.Min, f.Max = median(f.Rounds), slices.Min(f.Rounds), slices.Max(f.Rounds)
}

// Check returns an error if an option is invalid.
func (o ScaleOptions) Check() error {
	switch {
	case len(o.Peers) == 0 || slices.Min(o.Peers) < 1 || slices.Max(o.Peers) > MostPeers:
		return fmt.Errorf("peers %v: 1 to %d", o.Peers, MostPeers)
	case o.Rounds < 1:
		return fmt.Errorf("%d rounds: at least 1", o.Rounds)
	case o.Duration < 50*time.Millisecond:
		return fmt.Errorf("a duration of %s: at least 50ms", o.Duration)
	case o.Leases < 1:
		return fmt.Errorf("%d leases: at least 1", o.Leases)
	}
	return nil
}

// Scale measures the cost of the number of peers. When ctx ends it returns ctx's error
// and the report so far.
func Scale(ctx context.Context, o ScaleOptions) (*ScaleReport, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	r := &ScaleReport{Schema: Schema, Machine: thisMachine()}
	m := &r.Machine
	m.Culvert, m.Congestion, m.Generator = o.Version, load.Congestion, "builtin"
	m.Duration, m.Warmup = Seconds(o.Duration.Seconds()), Seconds(o.Warmup.Seconds())
	for _, n := range o.Peers {
		r.Scale = append(r.Scale, Scaled{Peers: n})
	}
	defer load.Quiet(1)()
	err := r.datapath(ctx, o)
	for i := range r.Scale {
		if err != nil {
			break
		}
		o.tell(i, len(r.Scale), fmt.Sprintf("control plane with %d leases", r.Scale[i].Peers))
		err = r.Scale[i].control(ctx, o)
	}
	return r, err
}

func (o ScaleOptions) tell(done, total int, doing string) {
	if o.Progress != nil {
		o.Progress(Progress{Done: done, Total: total, Doing: doing})
	}
}

// datapath measures the traffic with one peer for each size of the table, interleaved.
func (r *ScaleReport) datapath(ctx context.Context, o ScaleOptions) (err error) {
	var sites []*site
	defer func() {
		for _, s := range sites {
			err = errors.Join(err, s.close())
		}
	}()
	for _, n := range o.Peers {
		s, err := startLab(ctx, Datapath{Name: "vxlan/userspace"}, siteOptions{nodes: 2, profile: offloadProfile, self: o.Self, absent: n - 1})
		if err != nil {
			return fmt.Errorf("starting with %d peers: %w", n, err)
		}
		sites = append(sites, s)
	}
	method := method{warmup: o.Warmup, duration: o.Duration}
	for round := range o.Rounds {
		for i, s := range sites {
			o.tell(round*len(sites)+i, o.Rounds*len(sites), fmt.Sprintf("%d peers in the table", o.Peers[i]))
			f, err := builtin{}.measure(ctx, s, Workload{Streams: 1}, method)
			if err != nil {
				return err
			}
			r.Scale[i].Throughput.add(f[Throughput])
			f, err = builtin{}.measure(ctx, s, Workload{Payload: smallPacket}, method)
			if err != nil {
				return err
			}
			r.Scale[i].Rate.add(f[Rate])
			r.Scale[i].PerPacket.add(f[DaemonCPUPerGB] / 1e9 * smallPacket * 1e6)
		}
	}
	return nil
}

const smallPacket = 64

// control measures the control plane. Node n1 has a real daemon; n2 has a kernel vxlan
// device, and the harness writes its lease; all other peers are only leases:
//
//	fabric: etcd, N leases
//	   |                 |
//	  n1 culvert run    n2 kernel vxlan
func (s *Scaled) control(ctx context.Context, o ScaleOptions) (err error) {
	l, err := lab.New(lab.Options{Nodes: 2, Bin: o.Bin})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := s.inLab(ctx, l, o); err != nil {
		return fmt.Errorf("%d leases in etcd: %w", s.Peers, err)
	}
	return nil
}

func (s *Scaled) inLab(ctx context.Context, l *lab.Lab, o ScaleOptions) error {
	store, err := startEtcd(ctx, l, fmt.Sprintf(`{"Network":%q,"SubnetLen":24,"Backend":{"Type":"vxlan"}}`, wideNetwork))
	if err != nil {
		return err
	}
	defer store.client.CloseIdleConnections()
	far, err := l.Nodes[1].AddHandmadeVXLAN(lab.VXLANOptions{Subnet: innerSubnet(1)})
	if err != nil {
		return err
	}
	last := subnet.Lease{Node: "n2", Backend: "vxlan", Endpoints: []subnet.Endpoint{far.Self}}
	var others []subnet.Lease
	for k := 1; k < s.Peers; k++ {
		others = append(others, madeUpLease(k))
	}
	if err := store.put(ctx, others...); err != nil {
		return err
	}

	n := l.Nodes[0]
	began := time.Now()
	daemon, err := n.Start(lab.Command{Name: "culvert", Path: filepath.Join(o.Bin, "culvert"), Args: []string{
		"run", "--datapath", "userspace", "--node-id", n.ID, "--run-dir", n.RunDir, "--subnet-file", n.SubnetFile(), "--etcd-endpoints", store.url, "--iface", n.Link,
	}})
	if err != nil {
		return err
	}
	status, err := awaitPeers(ctx, n, daemon, s.Peers-1)
	if err != nil {
		return err
	}
	s.ReadyMS = float64(time.Since(began).Microseconds()) / 1e3
	cpu, err := processCPU(daemon.PID)
	if err != nil {
		return err
	}
	s.StartCPU = cpu * 1e3
	self, ok := subnetOf(status)
	if !ok {
		return errors.New("the daemon has no lease")
	}
	if err := far.AddPeer(subnet.Endpoint{
		Subnet: self, Public: n.Addrs[0], VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(n.ID, 1, false)},
	}); err != nil {
		return err
	}

	for range o.Leases {
		took, err := s.firstPacket(ctx, l, store, last, daemon)
		if err != nil {
			return err
		}
		s.FirstPacket.add(float64(took.Microseconds()) / 1e3)
	}
	if err := s.events(ctx, n, store, daemon); err != nil {
		return err
	}
	rss, err := processRSS(daemon.PID)
	if err != nil {
		return err
	}
	s.DaemonRSS = rss / 1e6
	for _, p := range l.Processes() {
		if p.Name == "etcd" {
			if rss, err = processRSS(p.PID); err != nil {
				return err
			}
			s.EtcdRSS = rss / 1e6
		}
	}
	return nil
}

// madeUpLease returns the lease of the k-th absent peer.
func madeUpLease(k int) subnet.Lease {
	name := fmt.Sprintf("absent-%d", k)
	return subnet.Lease{Node: name, Backend: "vxlan", Endpoints: []subnet.Endpoint{{
		Subnet: absentSubnet(k), Public: absent(k), VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(name, 1, false)},
	}}}
}

func subnetOf(s api.Status) (netip.Prefix, bool) {
	if s.Lease == nil || len(s.Lease.Subnets) == 0 {
		return netip.Prefix{}, false
	}
	return s.Lease.Subnets[0], true
}

// awaitPeers waits until the daemon is ready and has the given number of peers.
func awaitPeers(ctx context.Context, n *lab.Node, daemon *lab.Process, peers int) (api.Status, error) {
	for {
		status, err := api.GetStatus(ctx, n.RunDir)
		if err == nil && status.Ready && status.Datapath.Peers == peers {
			return status, nil
		}
		select {
		case <-daemon.Exited():
			return status, fmt.Errorf("the daemon exited: %s", daemon.Tail(5))
		case <-ctx.Done():
			return status, fmt.Errorf("the daemon has %d peers instead of %d: %w: %s", status.Datapath.Peers, peers, ctx.Err(), daemon.Tail(5))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// firstPacket writes a lease while datagrams are sent to its subnet, and returns the
// time until the first one arrived. Then it removes the lease.
func (s *Scaled) firstPacket(ctx context.Context, l *lab.Lab, store gateway, lease subnet.Lease, daemon *lab.Process) (time.Duration, error) {
	const perSecond = 10_000 // a resolution of 0.1 ms
	far, err := localEnd(l.Nodes[1].Namespace).Open(ctx, load.Spec{Kind: load.Drain, At: lease.Endpoints[0].Subnet.Addr()})
	if err != nil {
		return 0, err
	}
	defer far.Close()
	near, err := load.StartDatagrams([]load.Place{l.Nodes[0].Namespace}, far.Addr(), smallPacket, perSecond)
	if err != nil {
		return 0, err
	}
	defer near.Close()
	if err := sleep(ctx, 20*time.Millisecond); err != nil {
		return 0, err
	}
	before, err := far.Reading()
	if err == nil && before.Packets > 0 {
		err = errors.New("packets arrived before the lease was written")
	}
	if err == nil {
		err = store.put(ctx, lease)
	}
	for err == nil {
		var r load.Reading
		if r, err = far.Reading(); err == nil && r.Packets > 0 {
			if err := store.remove(ctx, lease); err != nil {
				return 0, err
			}
			_, err := awaitPeers(ctx, l.Nodes[0], daemon, s.Peers-1)
			return time.Duration(r.First - before.Nanoseconds), err
		}
		if err == nil {
			err = sleep(ctx, time.Millisecond)
		}
	}
	return 0, fmt.Errorf("waiting for the first packet after a lease: %w", err)
}

// events measures the daemon's CPU time per lease event.
func (s *Scaled) events(ctx context.Context, n *lab.Node, store gateway, daemon *lab.Process) error {
	const times = 20
	before, err := processCPU(daemon.PID)
	if err != nil {
		return err
	}
	lease := madeUpLease(s.Peers)
	for range times {
		// Leave time between events, since the daemon batches those that come together.
		if err := errors.Join(store.put(ctx, lease), sleep(ctx, 50*time.Millisecond), store.remove(ctx, lease), sleep(ctx, 50*time.Millisecond)); err != nil {
			return err
		}
	}
	if _, err := awaitPeers(ctx, n, daemon, s.Peers-1); err != nil {
		return err
	}
	after, err := processCPU(daemon.PID)
	s.EventCPU = (after - before) * 1e3 / (2 * times)
	return err
}

// JSON returns the report in the documented JSON form.
func (r *ScaleReport) JSON() ([]byte, error) {
	text, err := json.MarshalIndent(r, "", "  ")
	return append(text, '\n'), err
}
