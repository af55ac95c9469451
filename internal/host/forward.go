package host

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"

	"culvert/internal/api"
)

// An accept in our own table cannot override a drop in another's: every table
// must let a packet through. So where the FORWARD chain of the iptables
// (iptables-nft) drops, which Docker makes it do, the accept is inserted there,
// through nftables, as iptables itself would write it:
//
//	iptables -A FORWARD -s 10.5.0.0/16 -m comment --comment culvert -j ACCEPT
//
// The matches are of the kinds that iptables-save prints: a look-up in an nft
// set there would be saved as a rule that accepts everything.

// forwardComment marks our rules in others' chains.
const forwardComment = "culvert"

// forwardReading is what the FORWARD chains of other programs do.
type forwardReading struct {
	// chains are those that can be mended: one per address family at most.
	chains []forwardChain
	// obstacles are those that cannot.
	obstacles []api.Warning
}

// forwardChain is the chain of iptables that an accept belongs in.
type forwardChain struct {
	table  *nftables.Table
	name   string
	is4    bool
	drops  bool   // FORWARD does, by policy or at its end
	docker bool   // the chain is DOCKER-USER
	before uint64 // handle of the rule to stand before; 0 for the end
	ours   []forwardRule
}

type forwardRule struct {
	text   string
	handle uint64
	chain  string
}

// readForward looks at every filter chain in the forward hook.
func readForward(c *nftables.Conn, chains []*nftables.Chain) (forwardReading, error) {
	var r forwardReading
	for _, ch := range chains {
		t := ch.Table
		if ch.Hooknum == nil || *ch.Hooknum != *nftables.ChainHookForward || ch.Type != nftables.ChainTypeFilter || t.Name == TableName ||
			t.Family != nftables.TableFamilyIPv4 && t.Family != nftables.TableFamilyIPv6 && t.Family != nftables.TableFamilyINet {
			continue
		}
		rules, err := c.GetRules(t, ch)
		if err != nil {
			return r, fmt.Errorf("reading the chain %s of the nftables table %s: %w", ch.Name, t.Name, err)
		}
		drops := ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop
		last := uint64(0)
		for _, rule := range rules {
			if dropsAll(rule.Exprs) {
				drops, last = true, rule.Handle
				break
			}
		}
		if t.Name == "filter" && ch.Name == "FORWARD" && t.Family != nftables.TableFamilyINet {
			f := forwardChain{table: t, name: ch.Name, is4: t.Family == nftables.TableFamilyIPv4, drops: drops, before: last}
			f.gather(rules, ch.Name)
			if i := slices.IndexFunc(chains, func(o *nftables.Chain) bool {
				return o.Table.Name == t.Name && o.Table.Family == t.Family && o.Name == "DOCKER-USER"
			}); i >= 0 && jumps(rules, "DOCKER-USER") {
				if rules, err = c.GetRules(t, chains[i]); err != nil {
					return r, fmt.Errorf("reading the chain DOCKER-USER: %w", err)
				}
				f.name, f.docker, f.before = "DOCKER-USER", true, 0
				if len(rules) > 0 {
					f.before = rules[0].Handle
				}
				f.gather(rules, f.name)
			}
			r.chains = append(r.chains, f)
			continue
		}
		if drops {
			r.obstacles = append(r.obstacles, api.Warning{
				Check: "forward-drop",
				Text:  fmt.Sprintf("the nftables table %s, chain %s, drops forwarded packets", t.Name, ch.Name),
				Fix:   "accept the cluster network there",
			})
		}
	}
	r.obstacles = append(r.obstacles, legacy()...)
	return r, nil
}

// legacy looks for the iptables of old, whose tables nftables does not show.
func legacy() []api.Warning {
	var all []api.Warning
	for _, f := range [][2]string{{"/proc/thread-self/net/ip_tables_names", "iptables"}, {"/proc/thread-self/net/ip6_tables_names", "ip6tables"}} {
		b, err := os.ReadFile(f[0])
		if err == nil && slices.Contains(strings.Fields(string(b)), "filter") {
			all = append(all, api.Warning{
				Check: "forward-unreadable",
				Text:  fmt.Sprintf("the legacy %s is in use, which cannot be read here", f[1]),
				Fix:   fmt.Sprintf("see that its FORWARD chain accepts the cluster network (`%s-legacy -S FORWARD`)", f[1]),
			})
		}
	}
	return all
}

// dropsAll says whether a rule drops or rejects whatever reaches it.
func dropsAll(exprs []expr.Any) bool {
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Counter:
		case *expr.Reject:
			return true
		case *expr.Target:
			return e.Name == "REJECT"
		case *expr.Verdict:
			return e.Kind == expr.VerdictDrop
		default:
			return false
		}
	}
	return false
}

func jumps(rules []*nftables.Rule, to string) bool {
	return slices.ContainsFunc(rules, func(r *nftables.Rule) bool {
		return slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
			v, ok := e.(*expr.Verdict)
			return ok && v.Kind == expr.VerdictJump && v.Chain == to
		})
	})
}

// gather finds our own rules among a chain's.
func (f *forwardChain) gather(rules []*nftables.Rule, chain string) {
	for _, r := range rules {
		for _, e := range r.Exprs {
			m, ok := e.(*expr.Match)
			if !ok || m.Name != "comment" {
				continue
			}
			if text, ok := m.Info.(*xt.Comment); ok && *text == forwardComment {
				f.ours = append(f.ours, forwardRule{matchText(r.Exprs, f.is4), r.Handle, chain})
			}
		}
	}
}

// forwardMatch matches an address as iptables does: where the prefix ends with a
// byte, by as many bytes as it has.
func forwardMatch(field string, n netip.Prefix) []expr.Any {
	exprs := address(field, true, n.Masked()).exprs
	if n.Bits()%8 != 0 || n.Bits() == 0 {
		return exprs
	}
	load, compare := *exprs[0].(*expr.Payload), *exprs[2].(*expr.Cmp)
	load.Len = uint32(n.Bits() / 8)
	compare.Data = compare.Data[:load.Len]
	return []expr.Any{&load, &compare}
}

// matchText reads the prefix of a rule of ours back, as iptables' flag: "-s
// 10.5.0.0/16", or "" if it is not as we, or iptables-restore, write it.
func matchText(exprs []expr.Any, is4 bool) string {
	var load *expr.Payload
	var compare *expr.Cmp
	bits := -1
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Payload:
			load = e
		case *expr.Bitwise:
			bits = 0
			for _, m := range e.Mask {
				for ; m&0x80 != 0; m <<= 1 {
					bits++
				}
			}
		case *expr.Cmp:
			compare = e
		}
	}
	if load == nil || compare == nil || compare.Op != expr.CmpOpEq {
		return ""
	}
	if bits < 0 {
		bits = 8 * len(compare.Data)
	}
	full := make([]byte, 16)
	if is4 {
		full = full[:4]
	}
	copy(full, compare.Data)
	a, _ := netip.AddrFromSlice(full)
	for flag, field := range forwardFlags {
		if load.Offset == addressOffset(field, is4) {
			return flag + " " + netip.PrefixFrom(a, bits).String()
		}
	}
	return ""
}

// forwardFlags are iptables' flags for the fields of addresses.
var forwardFlags = map[string]string{"-s": "saddr", "-d": "daddr"}

// diffForward returns the steps that put an accept for each network where its
// packets would be dropped, and take away any other of ours.
func diffForward(have forwardReading, networks []netip.Prefix) []step {
	var steps []step
	for _, f := range have.chains {
		var want []string
		exprs := make(map[string][]expr.Any)
		if f.drops || f.docker {
			for _, n := range networks {
				if n.Addr().Is4() != f.is4 {
					continue
				}
				for flag, field := range forwardFlags {
					text := flag + " " + n.Masked().String()
					want = append(want, text)
					exprs[text] = forwardMatch(field, n)
				}
			}
			slices.Sort(want)
		}
		there := make(map[string]bool)
		for _, r := range f.ours {
			if slices.Contains(want, r.text) && !there[r.text] && r.chain == f.name {
				there[r.text] = true
				continue
			}
			old := &nftables.Rule{Table: f.table, Chain: &nftables.Chain{Table: f.table, Name: r.chain}, Handle: r.handle}
			steps = append(steps, step{
				Change: Change{KindForward, f.command("-D", r.chain, r.text)},
				nft:    func(c *nftables.Conn) error { return c.DelRule(old) },
			})
		}
		for _, text := range want {
			if there[text] {
				continue
			}
			comment := xt.Comment(forwardComment)
			rule := &nftables.Rule{
				Table: f.table, Chain: &nftables.Chain{Table: f.table, Name: f.name}, Position: f.before,
				Exprs: append(exprs[text], &expr.Match{Name: "comment", Info: &comment}, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}),
			}
			flag := "-A"
			if f.before != 0 {
				flag = "-I"
			}
			steps = append(steps, step{
				Change: Change{KindForward, f.command(flag, f.name, text)},
				nft: func(c *nftables.Conn) error {
					if rule.Position != 0 {
						c.InsertRule(rule)
					} else {
						c.AddRule(rule)
					}
					return nil
				},
			})
		}
	}
	return steps
}

func (f forwardChain) command(flag, chain, match string) string {
	program := "iptables"
	if !f.is4 {
		program = "ip6tables"
	}
	return fmt.Sprintf("%s %s %s %s -m comment --comment %s -j ACCEPT", program, flag, chain, match, forwardComment)
}
