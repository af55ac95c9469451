package firewall

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// table is culvert's nftables table, wanted or read. The text of a rule that
// was read is its comment, so that rules are compared without decoding
// expressions.
type table struct {
	sets   []set
	chains []chain
}

type chain struct {
	name  string
	rules []rule
}

// table returns the whole table; nil if it would be empty.
func (p Policy) table() *table {
	t := &table{}
	if len(p.Masquerade) > 0 {
		lines := []rule{all(marked(), leave())}
		for _, m := range p.Masquerade {
			lines = append(lines, m.rules()...)
		}
		t.chains = append(t.chains, chain{"postrouting", lines})
	}
	var in, inner, arrived, out, departed []rule
	if len(p.Tunnels) > 0 {
		in = notOf(p.Tunnels)
		arrived = notOf(p.Tunnels)
	}
	for _, tunnel := range p.Tunnels {
		in = append(in, tunnel.expected()...)
	}
	for _, tunnel := range p.Tunnels {
		arrived = append(arrived, tunnel.forged()...)
		in = append(in, tunnel.arriving()...)
		if tunnel.Device == "" && tunnel.Port == 0 {
			in = append(in, tunnel.taken())
		}
		if tunnel.Device != "" {
			in = append(in, tunnel.received()...)
			inner = append(inner, tunnel.unpacked())
			t.sets = append(t.sets, tunnel.sets()...)
		}
		out = append(out, tunnel.forwarded()...)
		if line, ok := tunnel.departed(); ok {
			departed = append(departed, line)
			t.sets = append(t.sets, tunnel.allNodes())
		}
	}
	for _, s := range p.Count.sets() {
		i := slices.IndexFunc(p.Forward, func(p netip.Prefix) bool { return p.Addr().Is4() == s.is4 })
		if i < 0 {
			continue
		}
		t.sets = append(t.sets, s)
		if s.kind == destinations {
			departed = append(departed, s.counted(p.Forward[i]))
		} else {
			inner = append(inner, all(inputDevice(p.Count.Underlay), s.counted(p.Forward[i])))
		}
	}
	if len(in) > 0 {
		t.chains = append(t.chains, chain{"input", in})
	}
	if len(inner) > 0 {
		t.chains = append(t.chains, chain{"prerouting", inner})
	}
	if len(arrived) > 0 {
		t.chains = append(t.chains, chain{"arrived", arrived})
	}
	if len(out) > 0 {
		t.chains = append(t.chains, chain{"forward", out})
	}
	if len(departed) > 0 {
		t.chains = append(t.chains, chain{"departed", departed})
	}
	if len(t.chains) == 0 {
		return nil
	}
	return t
}

// texts returns the rules of all chains, sorted by chain; order within a chain
// matters.
func (t *table) texts() []string {
	var all []string
	for _, c := range t.chains {
		for _, r := range c.rules {
			all = append(all, c.name+" "+label(r.text))
		}
	}
	slices.SortStableFunc(all, func(a, b string) int {
		a, _, _ = strings.Cut(a, " ")
		b, _, _ = strings.Cut(b, " ")
		return strings.Compare(a, b)
	})
	return all
}

func (t *table) set(name string) (set, bool) {
	i := slices.IndexFunc(t.sets, func(s set) bool { return s.name == name })
	if i < 0 {
		return set{}, false
	}
	return t.sets[i], true
}

// diffTable compares the tables. If rules differ, all chains are replaced,
// otherwise only elements are changed; either in one transaction, after new sets
// have been created.
func diffTable(have, want *table) []Step {
	var steps []Step
	add := func(nft func(*nftables.Conn) error, format string, args ...any) {
		steps = append(steps, Step{Command: "nft " + fmt.Sprintf(format, args...), nft: nft})
	}
	switch {
	case want == nil && have == nil:
		return nil
	case want == nil:
		add(func(c *nftables.Conn) error { c.DelTable(ourTable()); return nil }, "delete table inet %s", names.Table)
		return steps
	case have != nil && slices.ContainsFunc(want.sets, have.mistakable):
		// A set's type cannot be changed, and rules refer to the set.
		steps = append(steps, Step{Command: "nft delete table inet " + names.Table, do: deleteTable})
		have = nil
	}
	if have == nil {
		add(func(c *nftables.Conn) error { c.AddTable(ourTable()); return nil }, "add table inet %s", names.Table)
		have = &table{}
	}
	replace := !slices.Equal(have.texts(), want.texts())
	for _, s := range want.sets {
		if _, there := have.set(s.name); !there {
			steps = append(steps, s.addStep())
		}
	}
	if replace {
		for _, ch := range have.chains {
			n, _ := ch.nft()
			add(func(c *nftables.Conn) error { c.FlushChain(n); c.DelChain(n); return nil }, "delete chain inet %s %s", names.Table, ch.name)
		}
	}
	for _, h := range have.sets {
		if _, wanted := want.set(h.name); !wanted {
			add(func(c *nftables.Conn) error { c.DelSet(h.nft()); return nil }, "delete set inet %s %s", names.Table, h.name)
		}
	}
	for _, s := range want.sets {
		old, _ := have.set(s.name)
		steps = append(steps, diffElements(s, old)...)
	}
	if !replace {
		return steps
	}
	for _, ch := range want.chains {
		n, text := ch.nft()
		add(func(c *nftables.Conn) error { c.AddChain(n); return nil }, "add chain inet %s %s { %s }", names.Table, ch.name, text)
		for _, r := range ch.rules {
			line := &nftables.Rule{Table: n.Table, Chain: n, Exprs: r.exprs, UserData: comment(label(r.text))}
			add(func(c *nftables.Conn) error { c.AddRule(line); return nil }, "add rule inet %s %s %s", names.Table, ch.name, r.text)
		}
	}
	return steps
}

// mistakable reports whether the table has a set with the name of a wanted one
// but of another type. No version of culvert created such a set.
func (t *table) mistakable(wanted set) bool {
	s, there := t.set(wanted.name)
	return there && (s.unlike || s.is4 != wanted.is4)
}

// deleteTable deletes the table in its own transaction.
func deleteTable() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	c.DelTable(ourTable())
	return c.Flush()
}

func ourTable() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: names.Table}
}

func (c chain) nft() (*nftables.Chain, string) {
	n := &nftables.Chain{Name: c.name, Table: ourTable(), Type: nftables.ChainTypeFilter, Priority: nftables.ChainPriorityFilter}
	switch c.name {
	case "postrouting":
		n.Type, n.Hooknum, n.Priority = nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource
		return n, "type nat hook postrouting priority srcnat;"
	case "input":
		n.Hooknum = nftables.ChainHookInput
	case "prerouting": // before NAT, also of replies
		n.Hooknum, n.Priority = nftables.ChainHookPrerouting, nftables.ChainPriorityRaw
		return n, "type filter hook prerouting priority raw;"
	case "arrived": // after destination NAT
		n.Hooknum, n.Priority = nftables.ChainHookPrerouting, nftables.ChainPriorityRef(-90)
		return n, "type filter hook prerouting priority -90;"
	case "forward":
		n.Hooknum = nftables.ChainHookForward
	case "departed": // after source NAT
		n.Hooknum, n.Priority = nftables.ChainHookPostrouting, nftables.ChainPriorityRef(300)
		return n, "type filter hook postrouting priority 300;"
	}
	return n, "type filter hook " + c.name + " priority filter;"
}

func readTable(c *nftables.Conn, chains []*nftables.Chain) (*table, error) {
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == names.Table })
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
		got := setOf(s)
		for _, e := range list {
			source, ok := got.sourceOf(e.Key)
			got.elements = append(got.elements, source)
			got.foreign = got.foreign || !ok || len(e.KeyEnd) > 0
		}
		t.sets = append(t.sets, got)
	}
	for _, ch := range chains {
		if ch.Table.Name != names.Table || ch.Table.Family != nftables.TableFamilyINet {
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

// label is the comment of a rule: its text without quotes, which nft does not
// accept in a comment; if it is too long, its beginning and a hash.
func label(text string) string {
	const most = 127
	text = strings.ReplaceAll(text, `"`, "")
	if len(text) <= most {
		return text
	}
	sum := sha256.Sum256([]byte(text))
	return fmt.Sprintf("%s... %x", text[:most-4-16], sum[:8])
}

// comment encodes a rule's comment like nft (NFTNL_UDATA_RULE_COMMENT), so that
// `nft list ruleset` shows it.
func comment(text string) []byte {
	return append([]byte{0, byte(len(text) + 1)}, append([]byte(text), 0)...)
}

func commentText(b []byte) string {
	if len(b) < 3 || b[0] != 0 || int(b[1]) != len(b)-2 {
		return ""
	}
	return string(b[2 : len(b)-1])
}
