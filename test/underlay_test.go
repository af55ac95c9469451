package test

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/lab"
)

// scenario is a change of a node's underlay and the expected result.
//
//	pod ── n1 (the host of the scenario) ── fabric, 198.18.0.254 ── n2 ── pod
//	        198.18.0.1, default route metric 303                198.18.0.2
type scenario struct {
	name      string
	datapaths []string // all if nil
	dual      bool     // IPv4 and IPv6
	// prepare and peer are commands to run on n1 and on n2 before the daemons start.
	prepare, peer []string
	flags         []string // of n1's daemon
	// event are commands to run on n1 while pods ping each other.
	event []string
	// stays: for longer than MoveAfter after the event, no ping may be lost.
	stays bool
	// published are n1's addresses as n2 sees them at the end.
	published []string
	// warned is the check of a warning that n1 must show; mended are commands after which
	// it must disappear.
	warned string
	mended []string
	// also makes further checks.
	also func(t *testing.T, c *cluster)
}

func device(datapath string) string {
	if datapath == "kernel" {
		return "cvt.1"
	}
	return "culvert0"
}

// TestUnderlayScenarios changes the underlay as real hosts do. The names begin with the case
// that each reproduces.
func TestUnderlayScenarios(t *testing.T) {
	t.Parallel()
	const four, six = "198.18.0.1", "fd00:198:18::1"
	for _, s := range []scenario{
		{
			name:  "U1 a default route on our own device",
			event: []string{"addr add 169.254.77.7/16 dev TUNNEL", "route add default dev TUNNEL src 169.254.77.7 metric 206"},
			stays: true, published: []string{four},
			also: func(t *testing.T, c *cluster) { noAddress(t, c.Nodes[0], device(c.datapath), "169.254.77.7") },
		},
		{
			name:  "U1 a default route on the pods' bridge",
			event: []string{"addr add 172.20.7.7/16 dev cni0", "route add default dev cni0 src 172.20.7.7 metric 206"},
			stays: true, published: []string{four},
		},
		{
			name: "U2 another IPv6 address", dual: true,
			event: []string{"addr add fd00:198:18::100/64 dev eth0"},
			stays: true, published: []string{four, six},
		},
		{
			name:  "U4 the interface is renamed",
			event: []string{"link set eth0 name ens3"},
			stays: true, published: []string{four},
			also: func(t *testing.T, c *cluster) {
				c.start(c.Nodes[2])
				c.waitReady(c.Nodes[2], 2)
				s := c.wait(c.Nodes[0], "has the new peer", func(s api.Status) bool { return s.Ready && len(s.Peers) == 2 })
				if s.Underlay.Interface != "ens3" {
					t.Errorf("the underlay in the status is %s, want ens3", s.Underlay.Interface)
				}
				p, err := c.Nodes[2].AddPod(t.Context(), "p1")
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				if _, err := c.Nodes[0].Ping(ctx, netip.Addr{}, p.Addrs[0]); err != nil {
					t.Error(err)
				}
			},
		},
		{
			name:      "U5 the node's address is on lo",
			prepare:   []string{"addr add 192.168.99.11/32 dev lo", "route replace default via 198.18.0.254 src 192.168.99.11 metric 303"},
			peer:      []string{"route add 192.168.99.11/32 via 198.18.0.1"},
			published: []string{"192.168.99.11"},
		},
		{
			name:      "U5 the node's address is on lo, by --public-ip",
			prepare:   []string{"addr add 192.168.99.11/32 dev lo"},
			peer:      []string{"route add 192.168.99.11/32 via 198.18.0.1"},
			flags:     []string{"--public-ip", "192.168.99.11"},
			published: []string{"192.168.99.11"},
		},
		{
			name: "U6 the first of a list has no address", datapaths: []string{"kernel"},
			prepare: []string{"link add bond7 type bridge"}, flags: []string{"--iface", "bond7,eth0"},
			published: []string{four},
		},
		{
			name: "U6 the first match of a pattern has no address", datapaths: []string{"kernel"},
			prepare: []string{"link add eth9 type bridge"}, flags: []string{"--iface-regex", "^eth9,^eth0"},
			published: []string{four},
		},
		{
			name:  "U7 a better default route",
			event: []string{"link add wg0 type bridge", "addr add 10.99.0.2/24 dev wg0", "link set wg0 up", "route add default dev wg0 metric 1"},
			stays: true, published: []string{four},
		},
		{
			name:  "U7 a lower address of the same network",
			event: []string{"addr add 198.18.0.201/24 dev eth0", "route replace default via 198.18.0.254 src 198.18.0.201 metric 1"},
			stays: true, published: []string{four},
		},
		{
			name:      "the address moves to a bridge",
			event:     []string{"link add br0 type bridge", "link set br0 up", "addr del 198.18.0.1/24 dev eth0", "link set eth0 master br0", "addr add 198.18.0.1/24 dev br0", "route add default via 198.18.0.254 metric 303"},
			published: []string{four},
			also: func(t *testing.T, c *cluster) {
				c.wait(c.Nodes[0], "has the underlay br0", func(s api.Status) bool { return s.Ready && s.Underlay.Interface == "br0" })
			},
		},
		{
			name:      "the interface becomes a port of a bridge and keeps its address",
			event:     []string{"link add br0 type bridge", "link set br0 up", "link set eth0 master br0"},
			published: []string{four},
			warned:    "underlay-port", mended: []string{"link set eth0 nomaster"},
		},
		{
			name:      "P11 the MTU shrinks below what pods need",
			event:     []string{"link set eth0 mtu 576"},
			published: []string{four},
			warned:    "underlay-mtu", mended: []string{"link set eth0 mtu 1500"},
		},
		{
			name:      "the address is removed for a moment",
			event:     []string{"addr del 198.18.0.1/24 dev eth0", "addr add 198.18.0.77/32 dev lo"},
			published: []string{four},
			warned:    "underlay-address-gone", mended: []string{"addr add 198.18.0.1/24 dev eth0", "route add default via 198.18.0.254 metric 303"},
		},
	} {
		all := s.datapaths
		if all == nil {
			all = datapaths
		}
		for _, d := range all {
			t.Run(s.name+" "+d, func(t *testing.T) {
				t.Parallel()
				s.play(t, d)
			})
		}
	}
}

func (s scenario) play(t *testing.T, datapath string) {
	o := lab.Options{Nodes: 3}
	network := config
	if s.dual {
		o.Prefixes = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/24"), netip.MustParsePrefix("fd00:198:18::/64")}
		network = `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12::/48","Backend":{"Type":"vxlan"}}`
	}
	c := newClusterOf(t, o)
	c.datapath = datapath
	c.setConfig(network)
	n, peer := c.Nodes[0], c.Nodes[1]
	ipDo(t, n.Namespace, "route del default via 198.18.0.254", "route add default via 198.18.0.254 metric 303")
	ipDo(t, n.Namespace, s.prepare...)
	ipDo(t, peer.Namespace, s.peer...)
	daemon := c.start(n, s.flags...)
	c.start(peer)
	c.waitReady(n, 1)
	c.waitReady(peer, 1)
	var pods []*lab.Pod
	for _, n := range c.Nodes[:2] {
		p, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, p)
	}
	ping(t, pods[0], pods[1])

	stream := startPings(t, pods[0], pods[1])
	for _, command := range s.event {
		ipDo(t, n.Namespace, strings.ReplaceAll(command, "TUNNEL", device(datapath)))
	}
	if s.stays {
		// Wait long enough for a move, which must not happen.
		time.Sleep(host.MoveAfter + time.Second)
		if sent, lost := stream.stop(); lost > 0 {
			t.Errorf("of %d pings %d were lost", sent, lost)
		}
	}
	has := func(st api.Status) bool {
		return slices.ContainsFunc(st.Warnings, func(w api.Warning) bool { return w.Check == s.warned })
	}
	if s.warned != "" {
		st := c.wait(n, "shows the warning", has)
		t.Log(st.Warnings)
		ipDo(t, n.Namespace, s.mended...)
		c.wait(n, "no longer shows the warning", func(st api.Status) bool { return st.Ready && !has(st) })
	}
	published := func(st api.Status) bool {
		for _, p := range st.Peers {
			if p.Node == n.ID {
				var got []string
				for _, a := range p.PublicIPs {
					got = append(got, a.String())
				}
				return slices.Equal(got, s.published)
			}
		}
		return false
	}
	if s.also != nil {
		s.also(t, c)
	}
	c.wait(peer, "sees n1 at "+strings.Join(s.published, " and "), published)
	ping(t, pods[0], pods[1])
	ping(t, pods[1], pods[0])
	for i, a := range pods[1].Addrs {
		transfer(t, pods[0].Namespace, pods[1].Namespace, pods[0].Addrs[i], a, 1<<20)
	}
	select {
	case <-daemon.Exited():
		t.Errorf("the daemon exited: %v", daemon.Err())
	default:
	}
}

// noAddress waits until a link of a node does not have an address.
func noAddress(t *testing.T, n *lab.Node, link, addr string) {
	t.Helper()
	eventually(t, addr+" is gone from "+link, func() error { return absentAddress(n, link, addr) })
}

// TestU3VirtualAddress removes a node's address while the link has a virtual one. The node
// moves to the virtual address, and back when its own address returns: while it runs, after
// a restart, and after a restart without underlay.json.
func TestU3VirtualAddress(t *testing.T) {
	t.Parallel()
	const own, virtual = "198.18.0.1", "198.18.0.200"
	c := newCluster(t, 2)
	c.datapath = "kernel"
	c.setConfig(config)
	n, peer := c.Nodes[0], c.Nodes[1]
	daemon := c.start(n, "--iface", "eth0")
	c.start(peer)
	c.waitReady(n, 1)
	c.waitReady(peer, 1)
	pods := c.pods()
	sees := func(addr string) {
		t.Helper()
		c.wait(peer, "sees n1 at "+addr, func(s api.Status) bool {
			return len(s.Peers) == 1 && s.Peers[0].PublicIPs[0].String() == addr
		})
		ping(t, pods[0], pods[1])
	}
	lose := func() {
		t.Helper()
		ipDo(t, n.Namespace, "addr add 198.18.0.200/32 dev eth0", "addr del 198.18.0.1/24 dev eth0", "route add 198.18.0.0/24 dev eth0 src 198.18.0.200")
		sees(virtual)
	}
	regain := func() {
		t.Helper()
		ipDo(t, n.Namespace, "route del 198.18.0.0/24 dev eth0", "addr add 198.18.0.1/24 dev eth0")
	}
	lose()
	regain()
	sees(own)
	if s := c.wait(n, "reports why it moved back", func(s api.Status) bool { return strings.Contains(s.Underlay.Why, "back from "+virtual) }); s.Underlay.Addrs[0].String() != own {
		t.Errorf("the underlay is %+v", s.Underlay)
	}
	ipDo(t, n.Namespace, "addr del 198.18.0.200/32 dev eth0")

	for _, recorded := range []bool{true, false} {
		lose()
		if err := daemon.Kill(); err != nil {
			t.Fatal(err)
		}
		regain()
		if !recorded {
			if err := os.Remove(filepath.Join(n.RunDir, "underlay.json")); err != nil {
				t.Fatal(err)
			}
		}
		daemon = c.start(n, "--iface", "eth0")
		c.waitReady(n, 1)
		sees(own)
		ipDo(t, n.Namespace, "addr del 198.18.0.200/32 dev eth0")
	}
}

// TestU8Overlaps has a cluster network that contains the address of etcd, which is behind
// the router, and the networks of some host links.
//
//	n1, n2 ── 198.18.0.254 fabric, which has 10.99.0.5: etcd
func TestU8Overlaps(t *testing.T) {
	t.Parallel()
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			t.Parallel()
			overlaps(t, d)
		})
	}
}

func overlaps(t *testing.T, datapath string) {
	const server = "10.99.0.5"
	const whole = `{"Network":"10.96.0.0/12","SubnetLen":24,"Backend":{"Type":"vxlan"}}`
	const part = `{"Network":"10.96.0.0/12","SubnetLen":24,"SubnetMin":"10.97.0.0","SubnetMax":"10.97.255.0","Backend":{"Type":"vxlan"}}`
	c := newCluster(t, 2)
	c.datapath = datapath
	ipDo(t, c.Fabric, "addr add "+server+"/32 dev lo")
	p, err := c.Fabric.Start(lab.Command{
		Name: "etcd-behind", Path: filepath.Join(c.bin, "culvert-etcd"),
		Args: []string{"--data-dir", filepath.Join(c.Dir, "etcd-behind"), "--listen-client", server + ":2379", "--unsafe-no-fsync"},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := p.WaitLine(ctx, "ready "); err != nil {
		t.Fatal(err)
	}
	c.endpoint = "http://" + server + ":2379"
	n, peer := c.Nodes[0], c.Nodes[1]

	// The whole network would cut the node off from etcd, so the daemon exits before it takes
	// a lease.
	c.setConfig(whole)
	daemon := c.start(n)
	select {
	case <-daemon.Exited():
	case <-time.After(20 * time.Second):
		t.Fatal("the daemon keeps running")
	}
	if log := daemon.Tail(20); daemon.Err() == nil || !strings.Contains(log, server) || !strings.Contains(log, "10.96.0.0/12") {
		t.Errorf("the daemon exited with %v and printed\n%s", daemon.Err(), log)
	}
	client := c.client()
	if got, err := client.Get(t.Context(), "/coreos.com/network/subnets/", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil || got.Count != 0 {
		t.Errorf("%d leases, want none (%v)", got.Count, err)
	}

	// The range of subnets excludes etcd, but contains the network of a bridge of the host.
	c.setConfig(part)
	ipDo(t, n.Namespace, "link add docker0 type bridge", "addr add 10.97.7.1/24 dev docker0", "link set docker0 up")
	lease := func(subnet, public, mac string) {
		c.put("/coreos.com/network/subnets/"+subnet, `{"PublicIP":"`+public+`","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"`+mac+`"},"NodeID":"`+subnet+`"}`)
	}
	lease("10.97.7.0-24", "198.18.0.77", "02:00:00:00:00:77")
	c.start(n)
	c.start(peer)
	s := c.wait(n, "rejects the overlapping lease", func(s api.Status) bool { return s.Ready && len(s.Peers) == 1 && len(s.Rejected) == 1 })
	if r := s.Rejected[0]; r.Key != "10.97.7.0-24" || !strings.Contains(r.Reason, "10.97.7.0/24 on docker0") {
		t.Errorf("%+v", r)
	}
	c.waitReady(peer, 2)
	pods := c.pods()
	ping(t, pods[0], pods[1])
	warns := func(s api.Status, text string) bool {
		return slices.ContainsFunc(s.Warnings, func(w api.Warning) bool {
			return w.Check == "network-overlap" && strings.Contains(w.Text, text)
		})
	}
	c.wait(n, "warns about the bridge", func(s api.Status) bool { return warns(s, "docker0") })

	// The node also warns about a bridge that is added later.
	ipDo(t, n.Namespace, "link add docker1 type bridge", "addr add 10.97.9.1/24 dev docker1")
	c.wait(n, "warns about the new bridge", func(s api.Status) bool { return warns(s, "docker1") })
	if _, text := c.get(n, "/metrics"); !strings.Contains(text, `culvert_warnings{check="network-overlap"} 2`) {
		t.Error("the metric culvert_warnings does not count both")
	}
	ipDo(t, n.Namespace, "link del docker1")
	c.wait(n, "no longer warns about the new bridge", func(s api.Status) bool { return !warns(s, "docker1") })

	// The network is enlarged to contain etcd. A node with a specific route to etcd applies
	// the change; a node without one rejects it.
	ipDo(t, peer.Namespace, "route add 10.99.0.5/32 via 198.18.0.254")
	c.setConfig(whole)
	s = c.wait(n, "rejects the configuration", func(s api.Status) bool { return s.Ready && strings.Contains(s.Store.ConfigRefused, server) })
	if !s.Store.Connected {
		t.Errorf("%+v", s.Store)
	}
	lease("10.98.1.0-24", "198.18.0.78", "02:00:00:00:00:78")
	c.wait(peer, "accepts the configuration", func(s api.Status) bool { return s.Ready && s.Store.ConfigRefused == "" && len(s.Peers) == 3 })
	c.wait(n, "still gets changes from etcd", func(s api.Status) bool { return s.Ready && len(s.Peers) == 2 })
	ping(t, pods[1], pods[0])
}
