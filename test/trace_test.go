package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/lab"
	"culvert/internal/trace"
)

// traced is what `culvert trace` says.
type traced struct {
	Verdict string
	Culprit *trace.Step
	Steps   []trace.Step
	Probe   *trace.Probe
}

// TestTrace breaks the path between two pods at one place after another, on this node, on
// the far one and between them: `culvert trace` names the cause, and reports an intact
// path as such. The outputs are in docs/trace.md.
//
//	pod ── n1 ── fabric ── n2 ── pod
func TestTrace(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.datapath = "kernel"
	c.setConfig(config)
	daemons := c.startAll()
	pods := c.pods()
	ping(t, pods[0], pods[1])
	n1, n2 := c.Nodes[0], c.Nodes[1]
	c.waitKept(n1, 2)
	c.waitKept(n2, 2)
	from, to := pods[0].Addrs[0], pods[1].Addrs[0]
	culvert := filepath.Join(c.bin, "culvert")
	farCommand := fmt.Sprintf("nsenter --net=%s env CULVERT_RUN_DIR=%s %s", n2.Path, n2.RunDir, culvert)
	tables := os.Getenv("CULVERT_TRACE_TABLES") != "" // as docs/trace.md has them
	run := func(args ...string) (traced, string) {
		t.Helper()
		args = append([]string{"trace", "--run-dir", n1.RunDir}, args...)
		out, err := n1.Run(t.Context(), culvert, append(args, "-o", "json")...)
		var r traced
		if jerr := json.Unmarshal(out, &r); jerr != nil {
			t.Fatalf("culvert %v: %v: %s (%v)", args, jerr, out, err)
		}
		if (err != nil) != (r.Verdict == "stopped") {
			t.Errorf("%s, and it ended with %v", r.Verdict, err)
		}
		if !tables {
			return r, string(out)
		}
		text, _ := n1.Run(t.Context(), culvert, args...)
		return r, string(text)
	}
	for _, args := range [][]string{
		{from.String(), to.String()},
		{from.String(), to.String(), "--far", farCommand},
		{"node", "n2"},
		{from.String(), "n2"},
		{from.String(), to.String(), "--port", "4444"},
		{from.String(), to.String(), "--protocol", "udp", "--port", "4444"},
	} {
		if r, text := run(args...); r.Verdict != "passes" || r.Probe == nil || !r.Probe.Answered {
			t.Errorf("trace %v on a healthy way:\n%s", args, text)
		}
	}

	do := func(n *lab.Namespace, f func() error) {
		t.Helper()
		if err := n.Do(f); err != nil {
			t.Fatal(err)
		}
	}
	// routes deletes the routes that have a gateway, and restores them.
	routes := func() (take, give func() error) {
		var taken []netlink.Route
		each := func(change func(*netlink.Route) error) (err error) {
			for _, r := range taken {
				if err == nil {
					err = change(&r)
				}
			}
			return err
		}
		take = func() error {
			all, err := netlink.RouteList(nil, netlink.FAMILY_V4)
			for _, r := range all {
				if r.Gw != nil {
					taken = append(taken, r)
				}
			}
			if err != nil {
				return err
			}
			return each(netlink.RouteDel)
		}
		return take, func() error { return each(netlink.RouteAdd) }
	}
	take1, give1 := routes()
	take2, give2 := routes()
	// port is the host's end of a pod.
	port := func(p *lab.Pod, change func(netlink.Link) error) func() error {
		return func() error {
			var index int
			if err := p.Do(func() error {
				l, err := netlink.LinkByName("eth0")
				if err == nil {
					index = l.Attrs().ParentIndex
				}
				return err
			}); err != nil {
				return err
			}
			l, err := netlink.LinkByIndex(index)
			if err != nil {
				return err
			}
			return change(l)
		}
	}
	bridged := func(l netlink.Link) error {
		b, err := netlink.LinkByName("cni0")
		if err != nil {
			return err
		}
		return netlink.LinkSetMaster(l, b)
	}
	// moat drops packets from one address to another in an nftables table.
	moat := func(hook *nftables.ChainHook, match ...expr.Any) func() error {
		return func() error {
			x, err := nftables.New()
			if err != nil {
				return err
			}
			table := x.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "castle"})
			if match == nil {
				x.DelTable(table)
				return x.Flush()
			}
			ch := x.AddChain(&nftables.Chain{Name: "moat", Table: table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter})
			x.AddRule(&nftables.Rule{Table: table, Chain: ch, Exprs: []expr.Any{&expr.Counter{}}})
			x.AddRule(&nftables.Rule{Table: table, Chain: ch, Exprs: append(match, &expr.Verdict{Kind: expr.VerdictDrop})})
			return x.Flush()
		}
	}
	destination := func(a netip.Addr) []expr.Any {
		return []expr.Any{
			&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a.AsSlice()},
		}
	}
	tunnelPort := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(8472)},
	}
	fdb := func() error {
		l, err := netlink.LinkByName("cvt.1")
		if err != nil {
			return err
		}
		all, err := netlink.NeighList(l.Attrs().Index, unix.AF_BRIDGE)
		for _, e := range all {
			if err == nil && e.State&netlink.NUD_PERMANENT != 0 {
				err = netlink.NeighDel(&e)
			}
		}
		return err
	}
	forwardChain := func(rule ...expr.Any) func() error {
		return iptablesLike(func(x *iptables) {
			x.base("FORWARD", nftables.ChainHookForward, nftables.ChainPolicyAccept)
			x.flush("FORWARD")
			if rule != nil {
				x.append("FORWARD", rule...)
			}
		})
	}
	blackhole := func(change func(*netlink.Route) error) func() error {
		return func() error {
			return change(&netlink.Route{Dst: &net.IPNet{IP: n2.Addrs[0].AsSlice(), Mask: net.CIDRMask(32, 32)}, Type: unix.RTN_BLACKHOLE})
		}
	}
	narrow := func(mtu int) func() error {
		return func() error {
			l, err := netlink.LinkByName(n2.ID)
			if err != nil {
				return err
			}
			return netlink.LinkSetMTU(l, mtu)
		}
	}
	reach := func() {
		t.Helper()
		ping(t, pods[0], pods[1])
	}

	type breach struct {
		name     string
		on       *lab.Namespace
		do, undo func() error
		to       netip.Addr // instead of the pod of n2
		layer    string     // of the culprit
		node     string
		says     []string
		far      bool // ask the far node; else what it is told by packets is looked at too
		deduced  []string
		bypassed bool // by the fast path, until the daemon has seen it
	}
	cases := []breach{
		{
			name: "pod route", on: pods[0].Namespace, do: take1, undo: give1,
			node: "n1", layer: trace.LayerPodRoute, says: []string{"has no route to " + to.String()},
		},
		{
			name: "bridge", on: n1.Namespace, do: port(pods[0], netlink.LinkSetNoMaster), undo: port(pods[0], bridged),
			node: "n1", layer: trace.LayerBridge, says: []string{"is not on a bridge"},
		},
		{
			name: "iptables", on: n1.Namespace, do: forwardChain(append(destination(to)[2:], &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop})...), undo: forwardChain(),
			node: "n1", layer: trace.LayerRules, says: []string{"iptables, table filter, chain FORWARD, rule 1 (drop, handle", to.String()},
		},
		{
			name: "nftables", on: n1.Namespace, do: moat(nftables.ChainHookForward, destination(to)...), undo: moat(nil),
			node: "n1", layer: trace.LayerRules, says: []string{"nftables, table inet castle, chain moat, rule 2 (drop, handle"},
		},
		{
			name: "lease", on: n1.Namespace, do: ipCommands(), undo: ipCommands(), to: netip.MustParseAddr("10.5.250.7"),
			node: "n1", layer: trace.LayerLease, says: []string{"no lease covers 10.5.250.7"},
		},
		{
			name: "underlay route", on: n1.Namespace, do: blackhole(netlink.RouteAdd), undo: blackhole(netlink.RouteDel),
			node: "n1", layer: trace.LayerUnderlay, says: []string{"no route from 198.18.0.1 to the peer's address 198.18.0.2", "blackhole"}, bypassed: true,
		},
		{
			name: "path MTU", on: c.Fabric, do: narrow(1400), undo: narrow(1500),
			node: "n1", layer: trace.LayerMTU, says: []string{"but the pod sends up to 1450"},
		},
		{
			name: "far: rules for the tunnel's port", on: n2.Namespace, do: moat(nftables.ChainHookInput, tunnelPort...), undo: moat(nil), far: true,
			node: "n2", layer: trace.LayerTunnelRules, says: []string{"nftables, table inet castle, chain moat, rule 2 (drop, handle"},
			deduced: []string{"answers on another UDP port but not on the tunnel's port 8472"}, bypassed: true,
		},
		{
			name: "far: bridge", on: n2.Namespace, do: port(pods[1], netlink.LinkSetNoMaster), undo: port(pods[1], bridged), far: true,
			node: "n2", layer: trace.LayerBridge, says: []string{"is not on a bridge"},
			deduced: []string{"answers through the tunnel, but the pod " + to.String() + " does not"},
		},
		{
			name: "far: pod route", on: pods[1].Namespace, do: take2, undo: give2, far: true,
			node: "n2", layer: trace.LayerPodRoute, says: []string{"the pod " + to.String() + " has no route to " + from.String()},
			deduced: []string{"answers through the tunnel, but the pod " + to.String() + " does not"},
		},
	}
	play := func(b breach) {
		t.Run(b.name, func(t *testing.T) {
			do(b.on, b.do)
			target := to
			if b.to.IsValid() {
				target = b.to
			}
			args := []string{from.String(), target.String()}
			if b.bypassed {
				eventually(t, "the trace does not stop", func() error {
					if r, text := run(args...); r.Verdict != "stopped" {
						return errors.New(text)
					}
					return nil
				})
			}
			if b.deduced != nil {
				r, text := run(args...)
				if r.Verdict != "stopped" || r.Culprit == nil || r.Culprit.Node != "n2" {
					t.Fatalf("without the far node's word:\n%s", text)
				}
				for _, want := range b.deduced {
					if !strings.Contains(r.Culprit.Detail, want) {
						t.Errorf("%q is not deduced:\n%s", want, text)
					}
				}
			}
			if b.far {
				args = append(args, "--far", farCommand)
			}
			r, text := run(args...)
			if r.Verdict != "stopped" || r.Culprit == nil || r.Culprit.Node != b.node || r.Culprit.Layer != b.layer || r.Culprit.Fix == "" {
				t.Errorf("the culprit is not named:\n%s", text)
			}
			for _, want := range b.says {
				if r.Culprit == nil || !strings.Contains(r.Culprit.Detail, want) {
					t.Errorf("%q is not said:\n%s", want, text)
				}
			}
			if b.name == "nftables" && (r.Probe == nil || len(r.Probe.Dropped) == 0 || r.Probe.Dropped[0].Table != "castle" || r.Probe.Dropped[0].Handle == 0) {
				t.Errorf("the packet was not followed to its end: %+v", r.Probe)
			}
			if _, err := os.Stat("/sys/kernel/tracing/events/skb/kfree_skb/enable"); err == nil && b.name == "nftables" && r.Probe != nil && os.Geteuid() == 0 {
				if got := fmt.Sprint(r.Probe.Reasons); !strings.Contains(got, "NETFILTER_DROP") {
					t.Errorf("the kernel's reasons: %s", got)
				}
			}
			if tables {
				t.Logf("\n%s", regexp.MustCompile(`/run/netns/cvt-[0-9a-f]*-`).ReplaceAllString(text, "/run/netns/"))
			}
			do(b.on, b.undo)
			reach()
		})
	}
	for _, b := range cases {
		play(b)
	}

	// What a daemon repairs at once can only be observed without one. The fast path would
	// carry packets past the FDB without one.
	stop := func() {
		for _, d := range daemons {
			if err := d.Stop(); err != nil {
				t.Fatal(err)
			}
		}
	}
	stop()
	daemons = c.startAll("--fast-path=off")
	stop()
	mend := func(n *lab.Node) func() error { // as a daemon would
		return func() error {
			c.doctor(n, "--fix", "--no-cni")
			return nil
		}
	}
	for _, b := range []breach{
		{
			name: "sysctl", on: n1.Namespace, do: ipCommands("sysctl net/ipv4/conf/cni0/forwarding 0"), undo: ipCommands("sysctl net/ipv4/conf/cni0/forwarding 1"),
			node: "n1", layer: trace.LayerSetting, says: []string{"net.ipv4.conf.cni0.forwarding is 0"},
		},
		{
			name: "far: sysctl", on: n2.Namespace, do: ipCommands("sysctl net/ipv4/conf/cvt.1/forwarding 0"), undo: mend(n2), far: true,
			node: "n2", layer: trace.LayerSetting, says: []string{"net.ipv4.conf.cvt/1.forwarding is 0"}, deduced: []string{"answers through the tunnel"},
		},
		{
			name: "FDB", on: n1.Namespace, do: fdb, undo: mend(n1),
			node: "n1", layer: trace.LayerFDB, says: []string{"cvt.1 has no FDB entry for"},
		},
		{
			name: "far: tunnel port", on: n2.Namespace, do: ipCommands("link del cvt.1"), undo: mend(n2), far: true,
			node: "n2", layer: trace.LayerTunnel, says: []string{"there is no device cvt.1"}, deduced: []string{"UDP port 8472 is not open"},
		},
	} {
		play(b)
	}
}
