package test

import (
	"context"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/lab"
)

// TestUnderlayAddressChanges changes a node's underlay address: the node publishes the
// new address in its lease, its peers follow, and pods reach each other again. While
// etcd is unreachable the node uses the new address at once, and publishes it when etcd
// is back.
//
//	pod ── n1 198.18.0.1 → 198.18.0.77 ── fabric ── n2 198.18.0.2 ── pod
func TestUnderlayAddressChanges(t *testing.T) {
	t.Parallel()
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) { underlayChanges(t, "--datapath="+d) })
	}
}

func underlayChanges(t *testing.T, datapath string) {
	c := newCluster(t, 2)
	c.setConfig(config)
	for _, n := range c.Nodes {
		c.start(n, datapath)
	}
	mover, peer := c.Nodes[0], c.Nodes[1]
	before := c.waitReady(mover, 1)
	c.waitReady(peer, 1)
	pods := c.pods()

	to := netip.MustParseAddr("198.18.0.77")
	began := time.Now()
	readdress(t, mover, mover.Addrs[0], to)
	c.wait(peer, "has the peer's new address", func(s api.Status) bool { return len(s.Peers) == 1 && slices.Contains(s.Peers[0].PublicIPs, to) })
	took := time.Since(began)
	t.Logf("the peer followed %v after the address changed", took.Round(time.Millisecond))
	// The node moves only after MoveAfter, since the old address might come back.
	if took < host.MoveAfter || took > host.MoveAfter+2*time.Second {
		t.Errorf("the peer followed after %v, want shortly after %v", took, host.MoveAfter)
	}
	ping(t, pods[0], pods[1])
	after := c.wait(mover, "reports its new address", func(s api.Status) bool {
		return s.Ready && len(s.Peers) == 1 && s.Lease.PublicIPs[0] == to && s.Underlay.Addrs[0] == to
	})
	if after.Lease.Subnets[0] != before.Lease.Subnets[0] {
		t.Errorf("the node's subnet changed: %+v", after)
	}

	// Change it back while etcd does not answer: the node is ready at once, and
	// publishes the address later.
	c.stopEtcd()
	readdress(t, mover, to, mover.Addrs[0])
	c.wait(mover, "is ready with its first address", func(s api.Status) bool { return s.Ready && s.Underlay.Addrs[0] == mover.Addrs[0] && len(s.Peers) == 1 })
	c.continueEtcd()
	c.wait(peer, "has the peer's first address again", func(s api.Status) bool {
		return len(s.Peers) == 1 && slices.Contains(s.Peers[0].PublicIPs, mover.Addrs[0])
	})
	ping(t, pods[1], pods[0])
}

// readdress replaces the address of a node's underlay link and the default route, as a
// DHCP client would.
func readdress(t *testing.T, n *lab.Node, from, to netip.Addr) {
	t.Helper()
	err := n.Do(func() error {
		link, err := netlink.LinkByName(n.Link)
		if err != nil {
			return err
		}
		if err := netlink.AddrDel(link, &netlink.Addr{IPNet: host.IPNet(netip.PrefixFrom(from, 24))}); err != nil {
			return err
		}
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: host.IPNet(netip.PrefixFrom(to, 24))}); err != nil {
			return err
		}
		return netlink.RouteReplace(&netlink.Route{Gw: netip.MustParseAddr("198.18.0.254").AsSlice(), Dst: host.IPNet(netip.MustParsePrefix("0.0.0.0/0"))})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// pods adds a pod to each node.
func (c *cluster) pods() []*lab.Pod {
	c.t.Helper()
	var pods []*lab.Pod
	for _, n := range c.Nodes {
		p, err := n.AddPod(c.t.Context(), "p1")
		if err != nil {
			c.t.Fatal(err)
		}
		pods = append(pods, p)
	}
	return pods
}

// ping pings one pod from another, in each address family.
func ping(t *testing.T, from, to *lab.Pod) {
	t.Helper()
	for i, a := range to.Addrs {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		_, err := from.Ping(ctx, from.Addrs[i], a)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestFamilies tests dual-stack and IPv6-only clusters: pods reach each other in every
// family that they have, and their addresses are not translated.
func TestFamilies(t *testing.T) {
	under4, under6 := netip.MustParsePrefix("198.18.0.0/24"), netip.MustParsePrefix("fd00:198:18::/64")
	const four, six = `"Network":"10.5.0.0/16"`, `"EnableIPv6":true,"IPv6Network":"fd00:12::/48"`
	for _, f := range []struct {
		name, network string
		underlay      []netip.Prefix
		addrs         int
	}{
		{"dual", four + "," + six, []netip.Prefix{under4, under6}, 2},
		{"ipv6", `"EnableIPv4":false,` + six, []netip.Prefix{under6}, 1},
	} {
		for _, d := range datapaths {
			t.Run(f.name+" "+d, func(t *testing.T) {
				c := newClusterOf(t, lab.Options{Nodes: 2, Prefixes: f.underlay, InOrder: true})
				c.setConfig("{" + f.network + `,"Backend":{"Type":"vxlan"}}`)
				for _, n := range c.Nodes {
					c.start(n, "--datapath="+d)
				}
				for _, n := range c.Nodes {
					s := c.waitReady(n, 1)
					if len(s.Lease.Subnets) != f.addrs || len(s.Networks) != f.addrs {
						t.Errorf("%s has the subnets %v in %v", n.ID, s.Lease.Subnets, s.Networks)
					}
				}
				before := c.drops() // a node that does not know its peer yet may have dropped its first packets
				pods := c.pods()
				if len(pods[0].Addrs) != f.addrs {
					t.Fatalf("a pod has the addresses %v", pods[0].Addrs)
				}
				ping(t, pods[0], pods[1])
				for i, a := range pods[1].Addrs {
					transfer(t, pods[0].Namespace, pods[1].Namespace, pods[0].Addrs[i], a, 20<<20)
					datagrams(t, pods[1].Namespace, pods[0].Namespace, a, pods[0].Addrs[i])
				}
				if after := c.drops(); !reflect.DeepEqual(after, before) {
					t.Errorf("the nodes dropped %v, and before the traffic %v", after, before)
				}
			})
		}
	}
}

// TestGrowingNetwork enlarges the cluster network while pods run: running nodes apply the
// change, a node in the new part reaches the old ones, and a configuration that a
// running node cannot apply is rejected with the reason.
func TestGrowingNetwork(t *testing.T) {
	t.Parallel()
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) { growingNetwork(t, "--datapath="+d) })
	}
}

func growingNetwork(t *testing.T, datapath string) {
	c := newCluster(t, 3)
	c.setConfig(`{"Network":"10.5.0.0/22","SubnetLen":24,"Backend":{"Type":"vxlan"}}`)
	for _, n := range c.Nodes[:2] {
		c.start(n, datapath)
	}
	for _, n := range c.Nodes[:2] {
		c.waitReady(n, 1)
	}
	var pods []*lab.Pod
	for _, n := range c.Nodes[:2] {
		p, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, p)
	}
	stream := startPings(t, pods[0], pods[1])
	c.setConfig(`{"Network":"10.4.0.0/15","SubnetLen":24,"SubnetMin":"10.4.200.0","SubnetMax":"10.4.200.0","Backend":{"Type":"vxlan"}}`)
	for _, n := range c.Nodes[:2] {
		c.wait(n, "has the larger network", func(s api.Status) bool { return s.Ready && s.Networks[0].String() == "10.4.0.0/15" })
		eventually(t, "subnet.env has the larger network", func() error {
			env, err := cni.ReadSubnetEnv(n.SubnetFile())
			if err != nil || env.Networks[0].String() != "10.4.0.0/15" {
				return fmt.Errorf("it has %v: %w", env.Networks, err)
			}
			return nil
		})
	}
	c.start(c.Nodes[2], datapath)
	if s := c.waitReady(c.Nodes[2], 2); s.Lease.Subnets[0].String() != "10.4.200.0/24" {
		t.Errorf("the new node has the subnets %v", s.Lease.Subnets)
	}
	c.waitReady(c.Nodes[0], 2)
	fresh, err := c.Nodes[2].AddPod(t.Context(), "p1")
	if err != nil {
		t.Fatal(err)
	}
	ping(t, fresh, pods[0])
	ping(t, pods[1], fresh)

	c.put("/coreos.com/network/config", `{"Network":"10.99.0.0/16","Backend":{"Type":"vxlan"}}`)
	s := c.wait(c.Nodes[0], "rejects the configuration", func(s api.Status) bool { return s.Store.ConfigRefused != "" })
	if !s.Ready || s.Networks[0].String() != "10.4.0.0/15" || !strings.Contains(s.Store.ConfigRefused, "outside 10.99.0.0/16") {
		t.Errorf("%+v", s)
	}
	if sent, lost := stream.stop(); lost > 0 {
		t.Errorf("%d of %d pings were lost", lost, sent)
	}

	// Change an option of the datapath, the port.
	c.setConfig(`{"Network":"10.4.0.0/15","SubnetLen":24,"SubnetMin":"10.4.200.0","SubnetMax":"10.4.200.0","Backend":{"Type":"vxlan","Port":4790}}`)
	for _, n := range c.Nodes {
		eventually(t, n.ID+" uses the new port", func() error { return udpBound(n, 4790) })
		c.wait(n, "is ready with both peers", func(s api.Status) bool { return s.Ready && len(s.Peers) == 2 })
	}
	ping(t, fresh, pods[0])
	ping(t, pods[1], fresh)
}

// udpBound returns nil if the UDP port is in use on the node, by a kernel device or a
// program.
func udpBound(n *lab.Node, port int) error {
	c, err := n.ListenPacket(context.Background(), "udp4", netip.AddrPortFrom(n.Addrs[0], uint16(port)).String())
	if err == nil {
		_ = c.Close()
		return fmt.Errorf("port %d on %s is not in use", port, n.ID)
	}
	return nil
}
