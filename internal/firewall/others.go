package firewall

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/names"
)

// otherRules are the rules of other programs, and our rules in their chains.
type otherRules struct {
	set  ruleset   // without our rules, unless all were asked for
	ours []ourRule // our rules in iptables chains
	// bridge is a base chain of another program that sees bridged frames, or empty.
	bridge string
	// warnings are about rules that cannot be read.
	warnings []api.Warning
}

// hookOf returns the hook of a base chain, if culvert's packets pass it;
// otherwise false.
func hookOf(ch *nftables.Chain) (nftables.ChainHook, bool) {
	if ch.Hooknum == nil || ch.Type != nftables.ChainTypeFilter && ch.Type != nftables.ChainTypeRoute {
		return 0, false
	}
	hook := *ch.Hooknum
	switch ch.Table.Family {
	case nftables.TableFamilyIPv4, nftables.TableFamilyIPv6:
		return hook, hook <= *nftables.ChainHookPostrouting
	case nftables.TableFamilyINet:
		const ingress = 5 // NF_INET_INGRESS
		if hook == ingress {
			return *nftables.ChainHookPrerouting, true
		}
		return hook, hook <= *nftables.ChainHookPostrouting
	case nftables.TableFamilyNetdev:
		// Ingress packets reach the prerouting hook next.
		return *nftables.ChainHookPrerouting, hook == *nftables.ChainHookIngress
	}
	return 0, false
}

// readOthers reads the base chains and all chains that they lead to. It
// separates our rules in them, unless all is set.
func readOthers(c *nftables.Conn, chains []*nftables.Chain, all bool) (otherRules, error) {
	var o otherRules
	o.set.chains, o.warnings = readLegacy()
	type name struct {
		family       nftables.TableFamily
		table, chain string
	}
	byName := make(map[name]*nftables.Chain, len(chains))
	var next []*nftables.Chain
	for _, ch := range chains {
		if ch.Table.Name == names.Table && ch.Table.Family == nftables.TableFamilyINet {
			continue
		}
		if ch.Table.Family == nftables.TableFamilyBridge && ch.Hooknum != nil {
			o.bridge = fmt.Sprintf("%s of the nftables table bridge %s", ch.Name, ch.Table.Name)
		}
		byName[name{ch.Table.Family, ch.Table.Name, ch.Name}] = ch
		if _, ok := hookOf(ch); ok {
			next = append(next, ch)
		}
	}
	seen := make(map[*nftables.Chain]bool)
	sets := make(map[name]bool)
	for len(next) > 0 {
		ch := next[0]
		next = next[1:]
		if seen[ch] {
			continue
		}
		seen[ch] = true
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			return o, fmt.Errorf("reading the chain %s of the nftables table %s: %w", ch.Name, ch.Table.Name, err)
		}
		read := ruleChain{family: ch.Table.Family, table: ch.Table.Name, name: ch.Name}
		read.hook, read.base = hookOf(ch)
		if read.atIngress = read.base && read.hook != *ch.Hooknum || read.family == nftables.TableFamilyNetdev; read.atIngress {
			links, err := hookLinks(read.family)
			if err != nil {
				return o, fmt.Errorf("reading the links of the chain %s of the nftables table %s: %w", ch.Name, ch.Table.Name, err)
			}
			read.links = links[[2]string{read.table, read.name}]
		}
		read.drops = ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop
		for _, r := range rules {
			if !all && isOurs(r) {
				o.ours = append(o.ours, ourRule{
					text: matchText(r.Exprs, read.family == nftables.TableFamilyIPv4), handle: r.Handle,
					family: read.family, table: read.table, chain: read.name, after: len(read.rules),
				})
				continue
			}
			read.rules = append(read.rules, r)
			for _, e := range r.Exprs {
				switch e := e.(type) {
				case *expr.Verdict:
					if to := byName[name{read.family, read.table, e.Chain}]; to != nil {
						next = append(next, to)
					}
				case *expr.Lookup:
					key := name{read.family, read.table, e.SetName}
					if sets[key] {
						continue
					}
					sets[key] = true
					s, err := readSet(c, ch.Table, e.SetName)
					if err != nil {
						continue // deleted meanwhile, or of an unknown type: a lookup may match
					}
					o.set.sets = append(o.set.sets, s)
					for _, element := range s.elements {
						if element.VerdictData == nil {
							continue
						}
						if to := byName[name{read.family, read.table, element.VerdictData.Chain}]; to != nil {
							next = append(next, to)
						}
					}
				}
			}
		}
		o.set.chains = append(o.set.chains, read)
	}
	return o, nil
}

func readSet(c *nftables.Conn, t *nftables.Table, name string) (ruleSet, error) {
	s, err := c.GetSetByName(t, name)
	if err != nil {
		return ruleSet{}, err
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return ruleSet{}, err
	}
	defer func() { _ = conn.Close() }()
	elements, err := setElements(conn, t.Family, t.Name, name)
	if err != nil {
		return ruleSet{}, err
	}
	return ruleSet{family: t.Family, table: t.Name, name: name, interval: s.Interval, elements: elements}, nil
}
