package host

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"
)

// Rules are the nftables and iptables rules of this host, culvert's accepts in
// others' chains among them, culvert's own table not.
type Rules struct {
	set     ruleset
	indexes map[string]int // of links
}

// ReadRules reads the rules, changing nothing.
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

// Packet is one packet, as far as rules look at it.
type Packet struct {
	From, To netip.Addr
	Proto    byte
	Port     uint16 // destination of TCP and UDP; 0 is any
	In, Out  string // links; empty where there is none yet
	ToHost   bool   // its destination is this host
	Answer   bool   // to conntrack its connection is established
}

func (p Packet) String() string {
	text := map[byte]string{unix.IPPROTO_TCP: "TCP", unix.IPPROTO_UDP: "UDP", unix.IPPROTO_ICMP: "ICMP", unix.IPPROTO_ICMPV6: "ICMPv6", unix.IPPROTO_IPIP: "IPIP"}[p.Proto]
	port := ""
	if p.Port != 0 {
		port = fmt.Sprintf(" port %d", p.Port)
	}
	return fmt.Sprintf("%s packets from %s to %s%s", text, p.From, p.To, port)
}

// Hook is a place where the kernel calls chains.
type Hook string

// The hooks, in nftables' words.
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
	// Certain says that all matches on the way to the rule could be read.
	Certain bool
	Rule    string // the rule that drops, with its handle
	Fix     string
}

// Walk walks the chains at a hook with a packet, purely, and returns what each
// that sees it does.
func (r Rules) Walk(at Hook, p Packet) []Verdict {
	hook := hooks[at]
	ports := [2]field{free(2), free(2)}
	if p.Port != 0 {
		ports[1] = known(binaryutil.BigEndian.PutUint16(p.Port)...)
	}
	q := newProbe(p.String(), p.Proto, known(p.From.AsSlice()...), known(p.To.AsSlice()...), ports)
	q.in, q.out = iface{p.In, r.indexes[p.In]}, iface{p.Out, r.indexes[p.Out]}
	q.local, q.stateNew, q.names = p.ToHost, !p.Answer, 8
	var all []Verdict
	for _, c := range r.set.chains {
		if !c.base || c.hook != *hook || !c.sees(q) {
			continue
		}
		v := Verdict{Chain: fmt.Sprintf("%s, chain %s", tableText(c), c.name), Certain: true}
		for _, f := range (ruleset{append([]ruleChain{c}, notBase(r.set.chains)...), r.set.sets}).evaluate(*hook, q) {
			if v.Drops && (v.Certain || !f.certain) {
				continue // said already
			}
			v.Drops, v.Certain, v.Rule, v.Fix = true, f.certain, f.String(), removal(f)
		}
		all = append(all, v)
	}
	return all
}

// notBase are the chains that only others lead to.
func notBase(all []ruleChain) []ruleChain {
	var some []ruleChain
	for _, c := range all {
		if !c.base {
			some = append(some, c)
		}
	}
	return some
}

// removal is what a person would do about a rule that drops.
func removal(f finding) string {
	if len(f.path) == 0 {
		if program := f.base.program(); program != "" {
			return fmt.Sprintf("%s -t %s -P %s ACCEPT, or an accept in it", program, f.base.table, f.base.name)
		}
		return fmt.Sprintf("an accept in the chain %s of the table %s %s, or another policy", f.base.name, familyText(f.base.family), f.base.table)
	}
	last := f.path[len(f.path)-1]
	if program := f.base.program(); program != "" {
		return fmt.Sprintf("%s -t %s -D %s %d, or an accept before it", program, f.base.table, last.chain, last.index+1)
	}
	return fmt.Sprintf("nft delete rule %s %s %s handle %d, or an accept before it", familyText(f.base.family), f.base.table, last.chain, last.handle)
}
