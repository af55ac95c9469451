package firewall

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

var (
	cluster  = netip.MustParsePrefix("10.5.0.0/16")
	cluster6 = netip.MustParsePrefix("fd00:5::/48")
)

// chainsIn returns literal chains, the base chains in the order of their names.
func chainsIn(family nftables.TableFamily, table string, l literal) ruleset {
	s := l.ruleset(family, table)
	slices.SortFunc(s.chains, func(a, b ruleChain) int { return strings.Compare(a.name, b.name) })
	return s
}

// TestDiffOthers states which accepts are inserted where, which of ours are deleted, and
// which drops are only reported.
func TestDiffOthers(t *testing.T) {
	drop, accept := to(expr.VerdictDrop, ""), to(expr.VerdictAccept, "")
	fromCluster := address("saddr", true, cluster)
	docker := literal{"FORWARD drop": {to(expr.VerdictJump, "DOCKER-USER")}, "DOCKER-USER": {to(expr.VerdictReturn, "")}}
	both := []string{"iptables -I FORWARD -d 10.5.0.0/16", "iptables -I FORWARD -s 10.5.0.0/16"}
	mine := func(chain, text string, after int) ourRule {
		return ourRule{family: nftables.TableFamilyIPv4, table: "filter", chain: chain, text: text, handle: 99, after: after}
	}
	for name, test := range map[string]struct {
		family nftables.TableFamily
		table  string
		rules  literal
		ours   []ourRule
		steps  []string // without the comment
		warns  []string // check, chain
	}{
		"no drop":      {nftables.TableFamilyIPv4, "filter", literal{"FORWARD": {accept, drop}}, nil, nil, nil},
		"a drop":       {nftables.TableFamilyIPv4, "filter", literal{"FORWARD": {drop}}, nil, both, nil},
		"the policy":   {nftables.TableFamilyIPv4, "filter", literal{"FORWARD drop": nil}, nil, []string{"iptables -A FORWARD -d 10.5.0.0/16", "iptables -A FORWARD -s 10.5.0.0/16"}, nil},
		"Docker":       {nftables.TableFamilyIPv4, "filter", docker, nil, []string{"iptables -I DOCKER-USER -d 10.5.0.0/16", "iptables -I DOCKER-USER -s 10.5.0.0/16"}, nil},
		"mangle":       {nftables.TableFamilyIPv4, "mangle", literal{"FORWARD": {drop}}, nil, nil, []string{"forward-drop FORWARD"}},
		"inet":         {nftables.TableFamilyINet, "castle", literal{"FORWARD drop": nil}, nil, nil, []string{"forward-drop FORWARD"}},
		"intended":     {nftables.TableFamilyIPv4, "filter", literal{"FORWARD": {all(fromCluster, drop)}}, nil, nil, []string{"forward-drop FORWARD"}},
		"other family": {nftables.TableFamilyIPv6, "filter", literal{"FORWARD drop": nil}, nil, nil, nil},
		"in place": {
			nftables.TableFamilyIPv4, "filter",
			literal{"FORWARD": {drop}},
			[]ourRule{mine("FORWARD", "-d 10.5.0.0/16", 0), mine("FORWARD", "-s 10.5.0.0/16", 0)},
			nil, nil,
		},
		"after the drop": {
			nftables.TableFamilyIPv4, "filter",
			literal{"FORWARD": {drop}},
			[]ourRule{mine("FORWARD", "-d 10.5.0.0/16", 1), mine("FORWARD", "-s 10.5.0.0/16", 0)},
			[]string{"iptables -D FORWARD -d 10.5.0.0/16", "iptables -I FORWARD -d 10.5.0.0/16"},
			nil,
		},
		"of an earlier network": {
			nftables.TableFamilyIPv4, "filter",
			literal{"FORWARD": {drop}},
			[]ourRule{mine("FORWARD", "-d 10.9.0.0/16", 0), mine("FORWARD", "-d 10.5.0.0/16", 0), mine("FORWARD", "-s 10.5.0.0/16", 0)},
			[]string{"iptables -D FORWARD -d 10.9.0.0/16"},
			nil,
		},
		"twice": {
			nftables.TableFamilyIPv4, "filter",
			literal{"FORWARD": {drop}},
			[]ourRule{mine("FORWARD", "-d 10.5.0.0/16", 0), mine("FORWARD", "-s 10.5.0.0/16", 0), {"-s 10.5.0.0/16", 100, nftables.TableFamilyIPv4, "filter", "FORWARD", 0}},
			[]string{"iptables -D FORWARD -s 10.5.0.0/16"},
			nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			have := otherRules{set: chainsIn(test.family, test.table, test.rules), ours: test.ours}
			want := Policy{Forward: []netip.Prefix{cluster}}
			d := Devices{Pods: Device{"cni0", 3}, Tunnels: map[netip.Prefix]Device{cluster: {"cvt.1", 4}}}
			steps, warnings := diffOthers(have, want, d)
			var commands, said []string
			for _, s := range steps {
				command, _, _ := strings.Cut(s.Command, " -m comment")
				commands = append(commands, command)
				if !s.Foreign {
					t.Errorf("%s is not marked as another program's", s.Command)
				}
			}
			for _, w := range warnings {
				_, chain, _ := strings.Cut(w.Text, "chain ")
				said = append(said, w.Check+" "+strings.FieldsFunc(chain, func(r rune) bool { return r == ',' || r == ' ' })[0])
			}
			if !slices.Equal(commands, test.steps) {
				t.Errorf("steps %q, want %q", commands, test.steps)
			}
			if !slices.Equal(said, test.warns) {
				t.Errorf("warnings %q (%v), want %q", said, warnings, test.warns)
			}
			problems := Problems(Reading{others: have}, want, d)
			if len(problems) == 0 != (len(test.steps)+len(test.warns) == 0) {
				t.Errorf("problems %+v", problems)
			}
			for _, p := range problems {
				if (len(p.Repairs) > 0) != (len(test.steps) > 0) {
					t.Errorf("%s: %d repairs", p.Text, len(p.Repairs))
				}
			}
		})
	}
}

// TestWalk states each chain's verdict on a packet, and the fix that is suggested.
func TestWalk(t *testing.T) {
	drop, accept := to(expr.VerdictDrop, ""), to(expr.VerdictAccept, "")
	established := ctState(2 | 4) // IPS_... as in nft: established, related
	web := rule{"", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 80}},
	}, ""}
	unknown := rule{"", []expr.Any{&expr.Meta{Key: expr.MetaKeySKUID, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{1, 0, 0, 0}}}, ""}
	packet := Packet{From: netip.MustParseAddr("10.5.1.2"), To: netip.MustParseAddr("10.5.2.2"), Proto: unix.IPPROTO_TCP, Port: 80, In: "cni0", Out: "cvt.1"}
	answer := packet
	answer.Answer = true
	other := packet
	other.Port = 443
	for name, test := range map[string]struct {
		family  nftables.TableFamily
		table   string
		rules   literal
		packet  Packet
		drops   bool
		certain bool
		fix     string
	}{
		"accepted":             {nftables.TableFamilyIPv4, "filter", literal{"FORWARD drop": {accept}}, packet, false, true, ""},
		"a rule of iptables":   {nftables.TableFamilyIPv4, "filter", literal{"FORWARD": {all(web, drop)}}, packet, true, true, "iptables -t filter -D FORWARD 1, or add an accept before it"},
		"another port":         {nftables.TableFamilyIPv4, "filter", literal{"FORWARD": {all(web, drop)}}, other, false, true, ""},
		"a policy of iptables": {nftables.TableFamilyIPv4, "filter", literal{"FORWARD drop": nil}, packet, true, true, "iptables -t filter -P FORWARD ACCEPT, or add an accept to it"},
		"a rule of nft":        {nftables.TableFamilyINet, "castle", literal{"FORWARD": {all(web, drop)}}, packet, true, true, "nft delete rule inet castle FORWARD handle 1, or add an accept before it"},
		"a policy of nft":      {nftables.TableFamilyINet, "castle", literal{"FORWARD drop": nil}, packet, true, true, "add an accept to the chain FORWARD of the table inet castle, or change its policy"},
		"in a chain":           {nftables.TableFamilyINet, "castle", literal{"FORWARD": {to(expr.VerdictJump, "pods")}, "pods": {drop}}, packet, true, true, "nft delete rule inet castle pods handle 1, or add an accept before it"},
		"unknown match":        {nftables.TableFamilyINet, "castle", literal{"FORWARD": {all(unknown, drop)}}, packet, true, false, "nft delete rule inet castle FORWARD handle 1, or add an accept before it"},
		"unknown, then sure":   {nftables.TableFamilyINet, "castle", literal{"FORWARD": {all(unknown, drop), drop}}, packet, true, true, "nft delete rule inet castle FORWARD handle 2, or add an accept before it"},
		"an answer":            {nftables.TableFamilyIPv4, "filter", literal{"FORWARD drop": {all(established, accept)}}, answer, false, true, ""},
		"a first packet":       {nftables.TableFamilyIPv4, "filter", literal{"FORWARD drop": {all(established, accept)}}, packet, true, true, "iptables -t filter -P FORWARD ACCEPT, or add an accept to it"},
	} {
		t.Run(name, func(t *testing.T) {
			r := Rules{set: chainsIn(test.family, test.table, test.rules), indexes: map[string]int{"cni0": 3, "cvt.1": 4}}
			got := r.Walk(Forward, test.packet)
			if len(got) != 1 || got[0].Drops != test.drops || got[0].Certain != test.certain || got[0].Fix != test.fix {
				t.Errorf("%+v", got)
			}
			if at := r.Walk(Input, test.packet); len(at) != 0 {
				t.Errorf("at another hook: %+v", at)
			}
		})
	}
}

// TestMatchText decodes the accepts that culvert writes, as iptables would show them, and
// no others.
func TestMatchText(t *testing.T) {
	for want, p := range map[string]Policy{
		"-d 10.5.0.0/16|-s 10.5.0.0/16":   {Forward: []netip.Prefix{cluster}},
		"-d 10.5.64.0/19|-s 10.5.64.0/19": {Forward: []netip.Prefix{netip.MustParsePrefix("10.5.64.0/19")}},
		"-d fd00:5::/48|-s fd00:5::/48":   {Forward: []netip.Prefix{cluster6}},
		"-p udp --dport 8472":             {Tunnels: []TunnelRule{{Port: 8472, Network: cluster}}},
		"-p 4":                            {Tunnels: []TunnelRule{{Network: cluster, Device: "cvt.ipip"}}},
	} {
		var got []string
		for _, p := range p.passages(Devices{}) {
			for _, a := range p.accepts {
				text := matchText(a.exprs, p.is4)
				if text != a.text {
					t.Errorf("%q is read as %q", a.text, text)
				}
				if !slices.Contains(got, text) {
					got = append(got, text)
				}
			}
		}
		if strings.Join(got, "|") != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	negated := forwardMatch("saddr", cluster)
	negated[1].(*expr.Cmp).Op = expr.CmpOpNeq
	mark := []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{1, 0, 0, 0}}}
	ttl := []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{64}}}
	for name, exprs := range map[string][]expr.Any{"negated": negated, "a mark": mark, "TTL": ttl, "nothing": nil} {
		if text := matchText(exprs, true); text != "" {
			t.Errorf("%s is read as %q", name, text)
		}
	}
}

// TestParseTrace decodes nftables' trace messages.
func TestParseTrace(t *testing.T) {
	message := func(family nftables.TableFamily, kind uint32, attributes ...netlink.Attribute) netlink.Message {
		number := func(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
		attributes = append(attributes, netlink.Attribute{Type: traceType, Data: number(kind)}, netlink.Attribute{Type: traceTableName, Data: []byte("filter\x00")}, netlink.Attribute{Type: traceChain, Data: []byte("FORWARD\x00")})
		data, err := netlink.MarshalAttributes(attributes)
		if err != nil {
			t.Fatal(err)
		}
		return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | traceMessage)}, Data: append([]byte{byte(family), 0, 0, 0}, data...)}
	}
	verdict := func(code uint32) netlink.Attribute {
		nested, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: verdictCode, Data: binary.BigEndian.AppendUint32(nil, code)}})
		if err != nil {
			t.Fatal(err)
		}
		return netlink.Attribute{Type: traceVerdict | netlink.Nested, Data: nested}
	}
	handle := netlink.Attribute{Type: traceHandle, Data: binary.BigEndian.AppendUint64(nil, 7)}
	policy := func(v uint32) netlink.Attribute {
		return netlink.Attribute{Type: tracePolicy, Data: binary.BigEndian.AppendUint32(nil, v)}
	}
	const kindPolicy, kindReturn, kindRule = 1, 2, 3
	other := message(nftables.TableFamilyIPv4, kindRule, handle, verdict(0))
	other.Header.Type++
	short := message(nftables.TableFamilyIPv4, kindRule, handle, verdict(0))
	short.Data = short.Data[:3]
	for name, test := range map[string]struct {
		message netlink.Message
		text    string // empty: no drop
		fix     string
	}{
		"a rule drops":      {message(nftables.TableFamilyIPv4, kindRule, handle, verdict(0)), "iptables, table filter, chain FORWARD, the rule with handle 7, dropped the traced packet", "nft delete rule ip filter FORWARD handle 7, or add an accept before it"},
		"a rule of inet":    {message(nftables.TableFamilyINet, kindRule, handle, verdict(0)), "nftables, table inet filter, chain FORWARD, the rule with handle 7, dropped the traced packet", "nft delete rule inet filter FORWARD handle 7, or add an accept before it"},
		"a rule accepts":    {message(nftables.TableFamilyIPv4, kindRule, handle, verdict(1)), "", ""},
		"the policy drops":  {message(nftables.TableFamilyIPv6, kindPolicy, policy(0)), "ip6tables, table filter, chain FORWARD, by its policy, dropped the traced packet", "add an accept to the chain, or change its policy (`nft list chain ip6 filter FORWARD`)"},
		"the policy passes": {message(nftables.TableFamilyIPv4, kindPolicy, policy(1)), "", ""},
		"a return":          {message(nftables.TableFamilyIPv4, kindReturn, handle, verdict(0)), "", ""},
		"another message":   {other, "", ""},
		"truncated":         {short, "", ""},
	} {
		got, ok := parseTrace(test.message)
		if ok != (test.text != "") || ok && (got.String() != test.text || got.Fix() != test.fix) {
			t.Errorf("%s: %t, %q, %q", name, ok, got.String(), got.Fix())
		}
	}
}

// legacyEntry returns an entry of an x_tables table: matches by edit, a target by name with
// data.
func legacyEntry(f legacyFamily, target string, data []byte, edit func(e []byte)) []byte {
	e := make([]byte, f.entry+32+len(data))
	binary.NativeEndian.PutUint16(e[f.offsets:], uint16(f.entry))
	binary.NativeEndian.PutUint16(e[f.offsets+2:], uint16(len(e)))
	copy(e[f.entry+2:], target)
	copy(e[f.entry+32:], data)
	if edit != nil {
		edit(e)
	}
	return e
}

func legacyVerdict(v int32) []byte {
	return append(binary.NativeEndian.AppendUint32(nil, uint32(v)), make([]byte, 4)...)
}

// TestLegacyTable decodes tables of iptables-legacy, of both families, whole and damaged.
func TestLegacyTable(t *testing.T) {
	for _, f := range legacyFamilies {
		none := [5]int{-1, -1, -1, -1, -1}
		var table []byte
		add := func(e []byte) (at int) { at = len(table); table = append(table, e...); return at }
		begin, end := none, none
		begin[2] = add(legacyEntry(f, "", legacyVerdict(legacyAccept), func(e []byte) { // from a network, by a link, TCP
			e[0], e[1], e[2*f.addr], e[2*f.addr+1] = 10, 5, 255, 255
			copy(e[f.links:], "cni0\x00")
			copy(e[f.links+32:], "\xff\xff\xff\xff\xff")
			binary.NativeEndian.PutUint16(e[f.proto:], unix.IPPROTO_TCP)
		}))
		jump := add(legacyEntry(f, "", legacyVerdict(0), nil))
		add(legacyEntry(f, "REJECT", legacyVerdict(0), nil))
		end[2] = add(legacyEntry(f, "", legacyVerdict(legacyDrop), nil))
		add(legacyEntry(f, "ERROR", append([]byte("mine"), make([]byte, 28)...), nil))
		mine := add(legacyEntry(f, "", legacyVerdict(-5), nil)) // XT_RETURN
		add(legacyEntry(f, "ERROR", append([]byte("ERROR"), make([]byte, 27)...), nil))
		binary.NativeEndian.PutUint32(table[jump+f.entry+32:], uint32(mine))

		chains, err := f.parse("filter", table, begin, end)
		if err != nil || len(chains) != 2 || chains[0].name != "FORWARD" || !chains[0].base || !chains[0].drops || !chains[0].legacy || len(chains[0].rules) != 3 ||
			chains[1].name != "mine" || chains[1].base || len(chains[1].rules) != 1 {
			t.Fatalf("%+v, %v", chains, err)
		}
		last := func(chain, rule int) expr.Any {
			e := chains[chain].rules[rule].Exprs
			return e[len(e)-1]
		}
		if n := len(chains[0].rules[0].Exprs); n != 3+2+2+1 {
			t.Errorf("the first rule has %d expressions", n)
		}
		if v, ok := last(0, 0).(*expr.Verdict); !ok || v.Kind != expr.VerdictAccept {
			t.Errorf("the first rule: %+v", last(0, 0))
		}
		if v, ok := last(0, 1).(*expr.Verdict); !ok || v.Kind != expr.VerdictJump || v.Chain != "mine" {
			t.Errorf("the jump: %+v", last(0, 1))
		}
		if x, ok := last(0, 2).(*expr.Target); !ok || x.Name != "REJECT" {
			t.Errorf("the target: %+v", last(0, 2))
		}
		if v, ok := last(1, 0).(*expr.Verdict); !ok || v.Kind != expr.VerdictReturn {
			t.Errorf("the return: %+v", last(1, 0))
		}

		for name, damaged := range map[string][]byte{
			"is cut":         table[:f.entry-1],
			"is malformed":   legacyEntry(f, "", legacyVerdict(0), func(e []byte) { binary.NativeEndian.PutUint16(e[f.offsets:], 1) }),
			"is in no chain": legacyEntry(f, "", legacyVerdict(0), nil),
		} {
			if _, err := f.parse("filter", damaged, none, none); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("%v, want %q", err, name)
			}
		}
		// A match that is longer than the entry.
		long := make([]byte, f.entry+32+32+8)
		binary.NativeEndian.PutUint16(long[f.offsets:], uint16(f.entry+32))
		binary.NativeEndian.PutUint16(long[f.offsets+2:], uint16(len(long)))
		binary.NativeEndian.PutUint16(long[f.entry:], 1000)
		begin = none
		begin[1] = 0
		if _, err := f.parse("filter", long, begin, none); err == nil || !strings.Contains(err.Error(), "a match of 1000 bytes") {
			t.Errorf("%v", err)
		}
	}
}
