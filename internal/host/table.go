package host

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// table is culvert's nftables table, wanted or read. A line that was read has
// its text only, which is kept in its comment: so a difference is seen without
// decoding expressions.
type table struct {
	sets   []set
	chains []chain
}

type set struct {
	name     string
	is4      bool
	elements []Source
}

type chain struct {
	name  string
	rules []rule
}

func (t *table) texts() []string {
	var all []string
	for _, s := range t.sets {
		all = append(all, "set "+s.name)
	}
	for _, c := range t.chains {
		for _, r := range c.rules {
			all = append(all, c.name+" "+r.text)
		}
	}
	slices.Sort(all[:len(t.sets)])
	slices.SortStableFunc(all[len(t.sets):], func(a, b string) int {
		a, _, _ = strings.Cut(a, " ")
		b, _, _ = strings.Cut(b, " ")
		return strings.Compare(a, b) // the order within a chain counts
	})
	return all
}

// diffFirewall compares the tables. Where the lines differ the whole table is
// replaced, where only elements do, they are; either in one transaction.
func diffFirewall(have reading, want State) []step {
	wanted := want.Firewall.table()
	steps := diffTable(have.table, wanted)
	return append(steps, diffForward(have.forward, want.Firewall.Forward)...)
}

func diffTable(have, want *table) []step {
	var steps []step
	add := func(nft func(*nftables.Conn) error, format string, args ...any) {
		steps = append(steps, step{Change: Change{KindNFTables, "nft " + fmt.Sprintf(format, args...)}, nft: nft})
	}
	replace := have == nil || want == nil || !slices.Equal(have.texts(), want.texts())
	if replace && have != nil {
		add(func(c *nftables.Conn) error { c.DelTable(ourTable()); return nil }, "delete table inet %s", TableName)
		have = nil
	}
	if want == nil {
		return steps
	}
	if replace {
		add(func(c *nftables.Conn) error { c.AddTable(ourTable()); return nil }, "add table inet %s", TableName)
		for _, s := range want.sets {
			n := s.nft()
			kind := "ipv4_addr"
			if !s.is4 {
				kind = "ipv6_addr"
			}
			add(func(c *nftables.Conn) error { return c.AddSet(n, nil) },
				"add set inet %s %s { type %s . %s; flags interval; }", TableName, s.name, kind, kind)
		}
	}
	for _, s := range want.sets {
		var old []Source
		if have != nil {
			old = have.sets[slices.IndexFunc(have.sets, func(h set) bool { return h.name == s.name })].elements
		}
		steps = append(steps, diffElements(s, old)...)
	}
	if replace {
		for _, ch := range want.chains {
			n, text := ch.nft()
			add(func(c *nftables.Conn) error { c.AddChain(n); return nil }, "add chain inet %s %s { %s }", TableName, ch.name, text)
			for _, r := range ch.rules {
				line := &nftables.Rule{Table: n.Table, Chain: n, Exprs: r.exprs, UserData: comment(r.text)}
				add(func(c *nftables.Conn) error { c.AddRule(line); return nil }, "add rule inet %s %s %s", TableName, ch.name, r.text)
			}
		}
	}
	return steps
}

func diffElements(s set, old []Source) []step {
	there := make(map[Source]bool, len(old))
	for _, e := range old {
		there[e] = true
	}
	var missing, surplus []Source
	for _, e := range s.elements {
		if !there[e] {
			missing = append(missing, e)
		}
		delete(there, e)
	}
	for _, e := range old {
		if there[e] {
			surplus = append(surplus, e)
		}
	}
	n := s.nft()
	var steps []step
	// A message has room for 64 KB of elements.
	for part := range slices.Chunk(surplus, 200) {
		steps = append(steps, step{
			Change: Change{KindNFTables, "nft delete element inet " + TableName + " " + s.name + " " + elementsText(part)},
			nft:    func(c *nftables.Conn) error { return c.SetDeleteElements(n, elements(part)) },
		})
	}
	for part := range slices.Chunk(missing, 200) {
		steps = append(steps, step{
			Change: Change{KindNFTables, "nft add element inet " + TableName + " " + s.name + " " + elementsText(part)},
			nft:    func(c *nftables.Conn) error { return c.SetAddElements(n, elements(part)) },
		})
	}
	return steps
}

func elementsText(all []Source) string {
	words := make([]string, len(all))
	for i, e := range all {
		words[i] = e.Outer.String() + " . " + e.Inner.String()
	}
	return "{ " + strings.Join(words, ", ") + " }"
}

// elements are ranges in each field, both ends included.
func elements(all []Source) []nftables.SetElement {
	list := make([]nftables.SetElement, len(all))
	for i, e := range all {
		outer := e.Outer.AsSlice()
		list[i] = nftables.SetElement{
			Key:    append(slices.Clip(outer), e.Inner.Masked().Addr().AsSlice()...),
			KeyEnd: append(slices.Clip(outer), lastOf(e.Inner)...),
		}
	}
	return list
}

func lastOf(p netip.Prefix) []byte {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return b
}

// sourceOf reads an element; false if it is none that elements makes.
func sourceOf(e nftables.SetElement) (Source, bool) {
	n := len(e.Key) / 2
	outer, ok := netip.AddrFromSlice(e.Key[:n])
	if !ok || len(e.KeyEnd) != 2*n || string(e.Key[:n]) != string(e.KeyEnd[:n]) {
		return Source{}, false
	}
	first, _ := netip.AddrFromSlice(e.Key[n:])
	bits := 0
	for bits < 8*n && (e.Key[n+bits/8]^e.KeyEnd[n+bits/8])&(0x80>>(bits%8)) == 0 {
		bits++
	}
	s := Source{outer, netip.PrefixFrom(first, bits)}
	return s, s.Inner == s.Inner.Masked() && string(lastOf(s.Inner)) == string(e.KeyEnd[n:])
}

func ourTable() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: TableName}
}

func (s set) nft() *nftables.Set {
	kind := nftables.TypeIPAddr
	if !s.is4 {
		kind = nftables.TypeIP6Addr
	}
	return &nftables.Set{
		Table: ourTable(), Name: s.name, Interval: true, Concatenation: true,
		KeyType: nftables.MustConcatSetType(kind, kind),
	}
}

func (c chain) nft() (*nftables.Chain, string) {
	n := &nftables.Chain{Name: c.name, Table: ourTable(), Type: nftables.ChainTypeFilter, Priority: nftables.ChainPriorityFilter}
	switch c.name {
	case "postrouting":
		n.Type, n.Hooknum, n.Priority = nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource
		return n, "type nat hook postrouting priority srcnat;"
	case "input":
		n.Hooknum = nftables.ChainHookInput
	case "prerouting": // before any translation, of answers too
		n.Hooknum, n.Priority = nftables.ChainHookPrerouting, nftables.ChainPriorityRaw
		return n, "type filter hook prerouting priority raw;"
	case "forward":
		n.Hooknum = nftables.ChainHookForward
	}
	return n, "type filter hook " + c.name + " priority filter;"
}

func masqueradeExprs() []expr.Any { return []expr.Any{&expr.Masq{FullyRandom: true}} }

// notOf matches packets whose outer source and inner source, the latter at an
// offset from the transport header, are no pair of the set.
func (t Tunnel) notOf(inner uint32) rule {
	is4 := t.Network.Addr().Is4()
	n, second, offset := uint32(4), uint32(unix.NFT_REG32_01), addressOffset("saddr", is4)
	if !is4 {
		n, second = 16, unix.NFT_REG_2
	}
	text := fmt.Sprintf("%s saddr . @th,%d,%d != @%s", family(is4), (inner+offset)*8, n*8, t.setName())
	return rule{text, []expr.Any{
		&expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n},
		&expr.Payload{DestRegister: second, Base: expr.PayloadBaseTransportHeader, Offset: inner + offset, Len: n},
		&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: t.setName(), Invert: true},
	}, ""}
}

// readFirewall reads culvert's table and other programs' FORWARD chains.
func (r *reading) readFirewall() error {
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	defer func() { _ = c.CloseLasting() }()
	chains, err := c.ListChains()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil // a kernel without nftables: writing will say so
	}
	if err != nil {
		return fmt.Errorf("listing the nftables chains: %w", err)
	}
	if r.table, err = readTable(c, chains); err != nil {
		return fmt.Errorf("reading the nftables table %s: %w", TableName, err)
	}
	r.forward, err = readForward(c, chains)
	return err
}

func readTable(c *nftables.Conn, chains []*nftables.Chain) (*table, error) {
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == TableName })
	if i < 0 {
		return nil, nil
	}
	t := &table{}
	sets, err := c.GetSets(tables[i])
	if err != nil {
		return t, err
	}
	for _, s := range sets {
		list, err := c.GetSetElements(s)
		if err != nil {
			return t, err
		}
		got := set{name: s.Name, is4: s.KeyType.Bytes == 8}
		for _, e := range list {
			if source, ok := sourceOf(e); ok {
				got.elements = append(got.elements, source)
			} else {
				got.name += " with a foreign element" // so that it is made anew
			}
		}
		t.sets = append(t.sets, got)
	}
	for _, ch := range chains {
		if ch.Table.Name != TableName || ch.Table.Family != nftables.TableFamilyINet {
			continue
		}
		rules, err := c.GetRules(ourTable(), ch)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return t, err
		}
		got := chain{name: ch.Name}
		for _, r := range rules {
			got.rules = append(got.rules, rule{text: commentText(r.UserData), exprs: r.Exprs})
		}
		t.chains = append(t.chains, got)
	}
	return t, nil
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
