package firewall

import (
	"fmt"

	"github.com/google/nftables"
)

// Listed is one object of nftables, of any program, for a bug report.
type Listed struct {
	Family, Table, Chain string
	// For a chain: its type, hook, priority and policy, as the kernel's numbers.
	Type     nftables.ChainType      `json:",omitempty"`
	Hook     *nftables.ChainHook     `json:",omitempty"`
	Priority *nftables.ChainPriority `json:",omitempty"`
	Policy   *nftables.ChainPolicy   `json:",omitempty"`
	// For a rule: its handle, its expressions as nftables has them, and its comment.
	Handle  uint64   `json:",omitempty"`
	Exprs   []string `json:",omitempty"`
	Comment string   `json:",omitempty"`
}

// List returns the chains and rules of all programs. It needs no nft program.
func List() ([]Listed, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, err
	}
	families := map[nftables.TableFamily]string{
		nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6",
		nftables.TableFamilyBridge: "bridge", nftables.TableFamilyARP: "arp", nftables.TableFamilyNetdev: "netdev",
	}
	var all []Listed
	for _, ch := range chains {
		of := Listed{Family: families[ch.Table.Family], Table: ch.Table.Name, Chain: ch.Name}
		chain := of
		chain.Type, chain.Hook, chain.Priority, chain.Policy = ch.Type, ch.Hooknum, ch.Priority, ch.Policy
		all = append(all, chain)
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			return all, fmt.Errorf("reading the rules of %s %s: %w", ch.Table.Name, ch.Name, err)
		}
		for _, r := range rules {
			rule := of
			rule.Handle, rule.Comment = r.Handle, commentText(r.UserData)
			for _, e := range r.Exprs {
				rule.Exprs = append(rule.Exprs, fmt.Sprintf("%T%+v", e, e))
			}
			all = append(all, rule)
		}
	}
	return all, nil
}
