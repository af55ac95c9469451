package test

import (
	"errors"
	"fmt"
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
)

// tcpEstablished is TCP_CONNTRACK_ESTABLISHED.
const tcpEstablished = 3

var podPath = []string{"--datapath", "kernel", "--fast-path", "pod"}

// podFrames returns how many frames a node has sent and received the short way from pod
// to pod.
func (c *cluster) podFrames(n *lab.Node) (egress, ingress uint64) {
	c.t.Helper()
	if p := c.fastPath(n).Pods; p != nil {
		return p.Egress, p.Ingress
	}
	return 0, 0
}

// goesShort waits until the flow takes the short way through a node in both directions.
func (c *cluster) goesShort(n *lab.Node, f *flow) {
	c.t.Helper()
	c.goesOn(f)
	egress, ingress := c.podFrames(n)
	c.wait(n, "carries the flow from pod to pod", func(s api.Status) bool {
		p := s.Datapath.FastPath.Pods
		return p != nil && p.Egress > egress+10 && p.Ingress > ingress+10
	})
}

// stands waits until the flow makes no progress.
func (c *cluster) stands(f *flow) {
	c.t.Helper()
	eventually(c.t, "the connection stands", func() error {
		before, _, _ := f.state()
		time.Sleep(500 * time.Millisecond)
		if after, _, _ := f.state(); after != before {
			return fmt.Errorf("%d round trips", after-before)
		}
		return nil
	})
}

// TestPodPathOracle compares what one pod sends with what the other receives, with the
// short way from pod to pod on both nodes, over each underlay profile and in both address
// families; no TCP segment arrives out of order.
func TestPodPathOracle(t *testing.T) {
	c := newClusterOf(t, lab.Options{Nodes: 2, Prefixes: dualUnderlay, InOrder: true})
	c.setConfig(dual)
	c.startAll(podPath...)
	var pods []place
	for _, n := range c.Nodes {
		pod, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, place{pod.Namespace, pod.Addrs})
	}
	for _, n := range c.Nodes {
		c.wait(n, "has found its pod", func(s api.Status) bool {
			f := s.Datapath.FastPath
			return f != nil && f.Pods != nil && f.Pods.Links == 1
		})
	}
	profiles := lab.Profiles()
	if testing.Short() {
		profiles = profiles[:2]
	}
	for _, profile := range profiles {
		t.Run(string(profile), func(t *testing.T) {
			if _, err := c.SetProfile(profile); err != nil {
				t.Fatal(err)
			}
			count := func() (disorder, again uint64) {
				for _, p := range pods {
					counters, err := p.Counters()
					if err != nil {
						t.Fatal(err)
					}
					disorder += counters["TcpExtTCPOFOQueue"] // segments that arrived before those that precede them
					again += counters["TcpRetransSegs"]
				}
				return disorder, again
			}
			earlyDisorder, earlyAgain := count()
			egress, ingress := c.podFrames(c.Nodes[0])
			exchange(t, pods[0], pods[1], 30<<20)
			moreEgress, moreIngress := c.podFrames(c.Nodes[0])
			disorder, again := count()
			disorder, again = disorder-earlyDisorder, again-earlyAgain
			t.Logf("%d frames sent and %d received from pod to pod; %d segments out of order, %d sent again", moreEgress-egress, moreIngress-ingress, disorder, again)
			if disorder > 0 && again == 0 { // a lost one makes those behind it count, too
				t.Errorf("%d segments arrived out of order", disorder)
			}
			if moreEgress == egress || moreIngress == ingress {
				t.Error("nothing went from pod to pod")
			}
		})
	}
	for _, n := range c.Nodes {
		if s, err := c.status(n); err != nil || len(dropped(s)) != 0 {
			t.Errorf("%s dropped %v (%v)", n.ID, s.Datapath.Drops, err)
		}
	}
}

// TestPodPathObeysTheHost tests that what the host decides of an established connection
// holds although its packets pass the host by: rules of each kind, a policy on what
// conntrack finds invalid, a qdisc, routes; and that translated connections keep
// to the host's way.
func TestPodPathObeysTheHost(t *testing.T) {
	c := newCluster(t, 2)
	c.setConfig(config)
	c.startAll(podPath...)
	pods := c.pods()
	n, other := c.Nodes[0], c.Nodes[1]
	do := func(n *lab.Node, f func() error) {
		t.Helper()
		if err := n.Do(f); err != nil {
			t.Fatal(err)
		}
	}
	// As kube-proxy and most policies have it.
	for _, n := range c.Nodes {
		do(n, iptablesLike(func(x *iptables) {
			invalid := x.state(expr.CtStateBitINVALID)
			invalid[len(invalid)-1] = &expr.Verdict{Kind: expr.VerdictDrop}
			x.base("FORWARD", nftables.ChainHookForward, nftables.ChainPolicyAccept, invalid)
			x.chain("POLICY", &expr.Counter{})
		}))
	}
	flow := startFlow(t, pods[0], pods[1])
	c.goesShort(n, flow)
	c.goesShort(other, flow)

	drop := func(hook *nftables.ChainHook, family nftables.TableFamily) func() error {
		return func() error {
			x, err := nftables.New()
			if err != nil {
				return err
			}
			table := x.AddTable(&nftables.Table{Family: family, Name: "late"})
			chain := x.AddChain(&nftables.Chain{Name: "c", Table: table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter})
			x.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}})
			return x.Flush()
		}
	}
	lift := func(family nftables.TableFamily) func() error {
		return func() error {
			x, err := nftables.New()
			if err != nil {
				return err
			}
			x.DelTable(&nftables.Table{Family: family, Name: "late"})
			return x.Flush()
		}
	}
	link := podsLink(t, n)
	for what, change := range map[string]struct{ decide, lift func() error }{
		"a rule in forward":  {drop(nftables.ChainHookForward, nftables.TableFamilyINet), lift(nftables.TableFamilyINet)},
		"a rule of a bridge": {drop(nftables.ChainHookPrerouting, nftables.TableFamilyBridge), lift(nftables.TableFamilyBridge)},
		"a link that is no port of the bridge": {
			func() error { return netlink.LinkSetNoMaster(link) },
			func() error { return netlink.LinkSetMasterByIndex(link, link.Attrs().MasterIndex) },
		},
		"a route": {route(unix.RTN_BLACKHOLE, pods[1], netlink.RouteAdd), route(unix.RTN_BLACKHOLE, pods[1], netlink.RouteDel)},
	} {
		do(n, change.decide)
		c.stands(flow)
		if _, _, err := flow.state(); err != nil {
			t.Fatalf("%s: the connection broke: %v", what, err)
		}
		do(n, change.lift)
		c.goesShort(n, flow)
	}

	// A pod whose link is shaped keeps to the host's way.
	shape := func(do func(netlink.Qdisc) error) {
		t.Helper()
		if err := n.Do(func() error {
			return do(&netlink.GenericQdisc{QdiscType: "pfifo", QdiscAttrs: netlink.QdiscAttrs{
				LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT,
			}})
		}); err != nil {
			t.Fatal(err)
		}
	}
	shape(netlink.QdiscAdd)
	c.wait(n, "leaves the shaped pod out", func(s api.Status) bool { return s.Datapath.FastPath.Pods.Links == 0 })
	egress, _ := c.podFrames(n)
	c.goesOn(flow)
	if now, _ := c.podFrames(n); now != egress {
		t.Errorf("%d frames passed a qdisc by", now-egress)
	}
	shape(netlink.QdiscDel)
	c.goesShort(n, flow)

	// What is closed is closed for conntrack too.
	if turns, longest, err := flow.stop(); err != nil {
		t.Errorf("the connection broke after %d round trips, the longest of %s: %v", turns, longest, err)
	}
	for _, n := range c.Nodes {
		eventually(t, "conntrack has seen the end", func() error {
			return n.Do(func() error {
				all, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
				for _, f := range all {
					if tcp, ok := f.ProtoInfo.(*netlink.ProtoInfoTCP); ok && tcp.State == tcpEstablished && f.Forward.SrcIP.Equal(pods[0].Addrs[0].AsSlice()) {
						err = fmt.Errorf("%s is established", f)
					}
				}
				return err
			})
		})
	}

	// A translated connection.
	do(n, func() error {
		x, err := nftables.New()
		if err != nil {
			return err
		}
		table := x.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "service"})
		chain := x.AddChain(&nftables.Chain{Name: "c", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest})
		x.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: append(
			addressIs(true, boxAddr(true), false),
			&expr.Immediate{Register: 1, Data: pods[1].Addrs[0].AsSlice()},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
		)})
		return x.Flush()
	})
	translated := startFlowTo(t, pods[0], pods[1], boxAddr(true))
	egress, ingress := c.podFrames(n)
	for range 20 {
		c.goesOn(translated)
	}
	if now, in := c.podFrames(n); now != egress || in != ingress {
		t.Errorf("of a translated connection %d and %d frames went from pod to pod", now-egress, in-ingress)
	}
}

// TestPodPathDatagrams tests UDP in one direction, which stays unanswered: it takes the short
// way on both nodes, in order, and what the host decides of it holds.
func TestPodPathDatagrams(t *testing.T) {
	c := newCluster(t, 2)
	c.setConfig(config)
	c.startAll(podPath...)
	pods := c.pods()
	n, other := c.Nodes[0], c.Nodes[1]
	s := startNumbered(t, pods[0], pods[1])
	goesShort := func() {
		t.Helper()
		egress, _ := c.podFrames(n)
		_, ingress := c.podFrames(other)
		received := s.received.Load()
		c.wait(n, "sends the datagrams from pod to pod", func(api.Status) bool {
			e, _ := c.podFrames(n)
			_, i := c.podFrames(other)
			return e > egress+100 && i > ingress+100 && s.received.Load() > received+100
		})
	}
	goesShort()
	for _, n := range c.Nodes {
		table := func(do func(x *nftables.Conn, late *nftables.Table)) {
			t.Helper()
			if err := n.Do(func() error {
				x, err := nftables.New()
				if err != nil {
					return err
				}
				do(x, &nftables.Table{Family: nftables.TableFamilyINet, Name: "late"})
				return x.Flush()
			}); err != nil {
				t.Fatal(err)
			}
		}
		table(func(x *nftables.Conn, late *nftables.Table) {
			chain := x.AddChain(&nftables.Chain{
				Name: "c", Table: x.AddTable(late), Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter,
			})
			x.AddRule(&nftables.Rule{Table: late, Chain: chain, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}})
		})
		eventually(t, "nothing arrives", func() error {
			before := s.received.Load()
			time.Sleep(300 * time.Millisecond)
			if more := s.received.Load() - before; more != 0 {
				return fmt.Errorf("%d datagrams", more)
			}
			return nil
		})
		table(func(x *nftables.Conn, late *nftables.Table) { x.DelTable(late) })
		goesShort()
	}
	if late := s.late.Load(); late != 0 {
		t.Errorf("%d of %d datagrams were overtaken", late, s.received.Load())
	}

	// An XDP program of the pod's sees what the host's way delivers, and would see nothing
	// of the short way.
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.XDP, License: "Apache-2.0",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}, // XDP_PASS
	})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	inspect := func(fd int) {
		t.Helper()
		if err := pods[1].Do(func() error {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return netlink.LinkSetXdpFd(l, fd)
		}); err != nil {
			t.Fatal(err)
		}
	}
	links := func(n int) func(api.Status) bool {
		return func(s api.Status) bool { return s.Datapath.FastPath.Pods.Links == n }
	}
	inspect(program.FD())
	c.wait(other, "leaves out the pod with an XDP program", links(0))
	inspect(-1)
	c.wait(other, "takes the pod in again", links(1))
	goesShort()

	// So does another program that is attached to the pod's link.
	if host.TCX() {
		neighbour := tcx(t, other, podsLink(t, other).Attrs().Name, ebpf.AttachTCXEgress, -1)
		c.wait(other, "leaves out the pod with a tcx program", func(s api.Status) bool {
			p := s.Datapath.FastPath.Pods
			return p.Links == 0 && p.LeftOut["another program's tc filter or tcx program on its link"] == 1
		})
		eventually(t, "ours leave the pod's link", func() error {
			if left := filters(t, other); slices.ContainsFunc(left, func(f host.Filter) bool { return strings.HasPrefix(f.Link, "veth") }) {
				return fmt.Errorf("the filters are %v", left)
			}
			return nil
		})
		if err := neighbour.Close(); err != nil {
			t.Fatal(err)
		}
		c.wait(other, "takes the pod in again", links(1))
		goesShort()
	}
}

// route returns a function that adds or deletes a route to a pod.
func route(kind int, to *lab.Pod, do func(*netlink.Route) error) func() error {
	return func() error {
		return do(&netlink.Route{Type: kind, Dst: netlink.NewIPNet(to.Addrs[0].AsSlice())})
	}
}

// podsLink returns the host's end of the veth of a node's only pod.
func podsLink(t *testing.T, n *lab.Node) (found netlink.Link) {
	t.Helper()
	if err := n.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if l.Type() == "veth" && l.Attrs().MasterIndex != 0 {
				found = l
			}
		}
		if err == nil && found == nil {
			err = errors.New("there is no pod's link")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// TestPodPathLife tests that a connection outlives its daemon, and that no filter is left
// on the pods' links by a daemon with other flags and by cleanup.
func TestPodPathLife(t *testing.T) {
	c := newCluster(t, 2)
	c.setConfig(config)
	n := c.Nodes[0]
	p := c.start(n, podPath...)
	c.start(c.Nodes[1], podPath...)
	for _, n := range c.Nodes {
		c.waitReady(n, 1)
	}
	pods := c.pods()
	flow := startFlow(t, pods[0], pods[1])
	c.goesShort(n, flow)
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Exited()
	c.goesOn(flow)
	const own = 3      // of the tunnel, the uplink and the pair of veth
	withPod := own + 2 // with those of the pod's link
	if host.TCX() {
		withPod++ // that register them
	}
	if left := filters(t, n); len(left) != withPod {
		t.Errorf("while the daemon is not running the filters are %v, want %d", left, withPod)
	}
	asBefore(t, n, podsLink(t, n))
	p = c.start(n, podPath...)
	c.waitReady(n, 1)
	c.goesShort(n, flow)
	if left := filters(t, n); len(left) != withPod {
		t.Errorf("after a restart the filters are %v, want %d", left, withPod)
	}
	for flag, want := range map[string]int{"on": own, "off": 0} {
		stop(t, p)
		p = c.start(n, "--datapath", "kernel", "--fast-path", flag)
		c.wait(n, "is ready with the new flag", func(s api.Status) bool { return s.Ready && s.Datapath.FastPath.Mode == flag })
		c.goesOn(flow)
		if left := filters(t, n); len(left) != want {
			t.Errorf("--fast-path=%s: the filters %v are left, want %d", flag, left, want)
		}
		stop(t, p)
		p = c.start(n, podPath...)
		c.waitReady(n, 1)
		c.goesShort(n, flow)
	}
	if turns, longest, err := flow.stop(); err != nil {
		t.Errorf("the connection broke after %d round trips, the longest of %s: %v", turns, longest, err)
	}
	stop(t, p)
	c.cleanup(n)
	if left := filters(t, n); len(left) != 0 {
		t.Errorf("after cleanup the filters %v are left", left)
	}
}

// asBefore leaves tc filters on a pod's link, as culvert did before it attached its programs
// with tcx.
func asBefore(t *testing.T, n *lab.Node, l netlink.Link) {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Apache-2.0", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}, // TC_ACT_UNSPEC
	})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	if err := n.Do(func() error {
		if err := host.AddClsact(l); err != nil {
			return err
		}
		for parent, name := range map[uint32]string{netlink.HANDLE_MIN_INGRESS: "culvert_pod_out", netlink.HANDLE_MIN_EGRESS: "culvert_pod_in"} {
			if err := netlink.FilterReplace(&netlink.BpfFilter{
				FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: parent, Priority: names.FilterPriority, Handle: 1, Protocol: unix.ETH_P_ALL},
				Fd:          program.FD(), Name: name, DirectAction: true,
			}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// TestPodPathAuto has pods' packets take the short way by default, and the host's way while
// another program's rule counts on seeing each of them, unless a flag says otherwise.
func TestPodPathAuto(t *testing.T) {
	c := newClusterOf(t, lab.Options{Nodes: 2})
	c.setConfig(config)
	daemons := c.startAll("--datapath", "kernel")
	n := c.Nodes[0]
	pods := c.pods()
	flow := startFlow(t, pods[0], pods[1])
	c.goesShort(n, flow)
	run := func(args ...string) {
		t.Helper()
		if out, err := n.Run(t.Context(), "nft", args...); err != nil {
			t.Fatalf("nft %v: %v: %s", args, err, out)
		}
	}
	run("add", "table", "inet", "shaper")
	run("add", "chain", "inet", "shaper", "forward", "{ type filter hook forward priority 0; }")
	run("add", "rule", "inet", "shaper", "forward", "ip saddr 10.0.0.0/8 limit rate over 1000000/second drop")
	c.wait(n, "leaves each packet to the rule", func(s api.Status) bool {
		p := s.Datapath.FastPath.Pods
		return p != nil && p.Links == 0 && strings.Contains(p.Why, "table inet shaper, chain forward, rule 1 (limit, handle")
	})
	egress, ingress := c.podFrames(n)
	c.goesOn(flow)
	if e, i := c.podFrames(n); e != egress || i != ingress {
		t.Errorf("%d and %d frames went past the rule", e-egress, i-ingress)
	}
	stop(t, daemons[0])
	p := c.start(n, podPath...)
	c.goesShort(n, flow)
	stop(t, p)
	c.start(n, "--datapath", "kernel")
	c.wait(n, "leaves each packet to the rule again", func(s api.Status) bool {
		f := s.Datapath.FastPath
		return f != nil && f.Pods != nil && f.Pods.Why != ""
	})
	run("delete", "table", "inet", "shaper")
	c.goesShort(n, flow)
}
