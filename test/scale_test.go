package test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"culvert/internal/api"
	"culvert/subnet"
	"culvert/subnet/etcd"
)

// TestScale has many nodes join a large network at the same time, spread over a jitter, and
// measures the load on etcd and on a daemon:
//
//	1,000 registries in this process ── fabric ── culvert-etcd, 5,000 leases
//	one real daemon that follows them
//
// The default numbers are small; CULVERT_SCALE=leases,nodes sets others, such as 5000,1000.
// docs/scale.md has the figures.
func TestScale(t *testing.T) {
	leases, watchers, jitter, digest := 300, 30, 500*time.Millisecond, time.Duration(0)
	if text := os.Getenv("CULVERT_SCALE"); text != "" {
		if _, err := fmt.Sscanf(text, "%d,%d", &leases, &watchers); err != nil {
			t.Fatal(err)
		}
		// All nodes share this machine's CPUs, so have each wait after a snapshot.
		jitter, digest = time.Duration(watchers)*120*time.Millisecond, 20*time.Second
	}
	c := newCluster(t, 1)
	const config = `{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}`
	c.setConfig(config)
	client := c.client()
	n := c.Nodes[0]
	daemon := c.start(n)
	c.waitReady(n, 0)
	time.Sleep(time.Second)
	empty := residentMemory(t, daemon.PID)
	fill(t, client, 0, leases-watchers)
	c.wait(n, "has all peers", func(s api.Status) bool { return len(s.Peers) == leases-watchers })

	server := c.etcd()
	before, usedBefore := requests(t, c), processorTime(t, server.PID)
	cfg, _, err := subnet.ParseConfig([]byte(config))
	if err != nil {
		t.Fatal(err)
	}
	s := &swarm{t: t, cluster: c, config: cfg, jitter: jitter, want: leases, digest: digest}
	began := time.Now()
	s.start(watchers)
	s.joined.Wait()
	leased := time.Since(began)
	s.full.Wait()
	took := time.Since(began)
	after, used := requests(t, c), processorTime(t, server.PID)-usedBefore

	t.Logf("%d nodes join a network that then has %d leases, within a jitter of %v, on %d CPUs shared with etcd", watchers, leases, jitter, runtime.NumCPU())
	t.Logf("all have a lease after %v, all have the full snapshot after %v; a node takes %v (median) and %v (maximum) from its start to its first snapshot",
		leased.Round(time.Millisecond), took.Round(time.Millisecond), s.quantile(0.5), s.quantile(1))
	total := 0
	for _, name := range sortedKeys(after) {
		if k := after[name] - before[name]; k > 0 {
			t.Logf("  %-28s %8d requests, %.2f per join", name, k, float64(k)/float64(watchers))
			total += k
		}
	}
	t.Logf("  %.2f requests, %.0f kB received and %.1f kB sent per join; etcd used %v of CPU time, %v per join, and has %d MB",
		float64(total)/float64(watchers), float64(s.received.Load())/1000/float64(watchers), float64(s.sent.Load())/1000/float64(watchers),
		used.Round(time.Millisecond), (used / time.Duration(watchers)).Round(100*time.Microsecond), residentMemory(t, server.PID)>>20)
	if watches := after["Watch"] - before["Watch"]; watches != watchers {
		t.Errorf("%d watches by %d nodes", watches, watchers)
	}

	// One change while nothing else happens.
	time.Sleep(s.digest + time.Second)
	s.received.Store(0)
	began = time.Now()
	fill(t, client, 50_000, 50_001) // a subnet that no joining node has
	s.heard.Wait()
	t.Logf("a change reached all nodes after %v, with %d bytes to each", time.Since(began).Round(time.Millisecond), s.received.Load()/int64(watchers))
	s.stop()

	c.wait(n, "has all peers", func(s api.Status) bool { return len(s.Peers) >= leases })
	time.Sleep(2 * time.Second)
	full := residentMemory(t, daemon.PID)
	t.Logf("a daemon has %.1f MB without peers and %.1f MB with %d: %.2f MB per 1,000 peers, userspace datapath",
		float64(empty)/1e6, float64(full)/1e6, leases, float64(full-empty)/1e6/float64(leases)*1000)
}

// fill writes the leases of nodes from to to-1.
func fill(t *testing.T, c *clientv3.Client, from, to int) {
	t.Helper()
	var ops []clientv3.Op
	flush := func() {
		if _, err := c.Txn(t.Context()).Then(ops...).Commit(); err != nil {
			t.Fatal(err)
		}
		ops = ops[:0]
	}
	for i := from; i < to; i++ {
		node := fmt.Sprintf("worker-%05d.example.internal", i)
		l := subnet.Lease{Node: node, Backend: "vxlan", Endpoints: []subnet.Endpoint{{
			Subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100 + byte(i>>8), byte(i), 0}), 24),
			Public: netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}),
			VTEP:   subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(node, 1, false)},
		}}}
		value, err := l.Value()
		if err != nil {
			t.Fatal(err)
		}
		key := "/coreos.com/network/subnets/" + l.Key()
		ops = append(ops, clientv3.OpPut(key, string(value)))
		if len(ops) == 100 {
			flush()
		}
	}
	if len(ops) > 0 {
		flush()
	}
}

// swarm is many nodes in one process.
type swarm struct {
	t       *testing.T
	cluster *cluster
	config  subnet.Config
	jitter  time.Duration
	digest  time.Duration // how long a node waits after a snapshot
	want    int           // number of peers of each node: the real daemon, and all but itself

	received, sent      atomic.Int64
	joined, full, heard sync.WaitGroup
	nodes               sync.WaitGroup
	cancel              context.CancelFunc
	mu                  sync.Mutex
	took                []time.Duration
}

func (s *swarm) start(n int) {
	ctx, cancel := context.WithCancel(s.t.Context())
	s.cancel = cancel
	s.joined.Add(n)
	s.full.Add(n)
	s.heard.Add(n)
	for i := range n {
		s.nodes.Go(func() { s.live(ctx, i) })
	}
}

func (s *swarm) stop() {
	s.cancel()
	s.nodes.Wait()
}

func (s *swarm) quantile(q float64) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	slices.Sort(s.took)
	return s.took[int(q*float64(len(s.took)-1))].Round(time.Millisecond)
}

// live is one node: it waits for its jitter, acquires a lease and watches.
func (s *swarm) live(ctx context.Context, i int) {
	time.Sleep(rand.N(s.jitter))
	began := time.Now()
	r, err := etcd.New(etcd.Options{Endpoints: []string{s.cluster.endpoint}, Logger: slog.New(slog.DiscardHandler), RequestTimeout: 20 * time.Second, Quarantine: time.Hour, Dial: s.dial})
	if err != nil {
		s.t.Error(err)
		return
	}
	defer func() { _ = r.Close() }()
	if _, err := r.Config(ctx); err != nil {
		s.t.Error(err)
		return
	}
	claim := subnet.Claim{Node: fmt.Sprintf("joiner-%05d.example.internal", i), Config: s.config}
	claim.Ends = []subnet.Endpoint{{
		Public: netip.AddrFrom4([4]byte{172, 17, byte(i >> 8), byte(i)}),
		VTEP:   subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(claim.Node, 1, false)},
	}}
	l, err := r.Acquire(ctx, claim)
	if err != nil {
		s.t.Error(err)
		return
	}
	s.joined.Done()
	go func() { _ = r.Hold(ctx, l) }()
	first, full, heard := true, false, false
	for snapshot, err := range r.Watch(ctx, l) {
		if err != nil {
			continue
		}
		if first {
			s.mu.Lock()
			s.took = append(s.took, time.Since(began))
			s.mu.Unlock()
			first = false
		}
		if !full && len(snapshot.Peers) >= s.want {
			full = true
			s.full.Done()
		}
		if !heard && len(snapshot.Peers) > s.want { // the last change
			heard = true
			s.heard.Done()
		}
		if !heard {
			time.Sleep(s.digest)
		}
	}
}

// dial returns a connection to etcd that counts its bytes.
func (s *swarm) dial(ctx context.Context, address string) (net.Conn, error) {
	c, err := s.cluster.Fabric.Dial(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return countedConn{c, s}, nil
}

type countedConn struct {
	net.Conn
	swarm *swarm
}

func (c countedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.swarm.received.Add(int64(n))
	return n, err
}

func (c countedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.swarm.sent.Add(int64(n))
	return n, err
}

// requests returns etcd's count of requests by method.
func requests(t *testing.T, c *cluster) map[string]int {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: c.Fabric.Dial, DisableKeepAlives: true}}
	resp, err := client.Get(c.endpoint + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	sum := map[string]int{}
	for line := range bytes.Lines(text) {
		// grpc_server_started_total{grpc_method="Txn",...} 12
		rest, ok := strings.CutPrefix(string(line), `grpc_server_started_total{grpc_method="`)
		if !ok {
			continue
		}
		method, _, _ := strings.Cut(rest, `"`)
		k, err := strconv.ParseFloat(strings.TrimSpace(rest[strings.LastIndexByte(rest, ' ')+1:]), 64)
		if err != nil {
			t.Fatal(err)
		}
		sum[method] += int(k)
	}
	return sum
}

func sortedKeys(m map[string]int) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// residentMemory returns a process's resident memory in bytes.
func residentMemory(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	k, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return k << 10
}
