package firewall

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
)

// TestEachPacket finds rules that must see each packet of established connections between
// pods, and no other rules.
func TestEachPacket(t *testing.T) {
	pods := netip.MustParsePrefix("10.5.0.0/16")
	accept := to(expr.VerdictAccept, "")
	from := func(p string) rule { return address("saddr", true, netip.MustParsePrefix(p)) }
	does := func(e ...expr.Any) rule { return rule{"", e, ""} }
	load := func(base expr.PayloadBase, offset, length uint32) rule {
		return does(&expr.Payload{OperationType: expr.PayloadLoad, DestRegister: 1, Base: base, Offset: offset, Len: length})
	}
	target := func(name string) rule { return does(&expr.Target{Name: name, Info: &xt.Unknown{}}) }
	match := func(name string) rule { return extension(name, &xt.Unknown{0, 0, 0, 0}) }
	limit, log := does(&expr.Limit{Rate: 10}), does(&expr.Log{})
	established := ctState(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)

	for _, c := range []struct {
		name  string
		rules literal
		want  string // chain, rule and what; empty if there is none
	}{
		{"none", literal{"FORWARD": nil}, ""},
		{"kube-proxy and Docker", literal{
			"FORWARD drop": {
				all(ctState(expr.CtStateBitNEW), to(expr.VerdictJump, "KUBE-PROXY-FIREWALL")), to(expr.VerdictJump, "KUBE-FORWARD"), all(from("10.5.0.0/16"), match("comment"), accept),
			},
			"KUBE-PROXY-FIREWALL": nil, "KUBE-FORWARD": {all(ctState(expr.CtStateBitINVALID), to(expr.VerdictDrop, "")), all(established, accept)},
		}, ""},
		{"a policy by addresses, ports and sets", literal{"FORWARD": {
			all(from("10.5.1.7/32"), load(expr.PayloadBaseTransportHeader, 2, 2), does(&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 80}}), accept),
			all(match("set"), accept), all(match("physdev"), accept), all(target("MARK")),
		}}, ""},
		{"a limit", literal{"FORWARD": {all(limit, accept)}}, "FORWARD, rule 1 (limit, handle 1)"},
		{"a limit of others' packets", literal{"FORWARD": {all(from("192.0.2.0/24"), limit, accept)}}, ""},
		{"a limit of one pod's packets", literal{"FORWARD": {all(from("10.5.1.7/32"), limit, accept)}}, "FORWARD, rule 1 (limit, handle 1)"},
		{"a limit before a match", literal{"FORWARD": {all(limit, from("192.0.2.0/24"), accept)}}, "FORWARD, rule 1 (limit, handle 1)"},
		{"a limit behind an accept of what is established and new", literal{"FORWARD": {accept, all(limit, accept)}}, ""},
		{"a limit of what is new, which UDP stays", literal{"FORWARD": {all(established, accept), all(limit, accept)}}, "FORWARD, rule 2 (limit, handle 2)"},
		{"in a chain for one pod", literal{"FORWARD": {all(from("10.5.1.7/32"), to(expr.VerdictJump, "pod"))}, "pod": {log}}, "pod, rule 1 (log, handle 1)"},
		{"another hook", literal{"PREROUTING": {log}}, "PREROUTING, rule 1 (log, handle 1)"},
		{"on input", literal{"INPUT": {log}}, ""},
		{"a quota", literal{"FORWARD": {does(&expr.Quota{Bytes: 1 << 30})}}, "FORWARD, rule 1 (quota, handle 1)"},
		{"a queue", literal{"FORWARD": {does(&expr.Queue{Num: 1})}}, "FORWARD, rule 1 (queue, handle 1)"},
		{"a named limit", literal{"FORWARD": {does(&expr.Objref{Type: 4, Name: "x"})}}, "FORWARD, rule 1 (limit x, handle 1)"},
		{"a named counter", literal{"FORWARD": {does(&expr.Objref{Type: 1, Name: "x"})}}, ""},
		{"a copy", literal{"FORWARD": {does(&expr.Dup{})}}, "FORWARD, rule 1 (dup, handle 1)"},
		{"length", literal{"FORWARD": {does(&expr.Meta{Key: expr.MetaKeyLEN, Register: 1})}}, "FORWARD, rule 1 (meta length, handle 1)"},
		{"bytes of the connection", literal{"FORWARD": {does(&expr.Ct{Key: expr.CtKeyBYTES, Register: 1})}}, "FORWARD, rule 1 (ct bytes, handle 1)"},
		{"DSCP", literal{"FORWARD": {load(expr.PayloadBaseNetworkHeader, 1, 1)}}, "FORWARD, rule 1 (payload, handle 1)"},
		{"payload", literal{"FORWARD": {load(expr.PayloadBaseTransportHeader, 20, 4)}}, "FORWARD, rule 1 (payload, handle 1)"},
		{"flags of TCP", literal{"FORWARD": {load(expr.PayloadBaseTransportHeader, 13, 1)}}, ""},
		{"source and destination", literal{"FORWARD": {load(expr.PayloadBaseNetworkHeader, 12, 8)}}, ""},
		{"hashlimit", literal{"FORWARD": {match("hashlimit")}}, "FORWARD, rule 1 (-m hashlimit, handle 1)"},
		{"connlimit", literal{"FORWARD": {match("connlimit")}}, ""},
		{"NFLOG", literal{"FORWARD": {target("NFLOG")}}, "FORWARD, rule 1 (-j NFLOG, handle 1)"},
	} {
		have := Reading{others: otherRules{set: c.rules.ruleset(nftables.TableFamilyIPv4, "filter")}}
		got := EachPacket(have, Policy{Forward: []netip.Prefix{pods}}, Devices{Pods: Device{Name: "cni0"}, Tunnels: map[netip.Prefix]Device{pods: {Name: "cvt.1"}}})
		if want := strings.TrimSuffix("iptables, table filter, chain "+c.want, "chain "); got != want && (c.want != "" || got != "") {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	if got := EachPacket(Reading{others: otherRules{bridge: "x of the nftables table bridge y"}}, Policy{}, Devices{}); !strings.Contains(got, "x of the nftables table bridge y") {
		t.Errorf("a chain of the bridge: %q", got)
	}
}
