//go:build kubernetes

package kube

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"culvert/subnet"
	"culvert/subnet/contract"
	"culvert/subnet/kube/kubetest"
)

// relay counts what a client receives from the API server.
type relay struct {
	listener net.Listener
	received atomic.Int64
}

func startRelay(b *testing.B, to string) *relay {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	r := &relay{listener: l}
	var running sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	running.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to)
			if err != nil {
				_ = client.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, client, server)
			mu.Unlock()
			running.Go(func() { _, _ = io.Copy(server, client) })
			running.Go(func() { _, _ = io.Copy(countingWriter{client, &r.received}, server) })
		}
	})
	b.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for _, c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	return r
}

type countingWriter struct {
	io.Writer
	n *atomic.Int64
}

func (w countingWriter) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	w.n.Add(int64(n))
	return n, err
}

// BenchmarkNodes measures what a cluster of CULVERT_NODES Nodes (default 1,000)
// costs one daemon. Each Node has a status with 50 images. Use -benchtime 1x.
//
//	list-*      the first snapshot: bytes, time, heap
//	heartbeat-* one update of a Node's status: bytes
func BenchmarkNodes(b *testing.B) {
	count := 1000
	if text := os.Getenv("CULVERT_NODES"); text != "" {
		var err error
		if count, err = strconv.Atoi(text); err != nil {
			b.Fatal(err)
		}
	}
	server := kubetest.Start(b, "", "--max-requests-inflight=2000", "--max-mutating-requests-inflight=1000")
	c := &cluster{Server: server, netConf: b.TempDir() + "/net-conf.json", token: b.TempDir() + "/token"}
	if err := os.WriteFile(c.netConf, []byte(`{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`), 0o600); err != nil {
		b.Fatal(err)
	}
	cfg, _, err := subnet.ParseConfig([]byte(`{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`))
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(c.token, []byte(kubetest.AdminToken), 0o600); err != nil {
		b.Fatal(err)
	}
	fill(b, c, count)
	through := startRelay(b, strings.TrimPrefix(c.URL(), "https://"))

	open := func() *Registry {
		o := c.options(b, "n0")
		o.Server = "https://" + through.listener.Addr().String()
		r, err := New(o)
		if err != nil {
			b.Fatal(err)
		}
		return r
	}
	claim := contract.Claim(cfg, 1)
	claim.Node = "n0"
	for b.Loop() {
		for _, kind := range []string{"flannel", "culvert"} {
			if kind == "culvert" {
				each(count, func(n int) {
					name := "n" + strconv.Itoa(n)
					c.PutNode(name, nil, map[string]any{podCIDRsAnnotation: c.GetNode(name).Metadata.UID + " " + cidr(n).String()})
				})
			}
			r := open()
			r.rememberConfig(cfg, "")
			l, err := r.Acquire(b.Context(), claim)
			if err != nil {
				b.Fatal(err)
			}
			before, heap, began := through.received.Load(), heapInUse(), time.Now()
			ctx, cancel := context.WithCancel(b.Context())
			snapshots := make(chan subnet.Snapshot, 1000)
			var watching sync.WaitGroup
			watching.Go(func() {
				for s, err := range r.Watch(ctx, l) {
					if err != nil {
						b.Errorf("watch: %v", err)
					}
					select {
					case snapshots <- s:
					default:
					}
				}
			})
			if s := <-snapshots; len(s.Peers) != count-1 {
				b.Fatalf("%d peers, %d rejected", len(s.Peers), len(s.Rejected))
			}
			b.ReportMetric(time.Since(began).Seconds()*1000, "list-"+kind+"-ms")
			b.ReportMetric(float64(through.received.Load()-before)/float64(count), "list-"+kind+"-B/node")
			b.ReportMetric((heapInUse()-heap)/float64(count), "heap-"+kind+"-B/node")
			if kind == "culvert" {
				eventuallyQuiet(through)
				before := through.received.Load()
				beats := heartbeats(c, count)
				eventuallyQuiet(through)
				b.ReportMetric(float64(through.received.Load()-before)/float64(beats), "heartbeat-metadata-B")
			}
			cancel()
			watching.Wait()
			_ = r.Close()
		}
		// What flannel's watch would receive, in both encodings.
		for kind, accept := range map[string]string{"json": whole, "protobuf": "application/vnd.kubernetes.protobuf;stream=watch"} {
			r := open()
			at, err := r.c.list(b.Context(), metadataList, url.Values{"limit": {"1"}}, func(*object) {})
			if err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithCancel(b.Context())
			resp, err := r.c.do(ctx, request{method: http.MethodGet, path: "/api/v1/nodes", accept: accept, query: url.Values{"watch": {"1"}, "resourceVersion": {at}}})
			if err != nil {
				b.Fatal(err)
			}
			var reading sync.WaitGroup
			reading.Go(func() { _, _ = io.Copy(io.Discard, resp.Body) })
			before := through.received.Load()
			beats := heartbeats(c, count)
			eventuallyQuiet(through)
			b.ReportMetric(float64(through.received.Load()-before)/float64(beats), "heartbeat-"+kind+"-B")
			cancel()
			reading.Wait()
			_ = resp.Body.Close()
			_ = r.Close()
		}
	}
}

func cidr(n int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(n / 250), byte(n % 250), 0}), 24)
}

// each runs f for every n < count, sixteen at a time.
func each(count int, f func(n int)) {
	var next atomic.Int64
	var running sync.WaitGroup
	for range 16 {
		running.Go(func() {
			for n := int(next.Add(1)) - 1; n < count; n = int(next.Add(1)) - 1 {
				f(n)
			}
		})
	}
	running.Wait()
}

// fill creates Nodes running flannel, with a status as a kubelet writes it.
func fill(b *testing.B, c *cluster, count int) {
	b.Helper()
	var images []string
	for i := range 50 {
		images = append(images, fmt.Sprintf(`{"names":["registry.example.org/team-%d/application-%d@sha256:%064d","registry.example.org/team-%d/application-%d:v1.%d.0"],"sizeBytes":%d}`, i, i, i, i, i, i, 100000000+i))
	}
	each(count, func(n int) {
		name := "n" + strconv.Itoa(n)
		c.PutNode(name, []string{cidr(n).String()}, flannel(netip.AddrFrom4([4]byte{198, 18, byte(n / 250), byte(n%250 + 1)}).String(), subnet.DeriveMAC(name, 1, false).String()))
		c.Do(http.MethodPatch, "/api/v1/nodes/"+name+"/status?fieldManager=kubelet", "application/strategic-merge-patch+json",
			`{"status":{"images":[`+strings.Join(images, ",")+`],`+conditions("2026-01-02T03:04:05Z")+`,
			"addresses":[{"type":"InternalIP","address":"198.18.0.1"},{"type":"Hostname","address":"`+name+`"}],
			"capacity":{"cpu":"8","memory":"32Gi","pods":"110","ephemeral-storage":"100Gi","hugepages-1Gi":"0","hugepages-2Mi":"0"},
			"allocatable":{"cpu":"8","memory":"32Gi","pods":"110","ephemeral-storage":"100Gi","hugepages-1Gi":"0","hugepages-2Mi":"0"},
			"nodeInfo":{"machineID":"0123456789abcdef0123456789abcdef","systemUUID":"01234567-89ab-cdef-0123-456789abcdef","bootID":"01234567-89ab-cdef-0123-456789abcdef","kernelVersion":"6.1.0","osImage":"Debian GNU/Linux 12","containerRuntimeVersion":"containerd://1.7.0","kubeletVersion":"v1.34.2","kubeProxyVersion":"","operatingSystem":"linux","architecture":"amd64"}}}`)
	})
}

func conditions(at string) string {
	var all []string
	for _, c := range []string{"MemoryPressure", "DiskPressure", "PIDPressure", "Ready"} {
		all = append(all, `{"type":"`+c+`","status":"False","reason":"KubeletIsFine","message":"kubelet is posting ready status","lastHeartbeatTime":"`+at+`","lastTransitionTime":"2026-01-01T00:00:00Z"}`)
	}
	return `"conditions":[` + strings.Join(all, ",") + `]`
}

// heartbeats updates the status of some Nodes, as a kubelet does every five
// minutes, and returns how many.
func heartbeats(c *cluster, count int) int {
	beats := min(count, 500)
	at := time.Now().UTC().Format(time.RFC3339)
	each(beats, func(n int) {
		c.Do(http.MethodPatch, fmt.Sprintf("/api/v1/nodes/n%d/status?fieldManager=kubelet", n), "application/strategic-merge-patch+json", `{"status":{`+conditions(at)+`}}`)
		time.Sleep(time.Millisecond)
	})
	time.Sleep(1100 * time.Millisecond) // the timestamps have a resolution of 1 s
	return beats
}

// eventuallyQuiet waits until nothing is received any more.
func eventuallyQuiet(r *relay) {
	for last := int64(-1); last != r.received.Load(); time.Sleep(500 * time.Millisecond) {
		last = r.received.Load()
	}
}

func heapInUse() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}
