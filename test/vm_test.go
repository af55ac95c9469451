//go:build vm

package test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/subnet"
)

// These tests run in a virtual machine (make test-vm): they need a kernel with ipip devices
// and netem, and they set the clock.

// TestVMIPIP sends traffic between all pairs of IPIP implementations: the userspace
// datapath, the kernel datapath, and handmade kernel devices.
func TestVMIPIP(t *testing.T) {
	c := newClusterOf(t, lab.Options{Nodes: 3, InOrder: true})
	c.setConfig(`{"Network":"10.5.0.0/16","Backend":{"Type":"ipip"}}`)
	c.start(c.Nodes[0], "--datapath", "userspace")
	c.start(c.Nodes[1], "--datapath", "kernel")
	hand := c.Nodes[2]
	theirs := subnet.Lease{Backend: "ipip", Endpoints: []subnet.Endpoint{{Subnet: netip.MustParsePrefix("10.5.200.0/24"), Public: hand.Addrs[0]}}}
	value, err := theirs.Value()
	if err != nil {
		t.Fatal(err)
	}
	c.put("/coreos.com/network/subnets/"+theirs.Key(), string(value))

	type end struct {
		*lab.Namespace
		addr netip.Addr
	}
	var ends []end
	for i, n := range c.Nodes[:2] {
		s := c.waitReady(n, 2)
		if want := []string{"userspace", "kernel"}[i]; s.Datapath.Kind != want || s.Datapath.WireFormat != "ipip" {
			t.Fatalf("%s has %s/%s: %s", n.ID, s.Datapath.WireFormat, s.Datapath.Kind, s.Datapath.Why)
		}
		pod, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end{pod.Namespace, pod.Addr(true)})
		handmadeIPIP(t, hand, i, n.Addrs[0], s.Lease.Subnets[0])
	}
	ends = append(ends, end{hand.Namespace, netip.MustParseAddr("10.5.200.0")})

	for _, profile := range []lab.Profile{lab.Offload, lab.Bare} {
		if _, err := c.SetProfile(profile); err != nil {
			t.Fatal(err)
		}
		for i, a := range ends {
			for j, b := range ends {
				if i == j {
					continue
				}
				t.Run(fmt.Sprintf("%s %d to %d", profile, i, j), func(t *testing.T) {
					transfer(t, a.Namespace, b.Namespace, a.addr, b.addr, 2<<20)
					datagrams(t, a.Namespace, b.Namespace, a.addr, b.addr)
					if i == 0 || j != 0 || profile == lab.Bare {
						// In the excluded case a packet socket of Linux 6.1 loses them: IngressUncut.
						bursts(t, a.Namespace, b.Namespace, a.addr, b.addr)
					}
				})
			}
		}
	}
	s, err := c.status(c.Nodes[0])
	if err != nil || len(dropped(s)) != 0 {
		t.Errorf("dropped %v (%v)", s.Datapath.Drops, err)
	}
}

// handmadeIPIP runs, for the i-th peer:
//
//	ip link add ipip<i> type ipip local <self> remote <peer> ttl 64
//	ip addr add 10.5.200.0/32 dev ipip<i>; ip link set ipip<i> up mtu 1480
//	ip route add <subnet> dev ipip<i> src 10.5.200.0
func handmadeIPIP(t *testing.T, n *lab.Node, i int, peer netip.Addr, to netip.Prefix) {
	t.Helper()
	err := n.Do(func() error {
		link := &netlink.Iptun{
			LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("ipip%d", i), MTU: 1480},
			Local:     n.Addrs[0].AsSlice(), Remote: peer.AsSlice(), Ttl: 64, PMtuDisc: 1,
		}
		if err := netlink.LinkAdd(link); err != nil {
			return err
		}
		addr, err := netlink.ParseAddr("10.5.200.0/32")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		dst := host.IPNet(to)
		return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Index, Dst: dst, Src: addr.IP})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestVMBadNetwork loses 1 % of all packets and reorders 5 %: transfers between a userspace
// and a kernel node arrive unchanged in both directions.
func TestVMBadNetwork(t *testing.T) {
	for _, format := range []string{"vxlan", "ipip"} {
		t.Run(format, func(t *testing.T) {
			c := newClusterOf(t, lab.Options{Nodes: 2})
			c.setConfig(fmt.Sprintf(`{"Network":"10.5.0.0/16","Backend":{"Type":%q}}`, format))
			for i, n := range c.Nodes {
				c.start(n, "--datapath", []string{"userspace", "kernel"}[i])
			}
			var pods []*lab.Pod
			for _, n := range c.Nodes {
				c.waitReady(n, 1)
				pod, err := n.AddPod(t.Context(), "p1")
				if err != nil {
					t.Fatal(err)
				}
				pods = append(pods, pod)
				netem(t, n)
			}
			for i := range pods {
				a, b := pods[i], pods[1-i]
				transfer(t, a.Namespace, b.Namespace, a.Addr(true), b.Addr(true), 5<<20)
			}
		})
	}
}

// netem runs
//
//	tc qdisc replace dev <link> root netem delay 2ms loss 1% reorder 95%
//
// which delays 5 % of the packets, so that they arrive out of order.
func netem(t *testing.T, n *lab.Node) {
	t.Helper()
	err := n.Do(func() error {
		link, err := netlink.LinkByName(n.Link)
		if err != nil {
			return err
		}
		return netlink.QdiscReplace(netlink.NewNetem(
			netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			netlink.NetemQdiscAttrs{Latency: 2000, Loss: 1, ReorderProb: 95, Gap: 1},
		))
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestVMClockSteps sets the clock an hour forward, two hours back and an hour forward: nodes
// stay ready with their leases and peers, and traffic and new pods work.
func TestVMClockSteps(t *testing.T) {
	c := newClusterOf(t, lab.Options{Nodes: 2})
	c.setConfig(config)
	for _, n := range c.Nodes {
		c.start(n, "--lease-ttl", "20s")
	}
	var before []api.Status
	var pods []*lab.Pod
	for _, n := range c.Nodes {
		before = append(before, c.waitReady(n, 1))
		pod, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, pod)
	}
	for i, step := range []time.Duration{time.Hour, -2 * time.Hour, time.Hour} {
		now := unix.NsecToTimespec(time.Now().Add(step).UnixNano())
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
			t.Fatal(err)
		}
		for range 8 {
			time.Sleep(time.Second)
			for k, n := range c.Nodes {
				s, err := c.status(n)
				if err != nil || !s.Ready || len(s.Peers) != 1 || s.Lease == nil || s.Lease.Subnets[0] != before[k].Lease.Subnets[0] {
					t.Fatalf("after a step of %v the status of %s is %+v (%v)", step, n.ID, s, err)
				}
			}
			if _, err := pods[0].Ping(t.Context(), pods[0].Addr(true), pods[1].Addr(true)); err != nil {
				t.Fatalf("after a step of %v: %v", step, err)
			}
		}
		pod, err := c.Nodes[0].AddPod(t.Context(), fmt.Sprintf("p%d", 2+i))
		if err != nil {
			t.Fatalf("after a step of %v a pod cannot be added: %v", step, err)
		}
		if _, err := pod.Ping(t.Context(), pod.Addr(true), pods[1].Addr(true)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestVMF5ClockIsSet boots nodes with a wrong clock, sets it right and wrong again (case F5).
// subnet.env, the status, STATUS and ADD agree within seconds; no pod is refused, and none is
// added after the lease has expired.
func TestVMF5ClockIsSet(t *testing.T) {
	began := time.Now()
	set := func(to time.Time) {
		t.Helper()
		now := unix.NsecToTimespec(to.UnixNano())
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
			t.Fatal(err)
		}
	}
	right := func() time.Time { return began.Round(0).Add(time.Since(began)) } // measured by CLOCK_MONOTONIC
	t.Cleanup(func() { set(right()) })
	wrong := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

	set(wrong)
	c := newClusterOf(t, lab.Options{Nodes: 2})
	c.setConfig(config)
	n, brief := c.Nodes[0], c.Nodes[1]
	c.start(n)
	d := c.start(brief, "--lease-ttl", "20s")
	c.waitReady(n, 1)
	c.waitReady(brief, 1)
	for i, to := range []func() time.Time{right, func() time.Time { return wrong }, right} {
		set(to())
		// Add a pod at once, before the daemon has updated subnet.env.
		if _, err := n.AddPod(t.Context(), fmt.Sprintf("p%d", i)); err != nil {
			t.Errorf("step %d: ADD: %v", i, err)
		}
		eventually(t, "the clocks agree", func() error {
			s, err := c.status(n)
			if err != nil {
				return err
			}
			env, err := cni.ReadSubnetEnv(n.SubnetFile())
			if err != nil {
				return err
			}
			end := time.Now().Add(24 * time.Hour)
			if !s.Ready || s.Lease.Expires.Round(0).Sub(end.Round(0)).Abs() > time.Minute || env.Expires.Sub(end.Round(0)).Abs() > time.Minute {
				return fmt.Errorf("ready %t, the lease ends at %s, and in the file at %s, not %s", s.Ready, s.Lease.Expires, env.Expires, end)
			}
			return cniStatus(t, n)
		})
	}
	// Setting the clock back after the daemon was killed does not extend the lease.
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	set(wrong)
	eventually(t, "the lease expires", func() error {
		env, err := cni.ReadSubnetEnv(brief.SubnetFile())
		if err != nil || !expired(t, env) {
			return fmt.Errorf("subnet.env says %s, %s after boot: %w", env.Expires, env.ExpiresUp, err)
		}
		return nil
	})
	if _, err := brief.AddPod(t.Context(), "late"); err == nil {
		t.Error("a pod was added after the lease had expired")
	}
}

// TestVMIsOne logs the kernel's version.
func TestVMIsOne(t *testing.T) {
	text, err := os.ReadFile("/proc/version")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", text)
}

// TestVMKernel runs both datapaths, both families, on whatever kernel the machine has. The
// fast path is on, or the status says what the kernel lacks; asked for by --fast-path=on, the
// daemon says so and exits.
func TestVMKernel(t *testing.T) {
	release, old, err := host.Release()
	if err != nil || old != "" {
		t.Fatalf("%s: %q, %v", release, old, err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	able := major > 5 || major == 5 && minor >= 13 // BPF_F_ADJ_ROOM_ENCAP_L2_ETH
	c := newClusterOf(t, lab.Options{Nodes: 3, InOrder: true, Prefixes: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/24"), netip.MustParsePrefix("fd00:18::/64")}})
	c.setConfig(dualConfig)
	kinds := []string{"userspace", "kernel"}
	for i, kind := range kinds {
		c.start(c.Nodes[i], "--datapath", kind)
	}
	var pods []*lab.Pod
	for i, n := range c.Nodes[:2] {
		s := c.waitReady(n, 1)
		t.Logf("Linux %s, %s: %v; fast path %+v; warnings %v", release, s.Datapath.Kind, s.Datapath.Mechanisms, s.Datapath.FastPath, s.Warnings)
		if s.Datapath.Kind != kinds[i] {
			t.Errorf("%s has the datapath %s: %s", n.ID, s.Datapath.Kind, s.Datapath.Why)
		}
		if f := s.Datapath.FastPath; kinds[i] == "kernel" && (f == nil || f.On != able || !able && !strings.Contains(f.Why, "Linux 5.13")) {
			t.Errorf("the fast path is %+v on Linux %s", f, release)
		}
		pod, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, pod)
	}
	for _, is4 := range []bool{true, false} {
		for i, from := range pods {
			to := pods[1-i]
			transfer(t, from.Namespace, to.Namespace, from.Addr(is4), to.Addr(is4), 2<<20)
			datagrams(t, from.Namespace, to.Namespace, from.Addr(is4), to.Addr(is4))
		}
	}
	for _, n := range c.Nodes[:2] {
		if s, err := c.status(n); err != nil || len(dropped(s)) > 0 {
			t.Errorf("%s dropped %v (%v)", n.ID, s.Datapath.Drops, err)
		}
	}
	if able {
		return
	}
	asked := c.start(c.Nodes[2], "--datapath", "kernel", "--fast-path", "on")
	select {
	case <-asked.Exited():
	case <-time.After(time.Minute):
		t.Error("the daemon with --fast-path=on does not exit")
	}
	if said := asked.Tail(5); !strings.Contains(said, "Linux 5.13") {
		t.Errorf("the daemon with --fast-path=on said:\n%s", said)
	}
}

// TestVMShortWay has pods' packets take the short way on a kernel without tcx: the programs
// are filters, of the clsact qdisc that the CNI plugin has added. An emulated machine looks
// at its host seldom, so the test asks for each look.
func TestVMShortWay(t *testing.T) {
	c := newClusterOf(t, lab.Options{Nodes: 2, InOrder: true})
	c.setConfig(config)
	c.startAll("--datapath", "kernel")
	pods := c.pods()
	if host.TCX() {
		t.Log("this kernel has tcx: the programs are not filters")
	}
	flow := startFlow(t, pods[0], pods[1])
	frames := make([]uint64, len(c.Nodes))
	for i, n := range c.Nodes {
		eventually(t, n.ID+" carries the flow from pod to pod", func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			s, err := api.GetStatusNow(ctx, n.RunDir)
			if err != nil {
				return err
			}
			p := s.Datapath.FastPath.Pods
			if p == nil || p.Egress == 0 || p.Ingress == 0 {
				return fmt.Errorf("pods %+v, fast path %+v", p, s.Datapath.FastPath)
			}
			frames[i] = p.Egress
			return nil
		})
	}
	for i := range pods {
		from, to := pods[i], pods[1-i]
		transfer(t, from.Namespace, to.Namespace, from.Addrs[0], to.Addrs[0], 4<<20)
		datagrams(t, from.Namespace, to.Namespace, from.Addrs[0], to.Addrs[0])
	}
	for i, n := range c.Nodes {
		s, err := c.status(n)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %+v", n.ID, s.Datapath.FastPath.Pods)
		if s.Datapath.FastPath.Pods.Egress <= frames[i] || len(dropped(s)) > 0 {
			t.Errorf("%s: %d frames by the short way, %d before the transfers; dropped %v", n.ID, s.Datapath.FastPath.Pods.Egress, frames[i], s.Datapath.Drops)
		}
	}
	c.goesOn(flow)
}
