package test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/subnet"
)

// These tests have the kernel's vxlan device as an oracle: with every combination of
// mechanisms and underlay profiles, the one side must receive what the other sends.

const dualConfig = `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}`

// killSwitches are the combinations of flags to test.
var killSwitches = [][]string{
	{},
	{"--no-super-frame"},
	{"--no-gso"},
	{"--no-gro"},
	{"--no-uso", "--no-super-frame", "--no-busy-poll"},
	{"--no-gso", "--no-gro"},
	{"--queues", "2", "--source-ports", "4", "--copy-dscp"},
}

// oracle is a dual-stack cluster of a pod behind a culvert daemon and a node with kernel
// vxlan devices.
type oracle struct {
	*cluster
	pod    *lab.Pod
	kernel *lab.Node
	there  []netip.Addr // the kernel node's own addresses, IPv4 first
}

func newOracle(t *testing.T) *oracle {
	c := newClusterOf(t, lab.Options{
		Nodes: 2, Underlay: lab.Direct, InOrder: true,
		Prefixes: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/24"), netip.MustParsePrefix("fd00:18::/64")},
	})
	c.setConfig(dualConfig)
	o := &oracle{cluster: c, kernel: c.Nodes[1]}
	ours := c.Nodes[0]
	p := c.start(ours, "--iface", ours.Link)
	status := c.waitReady(ours, 0)

	theirs := subnet.Lease{Backend: "vxlan"}
	for i, prefix := range []string{"10.5.200.0/24", "fd00:5:0:c8::/64"} {
		v, err := o.kernel.AddHandmadeVXLAN(lab.VXLANOptions{Subnet: netip.MustParsePrefix(prefix), Local: o.kernel.Addrs[i], MTU: 1430})
		if err != nil {
			t.Fatal(err)
		}
		theirs.Endpoints = append(theirs.Endpoints, v.Self)
		o.there = append(o.there, v.Self.Subnet.Addr())
		err = v.AddPeer(subnet.Endpoint{
			Subnet: status.Lease.Subnets[i], Public: ours.Addrs[i],
			VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(ours.ID, 1, i == 1)},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	value, err := theirs.Value()
	if err != nil {
		t.Fatal(err)
	}
	c.put("/coreos.com/network/subnets/"+theirs.Key(), string(value))
	c.waitReady(ours, 1)
	if o.pod, err = ours.AddPod(t.Context(), "p1"); err != nil {
		t.Fatal(err)
	}
	stop(t, p)
	return o
}

func stop(t *testing.T, p *lab.Process) {
	t.Helper()
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
}

func TestEveryMechanismAgainstTheKernel(t *testing.T) {
	o := newOracle(t)
	switches, profiles := killSwitches, lab.Profiles()
	if testing.Short() {
		switches, profiles = switches[:2], profiles[:2]
	}
	for _, flags := range switches {
		p := o.start(o.Nodes[0], append([]string{"--iface", o.Nodes[0].Link}, flags...)...)
		o.waitReady(o.Nodes[0], 1)
		for _, profile := range profiles {
			name := strings.TrimSpace(fmt.Sprintf("%s %s", profile, strings.Join(flags, " ")))
			t.Run(name, func(t *testing.T) {
				if _, err := o.SetProfile(profile); err != nil {
					t.Fatal(err)
				}
				o.exchange(t, 3<<20)
			})
		}
		s := o.wait(o.Nodes[0], "has a status", func(api.Status) bool { return true })
		if d := dropped(s); len(d) != 0 {
			t.Errorf("with %v packets were dropped: %v", flags, d)
		}
		if m := mechanism(s, "multi-queue"); m.On != slices.Contains(flags, "--queues") && runtime.NumCPU() <= 2 {
			t.Errorf("%v: %+v", flags, m)
		}
		if whole := s.Datapath.Egress.SuperFrames; len(flags) == 0 && whole == 0 && mechanism(s, "super-frame").Why == "" {
			t.Error("no super-frame was sent")
		} else if len(flags) > 0 && flags[len(flags)-1] == "--no-super-frame" && whole != 0 {
			t.Errorf("with --no-super-frame %d super-frames were sent", whole)
		}
		stop(t, p)
	}
}

// dropped returns the drops except those of link-local packets, which are expected, and of
// packets for which a CPU's backlog had no room, as on a busy machine.
func dropped(s api.Status) []api.Drop {
	var all []api.Drop // nil if there are none, for reflect.DeepEqual
	for _, d := range s.Datapath.Drops {
		if d.Reason != "egress-link-local" && d.Reason != "egress-no-buffers" {
			all = append(all, d)
		}
	}
	return all
}

// drops returns what each node has dropped since its daemon's start.
func (c *cluster) drops() (all [][]api.Drop) {
	c.t.Helper()
	for _, n := range c.Nodes {
		s, err := c.status(n)
		if err != nil {
			c.t.Fatal(err)
		}
		all = append(all, dropped(s))
	}
	return all
}

func mechanism(s api.Status, name string) api.Mechanism {
	for _, m := range s.Datapath.Mechanisms {
		if m.Name == name {
			return m
		}
	}
	return api.Mechanism{}
}

// exchange sends all kinds of traffic between the pod and the kernel node, in each family.
func (o *oracle) exchange(t *testing.T, bytes int64) {
	t.Helper()
	for i, there := range o.there {
		here := o.pod.Addr(i == 0)
		transfer(t, o.pod.Namespace, o.kernel.Namespace, here, there, bytes)
		transfer(t, o.kernel.Namespace, o.pod.Namespace, there, here, bytes)
		datagrams(t, o.pod.Namespace, o.kernel.Namespace, here, there)
		extremes(t, o.pod.Namespace, o.kernel.Namespace, here, there)
		bursts(t, o.pod.Namespace, o.kernel.Namespace, here, there)
		bursts(t, o.kernel.Namespace, o.pod.Namespace, there, here)
	}
}

// extremes has empty datagrams and datagrams that IP must fragment echoed.
func extremes(t *testing.T, from, to *lab.Namespace, source, destination netip.Addr) {
	t.Helper()
	server, client := udpPair(t, from, to, source, destination)
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, a, err := server.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = server.WriteTo(b[:n], a)
		}
	}()
	largest := 65507
	if source.Is6() {
		largest = 65487
	}
	answer := make([]byte, 1<<16)
	for _, size := range []int{0, 1, 1421, 1422, 1423, 1451, 9000, 32768, largest} {
		want := pattern(size)
		if _, err := client.WriteTo(want, server.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		if err := client.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, _, err := client.ReadFrom(answer)
		if err != nil {
			t.Fatalf("no answer to a datagram of %d bytes: %v", size, err)
		}
		if !bytes.Equal(answer[:n], want) {
			t.Fatalf("a datagram of %d bytes came back with %d, or its bytes differ", size, n)
		}
	}
}

// bursts sends large buffers that the kernel segments into datagrams (UDP_SEGMENT): each
// datagram arrives unchanged and in order.
func bursts(t *testing.T, from, to *lab.Namespace, source, destination netip.Addr) {
	t.Helper()
	server, client := udpPair(t, from, to, source, destination)
	raw, err := client.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	const size, count, rounds = 1200, 40, 5
	if err := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, size) }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 2048)
	for round := range rounds {
		var burst []byte
		for i := range count {
			d := pattern(size)
			binary.BigEndian.PutUint32(d, uint32(round*count+i))
			burst = append(burst, d...)
		}
		burst = burst[:len(burst)-100] // the last is shorter
		if _, err := client.WriteTo(burst, server.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		for i := range count {
			if err := server.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
				t.Fatal(err)
			}
			n, _, err := server.ReadFrom(got)
			if err != nil {
				t.Fatalf("datagram %d of burst %d: %v", i, round, err)
			}
			if want := burst[i*size : min((i+1)*size, len(burst))]; !bytes.Equal(got[:n], want) {
				t.Fatalf("datagram %d of burst %d has %d bytes and number %d", i, round, n, binary.BigEndian.Uint32(got))
			}
		}
	}
}

func udpPair(t *testing.T, from, to *lab.Namespace, source, destination netip.Addr) (server, client net.PacketConn) {
	t.Helper()
	server, err := to.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(destination, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	client, err = from.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(source, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return server, client
}

// TestSuperFramesFollowTheUplink changes the uplink's features and deletes its neighbours
// during a transfer. Super-frames go off and on, with the reason in the status, and the
// transfer arrives unchanged.
func TestSuperFramesFollowTheUplink(t *testing.T) {
	o := newOracle(t)
	o.start(o.Nodes[0], "--iface", o.Nodes[0].Link)
	s := o.waitReady(o.Nodes[0], 1)
	if m := mechanism(s, "super-frame"); m.Why != "" && strings.Contains(m.Why, "6.17") {
		t.Skipf("super-frames: %s", m.Why)
	}
	settled := func(want bool, why string) {
		t.Helper()
		o.wait(o.Nodes[0], fmt.Sprintf("super-frames %t", want), func(s api.Status) bool {
			m := mechanism(s, "super-frame")
			return m.On == want && strings.Contains(m.Why, why)
		})
	}
	here, there := o.pod.Addr(true), o.there[0]
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := o.pod.Ping(ctx, here, there); err != nil { // resolves the neighbour
		t.Fatal(err)
	}
	settled(true, "")

	done := make(chan struct{})
	go func() {
		defer close(done)
		transfer(t, o.pod.Namespace, o.kernel.Namespace, here, there, 1<<30)
	}()
	for _, profile := range []lab.Profile{lab.Cloud, lab.Offload, lab.Bare, lab.Offload} {
		if _, err := o.SetProfile(profile); err != nil {
			t.Fatal(err)
		}
		if profile == lab.Offload {
			settled(true, "")
		} else {
			settled(false, "does not segment tunnels")
		}
		// Traffic resolves a deleted neighbour again.
		flushNeighbours(t, o.Nodes[0])
	}
	<-done
	s, err := o.status(o.Nodes[0])
	if err != nil {
		t.Fatal(err)
	}
	if d := dropped(s); s.Datapath.Egress.SuperFrames == 0 || len(d) != 0 {
		t.Errorf("%d super-frames, drops %v", s.Datapath.Egress.SuperFrames, d)
	}
}

// flushNeighbours deletes all neighbours on the node's underlay link.
func flushNeighbours(t *testing.T, n *lab.Node) {
	t.Helper()
	err := n.Do(func() error {
		link, err := netlink.LinkByName(n.Link)
		if err != nil {
			return err
		}
		list, err := netlink.NeighList(link.Attrs().Index, unix.AF_UNSPEC)
		if err != nil {
			return err
		}
		for i := range list {
			if list[i].State&netlink.NUD_PERMANENT == 0 {
				_ = netlink.NeighDel(&list[i])
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
