package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"culvert/internal/api"
	"culvert/internal/lab"
)

// TestPeers has `culvert peers` show, from a userspace and from a kernel node, each
// other, a node that is made by hand as flannel makes it, and one that is down, in
// IPv4 and IPv6.
func TestPeers(t *testing.T) {
	t.Parallel()
	c := newClusterOf(t, lab.Options{Nodes: 3, Prefixes: dualUnderlay})
	c.setConfig(dual)
	n1, n2 := c.Nodes[0], c.Nodes[1]
	c.start(n1, "--datapath", "userspace")
	n2Daemon := c.start(n2, "--datapath", "kernel", "--fast-path", "off")
	self := c.waitReady(n1, 1)
	other := c.waitReady(n2, 1)
	c.introduce(c.addHandmade(c.Nodes[2], "10.5.250.0/24", "fd00:5:0:fa::/64"), n1, self)
	c.put(`/coreos.com/network/subnets/10.5.251.0-24&fd00:5:0:fb::-64`,
		`{"PublicIP":"198.18.0.99","PublicIPv6":"fd00:198:18::99","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:fb"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:01:fb"}}`)
	c.waitReady(n1, 3)
	c.waitReady(n2, 3)

	peers := func(on *lab.Node, args ...string) (all []api.PeerState) {
		t.Helper()
		out, err := on.Run(t.Context(), filepath.Join(c.bin, "culvert"), append([]string{"peers", "--run-dir", on.RunDir, "-o", "json"}, args...)...)
		if err != nil {
			t.Fatalf("%s\n%v", out, err)
		}
		var p api.Peers
		if err := json.Unmarshal(out, &p); err != nil {
			t.Fatalf("%s\n%v", out, err)
		}
		return p.Peers
	}
	subnets := func(s api.Status) (all []string) {
		for _, p := range s.Lease.Subnets {
			all = append(all, p.String())
		}
		return all
	}
	absent := []string{"10.5.251.0/24", "fd00:5:0:fb::/64"}
	// settle waits until a node says so of each peer's subnet; the absent one is
	// asked again until it is silent.
	settle := func(on *lab.Node, way string, up []string, is func(api.PeerState) error) {
		t.Helper()
		eventually(t, on.ID+" knows its peers", func() error {
			all := peers(on)
			if len(all) != 6 {
				return fmt.Errorf("%d subnets", len(all))
			}
			for _, p := range all {
				switch {
				case p.Way != way:
					return fmt.Errorf("%s is reached by %q", p.Subnet, p.Way)
				case slices.Contains(up, p.Subnet.String()):
					if p.State != api.PeerIdle || p.RTTSeconds <= 0 || p.PathMTU != self.Datapath.MTU || p.Heard.IsZero() || p.Problem != "" {
						return fmt.Errorf("%+v", p)
					}
					if err := is(p); err != nil {
						return err
					}
				case slices.Contains(absent, p.Subnet.String()):
					if p.State != api.PeerSilent || p.Problem == "" || p.RTTSeconds != 0 {
						return fmt.Errorf("%+v", p)
					}
				}
			}
			return nil
		})
	}
	settle(n1, api.WayUserspace, append(subnets(other), "10.5.250.0/24", "fd00:5:0:fa::/64"), func(p api.PeerState) error {
		// A request and its answer, and those of full size.
		if p.Sent == nil || p.Received == nil || p.Drops == nil || p.Sent.Packets < 2 || p.Received.Packets < 2 || p.Received.Bytes < uint64(self.Datapath.MTU) || *p.Drops != 0 {
			return fmt.Errorf("%s: sent %+v, received %+v", p.Subnet, p.Sent, p.Received)
		}
		return nil
	})
	// The administrator of the third node has entered n1 alone.
	settle(n2, api.WayKernel, subnets(self), func(p api.PeerState) error {
		if p.Sent == nil || p.Received == nil || p.Drops == nil || p.Sent.Packets < 2 || p.Sent.Bytes < uint64(self.Datapath.MTU) || *p.Drops != 0 || p.Received.Packets < 2 || p.Received.Bytes < uint64(self.Datapath.MTU) {
			return fmt.Errorf("%s: sent %+v, received %+v", p.Subnet, p.Sent, p.Received)
		}
		return nil
	})
	if got := peers(n1, "--filter", "state=silent", "--filter", "subnet=10.5.0.0/16"); len(got) != 1 || got[0].Subnet.String() != "10.5.251.0/24" {
		t.Errorf("the silent ones: %+v", got)
	}
	// The absent node takes no warning as long as no pod sends to it.
	if s, err := c.status(n1); err != nil || len(s.Datapath.SilentPeers) != 0 {
		t.Errorf("silent peers: %+v, %v", s.Datapath.SilentPeers, err)
	}
	out, err := n1.Run(t.Context(), filepath.Join(c.bin, "culvert"), "peers", "--run-dir", n1.RunDir, "n2")
	if err != nil || !bytes.Contains(out, []byte("2 peers' subnets: ")) {
		t.Errorf("%s\n%v", out, err)
	}
	t.Logf("%s", out)

	// Traffic of pods makes a peer active; of a node whose daemon is gone too.
	from, err := n1.AddPod(t.Context(), "p1")
	if err != nil {
		t.Fatal(err)
	}
	to, err := n2.AddPod(t.Context(), "p1")
	if err != nil {
		t.Fatal(err)
	}
	if err := n2Daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "n2 is active", func() error {
		if _, err := from.Ping(t.Context(), from.Addrs[0], to.Addrs[0]); err != nil {
			return err
		}
		for _, p := range peers(n1, "subnet="+subnets(other)[0]) {
			if p.State == api.PeerActive {
				return nil
			}
		}
		return fmt.Errorf("%+v", peers(n1, subnets(other)[0]))
	})
}

// TestPeersCount has pods exchange a known number of packets, and compares what
// `culvert peers` shows: with the fast path, the kernel's device alone, a route without a
// tunnel, and in userspace.
func TestPeersCount(t *testing.T) {
	for name, n := range map[string]struct {
		config string
		way    string
		flags  []string
	}{
		"fast path": {config, api.WayFastPath, []string{"--datapath", "kernel", "--fast-path", "on"}},
		"device":    {config, api.WayKernel, []string{"--datapath", "kernel", "--fast-path", "off"}},
		"direct":    {`{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}`, api.WayDirect, []string{"--datapath", "kernel"}},
		"userspace": {config, api.WayUserspace, []string{"--datapath", "userspace"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, 2)
			c.setConfig(n.config)
			for _, node := range c.Nodes {
				c.start(node, append([]string{"--probe-peers=false"}, n.flags...)...)
			}
			for _, node := range c.Nodes {
				c.waitReady(node, 1)
			}
			if n.way == api.WayFastPath {
				c.fastPath(c.Nodes[0])
			}
			pods := c.pods()
			peer := func() api.PeerState {
				t.Helper()
				all, err := api.GetPeers(t.Context(), c.Nodes[0].RunDir)
				if err != nil || len(all.Peers) != 1 {
					t.Fatalf("%+v, %v", all, err)
				}
				if p := all.Peers[0]; p.Way != n.way || p.Sent == nil || p.Received == nil {
					t.Fatalf("%+v", p)
				}
				return all.Peers[0]
			}
			if _, err := pods[0].Ping(t.Context(), pods[0].Addrs[0], pods[1].Addrs[0]); err != nil {
				t.Fatal(err)
			}
			var before api.PeerState
			eventually(t, "the ping and its answer are counted", func() error { // the userspace loop counts after it has sent
				if before = peer(); before.Sent.Packets == 0 || before.Sent.Packets != before.Received.Packets {
					return fmt.Errorf("sent %+v, received %+v", before.Sent, before.Received)
				}
				return nil
			})
			const size, count = 500, 20
			echoDatagrams(t, pods[0], pods[1], size, count)
			want := api.PeerCount{Packets: count, Bytes: count * (20 + 8 + size)}
			eventually(t, "the datagrams are counted", func() error {
				after := peer()
				sent, received := since(before.Sent, after.Sent), since(before.Received, after.Received)
				if sent != want || received != want {
					return fmt.Errorf("sent %+v, received %+v, want %+v", sent, received, want)
				}
				return nil
			})
		})
	}
}

func since(before, after *api.PeerCount) api.PeerCount {
	return api.PeerCount{Packets: after.Packets - before.Packets, Bytes: after.Bytes - before.Bytes}
}

// echoDatagrams sends UDP datagrams from one pod to another, one at a time, and waits for
// each to come back.
func echoDatagrams(t *testing.T, from, to *lab.Pod, size, count int) {
	t.Helper()
	open := func(p *lab.Pod) (c *net.UDPConn) {
		t.Helper()
		if err := p.Do(func() (err error) {
			c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.Addrs[0], 9000)))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	here, there := open(from), open(to)
	buffer := make([]byte, size)
	for range count {
		for _, hop := range []struct {
			out, in *net.UDPConn
			to      netip.Addr
		}{{here, there, to.Addrs[0]}, {there, here, from.Addrs[0]}} {
			if _, err := hop.out.WriteToUDPAddrPort(buffer, netip.AddrPortFrom(hop.to, 9000)); err != nil {
				t.Fatal(err)
			}
			if err := hop.in.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := hop.in.Read(buffer); err != nil {
				t.Fatal(err)
			}
		}
	}
}
