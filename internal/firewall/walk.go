package firewall

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"
)

// Rules are this host's nftables and iptables rules, including culvert's
// accepts in other programs' chains, but not culvert's table.
type Rules struct {
	set     ruleset
	indexes map[string]int // of links by name
}

// ReadRules reads the rules. It changes nothing.
func ReadRules() (Rules, error) {
	r := Rules{indexes: make(map[string]int)}
	links, err := net.Interfaces()
	if err != nil {
		return r, fmt.Errorf("listing the network interfaces: %w", err)
	}
	for _, l := range links {
		r.indexes[l.Name] = l.Index
	}
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return r, fmt.Errorf("opening nftables: %w", err)
	}
	defer func() { _ = c.CloseLasting() }()
	chains, err := c.ListChains()
	if err != nil {
		return r, fmt.Errorf("listing the nftables chains: %w", err)
	}
	others, err := readOthers(c, chains, true)
	r.set = others.set
	return r, err
}

// Packet has the properties of a packet that rules can match.
type Packet struct {
	From, To netip.Addr
	Proto    byte
	Port     uint16 // destination port of TCP and UDP; 0 matches any
	In, Out  string // links; empty if not determined at the hook
	ToHost   bool   // the destination is this host
	Answer   bool   // the packet belongs to an established connection
}

func (p Packet) String() string {
	text := map[byte]string{unix.IPPROTO_TCP: "TCP", unix.IPPROTO_UDP: "UDP", unix.IPPROTO_ICMP: "ICMP", unix.IPPROTO_ICMPV6: "ICMPv6", unix.IPPROTO_IPIP: "IPIP"}[p.Proto]
	port := ""
	if p.Port != 0 {
		port = fmt.Sprintf(" port %d", p.Port)
	}
	return fmt.Sprintf("%s packets from %s to %s%s", text, p.From, p.To, port)
}

// Hook is a netfilter hook.
type Hook string

// The hooks, named as in nftables.
const (
	Prerouting  Hook = "prerouting"
	Input       Hook = "input"
	Forward     Hook = "forward"
	Output      Hook = "output"
	Postrouting Hook = "postrouting"
)

var hooks = map[Hook]*nftables.ChainHook{
	Prerouting: nftables.ChainHookPrerouting, Input: nftables.ChainHookInput, Forward: nftables.ChainHookForward,
	Output: nftables.ChainHookOutput, Postrouting: nftables.ChainHookPostrouting,
}

// Verdict is what one base chain does with a packet.
type Verdict struct {
	Chain string // such as "iptables, table filter, chain FORWARD"
	Drops bool
	// Certain is set if all matches on the path to the rule could be evaluated.
	Certain bool
	Rule    string // the rule that drops, with its handle
	Fix     string
}

// Walk evaluates the base chains at a hook for a packet and returns the verdict
// of each that sees it. It does no I/O.
func (r Rules) Walk(at Hook, p Packet) []Verdict {
	hook := hooks[at]
	ports := [2]field{free(2), free(2)}
	if p.Port != 0 {
		ports[1] = known(binaryutil.BigEndian.PutUint16(p.Port)...)
	}
	q := newProbe(p.String(), p.Proto, known(p.From.AsSlice()...), known(p.To.AsSlice()...), ports)
	q.in, q.out = Device{p.In, r.indexes[p.In]}, Device{p.Out, r.indexes[p.Out]}
	q.local, q.stateNew, q.names = p.ToHost, !p.Answer, 8
	var all []Verdict
	for _, c := range r.set.chains {
		if !c.base || c.hook != *hook || !c.sees(q) {
			continue
		}
		v := Verdict{Chain: fmt.Sprintf("%s, chain %s", tableText(c), c.name), Certain: true}
		for _, f := range (ruleset{append([]ruleChain{c}, notBase(r.set.chains)...), r.set.sets}).evaluate(*hook, q) {
			if v.Drops && (v.Certain || !f.certain) {
				continue // already reported
			}
			v.Drops, v.Certain, v.Rule, v.Fix = true, f.certain, f.String(), removal(f)
		}
		all = append(all, v)
	}
	return all
}

// notBase returns the chains that are not base chains.
func notBase(all []ruleChain) []ruleChain {
	var some []ruleChain
	for _, c := range all {
		if !c.base {
			some = append(some, c)
		}
	}
	return some
}

// removal suggests how to remove a rule that drops.
func removal(f finding) string {
	if len(f.path) == 0 {
		if program := f.base.program(); program != "" {
			return fmt.Sprintf("%s -t %s -P %s ACCEPT, or add an accept to it", program, f.base.table, f.base.name)
		}
		return fmt.Sprintf("add an accept to the chain %s of the table %s %s, or change its policy", f.base.name, familyText(f.base.family), f.base.table)
	}
	last := f.path[len(f.path)-1]
	if program := f.base.program(); program != "" {
		return fmt.Sprintf("%s -t %s -D %s %d, or add an accept before it", program, f.base.table, last.chain, last.index+1)
	}
	return fmt.Sprintf("nft delete rule %s %s %s handle %d, or add an accept before it", familyText(f.base.family), f.base.table, last.chain, last.handle)
}

// IngressChain returns the name of an nftables chain at the ingress hook
// (family netdev), as `nft` writes it; empty if there is none. That hook runs
// after tc's ingress filters.
func IngressChain() (string, error) {
	c, err := nftables.New()
	if err != nil {
		return "", fmt.Errorf("opening nftables: %w", err)
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyNetdev)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return "", nil // a kernel without nftables
	}
	if err != nil {
		return "", fmt.Errorf("listing the nftables chains: %w", err)
	}
	for _, ch := range chains {
		if ch.Hooknum != nil && *ch.Hooknum == *nftables.ChainHookIngress {
			return "netdev " + ch.Table.Name + " " + ch.Name, nil
		}
	}
	return "", nil
}
