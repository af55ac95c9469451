package test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/subnet"
)

// dual is a dual-stack network configuration.
const dual = `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}`

var dualUnderlay = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/24"), netip.MustParsePrefix("fd00:198:18::/64")}

// TestMixedCluster sends traffic between all pairs of nodes with different datapaths and
// the same wire format, in both address families:
//
//	n1 userspace (culvert0) ──┐
//	n2 kernel (cvt.1, cvt6.1) ┼── underlay
//	n3 made by hand (flannel.1, flannel-v6.1), with its lease written to etcd
func TestMixedCluster(t *testing.T) {
	c := newClusterOf(t, lab.Options{Nodes: 3, Prefixes: dualUnderlay, InOrder: true})
	c.setConfig(dual)
	c.start(c.Nodes[0], "--datapath", "userspace")
	c.start(c.Nodes[1], "--datapath", "auto")
	ours := []api.Status{c.waitReady(c.Nodes[0], 1), c.waitReady(c.Nodes[1], 1)}
	if kind := ours[1].Datapath.Kind; kind != "kernel" {
		t.Fatalf("auto chose %s: %s", kind, ours[1].Datapath.Why)
	}
	hand := c.addHandmade(c.Nodes[2], "10.5.250.0/24", "fd00:5:0:fa::/64")
	for i, s := range ours {
		c.introduce(hand, c.Nodes[i], s)
		c.waitReady(c.Nodes[i], 2)
	}
	type end struct {
		*lab.Namespace
		addrs []netip.Addr
	}
	ends := []end{{c.Nodes[2].Namespace, []netip.Addr{hand[0].Self.Subnet.Addr(), hand[1].Self.Subnet.Addr()}}}
	for _, n := range c.Nodes[:2] {
		pod, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end{pod.Namespace, pod.Addrs})
	}
	for _, from := range ends {
		for _, to := range ends {
			if from.Namespace == to.Namespace {
				continue
			}
			for k := range to.addrs {
				if _, err := from.Ping(t.Context(), from.addrs[k], to.addrs[k]); err != nil {
					t.Fatal(err)
				}
				transfer(t, from.Namespace, to.Namespace, from.addrs[k], to.addrs[k], 8<<20)
				datagrams(t, from.Namespace, to.Namespace, from.addrs[k], to.addrs[k])
			}
		}
	}
	for _, n := range c.Nodes[:2] {
		if s, err := c.status(n); err != nil || drops(s, "ingress-source")+drops(s, "ingress-protocol") != 0 {
			t.Errorf("%s dropped %v (%v)", n.ID, s.Datapath.Drops, err)
		}
	}
}

// addHandmade sets up a node without a daemon: a kernel vxlan device for each subnet, and
// a lease in etcd.
func (c *cluster) addHandmade(n *lab.Node, subnets ...string) []*lab.HandmadeVXLAN {
	c.t.Helper()
	var devices []*lab.HandmadeVXLAN
	lease := subnet.Lease{Backend: "vxlan"}
	for k, s := range subnets {
		d, err := n.AddHandmadeVXLAN(lab.VXLANOptions{Subnet: netip.MustParsePrefix(s), Local: n.Addrs[k]})
		if err != nil {
			c.t.Fatal(err)
		}
		devices = append(devices, d)
		lease.Endpoints = append(lease.Endpoints, d.Self)
	}
	value, err := lease.Value()
	if err != nil {
		c.t.Fatal(err)
	}
	c.put("/coreos.com/network/subnets/"+lease.Key(), string(value))
	return devices
}

// introduce adds a node as a peer to the handmade devices, as flannel would from its
// lease.
func (c *cluster) introduce(hand []*lab.HandmadeVXLAN, n *lab.Node, s api.Status) {
	c.t.Helper()
	for k, p := range s.Lease.Subnets {
		if err := hand[k].AddPeer(subnet.Endpoint{
			Subnet: p, Public: n.Addrs[k],
			VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(n.ID, 1, p.Addr().Is6())},
		}); err != nil {
			c.t.Fatal(err)
		}
	}
}

func drops(s api.Status, reason string) uint64 {
	for _, d := range s.Datapath.Drops {
		if d.Reason == reason {
			return d.Packets
		}
	}
	return 0
}

// TestDatapathChanges restarts a node with the other datapath several times, and then
// takes over from flannel's device with each. The TCP connections that are open
// meanwhile survive.
//
//	pod ── n1: userspace, kernel, userspace ── underlay ── n2: kernel ── pod
func TestDatapathChanges(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.setConfig(config)
	n := c.Nodes[0]
	p := c.start(n, "--datapath", "userspace")
	c.start(c.Nodes[1], "--datapath", "kernel")
	s := c.waitReady(n, 1)
	c.waitReady(c.Nodes[1], 1)
	pods := c.pods()
	flow, back := startFlow(t, pods[0], pods[1]), startFlow(t, pods[1], pods[0])
	for _, kind := range []string{"kernel", "userspace", "kernel", "userspace"} {
		c.goesOn(flow)
		if err := p.Stop(); err != nil {
			t.Fatal(err)
		}
		p = c.start(n, "--datapath", kind)
		c.wait(n, kind, func(s api.Status) bool { return s.Ready && s.Datapath.Kind == kind })
		c.goesOn(flow)
		c.goesOn(back)
	}

	// Replace culvert's state by what a stopped flanneld leaves.
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	asFlannel := func() {
		t.Helper()
		c.cleanup(n)
		flannel, err := n.AddHandmadeVXLAN(lab.VXLANOptions{Subnet: s.Lease.Subnets[0], MAC: subnet.DeriveMAC(n.ID, 1, false)})
		if err != nil {
			t.Fatal(err)
		}
		if err := flannel.AddPeer(subnet.Endpoint{
			Subnet: s.Peers[0].Subnets[0], Public: c.Nodes[1].Addrs[0], VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(c.Nodes[1].ID, 1, false)},
		}); err != nil {
			t.Fatal(err)
		}
		c.goesOn(flow)
	}
	asFlannel()
	for _, kind := range []string{"kernel", "userspace"} {
		p = c.start(n, "--datapath", kind)
		select {
		case <-p.Exited():
		case <-time.After(20 * time.Second):
			t.Fatal("the daemon runs although flannel.1 exists")
		}
		if log := p.Tail(3); p.Err() == nil || !strings.Contains(log, "flannel.1") || !strings.Contains(log, "--take-over-flannel") {
			t.Errorf("with flannel.1 the daemon printed %q", log)
		}
	}
	c.goesOn(flow)
	for _, kind := range []string{"kernel", "userspace"} {
		p = c.start(n, "--datapath", kind, "--take-over-flannel")
		c.wait(n, "takes over", func(s api.Status) bool { return s.Ready && s.Datapath.Kind == kind })
		c.goesOn(flow)
		c.goesOn(back)
		if err := n.Do(func() error {
			if _, err := netlink.LinkByName("flannel.1"); err == nil {
				return fmt.Errorf("flannel.1 still exists")
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		if kind == "kernel" {
			if err := p.Stop(); err != nil {
				t.Fatal(err)
			}
			asFlannel()
		}
	}
	for _, f := range []*namedFlow{{"there", flow}, {"back", back}} {
		turns, longest, err := f.flow.stop()
		t.Logf("%s: %d round trips, the longest took %s", f.name, turns, longest)
		if err != nil {
			t.Errorf("the connection %s broke: %v", f.name, err)
		}
	}
}

type namedFlow struct {
	name string
	flow *flow
}

// TestStrangers sends packets to a kernel node that its vxlan device alone would accept:
// from a node without a lease, and from a peer with an inner source outside the peer's
// subnet. It also has a pod send to a tunnel port. All are dropped and counted.
func TestStrangers(t *testing.T) {
	c := newCluster(t, 3)
	c.setConfig(config)
	n := c.Nodes[0]
	c.start(n, "--datapath", "kernel")
	s := c.waitReady(n, 0)
	pod, err := n.AddPod(t.Context(), "p1")
	if err != nil {
		t.Fatal(err)
	}
	us := subnet.Endpoint{Subnet: s.Lease.Subnets[0], Public: n.Addrs[0], VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(n.ID, 1, false)}}
	peer := c.addHandmade(c.Nodes[1], "10.5.250.0/24")[0]
	stranger, err := c.Nodes[2].AddHandmadeVXLAN(lab.VXLANOptions{Subnet: netip.MustParsePrefix("10.5.251.0/24")})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []*lab.HandmadeVXLAN{peer, stranger} {
		if err := d.AddPeer(us); err != nil {
			t.Fatal(err)
		}
	}
	c.waitReady(n, 1)
	if _, err := c.Nodes[1].Ping(t.Context(), peer.Self.Subnet.Addr(), pod.Addr(true)); err != nil {
		t.Fatal(err)
	}
	// Check whether packets arrive in the pod, which does not answer.
	arrives := func(from *lab.Node, source netip.Addr) bool {
		l, err := pod.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(pod.Addr(true), 7).String())
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		sender, err := from.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(source, 0).String())
		if err != nil {
			t.Fatal(err)
		}
		defer sender.Close()
		if _, err := sender.WriteTo([]byte("let me in"), l.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		if err := l.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		_, _, err = l.ReadFrom(make([]byte, 100))
		return err == nil
	}
	if !arrives(c.Nodes[1], peer.Self.Subnet.Addr()) {
		t.Error("a peer's packet did not arrive")
	}
	if arrives(c.Nodes[2], stranger.Self.Subnet.Addr()) {
		t.Error("a stranger's packet arrived")
	}
	forged := netip.MustParseAddr("10.5.251.9")
	c.addAddr(c.Nodes[1], "flannel.1", netip.PrefixFrom(forged, 32))
	if arrives(c.Nodes[1], forged) {
		t.Error("a peer's packet with an inner source outside its subnet arrived")
	}
	got := c.wait(n, "counts both drops", func(s api.Status) bool { return drops(s, "ingress-source") >= 1 && drops(s, "ingress-stranger") >= 1 })

	sink, err := c.Nodes[1].ListenPacket(t.Context(), "udp", netip.AddrPortFrom(c.Nodes[1].Addrs[0], 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	from, err := pod.Dial(t.Context(), "udp", netip.AddrPortFrom(c.Nodes[1].Addrs[0], 8472).String())
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	if _, err := from.Write(make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
	c.wait(n, "drops the packet that the pod encapsulated", func(s api.Status) bool { return drops(s, "egress-encapsulated") == 1 })
	t.Logf("dropped: %v", got.Datapath.Drops)
}

func (c *cluster) addAddr(n *lab.Node, device string, p netip.Prefix) {
	c.t.Helper()
	if err := n.Do(func() error {
		l, err := netlink.LinkByName(device)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(p.String())
		if err != nil {
			return err
		}
		return netlink.AddrAdd(l, a)
	}); err != nil {
		c.t.Fatal(err)
	}
}

// TestUnderlayMTU lowers the underlay's MTU while a pod runs: the datapath and new pods
// get the lower MTU, and the existing pod is reported as stale.
func TestUnderlayMTU(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"kernel", "userspace"} {
		t.Run(kind, func(t *testing.T) {
			c := newCluster(t, 1)
			c.setConfig(config)
			n := c.Nodes[0]
			c.start(n, "--datapath", kind)
			c.waitReady(n, 0)
			if _, err := n.AddPod(t.Context(), "old"); err != nil {
				t.Fatal(err)
			}
			if s, err := c.status(n); err != nil || s.Datapath.MTU != 1450 || len(s.Datapath.StalePods) != 0 {
				t.Fatalf("MTU %d, stale %v (%v)", s.Datapath.MTU, s.Datapath.StalePods, err)
			}
			if err := n.Do(func() error {
				l, err := netlink.LinkByName(n.Link)
				if err != nil {
					return err
				}
				return netlink.LinkSetMTU(l, 1400)
			}); err != nil {
				t.Fatal(err)
			}
			c.wait(n, "has the lower MTU", func(s api.Status) bool {
				return s.Ready && s.Datapath.MTU == 1350 && len(s.Datapath.StalePods) == 1
			})
			eventually(t, "new pods get the new MTU", func() error {
				pod, err := n.AddPod(t.Context(), "new")
				if err != nil {
					return err
				}
				defer func() { _ = pod.Delete(t.Context()) }()
				return pod.Do(func() error {
					l, err := netlink.LinkByName("eth0")
					if err == nil && l.Attrs().MTU != 1350 {
						err = fmt.Errorf("a new pod has MTU %d", l.Attrs().MTU)
					}
					return err
				})
			})
		})
	}
}
