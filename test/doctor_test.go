package test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// examination is what `culvert doctor` says of a node.
type examination []struct {
	Check    string
	Findings []struct {
		Severity, Check, Text, Fix string
		Repairs                    []string
		Actions                    []struct {
			Command string
			Others  bool
		}
	}
}

// of returns the findings with a check, one a line. What the machine that the
// test runs on has is left out.
func (e examination) of(check string) string {
	var all []string
	for _, r := range e {
		for _, f := range r.Findings {
			if (check == "" || f.Check == check) && !(f.Check == "clock" && strings.Contains(f.Text, "synchronises")) {
				all = append(all, fmt.Sprintf("%s %s: %s; fix: %s", f.Severity, f.Check, f.Text, f.Fix))
			}
		}
	}
	return strings.Join(all, "\n")
}

// doctor runs `culvert doctor` on a node.
func (c *cluster) doctor(n *lab.Node, args ...string) examination {
	c.t.Helper()
	args = append([]string{"doctor", "--run-dir", n.RunDir, "-o", "json"}, args...)
	out, err := n.Run(c.t.Context(), filepath.Join(c.bin, "culvert"), args...)
	var e examination
	if jerr := json.Unmarshal(out, &e); jerr != nil {
		c.t.Fatalf("culvert %v: %v: %s (%v)", args, jerr, out, err)
	}
	return e
}

// installCNI makes directories as a container runtime has them, with the node's
// configuration.
func (c *cluster) installCNI(n *lab.Node) (flags []string) {
	c.t.Helper()
	bin, conf := c.t.TempDir(), c.t.TempDir()
	text, err := lab.DefaultConflist(n)
	if err == nil {
		err = os.WriteFile(filepath.Join(conf, "10-culvert.conflist"), text, 0o644)
	}
	for _, p := range []string{"culvert-cni", "cni/bridge", "cni/host-local"} {
		if err == nil {
			err = os.Symlink(filepath.Join(c.bin, p), filepath.Join(bin, filepath.Base(p)))
		}
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return []string{"--cni-bin-dir", bin, "--cni-conf-dir", conf}
}

// TestDoctorUnderAStoppedDaemon breaks a host on which no daemon runs, one thing after
// the other: `culvert doctor` finds each, from what the last daemon has left, and names
// the fix; `culvert doctor --fix` repairs what a daemon would repair, and names what
// belongs to another program. After that the doctor has no finding.
func TestDoctorUnderAStoppedDaemon(t *testing.T) {
	t.Parallel()
	for _, datapath := range []string{"kernel", "userspace"} {
		t.Run(datapath, func(t *testing.T) {
			t.Parallel()
			testDoctor(t, datapath)
		})
	}
}

func testDoctor(t *testing.T, datapath string) {
	c := newClusterOf(t, lab.Options{Nodes: 2, Prefixes: dualUnderlay})
	c.datapath = datapath
	c.setConfig(dual)
	n := c.Nodes[0]
	daemons := c.startAll()
	s := c.waitReady(n, 1)
	pod, err := n.AddPod(t.Context(), "p1")
	if err != nil {
		t.Fatal(err)
	}
	if err := pod.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.waitKept(n, 2)
	if err := daemons[0].Stop(); err != nil {
		t.Fatal(err)
	}
	cniFlags := c.installCNI(n)
	device := device(datapath)
	subnet := s.Lease.Subnets[0]

	// These two findings are always there: that no daemon runs, and that therefore no pod
	// is added.
	background := regexp.MustCompile(`(?m)^(bad daemon: .*no daemon answers.*|bad cni: no pod can be added: .*)\n?`)
	look := func(args ...string) (examination, string) {
		e := c.doctor(n, append(cniFlags, args...)...)
		return e, strings.TrimSpace(background.ReplaceAllString(e.of(""), ""))
	}
	if _, all := look(); all != "" {
		t.Errorf("on a healthy host:\n%s", all)
	}

	edit := func(path string, change func(string) string) func() error {
		return func() error {
			b, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(path, []byte(change(string(b))), 0o644)
			}
			return err
		}
	}
	kept := func(path string) func() error { // restores a file
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return func() error { return os.WriteFile(path, b, 0o644) }
	}
	store := filepath.Join(n.StateDir, "networks", "culvert")
	for _, b := range []struct {
		name   string
		both   bool // in either datapath; else in the kernel's alone
		do     func() error
		check  string
		says   []string
		fixed  bool         // --fix mends it
		others bool         // only with --yes
		undo   func() error // if it is not fixed
	}{
		{
			name: "U5: the device sends from another address", check: "outer-source", fixed: true,
			says: []string{"cvt.1 sends from 198.18.0.77", "this node's lease has 198.18.0.1", "ip link del cvt.1"},
			do: func() error {
				l, err := netlink.LinkByName("cvt.1")
				if err != nil {
					return err
				}
				v := *l.(*netlink.Vxlan)
				up, err := netlink.LinkByName(n.Link)
				if err != nil {
					return err
				}
				attrs := netlink.NewLinkAttrs()
				attrs.Name, attrs.HardwareAddr, attrs.MTU = "cvt.1", v.HardwareAddr, v.MTU
				if err := netlink.LinkDel(l); err != nil {
					return err
				}
				return netlink.LinkAdd(&netlink.Vxlan{
					LinkAttrs: attrs, VxlanId: 1, Port: 8472, VtepDevIndex: up.Attrs().Index, UDPCSum: true,
					SrcAddr: netip.MustParseAddr("198.18.0.77").AsSlice(),
				})
			},
		},
		{
			name: "U8: etcd in the cluster network", check: "store-in-network", says: []string{"the etcd server 10.5.99.9", "Network"},
			do:   edit(filepath.Join(n.RunDir, "told.json"), func(s string) string { return strings.ReplaceAll(s, c.endpoint, "http://10.5.99.9:2379") }),
			undo: kept(filepath.Join(n.RunDir, "told.json")),
		},
		{
			name: "F1: FORWARD drops", both: true, check: "forward-drop", fixed: true,
			says: []string{"chain FORWARD", "chain ufw-reject-forward, rule 1", "iptables -I FORWARD -d 10.5.0.0/16"},
			do: iptablesLike(func(x *iptables) {
				x.chain("ufw-reject-forward", &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH})
				x.base("FORWARD", nftables.ChainHookForward, nftables.ChainPolicyDrop, []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictJump, Chain: "ufw-reject-forward"}})
			}),
		},
		{
			name: "F2: INPUT drops", check: "input-drop", fixed: true,
			says: []string{"chain INPUT, by its policy", "UDP port 8472", "iptables -I INPUT -p udp --dport 8472 -j ACCEPT"},
			do: iptablesLike(func(x *iptables) {
				x.base("INPUT", nftables.ChainHookInput, nftables.ChainPolicyDrop, x.state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED),
					[]expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_ICMPV6}}, &expr.Verdict{Kind: expr.VerdictAccept}})
			}),
		},
		{
			name: "F2: a table of nftables drops", check: "input-drop", says: []string{"table inet castle, chain gate, by its policy", "nft insert rule inet castle gate udp dport 8472 accept"},
			do: castle(nftables.ChainPolicyDrop), undo: castle(nftables.ChainPolicyAccept),
		},
		{name: "F3: our device does not forward", both: true, check: "forwarding-off", fixed: true, do: ipCommands("sysctl net/ipv4/conf/" + device + "/forwarding 0"), says: []string{"forwarding is not 1", "sysctl -w"}},
		{name: "F3: nothing forwards", check: "forwarding-off", fixed: true, do: ipCommands("sysctl net/ipv4/ip_forward 0"), says: []string{"net.ipv4.ip_forward is not 1", "sysctl -w net.ipv4.ip_forward=1"}},
		{
			name: "F4: router advertisements", check: "router-advertisements", fixed: true, says: []string{"net.ipv6.conf.eth0.accept_ra is not 2", "sysctl -w net.ipv6.conf.eth0.accept_ra=2"},
			do: func() error {
				if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+n.Link+"/accept_ra", []byte("1"), 0); err != nil {
					return err
				}
				l, err := netlink.LinkByName(n.Link)
				if err != nil {
					return err
				}
				return netlink.RouteReplace(&netlink.Route{Dst: everything6(), Gw: netip.MustParseAddr("fe80::1").AsSlice(), Protocol: unix.RTPROT_RA, Priority: 512, LinkIndex: l.Attrs().Index})
			},
		},
		{
			name: "F5: the clock is past the lease's end", check: "subnet-file", says: []string{"the lease ended at 2020-01-01", "no pod is added", "start the daemon"},
			do: edit(n.SubnetFile(), func(s string) string {
				s = regexp.MustCompile(`CULVERT_LEASE_EXPIRES=.*`).ReplaceAllString(s, "CULVERT_LEASE_EXPIRES=2020-01-01T00:00:00Z")
				return regexp.MustCompile(`CULVERT_LEASE_EXPIRES_BOOTTIME=.*\n`).ReplaceAllString(s, "")
			}),
			undo: kept(n.SubnetFile()),
		},
		{
			name: "F5: the clock was set, and the lease stands", check: "clock", says: []string{"the clock was set since", "start the daemon"},
			do: edit(n.SubnetFile(), func(s string) string {
				return regexp.MustCompile(`CULVERT_LEASE_EXPIRES=.*`).ReplaceAllString(s, "CULVERT_LEASE_EXPIRES=2020-01-01T00:00:00Z")
			}),
			undo: kept(n.SubnetFile()),
		},
		{
			name: "F6: a route for a part of this node's subnet by a peer", check: "foreign-route", fixed: true, others: true,
			says: []string{"which is not culvert's, diverts the packets for this node's own pods", "ip route del"},
			do:   ipCommands(fmt.Sprintf("route add %s via %s", netip.PrefixFrom(subnet.Addr(), subnet.Bits()+1), c.Nodes[1].Addrs[0])),
		},
		{
			name: "C1: the pods' bridge has a link-local address", check: "cni-bridge", fixed: true,
			says: []string{"the bridge cni0 has the address 169.254.9.9/16", "ip address del 169.254.9.9/16 dev cni0"},
			do: func() error {
				l, err := netlink.LinkByName("cni0")
				if err != nil {
					return err
				}
				all, err := netlink.AddrList(l, netlink.FAMILY_V4)
				if err != nil {
					return err
				}
				for _, a := range all {
					if err := netlink.AddrDel(l, &a); err != nil {
						return err
					}
				}
				return runIP(strings.Fields("addr add 169.254.9.9/16 dev cni0"))
			},
		},
		{
			name: "C2: an earlier boot's reservations", check: "cni-addresses", fixed: true, says: []string{"253 addresses are reserved", "an earlier boot left 253 of them"},
			do: func() error {
				if err := os.MkdirAll(store, 0o755); err != nil {
					return err
				}
				a := subnet.Addr().Next()
				for range 253 {
					a = a.Next()
					path := filepath.Join(store, a.String())
					if err := os.WriteFile(path, []byte("gone-"+a.String()+"\r\neth0"), 0o644); err != nil {
						return err
					}
					if err := os.Chtimes(path, time.Unix(1e9, 0), time.Unix(1e9, 0)); err != nil {
						return err
					}
				}
				return nil
			},
		},
		{name: "our routes are gone", both: true, check: "host-route", fixed: true, do: removeOurs, says: []string{"not as the leases require", "ip route prepend"}},
		{name: "our device is gone", check: "host-link", fixed: true, do: ipCommands("link del cvt.1"), says: []string{"ip link add cvt.1"}},
		{
			name: "our table is gone", both: true, check: "host-nftables", fixed: true, says: []string{"culvert's nftables table"},
			do: func() error {
				x, err := nftables.New()
				if err != nil {
					return err
				}
				x.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "culvert"})
				return x.Flush()
			},
		},
		{
			name: "flannel's device", check: "leftovers", fixed: true, others: true, says: []string{"devices of flannel exist: flannel.9", "--take-over-flannel"},
			do: ipCommands("link add flannel.9 type bridge"),
		},
		{
			name: "the underlay's address is another", check: "underlay-address-gone", says: []string{"peers send to 198.18.0.1", "would use [198.18.0.99"},
			do:   ipCommands("addr del 198.18.0.1/24 dev eth0", "addr add 198.18.0.99/24 dev eth0", "route replace default via 198.18.0.254"),
			undo: ipCommands("addr del 198.18.0.99/24 dev eth0", "addr add 198.18.0.1/24 dev eth0", "route replace default via 198.18.0.254"),
		},
	} {
		if datapath != "kernel" && !b.both {
			continue
		}
		t.Run(b.name, func(t *testing.T) {
			undo := b.undo
			if err := n.Do(b.do); err != nil {
				t.Fatal(err)
			}
			e, all := look()
			got := e.of(b.check)
			for _, want := range b.says {
				if !strings.Contains(got, want) {
					t.Errorf("%q is not said:\n%s", want, all)
				}
			}
			for line := range strings.Lines(all) {
				// One fault may cause further findings of the same kind.
				if !strings.Contains(line, " "+b.check+":") && !strings.Contains(line, " host-") && !strings.Contains(line, " store-latency: http://10.5.99.9") && b.check != "underlay-address-gone" {
					t.Errorf("also found: %s", line)
				}
			}
			left := ""
			switch {
			case b.others:
				if _, left := look("--fix"); !strings.Contains(left, b.check) {
					t.Errorf("%s was changed without --yes", b.check)
				}
				_, left = look("--fix", "--yes")
			case b.fixed:
				_, left = look("--fix")
			default:
				if err := n.Do(undo); err != nil {
					t.Fatal(err)
				}
				_, left = look()
			}
			if left != "" {
				t.Errorf("afterwards:\n%s", left)
			}
		})
	}
	// What was repaired without a daemon suits one: it has nothing to repair.
	c.start(n)
	s = c.waitReady(n, 1)
	pods := c.pods()
	ping(t, pods[0], pods[1])
	if e := c.doctor(n, cniFlags...); e.of("") != "" {
		t.Errorf("with a daemon again:\n%s", e.of(""))
	}
}

// castle creates an nftables table whose input chain accepts established connections, and
// applies its policy to all other packets.
func castle(policy nftables.ChainPolicy) func() error {
	return func() error {
		x, err := nftables.New()
		if err != nil {
			return err
		}
		established := binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
		table := x.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "castle"})
		ch := x.AddChain(&nftables.Chain{Name: "gate", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPrioritySecurity, Policy: &policy})
		x.FlushChain(ch)
		x.AddRule(&nftables.Rule{Table: table, Chain: ch, Exprs: []expr.Any{
			&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: established, Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
			&expr.Verdict{Kind: expr.VerdictAccept},
		}})
		return x.Flush()
	}
}

// TestDoctorMeasures has `culvert doctor` probe a peer: checksums that are damaged on the
// path, a tunnel port whose packets are dropped, one that is closed, and another machine
// with this node's address.
//
//	n1 ── fabric ── n2
//	        ▲ damages checksums, drops UDP 8472
func TestDoctorMeasures(t *testing.T) {
	c := newCluster(t, 2)
	c.datapath = "kernel"
	c.setConfig(config)
	daemons := c.startAll()
	n1, n2 := c.Nodes[0], c.Nodes[1]
	if e := c.doctor(n1, "--no-cni"); e.of("") != "" {
		t.Errorf("on a healthy node:\n%s", e.of(""))
	}
	wants := func(what, check string, says ...string) {
		t.Helper()
		e := c.doctor(n1, "--no-cni")
		for _, want := range says {
			if !strings.Contains(e.of(check), want) {
				t.Errorf("%s: %q is not said:\n%s", what, want, e.of(""))
			}
		}
	}

	// Imitate a network card that computes inner checksums wrong: n1 leaves no checksum
	// to hardware, so that the bytes on the wire are the packet's own, and the fabric
	// damages them.
	setFeatures(t, n1, map[string]bool{"tx-checksum-ip-generic": false}, n1.Link)
	way := func(rule ...expr.Any) {
		t.Helper()
		if err := c.Fabric.Do(func() error {
			x, err := nftables.New()
			if err != nil {
				return err
			}
			table := x.AddTable(&nftables.Table{Family: nftables.TableFamilyNetdev, Name: "way"})
			if rule == nil {
				x.DelTable(table)
				return x.Flush()
			}
			ch := x.AddChain(&nftables.Chain{
				Name: "in", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookIngress, Device: n1.ID, Priority: nftables.ChainPriorityFilter,
			})
			x.AddRule(&nftables.Rule{Table: table, Chain: ch, Exprs: append([]expr.Any{
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(8472)},
			}, rule...)})
			return x.Flush()
		}); err != nil {
			t.Fatal(err)
		}
	}
	const inner = 8 + 8 + 14 // UDP, VXLAN, Ethernet
	way(
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: inner + 9, Len: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: inner + 20 + 6, Len: 2}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0, 0}},
		&expr.Immediate{Register: 1, Data: []byte{0xba, 0xd1}},
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: inner + 20 + 6, Len: 2},
		&expr.Immediate{Register: 1, Data: []byte{0, 0}}, // the outer checksum would show it
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 6, Len: 2},
	)
	wants("damaged checksums", "checksum-offload", "bad checksum-offload: n2 10.5.", "arrive without a checksum", "ethtool -K")
	way(&expr.Verdict{Kind: expr.VerdictDrop})
	wants("an eaten port", "port-eaten", "the node answers UDP to another port, but not to 8472", "Backend.Port")
	way()

	ipDo(t, n2.Namespace, "addr add 198.18.0.1/32 dev eth0")
	var mac string
	if err := n2.Do(func() error {
		l, err := netlink.LinkByName(n2.Link)
		if err == nil {
			mac = l.Attrs().HardwareAddr.String()
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	wants("a duplicate address", "duplicate-address", "198.18.0.1 is this node's address on eth0, and "+mac+" answers for it too")
	ipDo(t, n2.Namespace, "addr del 198.18.0.1/32 dev eth0")

	if err := daemons[1].Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := n2.Run(t.Context(), filepath.Join(c.bin, "culvert"), "cleanup"); err != nil {
		t.Fatal(err)
	}
	wants("nobody listens", "peer-unreachable", "no program listens on UDP port 8472", "start culvert on that node")
}

// TestDoctorList compares the list of checks with the documentation.
func TestDoctorList(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), filepath.Join(labtest.Bin(t), "culvert"), "doctor", "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != len(api.Checks()) || slices.ContainsFunc(lines, func(l string) bool { return len(strings.Fields(l)) < 4 }) {
		t.Errorf("%d lines:\n%s", len(lines), out)
	}
	docs, err := os.ReadFile("../docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range lines {
		if !strings.Contains(string(docs), "    "+line+"\n") {
			t.Errorf("docs/troubleshooting.md lacks the line\n    %s", line)
		}
	}
}

func everything6() *net.IPNet { return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)} }
