package test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// members is an etcd cluster of three members, one on each of the last three nodes of a
// lab:
//
//	n1 ... culvert nodes ...   n(k-2) etcd   n(k-1) etcd   nk etcd
//	 └──────────────┴────── fabric ──┴─────────────┴───────────┘
type members struct {
	t     testing.TB
	lab   *lab.Lab
	nodes []*lab.Node
	procs []*lab.Process
	args  [][]string
	run   int
}

func startMembers(t testing.TB, l *lab.Lab) *members {
	t.Helper()
	m := &members{t: t, lab: l, nodes: l.Nodes[len(l.Nodes)-3:], procs: make([]*lab.Process, 3)}
	var cluster []string
	for _, n := range m.nodes {
		cluster = append(cluster, n.ID+"=http://"+netip.AddrPortFrom(n.Addrs[0], 2380).String())
	}
	for _, n := range m.nodes {
		m.args = append(m.args, []string{
			"--name", n.ID, "--data-dir", filepath.Join(l.Dir, "etcd-"+n.ID), "--unsafe-no-fsync", "--heartbeat-interval", "50",
			"--listen-client", netip.AddrPortFrom(n.Addrs[0], 2379).String(),
			"--listen-peer", netip.AddrPortFrom(n.Addrs[0], 2380).String(),
			"--initial-cluster", strings.Join(cluster, ","),
		})
	}
	for i := range m.nodes {
		m.start(i)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	for _, p := range m.procs {
		if _, err := p.WaitLine(ctx, "ready "); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// start starts a member that is not running, with its existing data.
func (m *members) start(i int) {
	m.t.Helper()
	m.run++
	p, err := m.nodes[i].Start(lab.Command{
		Name: fmt.Sprintf("etcd-%s-%d", m.nodes[i].ID, m.run), Path: filepath.Join(labtest.Bin(m.t), "culvert-etcd"), Args: m.args[i],
	})
	if err != nil {
		m.t.Fatal(err)
	}
	m.procs[i] = p
}

func (m *members) kill(i int) {
	if err := m.procs[i].Kill(); err != nil {
		m.t.Error(err)
	}
}

func (m *members) signal(i int, s syscall.Signal) {
	if err := m.procs[i].Signal(s); err != nil {
		m.t.Error(err)
	}
}

// cut disconnects a member from the underlay, or reconnects it. Packets to and from it are
// lost without an error.
func (m *members) cut(i int, off bool) {
	err := m.lab.Fabric.Do(func() error {
		port, err := netlink.LinkByName(m.nodes[i].ID)
		if err != nil {
			return err
		}
		if off {
			return netlink.LinkSetDown(port)
		}
		return netlink.LinkSetUp(port)
	})
	if err != nil {
		m.t.Error(err)
	}
}

// urls returns the members' client URLs.
func (m *members) urls() []string {
	var urls []string
	for _, n := range m.nodes {
		urls = append(urls, "http://"+netip.AddrPortFrom(n.Addrs[0], 2379).String())
	}
	return urls
}

// dial connects to a member from the fabric's namespace.
func (m *members) dial(ctx context.Context, address string) (net.Conn, error) {
	return m.lab.Fabric.Dial(ctx, "tcp", address)
}

// client returns a client that is closed when the test ends.
func (m *members) client() *clientv3.Client {
	m.t.Helper()
	c, err := clientv3.New(clientv3.Config{
		Endpoints: m.urls(), Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{
			grpc.WithContextDialer(m.dial),
			// By default it tries to connect every two minutes only, after a long outage.
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, MaxDelay: time.Second}, MinConnectTimeout: 2 * time.Second}),
		},
		DialKeepAliveTime: 5 * time.Second, DialKeepAliveTimeout: 2 * time.Second,
	})
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = c.Close() })
	return c
}

// leader returns the index of the leader, or -1.
func (m *members) leader(ctx context.Context, c *clientv3.Client) int {
	for i, url := range m.urls() {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		s, err := c.Status(ctx, url)
		cancel()
		if err == nil && s.Leader == s.Header.MemberId {
			return i
		}
	}
	return -1
}
