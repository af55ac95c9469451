package host

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// TableName is the nftables table that is culvert's.
const TableName = "culvert"

// Masquerade is the rule, in one address family, that traffic from pods
// leaving the cluster network bears the node's address, and that traffic
// within it never does.
type Masquerade struct {
	Network netip.Prefix // the cluster's
	Subnet  netip.Prefix // this node's
}

// kubeMark is set on packets that kube-proxy masquerades itself.
const kubeMark = 0x4000

// rule is one line of the chain, in the words of nft and as expressions.
type rule struct {
	text  string
	exprs []expr.Any
}

// rules returns the chain, which says what flannel's rules say:
//
//  1. what kube-proxy has marked is its business
//  2. this node's pods to pods: no translation
//  3. others to this node's pods: none either, the pod sees who it is
//  4. pods to anywhere else, multicast apart: the node's address
//  5. others to pods elsewhere: the node's address, so that the answer returns
func (m Masquerade) rules() []rule {
	family, multicast := "ip", netip.MustParsePrefix("224.0.0.0/4")
	if !m.Network.Addr().Is4() {
		family, multicast = "ip6", netip.MustParsePrefix("ff00::/8")
	}
	match := func(field, op string, p netip.Prefix) rule {
		return rule{fmt.Sprintf("%s %s %s%s", family, field, op, p), addressMatch(field, op != "", p)}
	}
	all := func(verdict rule, matches ...rule) rule {
		r := rule{"", familyMatch(m.Network.Addr().Is4())}
		for _, part := range append(matches, verdict) {
			r.text += part.text + " "
			r.exprs = append(r.exprs, part.exprs...)
		}
		r.text = r.text[:len(r.text)-1]
		return r
	}
	leave := rule{"return", []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}}
	masquerade := rule{"masquerade fully-random", []expr.Any{&expr.Masq{FullyRandom: true}}}
	return []rule{
		all(leave, match("saddr", "", m.Subnet), match("daddr", "", m.Network)),
		all(leave, match("daddr", "", m.Subnet)),
		all(masquerade, match("saddr", "", m.Network), match("daddr", "!= ", multicast)),
		all(masquerade, match("saddr", "!= ", m.Network), match("daddr", "", m.Network)),
	}
}

func markRule() rule {
	mark := binaryutil.NativeEndian.PutUint32(kubeMark)
	return rule{"meta mark & 0x4000 == 0x4000 return", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mark, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: mark},
		&expr.Verdict{Kind: expr.VerdictReturn},
	}}
}

func familyMatch(is4 bool) []expr.Any {
	proto := byte(unix.NFPROTO_IPV4)
	if !is4 {
		proto = unix.NFPROTO_IPV6
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}
}

// addressMatch compares a packet's source or destination with a prefix.
func addressMatch(field string, negate bool, p netip.Prefix) []expr.Any {
	n := uint32(p.Addr().BitLen() / 8)
	offset := uint32(12) // of the IPv4 source (RFC 791)
	if n == 16 {
		offset = 8 // of the IPv6 source (RFC 8200)
	}
	if field == "daddr" {
		offset += n
	}
	op := expr.CmpOpEq
	if negate {
		op = expr.CmpOpNeq
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: n, Mask: IPNet(p).Mask, Xor: make([]byte, n)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

// Text returns the table as a person would type it for nft -f.
func masqueradeText(ms []Masquerade) []string {
	lines := []string{markRule().text}
	for _, m := range ms {
		for _, r := range m.rules() {
			lines = append(lines, r.text)
		}
	}
	return lines
}

// applyMasquerade replaces the table where it differs from what is wanted, in
// one transaction. The wanted text is kept in each rule's user data, so that a
// difference is seen without decoding the rules.
func applyMasquerade(s State) ([]string, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("opening nftables: %w", err)
	}
	have, exists, err := tableText(c)
	if err != nil {
		return nil, fmt.Errorf("reading nftables: %w", err)
	}
	var want []string
	if len(s.Masquerade) > 0 {
		want = masqueradeText(s.Masquerade)
	}
	if exists == (want != nil) && slices.Equal(have, want) {
		return nil, nil
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: TableName}
	var changes []string
	if exists {
		c.DelTable(table)
		changes = append(changes, "nft delete table inet "+TableName)
	}
	if want != nil {
		c.AddTable(table)
		chain := c.AddChain(&nftables.Chain{
			Name: "postrouting", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
		})
		rules := []rule{markRule()}
		for _, m := range s.Masquerade {
			rules = append(rules, m.rules()...)
		}
		for _, r := range rules {
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: r.exprs, UserData: comment(r.text)})
			changes = append(changes, "nft add rule inet "+TableName+" postrouting "+r.text)
		}
	}
	if err := c.Flush(); err != nil {
		return nil, fmt.Errorf("replacing the nftables table %s: %w", TableName, err)
	}
	return changes, nil
}

// tableText returns the texts of the rules in culvert's table.
func tableText(c *nftables.Conn) (texts []string, exists bool, err error) {
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, false, err
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == TableName })
	if i < 0 {
		return nil, false, nil
	}
	rules, err := c.GetRules(tables[i], &nftables.Chain{Name: "postrouting"})
	if errors.Is(err, unix.ENOENT) {
		return nil, true, nil
	}
	if err != nil {
		return nil, true, err
	}
	for _, r := range rules {
		texts = append(texts, commentText(r.UserData))
	}
	return texts, true, nil
}

// comment encodes a rule's comment as nft does (NFTNL_UDATA_RULE_COMMENT), so
// that `nft list ruleset` shows it.
func comment(text string) []byte {
	return append([]byte{0, byte(len(text) + 1)}, append([]byte(text), 0)...)
}

func commentText(b []byte) string {
	if len(b) < 3 || b[0] != 0 || int(b[1]) != len(b)-2 {
		return ""
	}
	return string(b[2 : len(b)-1])
}
