package test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/safchain/ethtool"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/subnet"
)

// TestKernelNode sends traffic between a userspace node and a node without a daemon, which
// has a kernel vxlan device as flannel sets it up and a lease that the test writes:
//
//	pod 10.5.x.2 ── cni0 ── culvert0 ── culvert run ── eth0
//	                                                    │ underlay
//	       10.5.200.0 on flannel.1 (kernel vxlan) ──── eth0
//
// The kernel's node sends with all offloads that the kernel has, so its packets arrive as
// large frames and with unfinished checksums.
func TestKernelNode(t *testing.T) {
	c := newClusterOf(t, lab.Options{Nodes: 2, InOrder: true})
	c.setConfig(config)
	c.start(c.Nodes[0])
	ours := c.waitReady(c.Nodes[0], 0)

	kernel, err := c.Nodes[1].AddHandmadeVXLAN(lab.VXLANOptions{Subnet: netip.MustParsePrefix("10.5.200.0/24")})
	if err != nil {
		t.Fatal(err)
	}
	peer := subnet.Lease{Backend: "vxlan", Endpoints: []subnet.Endpoint{kernel.Self}}
	value, err := peer.Value()
	if err != nil {
		t.Fatal(err)
	}
	c.put("/coreos.com/network/subnets/"+peer.Key(), string(value))
	c.waitReady(c.Nodes[0], 1)
	if err := kernel.AddPeer(subnet.Endpoint{
		Subnet: ours.Lease.Subnets[0], Public: c.Nodes[0].Addrs[0],
		VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(c.Nodes[0].ID, 1, false)},
	}); err != nil {
		t.Fatal(err)
	}
	pod, err := c.Nodes[0].AddPod(t.Context(), "p1")
	if err != nil {
		t.Fatal(err)
	}
	here, there := pod.Addr(true), netip.MustParseAddr("10.5.200.0")

	for _, offloads := range []bool{true, false} {
		t.Run(fmt.Sprintf("underlay offloads %t", offloads), func(t *testing.T) {
			for _, n := range c.Nodes {
				setOffloads(t, n, offloads)
			}
			for _, direction := range []struct {
				name         string
				from, to     *lab.Namespace
				source, dest netip.Addr
			}{
				{"pod to kernel", pod.Namespace, c.Nodes[1].Namespace, here, there},
				{"kernel to pod", c.Nodes[1].Namespace, pod.Namespace, there, here},
			} {
				t.Run(direction.name, func(t *testing.T) {
					d := direction
					if _, err := d.from.Ping(t.Context(), d.source, d.dest); err != nil {
						t.Error(err)
					}
					transfer(t, d.from, d.to, d.source, d.dest, 100<<20)
					datagrams(t, d.from, d.to, d.source, d.dest)
				})
			}
		})
	}
	s := c.wait(c.Nodes[0], "has a status", func(api.Status) bool { return true })
	if len(s.Datapath.Drops) != 0 {
		t.Errorf("dropped: %v", s.Datapath.Drops)
	}
}

// setOffloads turns segmentation, GRO and checksum offloads of the underlay link on or off.
func setOffloads(t *testing.T, n *lab.Node, on bool) {
	t.Helper()
	features := make(map[string]bool)
	for _, name := range []string{
		"tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-generic-segmentation", "tx-udp-segmentation",
		"tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation", "rx-gro", "tx-checksum-ip-generic",
	} {
		features[name] = on
	}
	setFeatures(t, n, features, n.Link)
}

// setFeatures turns features of a node's links on or off, as `ethtool -K` does.
func setFeatures(t *testing.T, n *lab.Node, features map[string]bool, links ...string) {
	t.Helper()
	err := n.Do(func() error {
		e, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer e.Close()
		for _, l := range links {
			err = errors.Join(err, e.Change(l, features))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestKilledDaemonComesBack kills a daemon and starts another: it gets the same subnet, and
// the pods' traffic resumes.
func TestKilledDaemonComesBack(t *testing.T) {
	c := newCluster(t, 2)
	c.setConfig(config)
	p := c.start(c.Nodes[0])
	c.start(c.Nodes[1])
	before := c.waitReady(c.Nodes[0], 1)
	c.waitReady(c.Nodes[1], 1)
	var pods []*lab.Pod
	for _, n := range c.Nodes {
		pod, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, pod)
	}
	transfer(t, pods[0].Namespace, pods[1].Namespace, pods[0].Addr(true), pods[1].Addr(true), 1<<20)
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.Exited()
	c.start(c.Nodes[0])
	after := c.waitReady(c.Nodes[0], 1)
	if after.Lease.Subnets[0] != before.Lease.Subnets[0] {
		t.Fatalf("the subnet was %s and is %s", before.Lease.Subnets[0], after.Lease.Subnets[0])
	}
	eventually(t, "traffic resumes", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := pods[0].Ping(ctx, pods[0].Addr(true), pods[1].Addr(true))
		return err
	})
	transfer(t, pods[1].Namespace, pods[0].Namespace, pods[1].Addr(true), pods[0].Addr(true), 1<<20)
}

// TestDaemonWaitsForConfiguration starts a daemon with an empty etcd: it waits, says how to
// set a configuration, and becomes ready once there is one.
func TestDaemonWaitsForConfiguration(t *testing.T) {
	c := newCluster(t, 1)
	p := c.start(c.Nodes[0])
	c.wait(c.Nodes[0], "waits for the configuration", func(s api.Status) bool {
		return !s.Ready && s.NotReady == "waiting for the network configuration in etcd: set one with `culvert config set`"
	})
	select {
	case <-p.Exited():
		t.Fatalf("the daemon exited: %v", p.Err())
	default:
	}
	c.setConfig(config)
	c.waitReady(c.Nodes[0], 0)
	if err := p.Stop(); err != nil {
		t.Errorf("stopping the daemon: %v", err)
	}
	if err := p.Err(); err != nil {
		t.Errorf("after SIGTERM the daemon exited with %v", err)
	}
}

// TestMalformedLeaseIsSetAside writes a malformed lease beside good ones: the status lists
// it as rejected, and the other peers are not affected.
func TestMalformedLeaseIsSetAside(t *testing.T) {
	c := newCluster(t, 2)
	c.setConfig(config)
	c.startAll()
	c.put("/coreos.com/network/subnets/10.5.99.0-24", "{")
	s := c.wait(c.Nodes[0], "rejects the malformed lease", func(s api.Status) bool { return len(s.Rejected) == 1 })
	if len(s.Peers) != 1 || !s.Ready {
		t.Errorf("peers %v, ready %t", s.Peers, s.Ready)
	}
}
