package test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/lab"
)

// TestFirewallsAndSettings runs a node on a host with a firewall and changed sysctls, and
// changes more while it runs. After each change pods of both nodes reach each other in
// both directions and both families, or the node's status names the obstacle.
//
//	pod ── n1 ── underlay ── n2 ── pod
//	       ▲ firewall, settings, routes
func TestFirewallsAndSettings(t *testing.T) {
	t.Parallel()
	for _, datapath := range []string{"kernel", "userspace"} {
		t.Run(datapath, func(t *testing.T) {
			t.Parallel() // it mostly waits
			testWornHost(t, datapath)
		})
	}
}

func testWornHost(t *testing.T, datapath string) {
	c := newClusterOf(t, lab.Options{Nodes: 2, Prefixes: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/24"), netip.MustParsePrefix("fd00:198:18::/64")}})
	c.datapath = datapath
	c.setConfig(dual)
	n := c.Nodes[0]
	device := map[string]string{"kernel": "cvt.1", "userspace": "culvert0"}[datapath]
	device6 := map[string]string{"kernel": "cvt6.1", "userspace": "culvert0"}[datapath]

	// Before the start of the daemon: cases F1, F3, F4, F7.
	do := func(t *testing.T, what string, f func() error) {
		t.Helper()
		if err := n.Do(f); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	set := func(key, value string) func() error {
		return func() error { return os.WriteFile("/proc/sys/"+key, []byte(value), 0) }
	}
	ra := "net/ipv6/conf/" + n.Link + "/accept_ra"
	do(t, "a firewall", iptablesLike(func(x *iptables) {
		x.chain("ufw-reject-forward", &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH})
		x.base("FORWARD", nftables.ChainHookForward, nftables.ChainPolicyDrop, []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictJump, Chain: "ufw-reject-forward"}})
	}))
	for _, s := range [][2]string{
		{"net/ipv4/ip_forward", "1"},
		{"net/ipv4/conf/default/forwarding", "0"},
		{"net/ipv4/conf/all/rp_filter", "1"},
		{"net/ipv6/conf/all/forwarding", "0"},
		{ra, "1"},
		{"net/ipv6/conf/default/disable_ipv6", "1"},
	} {
		do(t, s[0], set(s[0], s[1]))
	}
	advertised := &netlink.Route{Dst: &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}, Gw: net.ParseIP("fe80::1"), Protocol: unix.RTPROT_RA, Priority: 512}
	do(t, "a default route from a router", func() error {
		l, err := netlink.LinkByName(n.Link)
		if err != nil {
			return err
		}
		advertised.LinkIndex = l.Attrs().Index
		return netlink.RouteAdd(advertised)
	})
	c.startAll()
	pods := c.pods()
	reach := func(t *testing.T) {
		t.Helper()
		eventually(t, "pods reach each other", func() error { return reaches(t, pods) })
	}
	warned := func(s api.Status, check string) (text string) {
		for _, w := range s.Warnings {
			if w.Check == check {
				text += w.Text + " / " + w.Fix + "\n"
			}
		}
		return text
	}
	// Not all changes are announced by the kernel, so have the daemon look.
	now := func(t *testing.T) (api.Status, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		return api.GetStatusNow(ctx, n.RunDir)
	}
	quiet := func(t *testing.T) {
		t.Helper()
		eventually(t, "has no warnings", func() error {
			s, err := now(t)
			if len(s.Warnings) > 0 {
				err = fmt.Errorf("%v", s.Warnings)
			}
			return err
		})
	}
	reach(t)
	quiet(t)
	if got, err := n.Sysctl(ra); err != nil || got != "2" {
		t.Errorf("accept_ra is %q (%v)", got, err)
	}
	do(t, "the default route", func() error {
		all, err := netlink.RouteListFiltered(netlink.FAMILY_V6, advertised, netlink.RT_FILTER_GW|netlink.RT_FILTER_PROTOCOL)
		if len(all) != 1 {
			err = errors.Join(err, fmt.Errorf("%d default routes from the router, want 1", len(all)))
		}
		return err
	})
	self := func() netip.Prefix {
		s, err := c.status(n)
		if err != nil || s.Lease == nil {
			t.Fatal(err)
		}
		return s.Lease.Subnets[0]
	}()
	stale := func(do func(*netlink.Route) error) func() error {
		return func() error {
			l, err := netlink.LinkByName(n.Link)
			if err != nil {
				return err
			}
			// Half of the subnet, since cni0's route wins against one of the same length.
			half := netip.PrefixFrom(self.Masked().Addr(), self.Bits()+1)
			return do(&netlink.Route{Dst: host.IPNet(half), Gw: c.Nodes[1].Addrs[0].AsSlice(), LinkIndex: l.Attrs().Index, Protocol: unix.RTPROT_BOOT})
		}
	}
	inet := func(policy nftables.ChainPolicy) func() error {
		return func() error {
			x, err := nftables.New()
			if err != nil {
				return err
			}
			established := binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
			table := x.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "castle"})
			ch := x.AddChain(&nftables.Chain{Name: "gate", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPrioritySecurity, Policy: &policy})
			x.AddRule(&nftables.Rule{Table: table, Chain: ch, Exprs: []expr.Any{
				&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
				&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: established, Xor: make([]byte, 4)},
				&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
				&expr.Verdict{Kind: expr.VerdictAccept},
			}})
			// Accept ICMPv6, which neighbour discovery needs.
			x.AddRule(&nftables.Rule{Table: table, Chain: ch, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_ICMPV6}}, &expr.Verdict{Kind: expr.VerdictAccept},
			}})
			return x.Flush()
		}
	}

	for _, e := range []struct {
		name   string
		event  func() error
		repair host.Kind // the repair to be counted, if check is empty
		check  string    // the expected warning's check; then pods need not reach each other
		says   string    // part of the expected warning
		undo   func() error
	}{
		{
			name: "F2: INPUT drops packets that are not established",
			event: iptablesLike(func(x *iptables) {
				x.base("INPUT", nftables.ChainHookInput, nftables.ChainPolicyDrop,
					x.state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED),
					[]expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_ICMPV6}}, &expr.Verdict{Kind: expr.VerdictAccept}})
			}),
			repair: host.KindForward,
		},
		{
			name: "the firewall is reloaded without our rules",
			event: iptablesLike(func(x *iptables) {
				x.flush("FORWARD")
				x.flush("INPUT")
				x.base("FORWARD", nftables.ChainHookForward, nftables.ChainPolicyDrop, []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictJump, Chain: "ufw-reject-forward"}})
			}),
			repair: host.KindForward,
		},
		{
			name: "a rule that rejects is inserted before ours",
			event: iptablesLike(func(x *iptables) {
				x.insert("FORWARD", &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH})
				x.insert("INPUT", &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictJump, Chain: "ufw-reject-forward"})
			}),
			repair: host.KindForward,
			undo: iptablesLike(func(x *iptables) {
				x.flush("INPUT")
				x.policy("INPUT", nftables.ChainHookInput, nftables.ChainPolicyAccept)
			}),
		},
		{name: "F3: our device does not forward", event: set("net/ipv4/conf/"+device+"/forwarding", "0"), repair: host.KindSysctl},
		{name: "F3: the pods' bridge does not forward", event: set("net/ipv4/conf/cni0/forwarding", "0"), repair: host.KindSysctl},
		{name: "F3: the underlay does not forward", event: set("net/ipv4/conf/"+n.Link+"/forwarding", "0"), repair: host.KindSysctl},
		{name: "F7: IPv6 is disabled on our device", event: set("net/ipv6/conf/"+device6+"/disable_ipv6", "1"), repair: host.KindSysctl},
		{name: "the pods' bridge is set down", event: ipCommands("link set cni0 down"), repair: host.KindPods},
		{name: "the pods' bridge loses its addresses", event: without(netlink.AddrList, netlink.AddrDel), repair: host.KindPods},
		{name: "the pods' bridge loses its routes", event: without(netlink.RouteList, func(_ netlink.Link, r *netlink.Route) error { return netlink.RouteDel(r) }), repair: host.KindPods},
		{name: "IPv6 is disabled on the pods' bridge", event: set("net/ipv6/conf/cni0/disable_ipv6", "1"), repair: host.KindPods},
		{name: "a pod's link is taken from the bridge", event: podLink("nomaster"), check: "host-pods", says: "is not a port of the pods' bridge cni0", undo: podLink("master cni0")},
		{
			name: "a peer's address is unreachable", event: ipCommands("route add unreachable " + c.Nodes[1].Addrs[0].String() + "/32"), check: "underlay-route",
			says: "tunnel packets to the peer " + c.Nodes[1].Addrs[0].String() + " have no route", undo: ipCommands("route del unreachable " + c.Nodes[1].Addrs[0].String() + "/32"),
		},
		{name: "strict reverse path filtering", event: set("net/ipv4/conf/"+device+"/rp_filter", "1"), repair: host.KindSysctl},
		{
			name: "F6: a route for part of this node's subnet via a peer", event: stale(netlink.RouteAdd), check: "foreign-route",
			says: "this node's own pods", undo: stale(netlink.RouteDel),
		},
		{
			name: "another program's rule drops the tunnel's port",
			event: iptablesLike(func(x *iptables) {
				x.append("INPUT", &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
					&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(8472)},
					&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop})
			}),
			check: "input-drop", says: "table filter, chain INPUT, rule 1", undo: iptablesLike(func(x *iptables) { x.flush("INPUT") }),
		},
		{
			name: "F2: a chain of an nftables table drops by policy", event: inet(nftables.ChainPolicyDrop), check: "input-drop",
			says: "table inet castle, chain gate, by its policy", undo: inet(nftables.ChainPolicyAccept),
		},
		{
			name: "F2: packets from the peer are dropped at ingress", event: eaten(n.Link, true), check: "silent-peer", says: c.Nodes[1].Addrs[0].String(), undo: eaten(n.Link, false),
		},
	} {
		t.Run(e.name, func(t *testing.T) {
			before, err := c.status(n)
			if err != nil {
				t.Fatal(err)
			}
			do(t, "the event", e.event)
			if e.check == "" {
				reach(t)
				s := c.wait(n, "repairs", func(s api.Status) bool {
					return s.Datapath.Repairs[string(e.repair)] > before.Datapath.Repairs[string(e.repair)]
				})
				if len(s.Warnings) > 0 {
					t.Errorf("warnings: %v", s.Warnings)
				}
			} else {
				// Keep sending, since the warnings depend on traffic.
				end := time.Now().Add(70 * time.Second)
				for text := ""; !strings.Contains(text, e.says); time.Sleep(200 * time.Millisecond) {
					_ = reaches(t, pods)
					s, err := now(t)
					if err == nil {
						text = warned(s, e.check)
					}
					if time.Now().After(end) {
						t.Fatalf("the expected warning is missing: %v", s.Warnings)
					}
				}
			}
			if e.check == "input-drop" && datapath == "kernel" {
				c.wait(n, "turns the fast path off", func(s api.Status) bool {
					f := s.Datapath.FastPath
					return f != nil && !f.On && strings.Contains(f.Why, e.says)
				})
			}
			if e.check == "silent-peer" {
				s, err := c.status(n)
				if err != nil || !strings.Contains(warned(s, "input-drop"), "table netdev moat, chain bridge, rule 1") || len(s.Datapath.SilentPeers) == 0 {
					t.Errorf("the warnings do not name the cause: %v (%v)", s.Warnings, err)
				}
				if _, text := c.get(n, "/metrics"); strings.Contains(text, "culvert_silent_peers 0") || !strings.Contains(text, "culvert_silent_peers ") {
					t.Error("the metric culvert_silent_peers is 0 or missing")
				}
			}
			if e.undo != nil {
				do(t, "undoing it", e.undo)
			}
			reach(t)
			quiet(t)
		})
	}
}

// without returns a function that deletes all of a kind from the pods' bridge.
func without[T any](list func(netlink.Link, int) ([]T, error), del func(netlink.Link, *T) error) func() error {
	return func() error {
		l, err := netlink.LinkByName("cni0")
		if err != nil {
			return err
		}
		all, err := list(l, netlink.FAMILY_ALL)
		for _, x := range all {
			err = errors.Join(err, del(l, &x))
		}
		return err
	}
}

// podLink returns a function that changes the first port of the pods' bridge, or a
// former one: the pod's link.
func podLink(change string) func() error {
	return func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			if l.Type() == "veth" && strings.HasPrefix(l.Attrs().Name, "veth") {
				return runIP(strings.Fields("link set " + l.Attrs().Name + " " + change))
			}
		}
		return errors.New("there is no link of a pod")
	}
}

// reaches pings between two pods, in both directions and each family.
func reaches(t *testing.T, pods []*lab.Pod) error {
	var errs []error
	for _, way := range [][2]*lab.Pod{{pods[0], pods[1]}, {pods[1], pods[0]}} {
		for i, a := range way[1].Addrs {
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			_, err := way[0].Ping(ctx, way[0].Addrs[i], a)
			cancel()
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// iptables writes to the filter tables of both families as iptables-nft does.
type iptables struct {
	c      *nftables.Conn
	tables []*nftables.Table
}

// iptablesLike returns a function that applies f in one transaction.
func iptablesLike(f func(*iptables)) func() error {
	return func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		x := &iptables{c: c}
		for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
			x.tables = append(x.tables, c.AddTable(&nftables.Table{Family: family, Name: "filter"}))
		}
		f(x)
		return c.Flush()
	}
}

func (x *iptables) policy(name string, hook *nftables.ChainHook, policy nftables.ChainPolicy) {
	for _, t := range x.tables {
		x.c.AddChain(&nftables.Chain{Name: name, Table: t, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter, Policy: &policy})
	}
}

func (x *iptables) base(name string, hook *nftables.ChainHook, policy nftables.ChainPolicy, rules ...[]expr.Any) {
	x.policy(name, hook, policy)
	for _, r := range rules {
		x.append(name, r...)
	}
}

func (x *iptables) chain(name string, rule ...expr.Any) {
	for _, t := range x.tables {
		x.c.AddChain(&nftables.Chain{Name: name, Table: t})
	}
	x.append(name, rule...)
}

func (x *iptables) append(chain string, rule ...expr.Any) {
	for _, t := range x.tables {
		x.c.AddRule(&nftables.Rule{Table: t, Chain: &nftables.Chain{Table: t, Name: chain}, Exprs: rule})
	}
}

func (x *iptables) insert(chain string, rule ...expr.Any) {
	for _, t := range x.tables {
		x.c.InsertRule(&nftables.Rule{Table: t, Chain: &nftables.Chain{Table: t, Name: chain}, Exprs: rule})
	}
}

func (x *iptables) flush(chain string) {
	for _, t := range x.tables {
		x.c.FlushChain(&nftables.Chain{Table: t, Name: chain})
	}
}

// state returns a rule that accepts packets with the given conntrack states.
func (*iptables) state(bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
		&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept},
	}
}
