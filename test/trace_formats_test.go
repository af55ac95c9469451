package test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/lab"
	"culvert/internal/trace"
)

// TestTraceFormats is TestTrace in short for the other ways of packets: healthy, with
// the way to the peer's address blocked here (a tunnel's), and with packets dropped on
// the far node, in each of the network's address families.
func TestTraceFormats(t *testing.T) {
	t.Parallel()
	for _, f := range []struct {
		name, config, datapath string
		tunnel                 bool
		flags                  []string
	}{
		{"vxlan in the kernel", dual, "kernel", true, []string{"--fast-path=off"}}, // which follows a blackhole only after a while
		{"vxlan in userspace", dual, "userspace", true, nil},
		{"ipip in userspace", `{"Network":"10.5.0.0/16","Backend":{"Type":"ipip"}}`, "userspace", true, nil},
		{"host-gw", strings.Replace(dual, "vxlan", "host-gw", 1), "kernel", false, nil},
		{"vxlan with direct routes", strings.Replace(dual, `"Type":"vxlan"`, `"Type":"vxlan","DirectRouting":true`, 1), "kernel", false, nil},
	} {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			c := newClusterOf(t, lab.Options{Nodes: 2, Prefixes: dualUnderlay})
			c.datapath = f.datapath
			c.setConfig(f.config)
			c.startAll(f.flags...)
			pods := c.pods()
			n1, n2 := c.Nodes[0], c.Nodes[1]
			c.waitKept(n1, 2)
			c.waitKept(n2, 2)
			for i, to := range pods[1].Addrs {
				from := pods[0].Addrs[i]
				far := fmt.Sprintf("nsenter --net=%s env CULVERT_RUN_DIR=%s %s", n2.Path, n2.RunDir, filepath.Join(c.bin, "culvert"))
				stops := func(what, node, layer, says string) error {
					out, _ := n1.Run(t.Context(), filepath.Join(c.bin, "culvert"), "trace", "--run-dir", n1.RunDir, from.String(), to.String(), "--far", far, "-o", "json")
					var r traced
					if err := json.Unmarshal(out, &r); err != nil {
						return fmt.Errorf("%s: %w: %s", what, err, out)
					}
					if node == "" {
						if r.Verdict != "passes" || r.Probe == nil || !r.Probe.Answered {
							return fmt.Errorf("%s:\n%s", what, out)
						}
						return nil
					}
					if r.Verdict != "stopped" || r.Culprit == nil || r.Culprit.Node != node || r.Culprit.Layer != layer || r.Culprit.Fix == "" || !strings.Contains(r.Culprit.Detail, says) {
						return fmt.Errorf("%s: the culprit is not named:\n%s", what, out)
					}
					return nil
				}
				eventually(t, "healthy", func() error { return stops("healthy", "", "", "") })
				if err := n2.Do(func() error { return dropForwarded(to) }); err != nil {
					t.Fatal(err)
				}
				if err := stops("dropped there", "n2", trace.LayerRules, "nftables, table inet castle, chain moat"); err != nil {
					t.Error(err)
				}
				if err := n2.Do(func() error { return dropForwarded(netip.Addr{}) }); err != nil {
					t.Fatal(err)
				}
				if f.tunnel {
					block := &netlink.Route{Dst: &net.IPNet{IP: n2.Addrs[i].AsSlice(), Mask: net.CIDRMask(n2.Addrs[i].BitLen(), n2.Addrs[i].BitLen())}, Type: unix.RTN_BLACKHOLE}
					if err := n1.Do(func() error { return netlink.RouteAdd(block) }); err != nil {
						t.Fatal(err)
					}
					eventually(t, "blocked here", func() error {
						return stops("blocked here", "n1", trace.LayerUnderlay, "to the peer's address "+n2.Addrs[i].String())
					})
					if err := n1.Do(func() error { return netlink.RouteDel(block) }); err != nil {
						t.Fatal(err)
					}
				}
				eventually(t, "healthy again", func() error { return stops("healthy again", "", "", "") })
			}
		})
	}
}

// dropForwarded adds an nftables table that drops what is forwarded to an address; the
// zero address removes the table.
func dropForwarded(to netip.Addr) error {
	x, err := nftables.New()
	if err != nil {
		return err
	}
	table := x.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "castle"})
	if !to.IsValid() {
		x.DelTable(table)
		return x.Flush()
	}
	family, offset, size := byte(unix.NFPROTO_IPV4), uint32(16), uint32(4)
	if to.Is6() {
		family, offset, size = unix.NFPROTO_IPV6, 24, 16
	}
	chain := x.AddChain(&nftables.Chain{Name: "moat", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
	x.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: to.AsSlice()},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	return x.Flush()
}
