package test

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// cluster is a lab with etcd in its fabric, in which tests start the built daemons.
type cluster struct {
	*lab.Lab
	t        testing.TB
	bin      string
	endpoint string
	starts   int
	datapath string // default of --datapath for start, which flags may override
}

const config = `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`

func newCluster(t testing.TB, nodes int) *cluster {
	t.Helper()
	return newClusterOf(t, lab.Options{Nodes: nodes})
}

func newClusterOf(t testing.TB, o lab.Options) *cluster {
	t.Helper()
	labtest.NeedTUN(t)
	bin, err := lab.FindBin()
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{Lab: labtest.New(t, o), t: t, bin: bin, datapath: "userspace"}
	c.endpoint = labtest.StartEtcd(t, c.Lab)
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, n := range c.Nodes {
			if s, err := c.status(n); err == nil {
				t.Logf("%s has dropped %v; fast path: %+v", n.ID, s.Datapath.Drops, s.Datapath.FastPath)
			}
		}
	})
	return c
}

// culvert runs a culvert command in the fabric and expects it to succeed.
func (c *cluster) culvert(args ...string) {
	c.t.Helper()
	c.starts++
	p, err := c.Fabric.Start(lab.Command{Name: "command-" + strconv.Itoa(c.starts), Path: filepath.Join(c.bin, "culvert"), Args: args})
	if err != nil {
		c.t.Fatal(err)
	}
	<-p.Exited()
	if err := p.Err(); err != nil {
		c.t.Fatalf("culvert %v: %v\n%s", args, err, p.Tail(5))
	}
}

func (c *cluster) setConfig(text string) {
	c.culvert("config", "set", text, "--etcd-endpoints", c.endpoint)
}

// etcd returns the server's process.
func (c *cluster) etcd() *lab.Process {
	c.t.Helper()
	for _, p := range c.Processes() {
		if p.Name == "etcd" {
			return p
		}
	}
	c.t.Fatal("etcd is not running in this lab")
	return nil
}

// stopEtcd suspends the server (SIGSTOP), and continueEtcd resumes it.
func (c *cluster) stopEtcd()     { c.signalEtcd(syscall.SIGSTOP) }
func (c *cluster) continueEtcd() { c.signalEtcd(syscall.SIGCONT) }

func (c *cluster) signalEtcd(s syscall.Signal) {
	c.t.Helper()
	if err := c.etcd().Signal(s); err != nil {
		c.t.Fatal(err)
	}
}

// start starts a node's daemon.
func (c *cluster) start(n *lab.Node, flags ...string) *lab.Process {
	c.t.Helper()
	c.starts++
	p, err := n.Start(lab.Command{
		Name: n.ID + "-" + strconv.Itoa(c.starts), Path: filepath.Join(c.bin, "culvert"),
		Args: append([]string{
			"run", "--node-id", n.ID, "--run-dir", n.RunDir, "--etcd-endpoints", c.endpoint,
			"--datapath", cmp.Or(c.datapath, "auto"), "--confine", "kill",
		}, flags...),
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return p
}

// cleanup runs culvert cleanup on a node.
func (c *cluster) cleanup(n *lab.Node) {
	c.t.Helper()
	if out, err := n.Run(c.t.Context(), filepath.Join(c.bin, "culvert"), "cleanup", "--run-dir", n.RunDir); err != nil {
		c.t.Fatalf("%v: %s", err, out)
	}
}

// startAll starts every node's daemon and waits until each is ready and has all others
// as peers.
func (c *cluster) startAll(flags ...string) (daemons []*lab.Process) {
	c.t.Helper()
	for _, n := range c.Nodes {
		daemons = append(daemons, c.start(n, flags...))
	}
	for _, n := range c.Nodes {
		c.waitReady(n, len(c.Nodes)-1)
	}
	return daemons
}

// startPair starts two nodes with a datapath (newCluster's if empty), each with a pod, and waits until the pods reach each other.
func startPair(t *testing.T, datapath string) (c *cluster, daemons []*lab.Process, pods []*lab.Pod) {
	t.Helper()
	c = newCluster(t, 2)
	c.datapath = cmp.Or(datapath, c.datapath)
	c.setConfig(config)
	daemons = c.startAll()
	pods = c.pods()
	ping(t, pods[0], pods[1])
	return c, daemons, pods
}

// status returns the status of a node's daemon.
func (c *cluster) status(n *lab.Node) (api.Status, error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), 10*time.Second)
	defer cancel()
	return api.GetStatus(ctx, n.RunDir)
}

// wait waits until the status of a node's daemon meets a condition; what names it.
func (c *cluster) wait(n *lab.Node, what string, is func(api.Status) bool) api.Status {
	c.t.Helper()
	var s api.Status
	eventually(c.t, n.ID+": "+what, func() error {
		var err error
		if s, err = c.status(n); err != nil {
			return err
		}
		if !is(s) {
			return fmt.Errorf("ready %t (%s), %d peers, store %+v", s.Ready, s.NotReady, len(s.Peers), s.Store)
		}
		return nil
	})
	return s
}

// get fetches a path of the daemon's health and metrics server over the node's loopback;
// it retries until the server answers.
func (c *cluster) get(n *lab.Node, path string) (code int, text string) {
	c.t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: n.Dial, DisableKeepAlives: true}, Timeout: 5 * time.Second}
	eventually(c.t, n.ID+path, func() error {
		r, err := http.NewRequestWithContext(c.t.Context(), http.MethodGet, "http://127.0.0.1:9472"+path, http.NoBody)
		if err != nil {
			return err
		}
		answer, err := client.Do(r)
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		b, err := io.ReadAll(answer.Body)
		code, text = answer.StatusCode, string(b)
		return err
	})
	return code, text
}

func (c *cluster) waitReady(n *lab.Node, peers int) api.Status {
	c.t.Helper()
	return c.wait(n, "is ready", func(s api.Status) bool { return s.Ready && len(s.Peers) == peers })
}

// eventually repeats try until it succeeds, for up to 60 s: the machine may be slow, and
// the test is not about speed.
func eventually(t testing.TB, what string, try func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// client returns an etcd client that is closed when the test ends. It connects from
// inside the fabric, since the test's own namespace cannot reach etcd.
func (c *cluster) client() *clientv3.Client {
	c.t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{c.endpoint},
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return c.Fabric.Dial(ctx, "tcp", address)
		})},
		Logger: zap.NewNop(),
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = client.Close() })
	return client
}

// put writes a key to etcd, as another program would.
func (c *cluster) put(key, value string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 10*time.Second)
	defer cancel()
	if _, err := c.client().Put(ctx, key, value); err != nil {
		c.t.Fatal(err)
	}
}

// transfer sends n random bytes over TCP and checks that they arrive unchanged, from the
// sender's own address.
func transfer(t testing.TB, from, to *lab.Namespace, source, destination netip.Addr, n int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	l, err := to.Listen(ctx, "tcp", netip.AddrPortFrom(destination, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan error, 1)
	want := sha256.New()
	received := sha256.New()
	go func() {
		got <- func() error {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			defer c.Close()
			if a := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); a != source {
				return fmt.Errorf("the connection came from %s, not from %s: the address was translated", a, source)
			}
			k, err := io.Copy(received, c)
			if err == nil && k != n {
				err = fmt.Errorf("%d of %d bytes arrived", k, n)
			}
			return err
		}()
	}()
	c, err := from.DialWith(ctx, net.Dialer{LocalAddr: &net.TCPAddr{IP: source.AsSlice()}}, "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	random := rand.NewChaCha8([32]byte{1})
	if _, err := io.Copy(io.MultiWriter(c, want), io.LimitReader(random, n)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	if string(want.Sum(nil)) != string(received.Sum(nil)) {
		t.Fatal("the received bytes differ from the sent ones")
	}
}

// datagrams sends UDP datagrams of every size from 1 to 1380 bytes, which are never
// fragmented, a few at a time, and checks that each is echoed unchanged and in order. The lab
// needs lab.Options.InOrder, or else packets may overtake each other outside culvert.
func datagrams(t testing.TB, from, to *lab.Namespace, source, destination netip.Addr) {
	t.Helper()
	server, err := to.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(destination, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	var overtook atomic.Int64 // the first datagram that was out of order at the server
	go func() {
		b := make([]byte, 2048)
		for want := 1; ; want++ {
			n, a, err := server.ReadFrom(b)
			if err != nil {
				return
			}
			if n != want {
				overtook.CompareAndSwap(0, int64(n))
			}
			if _, err := server.WriteTo(b[:n], a); err != nil && !errors.Is(err, net.ErrClosed) {
				return
			}
		}
	}()
	client, err := from.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(source, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	const window = 8
	missing := make(map[int]bool)
	answer := make([]byte, 2048)
	for next, size := 1, 1; size <= 1380 || len(missing) > 0; {
		for ; size <= 1380 && len(missing) < window; size++ {
			if _, err := client.WriteTo(pattern(size), server.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			missing[size] = true
		}
		if err := client.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, _, err := client.ReadFrom(answer)
		if err != nil {
			t.Fatalf("no answer to %v: %v", missing, err)
		}
		if n != next || string(answer[:n]) != string(pattern(n)) {
			var later []int // tells lost from late
			for range window {
				k, _, err := client.ReadFrom(answer)
				if err != nil {
					break
				}
				later = append(later, k)
			}
			t.Fatalf("a datagram of %d bytes arrived, want %d, or its bytes differ; then %v arrived; the first that the server received out of order (0: none): %d",
				n, next, later, overtook.Load())
		}
		delete(missing, n)
		next++
	}
}

func pattern(n int) []byte {
	b := make([]byte, n+4)
	for i := 0; i < n; i += 4 {
		binary.BigEndian.PutUint32(b[i:], uint32(n*7919+i))
	}
	return b[:n]
}
