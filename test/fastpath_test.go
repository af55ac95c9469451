package test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/internal/names"
	"culvert/subnet"
)

// fastEnd is a kind of datapath at one end of a tunnel, in tests of the fast path.
type fastEnd struct {
	name  string
	flags []string
}

var fastEnds = []fastEnd{
	{"fast", []string{"--datapath", "kernel", "--fast-path", "on"}},
	{"kernel", []string{"--datapath", "kernel", "--fast-path", "off"}},
	{"loop", []string{"--datapath", "userspace"}},
	{"fast loop", []string{"--datapath", "userspace", "--fast-path", "on"}},
}

// place is one end of traffic.
type place struct {
	*lab.Namespace
	addrs []netip.Addr // IPv4 first
}

// exchange sends all kinds of traffic between two places, in each address family.
func exchange(t *testing.T, a, b place, bytes int64) {
	t.Helper()
	for i := range a.addrs {
		here, there := a.addrs[i], b.addrs[i]
		if _, err := a.Ping(t.Context(), here, there); err != nil {
			t.Fatal(err)
		}
		transfer(t, a.Namespace, b.Namespace, here, there, bytes)
		transfer(t, b.Namespace, a.Namespace, there, here, bytes)
		datagrams(t, a.Namespace, b.Namespace, here, there)
		extremes(t, a.Namespace, b.Namespace, here, there)
		bursts(t, a.Namespace, b.Namespace, here, there)
		bursts(t, b.Namespace, a.Namespace, there, here)
	}
}

// TestFastPathOracle compares what one pod sends with what the other receives, with the
// fast path on n1, each kind of datapath at the other end, and each underlay profile, in
// both address families. The fast path on n1 is before the kernel's datapath, then
// before the userspace one.
//
//	pod ── n1: fast, or fast loop ──┐
//	pod ── n2: each of fastEnds ────┼── underlay
//	       n3: handmade devices ────┘
func TestFastPathOracle(t *testing.T) {
	profiles, ends := lab.Profiles(), fastEnds
	if testing.Short() {
		profiles, ends = profiles[:2], ends[:1]
	}
	c := newClusterOf(t, lab.Options{Nodes: 3, Prefixes: dualUnderlay, InOrder: true})
	c.setConfig(dual)
	n := c.Nodes[0]
	self := c.start(n, fastEnds[0].flags...)
	c.waitReady(n, 0)
	other := c.start(c.Nodes[1], fastEnds[1].flags...)
	c.waitReady(c.Nodes[1], 1)
	s := c.waitReady(n, 1)
	hand := c.addHandmade(c.Nodes[2], "10.5.250.0/24", "fd00:5:0:fa::/64")
	for k, p := range s.Lease.Subnets {
		if err := hand[k].AddPeer(subnet.Endpoint{
			Subnet: p, Public: n.Addrs[k], VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(n.ID, 1, p.Addr().Is6())},
		}); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range hand { // pods have the lower MTU of both families
		if out, err := c.Nodes[2].Run(t.Context(), "ip", "link", "set", d.Device(), "mtu", "1430"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	c.waitReady(n, 2)
	var pods []place
	for _, node := range c.Nodes[:2] {
		pod, err := node.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, place{pod.Namespace, pod.Addrs})
	}
	byHand := place{c.Nodes[2].Namespace, []netip.Addr{hand[0].Self.Subnet.Addr(), hand[1].Self.Subnet.Addr()}}

	with := func(name string, there place) {
		for _, profile := range profiles {
			t.Run(name+" "+string(profile), func(t *testing.T) {
				if _, err := c.SetProfile(profile); err != nil {
					t.Fatal(err)
				}
				before := c.fastPath(n)
				exchange(t, pods[0], there, 3<<20)
				after := c.fastPath(n)
				t.Logf("fast path: %d packets sent and %d received, %d coalesced, left to the device: %v", after.Egress.Packets-before.Egress.Packets,
					after.Ingress.Packets-before.Ingress.Packets, after.Joined-before.Joined, after.Slow)
				// A loop's frames of several datagrams may leave all flows that begin within 100 ms
				// to the device.
				left := func(f api.FastPath) uint64 {
					i := slices.IndexFunc(f.Slow, func(d api.Drop) bool { return d.Reason == "ingress-flow" })
					if i < 0 {
						return 0
					}
					return f.Slow[i].Packets
				}
				received := after.Ingress.Packets > before.Ingress.Packets || strings.Contains(name, "loop") && left(after) > left(before)
				if after.Egress.Packets == before.Egress.Packets || !received {
					t.Error("no packet took the fast path")
				}
			})
		}
	}
	with("fast, made by hand", byHand)
	for _, here := range []fastEnd{fastEnds[0], fastEnds[3]} {
		if here.name != fastEnds[0].name {
			stop(t, self)
			self = c.start(n, here.flags...)
			c.waitReady(n, 2)
			with(here.name+", made by hand", byHand)
		}
		for _, end := range ends {
			stop(t, other)
			other = c.start(c.Nodes[1], end.flags...)
			c.waitReady(c.Nodes[1], 2)
			with(here.name+", "+end.name, pods[1])
		}
	}
	for _, node := range c.Nodes[:2] {
		if s, err := c.status(node); err != nil || len(dropped(s)) != 0 {
			t.Errorf("%s dropped %v (%v)", node.ID, s.Datapath.Drops, err)
		}
	}
}

// fastPath waits until a node's fast path is on, and returns its status.
func (c *cluster) fastPath(n *lab.Node) api.FastPath {
	c.t.Helper()
	s := c.wait(n, "has the fast path on", func(s api.Status) bool { return s.Datapath.FastPath != nil && s.Datapath.FastPath.On })
	return *s.Datapath.FastPath
}

// TestFastPathLife tests a node's fast path under a TCP connection and pings in both
// directions: no ping is lost while the daemon is killed, stopped or restarted; parts
// that others delete are restored; a qdisc that the fast path would bypass turns it off;
// and nothing is left when it is off or cleaned up.
func TestFastPathLife(t *testing.T) {
	t.Parallel()
	t.Run("kernel", func(t *testing.T) {
		fastPathLife(t, []string{"--datapath", "kernel", "--fast-path", "auto"}, "cvt.1", "userspace")
	})
	t.Run("userspace", func(t *testing.T) {
		fastPathLife(t, []string{"--datapath", "userspace", "--fast-path", "on"}, "culvert0", "kernel")
	})
}

// fastPathLife tests a node with flags on, whose tunnel device is named, and which has
// another datapath for a while.
func fastPathLife(t *testing.T, on []string, device, another string) {
	t.Parallel()
	c := newCluster(t, 2)
	c.setConfig(config)
	n := c.Nodes[0]
	p := c.start(n, on...)
	c.start(c.Nodes[1], on...)
	c.waitReady(n, 1)
	c.waitReady(c.Nodes[1], 1)
	pods := c.pods()
	c.fastPath(n)
	flow := startFlow(t, pods[0], pods[1])
	carries := func() {
		t.Helper()
		before := c.fastPath(n)
		c.goesOn(flow)
		c.wait(n, "sends and receives by the fast path", func(s api.Status) bool {
			f := s.Datapath.FastPath
			return f.Egress.Packets > before.Egress.Packets && f.Ingress.Packets > before.Ingress.Packets
		})
	}
	carries()

	there, back := startPings(t, pods[0], pods[1]), startPings(t, pods[1], pods[0])
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Exited()
	c.goesOn(flow)
	left := slices.DeleteFunc(filters(t, n), func(f host.Filter) bool { // but for those of the short way
		return f.Registers() || !slices.Contains([]string{n.Link, device, names.JoinFar}, f.Link)
	})
	if len(left) != 3 {
		t.Errorf("while the daemon is not running the filters are %v, want 3", left)
	}
	p = c.start(n, on...)
	c.waitReady(n, 1)
	carries()
	stop(t, p)
	p = c.start(n, on...)
	c.waitReady(n, 1)
	carries()
	for _, p := range []*pings{there, back} {
		if sent, lost := p.stop(); lost != 0 {
			t.Errorf("of %d pings %d were lost while the daemon was not running", sent, lost)
		}
	}

	uplink := func(do func(netlink.Link) error) error {
		return n.Do(func() error {
			l, err := netlink.LinkByName(n.Link)
			if err != nil {
				return err
			}
			return do(l)
		})
	}
	for what, harm := range map[string]func() error{
		"the filters are deleted": func() error {
			return n.Do(func() error {
				all, err := host.Filters()
				for _, f := range all {
					err = errors.Join(err, host.RemoveFilter(f))
				}
				return err
			})
		},
		"the clsact qdisc is deleted": func() error {
			return uplink(func(l netlink.Link) error {
				return netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}})
			})
		},
		"the veth pair is deleted": func() error {
			return n.Do(func() error {
				l, err := netlink.LinkByName(names.JoinNear)
				if err != nil {
					return err
				}
				return netlink.LinkDel(l)
			})
		},
	} {
		before := c.wait(n, "is ready", func(s api.Status) bool { return s.Ready }).Datapath.Repairs[string(host.KindFastPath)]
		if err := harm(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		c.wait(n, "repairs the fast path after "+what, func(s api.Status) bool { return s.Datapath.Repairs[string(host.KindFastPath)] > before })
		carries()
	}

	// A qdisc on the tunnel device must see all packets, so the fast path turns off.
	shape := func(do func(netlink.Qdisc) error) {
		t.Helper()
		if err := n.Do(func() error {
			l, err := netlink.LinkByName(device)
			if err != nil {
				return err
			}
			return do(&netlink.GenericQdisc{QdiscType: "pfifo", QdiscAttrs: netlink.QdiscAttrs{
				LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT,
			}})
		}); err != nil {
			t.Fatal(err)
		}
	}
	shape(netlink.QdiscAdd)
	c.wait(n, "turns the fast path off", func(s api.Status) bool {
		return !s.Datapath.FastPath.On && strings.Contains(s.Datapath.FastPath.Why, "the qdisc pfifo on "+device)
	})
	if left := filters(t, n); len(left) != 0 {
		t.Errorf("with a qdisc the filters %v are left", left)
	}
	c.goesOn(flow)
	shape(netlink.QdiscDel)
	carries()

	// Another program's filter on the uplink keeps running, before ours.
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Apache-2.0", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}, // TC_ACT_UNSPEC
	})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	other := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{Parent: netlink.HANDLE_MIN_INGRESS, Priority: 1, Handle: 1, Protocol: unix.ETH_P_ALL},
		Fd:          program.FD(), Name: "other", DirectAction: true,
	}
	if err := uplink(func(l netlink.Link) error { other.LinkIndex = l.Attrs().Index; return netlink.FilterAdd(other) }); err != nil {
		t.Fatal(err)
	}
	carries()

	// Restart without the fast path, with it, with another datapath, with it again.
	for _, flags := range [][]string{{"--datapath", on[1], "--fast-path", "off"}, on, {"--datapath", another, "--fast-path", "off"}, on} {
		stop(t, p)
		p = c.start(n, flags...)
		c.wait(n, "is ready with the new flags", func(s api.Status) bool { return s.Ready && s.Datapath.Kind == flags[1] })
		if slices.Equal(flags, on) {
			carries()
			continue
		}
		c.goesOn(flow)
		if left := filters(t, n); len(left) != 0 {
			t.Errorf("%v: the filters %v are left", flags, left)
		}
	}
	if turns, longest, err := flow.stop(); err != nil {
		t.Errorf("the connection broke after %d round trips, the longest of %s: %v", turns, longest, err)
	}
	stop(t, p)
	c.cleanup(n)
	if left := filters(t, n); len(left) != 0 {
		t.Errorf("after cleanup the filters %v are left", left)
	}
	if err := n.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if names.Managed(l.Attrs().Name) {
				err = fmt.Errorf("after cleanup the device %s is left", l.Attrs().Name)
			}
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	if err := uplink(func(l netlink.Link) error {
		left, err := netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS)
		if err == nil && len(left) == 0 {
			err = errors.New("cleanup deleted another program's filter")
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// filters returns culvert's tc filters in a node.
func filters(t *testing.T, n *lab.Node) (all []host.Filter) {
	t.Helper()
	if err := n.Do(func() (err error) { all, err = host.Filters(); return err }); err != nil {
		t.Fatal(err)
	}
	return all
}

// TestFastPathBulk checks that at least 95 % of a bulk transfer's bytes take the fast
// path: on the way out on every profile, on the way in where frames do not arrive
// coalesced, which are left to the datapath below.
func TestFastPathBulk(t *testing.T) {
	t.Run("kernel", func(t *testing.T) {
		fastPathBulk(t, "kernel", lab.Offload, lab.Plain)
	})
	t.Run("userspace", func(t *testing.T) { // no vxlan socket, so the kernel coalesces nothing
		fastPathBulk(t, "userspace", lab.Offload)
	})
}

func fastPathBulk(t *testing.T, datapath string, coalesced ...lab.Profile) {
	c := newClusterOf(t, lab.Options{Nodes: 2, Underlay: lab.Direct})
	c.setConfig(config)
	for _, n := range c.Nodes {
		c.start(n, "--iface", n.Link, "--datapath", datapath, "--fast-path", "on")
	}
	for _, n := range c.Nodes {
		c.waitReady(n, 1)
	}
	pods := c.pods()
	// bytes returns what passed by the fast path, and all.
	bytes := func() (fast, all [2]uint64, left []api.Drop) {
		f := c.fastPath(c.Nodes[0])
		d := c.wait(c.Nodes[0], "answers", func(api.Status) bool { return true }).Datapath
		return [2]uint64{f.Egress.Bytes, f.Ingress.Bytes}, [2]uint64{d.Egress.Bytes, d.Ingress.Bytes}, f.Slow
	}
	for _, profile := range lab.Profiles() {
		if _, err := c.SetProfile(profile); err != nil {
			t.Fatal(err)
		}
		fast, all, _ := bytes()
		const size = 64 << 20
		transfer(t, pods[0].Namespace, pods[1].Namespace, pods[0].Addr(true), pods[1].Addr(true), size)
		transfer(t, pods[1].Namespace, pods[0].Namespace, pods[1].Addr(true), pods[0].Addr(true), size)
		fastAfter, allAfter, left := bytes()
		for i, direction := range []string{"out", "in"} {
			took, whole := fastAfter[i]-fast[i], allAfter[i]-all[i]
			share := 100 * float64(took) / float64(max(whole, 1))
			t.Logf("%s, %s: %.2f %% of %d bytes", profile, direction, share, whole)
			if share < 95 && !(direction == "in" && slices.Contains(coalesced, profile)) {
				t.Errorf("%s, %s: %.2f %% of %d bytes took the fast path; packets left: %v", profile, direction, share, whole, left)
			}
		}
	}
}

// TestFastPathHostRules has nftables rules on every hook that sees the tunnel device,
// some with conntrack states: with the fast path and without, they drop and count the
// same packets.
func TestFastPathHostRules(t *testing.T) {
	t.Run("kernel", func(t *testing.T) { fastPathHostRules(t, "kernel", "cvt.1") })
	t.Run("userspace", func(t *testing.T) { fastPathHostRules(t, "userspace", "culvert0") })
}

func fastPathHostRules(t *testing.T, datapath, tunnelDevice string) {
	t.Parallel()
	c := newCluster(t, 2)
	c.setConfig(config)
	n := c.Nodes[0]
	var p *lab.Process
	begin := func(mode string) {
		if p != nil {
			stop(t, p)
		}
		p = c.start(n, "--datapath", datapath, "--fast-path", mode)
		c.waitReady(n, 1)
		c.wait(n, "fast path "+mode, func(s api.Status) bool {
			return (s.Datapath.FastPath != nil && s.Datapath.FastPath.On) == (mode == "on")
		})
	}
	c.start(c.Nodes[1], "--datapath", "kernel", "--fast-path", "on")
	c.wait(c.Nodes[1], "ready", func(s api.Status) bool { return s.Ready })
	begin("on")
	c.waitReady(c.Nodes[1], 1)
	pods := c.pods()
	s := c.waitReady(n, 1)
	node := s.Lease.Subnets[0].Addr()

	// Each rule drops one port's datagrams on one hook, matched by the tunnel device.
	type rule struct {
		chain   string
		in      bool // match the input device; otherwise the output device
		port    uint16
		state   uint32 // conntrack state; 0: any
		crosses string
	}
	const isNew, established = expr.CtStateBitNEW, expr.CtStateBitESTABLISHED
	rules := []rule{
		{"forward", true, 1001, 0, "to the pod"},
		{"forward", false, 1002, 0, "from the pod"},
		{"input", true, 1003, 0, "to the node"},
		{"output", false, 1004, 0, "from the node"},
		{"prerouting", true, 1005, 0, "to the pod"},
		{"postrouting", false, 1006, 0, "from the pod"},
		{"forward", true, 1007, isNew, "to the pod"},
		{"forward", true, 1008, established, "to the pod"},
		{"input", true, 1009, isNew, "to the node"},
		{"forward", true, 1010, established, "from the pod"}, // the answers to it
	}
	place := func(out bool) {
		if err := n.Do(func() error {
			conn, err := nftables.New()
			if err != nil {
				return err
			}
			table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "probe"})
			conn.DelTable(table)
			if out {
				return conn.Flush()
			}
			table = conn.AddTable(table)
			chains := map[string]*nftables.Chain{}
			for name, hook := range map[string]*nftables.ChainHook{
				"prerouting": nftables.ChainHookPrerouting, "input": nftables.ChainHookInput, "forward": nftables.ChainHookForward,
				"output": nftables.ChainHookOutput, "postrouting": nftables.ChainHookPostrouting,
			} {
				chains[name] = conn.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter})
			}
			for _, r := range rules {
				key, offset := expr.MetaKeyOIFNAME, uint32(2)
				if r.in {
					key = expr.MetaKeyIIFNAME
				}
				if r.crosses == "from the pod" && r.in {
					offset = 0 // the answers' source port
				}
				device := append([]byte(tunnelDevice), make([]byte, 16-len(tunnelDevice))...)
				exprs := []expr.Any{
					&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Register: 1, Data: device},
					&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Register: 1, Data: []byte{unix.IPPROTO_UDP}},
					&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
					&expr.Cmp{Register: 1, Data: []byte{byte(r.port >> 8), byte(r.port)}},
				}
				if r.state != 0 {
					mask := []byte{byte(r.state), 0, 0, 0}
					exprs = append(exprs, &expr.Ct{Key: expr.CtKeySTATE, Register: 1},
						&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
						&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)})
				}
				conn.AddRule(&nftables.Rule{Table: table, Chain: chains[r.chain], Exprs: append(exprs, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop})})
			}
			return conn.Flush()
		}); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { place(true) })
	// exchange sends two datagrams to a port, has each answered, and returns how many of
	// the four arrive.
	exchange := func(r rule) (arrived int) {
		from, to, source, destination := pods[1].Namespace, pods[0].Namespace, pods[1].Addr(true), pods[0].Addr(true)
		switch r.crosses {
		case "to the node":
			to, destination = n.Namespace, node
		case "from the node":
			from, to, source, destination = n.Namespace, pods[1].Namespace, node, pods[1].Addr(true)
		case "from the pod":
			from, to, source, destination = to, from, destination, source
		}
		server, err := to.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(destination, r.port).String())
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		client, err := from.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(source, 0).String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		b := make([]byte, 100)
		for range 2 {
			if _, err := client.WriteTo([]byte("?"), server.LocalAddr()); err != nil && !errors.Is(err, unix.EPERM) {
				t.Fatal(err)
			}
			_ = server.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if _, _, err := server.ReadFrom(b); err == nil {
				arrived++
			}
			// Answer even a lost datagram, so that both modes send the same packets.
			if _, err := server.WriteTo([]byte("!"), client.LocalAddr()); err != nil && !errors.Is(err, unix.EPERM) {
				t.Fatal(err)
			}
			_ = client.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if _, _, err := client.ReadFrom(b); err == nil {
				arrived++
			}
		}
		return arrived
	}
	counted := func() (all []uint64) {
		if err := n.Do(func() error {
			conn, err := nftables.New()
			if err != nil {
				return err
			}
			table := &nftables.Table{Family: nftables.TableFamilyINet, Name: "probe"}
			for _, name := range []string{"prerouting", "input", "forward", "output", "postrouting"} {
				list, err := conn.GetRules(table, &nftables.Chain{Table: table, Name: name})
				if err != nil {
					return err
				}
				for _, r := range list {
					for _, e := range r.Exprs {
						if n, ok := e.(*expr.Counter); ok {
							all = append(all, n.Packets)
						}
					}
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return all
	}
	results := map[string][]int{}
	counts := map[string][]uint64{}
	for _, mode := range []string{"off", "on"} {
		begin(mode)
		place(false)
		for _, r := range rules {
			results[mode] = append(results[mode], exchange(r))
		}
		counts[mode] = counted()
	}
	if !slices.Equal(results["on"], results["off"]) || !slices.Equal(counts["on"], counts["off"]) {
		t.Errorf("with the fast path %v arrived and %v were counted, without it %v and %v", results["on"], counts["on"], results["off"], counts["off"])
	}
	if i := slices.Index(counts["off"], 0); i >= 0 {
		t.Errorf("the rules counted %v: one matched nothing", counts["off"])
	}
	if f := c.fastPath(n); f.Egress.Packets == 0 || f.Ingress.Packets == 0 {
		t.Error("no packet took the fast path")
	}
}
