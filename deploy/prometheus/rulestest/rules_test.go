// Package rulestest evaluates the alert rules and the dashboard with Prometheus'
// own engine, over what real daemons serve. It is a module of its own, since
// Prometheus is a large one.
package rulestest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/teststorage"
	"github.com/vishvananda/netlink"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// TestRules scrapes a healthy node, then makes the condition of each alert, and
// evaluates every rule and every panel over both: all alerts are silent first,
// and each fires.
//
//	n1: watched      n2: a peer      n3: a peer behind a narrow link, later fenced      n4: never reaches etcd
//	n5: pods that talk with n2's by the fast path, which both have
func TestRules(t *testing.T) {
	c := newCluster(t)
	// Fifteen subnets, so that it can be filled.
	c.put("/coreos.com/network/config", `{"Network":"10.5.0.0/20","Backend":{"Type":"vxlan"}}`)
	n1, n2, n3, n4 := c.Nodes[0], c.Nodes[1], c.Nodes[2], c.Nodes[3]
	n5 := c.Nodes[4]
	c.start(n1)
	c.start(n2, "--datapath", "kernel", "--fast-path", "pod")
	healthy := c.scrapeWhen(n1, `culvert_ready 1`, `culvert_peer_subnets{state="idle"} 1`, `culvert_peer_subnets{state="silent"} 0`)

	// The fast path, with which the userspace datapath of n1 does without.
	c.start(n5, "--datapath", "kernel", "--fast-path", "pod")
	c.scrapeWhen(n5, `culvert_ready 1`, `culvert_fast_path 1`)
	near, far := c.addPod(n2), c.addPod(n5)
	slow := c.shortWay(n2, near, far, "")
	fast := c.shortWay(n2, near, far, slow)

	// Conditions of n1.
	pod := c.addPod(n1)
	c.narrow(n3)
	c.start(n3, "--lease-ttl", "2h")
	c.scrapeWhen(n3, `culvert_ready 1`) // it has its subnet before the others are taken
	absent := `{"PublicIP":"198.18.0.99","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:fb"}}`
	subnets := c.leased()
	silent := ""
	for i := 1; len(subnets) < 13; i++ {
		if name := fmt.Sprintf("10.5.%d.0-24", i); !slices.Contains(subnets, name) {
			silent = name
			subnets = append(subnets, name)
			c.put("/coreos.com/network/subnets/"+name, strings.NewReplacer(".99", "."+strconv.Itoa(100+i), "00:fb", fmt.Sprintf("01:%02x", i)).Replace(absent))
		}
	}
	c.put("/coreos.com/network/subnets/10.5.15.0-24", "nonsense")
	c.removeRoutes(n1, 9)
	to := netip.MustParsePrefix(strings.Replace(silent, "-", "/", 1)).Addr().Next()
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() { // pods send to a peer that is not there
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
				c.send(pod, to, 1)
			}
		}
	}()
	c.send(pod, netip.MustParseAddr("10.5.15.9"), 10_000) // nobody's
	sick := c.scrapeWhen(n1, `culvert_silent_peers 1`, `culvert_peer_subnets_small_path 1`, `culvert_rejected_leases 1`, `culvert_warnings{check="network-nearly-full"} 1`)
	close(stop)
	<-done
	c.setMTU(n1, 1400)
	stale := c.scrapeWhen(n1, `culvert_stale_pods 1`)

	// And of others.
	ending := c.scrapeWhen(n3, `culvert_ready 1`)
	for _, name := range c.leased() {
		if strings.Contains(ending, `culvert_ready 1`) && c.ownedBy(name, "n3") {
			c.put("/coreos.com/network/subnets/"+name, absent)
		}
	}
	fenced := c.scrapeWhen(n3, `culvert_fenced 1`)
	c.stopEtcd()
	away := c.scrapeWhen(n1, `culvert_store_connected 0`)
	c.start(n4)
	unready := c.scrapeWhen(n4, `culvert_ready 0`)

	conditions := map[string]string{
		"CulvertFenced": fenced, "CulvertNotReady": unready, "CulvertStoreUnreachable": away, "CulvertLeaseEnding": ending, "CulvertNetworkNearlyFull": sick,
		"CulvertLeasesRejected": sick, "CulvertPeerSilent": sick, "CulvertPeersUnreachable": sick, "CulvertPathTooSmall": sick, "CulvertWarning": sick,
		"CulvertRepairs": sick, "CulvertStalePods": stale, "CulvertDrops": sick,
	}
	file, err := os.ReadFile("../alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	groups, errs := rulefmt.Parse(file, false, model.UTF8Validation, parser.NewParser(parser.Options{}), slog.New(slog.DiscardHandler))
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	well := newHistory(t, healthy, healthy)
	exists := make(map[string]bool)
	for _, text := range []string{healthy, fast, sick, stale, ending, fenced, away, unready} {
		for line := range strings.Lines(text) {
			name, _, _ := strings.Cut(line, "{")
			name, _, _ = strings.Cut(name, " ")
			exists[name] = true
		}
	}
	docs, err := os.ReadFile("../../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range groups.Groups {
		for _, r := range g.Rules {
			for _, name := range metricsOf(t, r.Expr) {
				if !exists[name] {
					t.Errorf("%s: no daemon served %s", r.Alert, name)
				}
			}
			if v := well.evaluate(r.Expr); len(v) > 0 {
				t.Errorf("%s fires on a healthy node: %v", r.Alert, v)
			}
			text, ok := conditions[r.Alert]
			if !ok {
				t.Errorf("%s: there is no condition for it here", r.Alert)
				continue
			}
			if v := newHistory(t, healthy, text).evaluate(r.Expr); len(v) == 0 {
				t.Errorf("%s does not fire: %s", r.Alert, r.Expr)
			}
			if r.Annotations["summary"] == "" || r.Annotations["description"] == "" || !strings.Contains(string(docs), "`"+r.Alert+"`") {
				t.Errorf("%s lacks words, here or in docs/metrics.md", r.Alert)
			}
		}
	}

	// The dashboard: each panel shows something of the sick node.
	text, err := os.ReadFile("../../grafana/culvert.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &board); err != nil {
		t.Fatal(err)
	}
	ill, quick := newHistory(t, healthy, sick, stale, away), newHistory(t, slow, fast)
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			expr := strings.NewReplacer("$__rate_interval", "20m", "$instance", ".*", "$job", ".*").Replace(target.Expr)
			for _, name := range metricsOf(t, expr) {
				if !exists[name] {
					t.Errorf("panel %q: no daemon served %s", p.Title, name)
				}
			}
			if strings.Contains(expr, "culvert_fast_path") {
				if v := quick.evaluate(expr); !slices.ContainsFunc(v, func(s promql.Sample) bool { return s.F > 0 }) {
					t.Errorf("panel %q shows nothing of the pods' flow: %s: %v", p.Title, expr, v)
				}
				continue
			}
			if len(ill.evaluate(expr)) == 0 {
				t.Errorf("panel %q shows nothing: %s", p.Title, expr)
			}
		}
	}
}

func metricsOf(t *testing.T, expr string) (names []string) {
	t.Helper()
	e, err := parser.NewParser(parser.Options{}).ParseExpr(expr)
	if err != nil {
		t.Fatalf("%s: %v", expr, err)
	}
	parser.Inspect(e, func(n parser.Node, _ []parser.Node) error {
		if v, ok := n.(*parser.VectorSelector); ok {
			names = append(names, v.Name)
		}
		return nil
	})
	return names
}

// history is scrapes one after another, each served for five minutes, up to now: the
// rules' windows hold the change from one to the next.
type history struct {
	t       *testing.T
	storage storage.Queryable
	engine  *promql.Engine
	now     time.Time
}

func newHistory(t *testing.T, scrapes ...string) *history {
	t.Helper()
	s := teststorage.New(t)
	h := &history{t: t, storage: s, now: time.Now(), engine: promql.NewEngine(promql.EngineOpts{MaxSamples: 1e6, Timeout: time.Minute})}
	t.Cleanup(func() { _ = h.engine.Close() })
	at := h.now.Add(-time.Duration(len(scrapes)) * 5 * time.Minute)
	for _, text := range scrapes {
		for range 10 {
			at = at.Add(30 * time.Second)
			app := s.Appender(t.Context())
			for line := range strings.Lines(text) {
				if strings.HasPrefix(line, "#") {
					continue
				}
				line = strings.TrimSpace(line)
				i := strings.LastIndexByte(line, ' ')
				ls, err := parser.NewParser(parser.Options{}).ParseMetric(line[:i])
				if err != nil {
					t.Fatalf("%s: %v", line, err)
				}
				v, err := strconv.ParseFloat(line[i+1:], 64)
				if err != nil {
					t.Fatal(err)
				}
				ls = labels.NewBuilder(ls).Set("job", "culvert").Set("instance", "n1:9472").Labels()
				if _, err := app.Append(0, ls, at.UnixMilli(), v); err != nil {
					t.Fatal(err)
				}
			}
			if err := app.Commit(); err != nil {
				t.Fatal(err)
			}
		}
	}
	return h
}

func (h *history) evaluate(expr string) promql.Vector {
	h.t.Helper()
	q, err := h.engine.NewInstantQuery(h.t.Context(), h.storage, nil, expr, h.now)
	if err != nil {
		h.t.Fatalf("%s: %v", expr, err)
	}
	defer q.Close()
	v, err := q.Exec(h.t.Context()).Vector()
	if err != nil {
		h.t.Fatalf("%s: %v", expr, err)
	}
	return v
}

type cluster struct {
	*lab.Lab
	t        *testing.T
	endpoint string
	client   *clientv3.Client
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	labtest.NeedTUN(t)
	c := &cluster{Lab: labtest.New(t, lab.Options{Nodes: 5}), t: t}
	c.endpoint = labtest.StartEtcd(t, c.Lab)
	var err error
	if c.client, err = clientv3.New(clientv3.Config{
		Endpoints: []string{c.endpoint}, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return c.Fabric.Dial(ctx, "tcp", address)
		})},
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.client.Close() })
	return c
}

func (c *cluster) start(n *lab.Node, flags ...string) {
	c.t.Helper()
	if _, err := n.Start(lab.Command{
		Name: n.ID, Path: filepath.Join(labtest.Bin(c.t), "culvert"),
		Args: append([]string{"run", "--node-id", n.ID, "--run-dir", n.RunDir, "--etcd-endpoints", c.endpoint, "--datapath", "userspace"}, flags...),
	}); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) put(key, value string) {
	c.t.Helper()
	if _, err := c.client.Put(c.t.Context(), key, value); err != nil {
		c.t.Fatal(err)
	}
}

// leased are the names of the leases in etcd.
func (c *cluster) leased() (names []string) {
	c.t.Helper()
	const prefix = "/coreos.com/network/subnets/"
	r, err := c.client.Get(c.t.Context(), prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		c.t.Fatal(err)
	}
	for _, kv := range r.Kvs {
		names = append(names, strings.TrimPrefix(string(kv.Key), prefix))
	}
	return names
}

func (c *cluster) ownedBy(name, node string) bool {
	c.t.Helper()
	r, err := c.client.Get(c.t.Context(), "/coreos.com/network/subnets/"+name)
	if err != nil {
		c.t.Fatal(err)
	}
	return len(r.Kvs) == 1 && strings.Contains(string(r.Kvs[0].Value), `"`+node+`"`)
}

// scrapeWhen scrapes a node until it serves all of the lines.
func (c *cluster) scrapeWhen(n *lab.Node, lines ...string) string {
	c.t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: n.Dial, DisableKeepAlives: true}, Timeout: 5 * time.Second}
	var text, missing string
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		answer, err := client.Get("http://127.0.0.1:9472/metrics")
		if err != nil {
			missing = err.Error()
			continue
		}
		b, err := io.ReadAll(answer.Body)
		_ = answer.Body.Close()
		if err != nil {
			missing = err.Error()
			continue
		}
		text, missing = string(b), ""
		for _, line := range lines {
			if !strings.Contains(text, "\n"+line+"\n") {
				missing += line + "; "
			}
		}
		if missing == "" {
			return text
		}
	}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "culvert_") && !strings.Contains(line, "_bucket") {
			c.t.Log(strings.TrimSpace(line))
		}
	}
	c.t.Fatalf("%s does not serve %s", n.ID, missing)
	return ""
}

// narrow has the link to a node lose what is longer than 1,300 bytes, silently.
func (c *cluster) narrow(n *lab.Node) {
	c.t.Helper()
	if err := c.Fabric.Do(func() error { return setMTU(n.ID, 1300) }); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) setMTU(n *lab.Node, mtu int) {
	c.t.Helper()
	if err := n.Do(func() error { return setMTU("eth0", mtu) }); err != nil {
		c.t.Fatal(err)
	}
}

func setMTU(name string, mtu int) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetMTU(link, mtu)
}

// removeRoutes removes the tunnel's route, until it has been put back that often.
func (c *cluster) removeRoutes(n *lab.Node, times int) {
	c.t.Helper()
	for i := 0; i <= times; {
		removed := false
		if err := n.Do(func() error {
			link, err := netlink.LinkByName("culvert0")
			if err != nil {
				return err
			}
			all, err := netlink.RouteList(link, netlink.FAMILY_V4)
			for _, r := range all {
				if err := netlink.RouteDel(&r); err != nil {
					return err
				}
				removed = true
			}
			return err
		}); err != nil {
			c.t.Fatal(err)
		}
		if removed {
			i++
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (c *cluster) addPod(n *lab.Node) *lab.Pod {
	c.t.Helper()
	pod, err := n.AddPod(c.t.Context(), "p1")
	if err != nil {
		c.t.Fatal(err)
	}
	return pod
}

// shortWay has a pod of n send to another, and that answer, until more packets than in an
// earlier scrape have gone the short way, and more were left to the datapath, as fragments
// are. It returns a scrape after that.
func (c *cluster) shortWay(n *lab.Node, from, to *lab.Pod, before string) string {
	c.t.Helper()
	there := netip.AddrPortFrom(to.Addrs[0], 7)
	var echo net.PacketConn
	if err := to.Do(func() (err error) {
		echo, err = net.ListenPacket("udp", there.String())
		return err
	}); err != nil {
		c.t.Fatal(err)
	}
	done := make(chan struct{})
	defer func() { _ = echo.Close(); <-done }()
	go func() {
		defer close(done)
		b := make([]byte, 3000)
		for {
			n, from, err := echo.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = echo.WriteTo(b[:n], from)
		}
	}()
	conn, err := from.Dial(c.t.Context(), "udp", there.String())
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	b := make([]byte, 3000)
	text := ""
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		for range 10 {
			_ = conn.SetDeadline(time.Now().Add(100 * time.Millisecond))
			_, _ = conn.Write([]byte("x"))
			_, _ = conn.Read(b)
		}
		_, _ = conn.Write(b)
		_, _ = conn.Read(b)
		text = c.scrapeWhen(n)
		if !slices.ContainsFunc([]string{
			`culvert_fast_path_pod_frames_total{direction="egress"}`, `culvert_fast_path_pod_frames_total{direction="ingress"}`,
			`culvert_fast_path_left_total{reason="egress-checksum"}`,
		}, func(metric string) bool { return value(c.t, text, metric) <= value(c.t, before, metric) }) {
			return text
		}
	}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "culvert_fast_path") {
			c.t.Log(strings.TrimSpace(line))
		}
	}
	c.t.Fatal("no packet of the pods goes the short way")
	return ""
}

// value returns a metric's value in a scrape; 0 if it is not there.
func value(t *testing.T, scrape, metric string) float64 {
	t.Helper()
	for line := range strings.Lines(scrape) {
		if text, ok := strings.CutPrefix(line, metric+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
			if err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			return v
		}
	}
	return 0
}

// send sends datagrams from a pod.
func (c *cluster) send(from *lab.Pod, to netip.Addr, count int) {
	conn, err := from.Dial(c.t.Context(), "udp", netip.AddrPortFrom(to, 9).String())
	if err != nil {
		c.t.Error(err)
		return
	}
	defer func() { _ = conn.Close() }()
	for range count {
		_, _ = conn.Write([]byte("x"))
	}
}

// stopEtcd stops the server without ending it.
func (c *cluster) stopEtcd() {
	c.t.Helper()
	for _, p := range c.Processes() {
		if p.Name == "etcd" {
			if err := p.Signal(syscall.SIGSTOP); err != nil {
				c.t.Fatal(err)
			}
		}
	}
}
