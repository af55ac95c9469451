package test

import (
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/host"
)

// TestPolicies diverts or drops packets between pods by policy routing rules and IPsec
// policies, which the kernel applies before the main table's routes, the ones that the
// daemon keeps. `culvert doctor`, `ping` and `trace` name them, on this node and not the
// far one.
//
//	pod ── cni0 ── ip rule 100 ── table 100 (a default route elsewhere), or prohibit
//	                  │
//	               main table ── IPsec policy ── cvt.1
func TestPolicies(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.datapath = "kernel"
	c.setConfig(config)
	c.startAll("--fast-path=off")
	n, pods := c.Nodes[0], c.pods()
	ping(t, pods[0], pods[1])
	from, to := pods[0].Addrs[0], pods[1].Addrs[0]
	network := host.IPNet(netip.MustParsePrefix("10.5.0.0/16"))
	culvert := filepath.Join(c.bin, "culvert")
	if e := c.doctor(n, "--no-cni"); e.of("") != "" {
		t.Fatalf("on a healthy host:\n%s", e.of(""))
	}
	rule := func(change func(*netlink.Rule)) (do, undo func() error) {
		r := netlink.NewRule()
		r.Priority, r.Family = 100, netlink.FAMILY_V4
		change(r)
		return func() error { return netlink.RuleAdd(r) }, func() error { return netlink.RuleDel(r) }
	}
	elsewhere, back := rule(func(r *netlink.Rule) { r.Src, r.Table = network, 100 })
	forbid, allow := rule(func(r *netlink.Rule) { r.Dst, r.Type = network, unix.RTN_PROHIBIT })
	route := &netlink.Route{Table: 100, Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, Gw: c.FabricAddrs[0].AsSlice()}
	main := netlink.NewRule()
	main.Priority, main.Table, main.Family = 32766, unix.RT_TABLE_MAIN, netlink.FAMILY_V4
	var block []*netlink.XfrmPolicy
	for _, dir := range []netlink.Dir{netlink.XFRM_DIR_OUT, netlink.XFRM_DIR_FWD} {
		block = append(block, &netlink.XfrmPolicy{Src: network, Dst: network, Dir: dir, Action: netlink.XFRM_POLICY_BLOCK})
	}
	each := func(change func(*netlink.XfrmPolicy) error) func() error {
		return func() error {
			for _, p := range block {
				if err := change(p); err != nil {
					return err
				}
			}
			return nil
		}
	}
	for _, m := range []struct {
		name     string
		do, undo func() error
		check    string
		finding  []string // of doctor
		ping     string
		trace    []string
	}{
		{
			name: "a rule to another table", do: func() error {
				if err := netlink.RouteAdd(route); err != nil {
					return err
				}
				return elsewhere()
			}, undo: back,
			check: "policy-route", finding: []string{"leave via " + c.FabricAddrs[0].String() + " dev eth0", "100: from 10.5.0.0/16 lookup 100", "ip rule del priority 100"},
			trace: []string{"STOPPED at n1, route", "and not by cvt.1"},
		},
		{
			name: "a rule that prohibits", do: forbid, undo: allow,
			check: "policy-route", finding: []string{"are refused (prohibit)", "100: from all to 10.5.0.0/16 prohibit, "},
			ping:  "this host does not send to it: a prohibit route or rule refuses the packets",
			trace: []string{"STOPPED at n1, route", "a prohibit route rejects them", "`ip rule`"},
		},
		{
			name: "no rule for the main table", do: func() error { return netlink.RuleDel(main) }, undo: func() error { return netlink.RuleAdd(main) },
			check: "policy-route", finding: []string{"have no route; this host has no policy rule for the main table", "fix: ip rule add priority 32766 lookup main"},
			ping:  "network is unreachable",
			trace: []string{"STOPPED at n1, route"},
		},
		{
			name: "an IPsec policy", do: each(netlink.XfrmPolicyAdd), undo: each(netlink.XfrmPolicyDel),
			check: "ipsec-block", finding: []string{"src 10.5.0.0/16 dst 10.5.0.0/16 dir fwd action block", "ip xfrm policy delete src 10.5.0.0/16 dst 10.5.0.0/16 dir out"},
			ping:  "this host does not send to it: a rule of its packet filter, or an IPsec policy",
			trace: []string{"STOPPED at n1, rules: the IPsec policy"},
		},
	} {
		t.Run(m.name, func(t *testing.T) {
			if err := n.Do(m.do); err != nil {
				t.Fatal(err)
			}
			found := c.doctor(n, "--no-cni").of(m.check)
			for _, want := range m.finding {
				if !strings.Contains(found, want) {
					t.Errorf("doctor: %q is not said:\n%s", want, found)
				}
			}
			pinged, err := n.Run(t.Context(), culvert, "ping", "--all", "--count=1", "--run-dir", n.RunDir)
			if err == nil || !strings.Contains(string(pinged), m.ping) {
				t.Errorf("ping: %q is not said:\n%s", m.ping, pinged)
			}
			traced, _ := n.Run(t.Context(), culvert, "trace", from.String(), to.String(), "--run-dir", n.RunDir)
			for _, want := range m.trace {
				if !strings.Contains(string(traced), want) {
					t.Errorf("trace: %q is not said:\n%s", want, traced)
				}
			}
			if err := n.Do(m.undo); err != nil {
				t.Fatal(err)
			}
			ping(t, pods[0], pods[1])
		})
	}
}
