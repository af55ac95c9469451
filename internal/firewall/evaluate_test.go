package firewall

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// literal is a ruleset of one table, ip filter unless a test says otherwise.
// The key is the chain's name; a base chain has the name of its hook, and the
// suffix " drop" if that is its policy.
type literal map[string][]rule

func (l literal) ruleset(family nftables.TableFamily, table string) ruleset {
	hooks := map[string]*nftables.ChainHook{"FORWARD": nftables.ChainHookForward, "INPUT": nftables.ChainHookInput, "PREROUTING": nftables.ChainHookPrerouting}
	var s ruleset
	for key, rules := range l {
		name, policy, _ := strings.Cut(key, " ")
		c := ruleChain{family: family, table: table, name: name, drops: policy == "drop"}
		if h := hooks[name]; h != nil {
			c.base, c.hook = true, *h
		}
		for i, r := range rules {
			c.rules = append(c.rules, &nftables.Rule{Handle: uint64(i + 1), Exprs: r.exprs})
		}
		s.chains = append(s.chains, c)
	}
	return s
}

func to(kind expr.VerdictKind, chain string) rule {
	return rule{"", []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: kind, Chain: chain}}, ""}
}

func extension(name string, info xt.InfoAny) rule {
	return rule{"", []expr.Any{&expr.Match{Name: name, Info: info}}, ""}
}

func ctState(bits uint32) rule {
	mask := binaryutil.NativeEndian.PutUint32(bits)
	return rule{"", []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}, ""}
}

// TestEvaluate walks literal rules with packets of 10.5.0.0/16 between cni0 and
// cvt.1, and with VXLAN packets from peers in 192.168.50.0/28.
func TestEvaluate(t *testing.T) {
	drop, accept, back := to(expr.VerdictDrop, ""), to(expr.VerdictAccept, ""), to(expr.VerdictReturn, "")
	reject := rule{"", []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH}}, ""}
	rejectTarget := rule{"", []expr.Any{&expr.Target{Name: "REJECT", Info: &xt.Unknown{0, 0, 0, 0}}}, ""}
	pods := netip.MustParsePrefix("10.5.0.0/16")
	from := func(p string) rule { return address("saddr", true, netip.MustParsePrefix(p)) }
	dest := func(p string) rule { return address("daddr", true, netip.MustParsePrefix(p)) }
	multiport := make(xt.Unknown, 48)
	multiport[0], multiport[1] = 1, 2
	copy(multiport[2:], binaryutil.NativeEndian.PutUint16(53))
	copy(multiport[4:], binaryutil.NativeEndian.PutUint16(8472))

	for _, c := range []struct {
		name  string
		rules literal
		want  string // for forwarded packets: where they are dropped, and how certainly; "" if they pass
		in    string // the same for the tunnel's packets
	}{
		{name: "empty", rules: literal{"FORWARD": nil}},
		{name: "policy", rules: literal{"FORWARD drop": nil}, want: "FORWARD policy: drops"},
		{name: "last rule", rules: literal{"FORWARD": {all(from("172.16.0.0/12"), accept), reject}}, want: "FORWARD:2 drops"},
		{name: "a target of xtables", rules: literal{"FORWARD": {rejectTarget}}, want: "FORWARD:1 drops"},
		{name: "accepted before", rules: literal{"FORWARD drop": {all(from("10.0.0.0/8"), accept), drop}}},
		{
			name:  "one direction alone is accepted",
			rules: literal{"FORWARD drop": {all(from("10.5.0.0/16"), inputDevice("cni0"), accept), drop}}, want: "FORWARD:2 drops",
		},
		{
			name:  "jumps, nested",
			rules: literal{"FORWARD": {to(expr.VerdictJump, "a")}, "a": {to(expr.VerdictJump, "b")}, "b": {drop}}, want: "FORWARD:1 a:1 b:1 drops",
		},
		{
			name:  "a jump that returns",
			rules: literal{"FORWARD": {to(expr.VerdictJump, "a"), drop}, "a": {back, drop}}, want: "FORWARD:2 drops",
		},
		{
			name:  "a jump that accepts",
			rules: literal{"FORWARD drop": {to(expr.VerdictJump, "a"), drop}, "a": {accept}},
		},
		{
			name:  "goto does not come back",
			rules: literal{"FORWARD": {to(expr.VerdictGoto, "a"), drop}, "a": {all(from("192.0.2.0/24"), drop)}},
		},
		{
			name:  "goto, and the policy",
			rules: literal{"FORWARD drop": {to(expr.VerdictGoto, "a"), accept}, "a": nil}, want: "FORWARD policy: drops",
		},
		{
			name:  "goto out of a chain that was jumped to",
			rules: literal{"FORWARD": {to(expr.VerdictJump, "a"), drop}, "a": {to(expr.VerdictGoto, "b"), accept}, "b": nil}, want: "FORWARD:2 drops",
		},
		{name: "a pod", rules: literal{"FORWARD": {all(from("10.5.1.7/32"), drop)}}},
		{name: "a node's pods", rules: literal{"FORWARD": {all(dest("10.5.7.0/24"), drop)}}, want: "FORWARD:1 may drop, meant"},
		{name: "the network", rules: literal{"FORWARD": {all(dest("10.5.0.0/16"), drop)}}, want: "FORWARD:1 drops, meant"},
		{name: "more than the network", rules: literal{"FORWARD": {all(dest("10.0.0.0/8"), drop)}}, want: "FORWARD:1 drops"},
		{name: "all but the network", rules: literal{"FORWARD": {all(address("daddr", false, pods), drop)}}},
		{name: "invalid", rules: literal{"FORWARD": {all(ctState(expr.CtStateBitINVALID), drop)}}},
		{name: "new", rules: literal{"FORWARD": {all(ctState(expr.CtStateBitESTABLISHED), accept), all(ctState(expr.CtStateBitNEW), drop)}}, want: "FORWARD:2 drops"},
		{name: "another device", rules: literal{"FORWARD": {all(inputDevice("eth7"), drop)}}},
		{name: "our device", rules: literal{"FORWARD": {all(inputDevice("cvt.1"), drop)}}, want: "FORWARD:1 drops"},
		{name: "no one knows", rules: literal{"FORWARD": {all(extension("set", &xt.Unknown{1, 2, 3, 4}), drop)}}, want: "FORWARD:1 may drop"},
		{name: "no one knows what it accepts", rules: literal{"FORWARD": {all(extension("set", &xt.Unknown{1, 2, 3, 4}), accept), drop}}, want: "FORWARD:2 drops"},
		{name: "no one knows where it jumps", rules: literal{"FORWARD": {all(extension("set", &xt.Unknown{1, 2, 3, 4}), to(expr.VerdictJump, "a"))}, "a": {drop}}, want: "FORWARD:1 a:1 may drop"},
		{name: "a limit", rules: literal{"FORWARD": {rule{"", []expr.Any{&expr.Limit{Rate: 1, Over: true}, &expr.Verdict{Kind: expr.VerdictDrop}}, ""}}}, want: "FORWARD:1 may drop"},
		{name: "a comment", rules: literal{"FORWARD": {all(extension("comment", commentInfo("x")), drop)}}, want: "FORWARD:1 drops"},
		{name: "a queue", rules: literal{"FORWARD": {rule{"", []expr.Any{&expr.Queue{}}, ""}}}, want: "FORWARD:1 may drop"},
		{name: "a loop", rules: literal{"FORWARD": {to(expr.VerdictJump, "a")}, "a": {to(expr.VerdictJump, "a")}}},

		{name: "F2", rules: literal{"INPUT drop": {all(protocol(6, ""), transport(2, 2, true, []byte{0, 22}), accept), all(ctState(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept)}}, in: "INPUT policy: drops"},
		{name: "the port is accepted", rules: literal{"INPUT drop": {all(udpPort(8472), accept)}}},
		{name: "the port is eaten", rules: literal{"INPUT": {all(udpPort(8472), drop)}}, in: "INPUT:1 drops, meant"},
		{name: "UDP is dropped", rules: literal{"INPUT": {all(protocol(17, ""), drop)}}, in: "INPUT:1 drops"},
		{name: "another port is dropped", rules: literal{"INPUT": {all(udpPort(53), drop)}}},
		{name: "peers are accepted", rules: literal{"INPUT drop": {all(from("192.168.50.0/24"), accept)}}},
		{name: "a part of the peers is accepted", rules: literal{"INPUT drop": {all(from("192.168.50.8/29"), accept)}}, in: "INPUT policy: drops"},
		{name: "a stranger is dropped", rules: literal{"INPUT": {all(from("192.168.51.0/24"), drop)}}},
		{name: "another link is dropped", rules: literal{"INPUT": {all(inputDevice("eth1"), drop)}}},
		{name: "by an extension's port", rules: literal{"INPUT drop": {all(protocol(17, ""), extension("udp", &xt.Udp{SrcPorts: [2]uint16{0, 0xffff}, DstPorts: [2]uint16{8000, 9000}}), accept)}}},
		{name: "raw", rules: literal{"PREROUTING": {all(protocol(17, ""), drop)}}, want: "PREROUTING:1 drops", in: "PREROUTING:1 drops"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := c.rules.ruleset(nftables.TableFamilyIPv4, "filter")
			bridge, tunnel := Device{Name: "cni0"}, Device{Name: "cvt.1", Index: 7}
			if got := first(s, forwarded(pods, bridge, tunnel), nftables.ChainHookPrerouting, nftables.ChainHookForward); got != c.want {
				t.Errorf("forwarded: %q, want %q", got, c.want)
			}
			in, _ := TunnelRule{Port: 8472, Network: pods}.probes(Device{Name: "eth0", Index: 2}, netip.MustParsePrefix("192.168.50.0/28"))
			if got := first(s, in, nftables.ChainHookPrerouting, nftables.ChainHookInput); got != c.in {
				t.Errorf("the tunnel's: %q, want %q", got, c.in)
			}
		})
	}
	w := walker{probe: newProbe("", unix.IPPROTO_UDP, free(4), free(4), [2]field{free(2), known(0x21, 0x18)})}
	if got := w.extension(&expr.Match{Name: "multiport", Rev: 1, Info: &multiport}); got != every {
		t.Errorf("multiport: %d", got)
	}
}

func commentInfo(s string) *xt.Comment {
	c := xt.Comment(s)
	return &c
}

// first describes the first place where one of the probes is lost.
func first(s ruleset, probes []probe, hooks ...*nftables.ChainHook) string {
	for _, hook := range hooks {
		for _, p := range probes {
			found := s.evaluate(*hook, p)
			if len(found) == 0 {
				continue
			}
			f := found[0]
			text := f.base.name + " policy:"
			if len(f.path) > 0 {
				text = ""
			}
			for _, at := range f.path {
				text += fmt.Sprintf("%s:%d ", at.chain, at.index+1)
			}
			text = strings.TrimSpace(text) + map[bool]string{true: " drops", false: " may drop"}[f.certain]
			if f.meant {
				text += ", meant"
			}
			return text
		}
	}
	return ""
}

// TestRanges decodes interval sets as the kernel dumps them: interval starts,
// and the values after interval ends.
func TestRanges(t *testing.T) {
	end := func(key ...byte) nftables.SetElement { return nftables.SetElement{Key: key, IntervalEnd: true} }
	begin := func(key ...byte) nftables.SetElement { return nftables.SetElement{Key: key} }
	s := ruleSet{interval: true, elements: []nftables.SetElement{begin(10, 20), end(10, 0), begin(9, 0), end(0, 0), begin(200, 0), end(10, 30)}}
	var got []string
	for _, r := range s.ranges() {
		got = append(got, fmt.Sprintf("%d-%d", r.from, r.to))
	}
	want := "[9 0]-[9 255] [10 20]-[10 29] [200 0]-[255 255]"
	if strings.Join(got, " ") != want {
		t.Errorf("%q, want %s", got, want)
	}
	f := field{{val: 10, known: 0xff}, {}}
	for _, c := range []struct {
		lo, hi []byte
		want   match
	}{
		{[]byte{10, 0}, []byte{10, 255}, every},
		{[]byte{0, 0}, []byte{9, 255}, none},
		{[]byte{10, 0}, []byte{10, 200}, some},
		{[]byte{10, 7}, []byte{10, 9}, few},
	} {
		if got := f.between(c.lo, c.hi); got != c.want {
			t.Errorf("%d-%d: %d, want %d", c.lo, c.hi, got, c.want)
		}
	}
}
