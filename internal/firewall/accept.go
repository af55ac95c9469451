package firewall

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/names"
)

// An accept in our table cannot override a drop in another: every table must
// accept a packet. So other programs' chains are evaluated with the packets
// that must pass (evaluate.go). If an iptables-nft chain drops them, as with
// Docker or ufw, an accept is inserted there before the rule that drops,
// through nftables, in the form that iptables itself writes:
//
//	iptables -A FORWARD -s 10.5.0.0/16 -m comment --comment culvert -j ACCEPT
//	iptables -A INPUT -p udp --dport 8472 -m comment --comment culvert -j ACCEPT
//
// Only matches that iptables-save can print are used: it would save a lookup in
// an nft set as a rule that accepts everything. So the accept in INPUT cannot
// list thousands of peers; packets from strangers are dropped and counted by
// our own table.
//
// Drops in other places, rules that cannot be evaluated, and drops that
// explicitly match the cluster network or the tunnel, and so are intended, are
// left and reported.

// passage is a kind of packet that must pass a hook.
type passage struct {
	hook   *nftables.ChainHook
	chain  string // the iptables chain at that hook
	is4    bool
	probes []probe
	// each, if not nil, returns the probes for a single one of the peers. There may be thousands, so
	// these are computed only when the probes find something.
	each    func(peer netip.Prefix) []probe
	peers   []Source
	accepts []accept
	check   string // the warning's check name
}

// accept is an accept rule of ours in an iptables chain.
type accept struct {
	text  string // in iptables syntax
	nft   string // in nft syntax
	exprs []expr.Any
}

// passages returns everything that must pass other programs' chains.
func (p Policy) passages(d Devices) []passage {
	var all []passage
	for _, n := range p.Forward {
		is4 := n.Addr().Is4()
		through := passage{hook: nftables.ChainHookForward, chain: "FORWARD", is4: is4, check: "forward-drop"}
		through.probes = forwarded(n, d.Pods, d.Tunnels[n])
		for _, flag := range []string{"-d", "-s"} {
			field := forwardFlags[flag]
			through.accepts = append(through.accepts, accept{
				flag + " " + n.Masked().String(), fmt.Sprintf("%s %s %s", family(is4), field, n.Masked()), forwardMatch(field, n),
			})
		}
		all = append(all, through, through.at(nftables.ChainHookPrerouting), through.at(nftables.ChainHookPostrouting))
	}
	for _, t := range p.Tunnels {
		is4 := t.Network.Addr().Is4()
		in := passage{hook: nftables.ChainHookInput, chain: "INPUT", is4: is4, check: CheckInput, accepts: []accept{t.accept()}}
		out := passage{hook: nftables.ChainHookOutput, chain: "OUTPUT", is4: is4, check: "output-drop", accepts: in.accepts}
		in.probes, out.probes = t.probes(d.Underlay, commonPrefix(t.Peers))
		if len(t.Peers) > 1 {
			in.peers, out.peers = t.Peers, t.Peers
			in.each = func(peer netip.Prefix) []probe {
				i, _ := t.probes(d.Underlay, peer)
				return i
			}
			out.each = func(peer netip.Prefix) []probe {
				_, o := t.probes(d.Underlay, peer)
				return o
			}
		}
		all = append(all, out, out.at(nftables.ChainHookPostrouting))
		if t.Device != "" || t.Port != 0 { // else a packet socket receives them before any hook
			all = append(all, in, in.at(nftables.ChainHookPrerouting))
		}
	}
	return all
}

// forwarded returns probes for packets between this node's pods and other
// nodes'.
func forwarded(n netip.Prefix, pods, tunnel Device) []probe {
	coarse, protos := max(24, min(n.Bits()+8, 30)), []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP}
	if !n.Addr().Is4() {
		coarse, protos[2] = max(64, min(n.Bits()+8, 112)), unix.IPPROTO_ICMPV6
	}
	address := prefixField(n, coarse)
	var all []probe
	for _, direction := range [][2]Device{{pods, tunnel}, {tunnel, pods}} {
		for _, proto := range protos {
			p := newProbe("packets of the cluster network "+n.String(), proto, address, address, [2]field{free(2), free(2)})
			p.in, p.out, p.names = direction[0], direction[1], n.Bits()
			all = append(all, p)
		}
	}
	return all
}

// at returns the passage at another hook, where no accepts are inserted.
func (p passage) at(hook *nftables.ChainHook) passage {
	p.hook, p.chain = hook, ""
	return p
}

// probes returns the tunnel's packets from and to peers within a prefix; the
// zero Prefix means any.
func (t TunnelRule) probes(underlay Device, peers netip.Prefix) (in, out []probe) {
	n := 4
	if !t.Network.Addr().Is4() {
		n = 16
	}
	proto, ports, bits := byte(unix.IPPROTO_IPIP), [2]field{free(2), free(2)}, 8
	if t.Port != 0 {
		proto, bits = unix.IPPROTO_UDP, 16
		ports[1] = known(binaryutil.BigEndian.PutUint16(t.Port)...)
	}
	peer := dark(n)
	if peers.IsValid() {
		peer = prefixField(peers, n*8)
	}
	i := newProbe("the tunnel's packets ("+t.packets()+") from peers", proto, peer, dark(n), ports)
	i.in, i.local, i.names = underlay, true, bits
	o := newProbe("the tunnel's packets ("+t.packets()+") to peers", proto, dark(n), peer, ports)
	o.out, o.names = underlay, bits
	return []probe{i}, []probe{o}
}

// commonPrefix returns the longest prefix that contains all peers' addresses;
// the zero Prefix if there is none.
func commonPrefix(peers []Source) netip.Prefix {
	if len(peers) == 0 {
		return netip.Prefix{}
	}
	common := netip.PrefixFrom(peers[0].Outer, peers[0].Outer.BitLen())
	for _, p := range peers[1:] {
		for !common.Contains(p.Outer) {
			if common.Bits() == 0 || common.Addr().Is4() != p.Outer.Is4() {
				return netip.Prefix{}
			}
			common = netip.PrefixFrom(common.Addr(), common.Bits()-1).Masked()
		}
	}
	return common
}

// packets describes the tunnel's packets.
func (t TunnelRule) packets() string {
	if t.Port == 0 {
		return "IP protocol 4"
	}
	return fmt.Sprintf("UDP port %d", t.Port)
}

// accept returns the rule that accepts the tunnel's packets, in either
// direction.
func (t TunnelRule) accept() accept {
	is4 := t.Network.Addr().Is4()
	if t.Port == 0 {
		return accept{"-p 4", "ip protocol 4", protocolMatch(unix.IPPROTO_IPIP, is4)}
	}
	udp := &xt.Udp{SrcPorts: [2]uint16{0, 0xffff}, DstPorts: [2]uint16{t.Port, t.Port}}
	return accept{
		fmt.Sprintf("-p udp --dport %d", t.Port), fmt.Sprintf("udp dport %d", t.Port),
		append(protocolMatch(unix.IPPROTO_UDP, is4), &expr.Match{Name: "udp", Info: udp}),
	}
}

// protocolMatch matches a protocol in the form that iptables writes.
func protocolMatch(number byte, is4 bool) []expr.Any {
	compare := &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{number}}
	if is4 {
		return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 9, Len: 1}, compare}
	}
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, compare}
}

// findings returns where the passage's packets may be lost. Single peers are
// evaluated only if the probes for all of them find something.
func (p passage) findings(s ruleset) (found []finding) {
	for _, probe := range p.probes {
		found = append(found, s.evaluate(*p.hook, probe)...)
	}
	if len(found) == 0 || p.each == nil {
		return found
	}
	for _, peer := range p.peers {
		for _, probe := range p.each(netip.PrefixFrom(peer.Outer, peer.Outer.BitLen())) {
			if found = s.evaluate(*p.hook, probe); len(found) > 0 {
				return found
			}
		}
	}
	return nil
}

// ourRule is a rule of ours in another program's chain.
type ourRule struct {
	text   string
	handle uint64
	family nftables.TableFamily
	table  string
	chain  string
	after  int // number of others' rules before it
}

// isOurs reports whether a rule has our comment.
func isOurs(r *nftables.Rule) bool {
	return slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
		m, ok := e.(*expr.Match)
		if !ok || m.Name != "comment" {
			return false
		}
		text, ok := m.Info.(*xt.Comment)
		return ok && *text == names.RuleComment
	})
}

// diffOthers returns the steps that insert our accepts into the iptables chains
// that would drop what must pass, and delete any other of ours; and warnings
// about drops that the accepts do not prevent.
func diffOthers(have otherRules, want Policy, d Devices) (steps []Step, warnings []api.Warning) {
	keep := make(map[ourRule]bool)
	var added []Step
	for _, p := range want.passages(d) {
		found := p.findings(have.set)
		spot, ok := have.spot(p, found)
		if ok {
			for _, a := range p.accepts {
				there := false
				for _, r := range have.ours {
					if !there && spot.holds(r) && r.text == a.text && !keep[r] {
						there, keep[r] = true, true
					}
				}
				if !there {
					added = append(added, spot.addStep(a))
				}
			}
		}
		for _, f := range found {
			if !ok || !spot.covers(f) {
				warnings = append(warnings, p.warning(f))
			}
		}
	}
	for _, r := range have.ours {
		if !keep[r] {
			steps = append(steps, r.deleteStep())
		}
	}
	return append(steps, added...), api.SortWarnings(append(warnings, have.warnings...))
}

// spot is where accepts are inserted in the iptables of a family.
type spot struct {
	family nftables.TableFamily
	base   string // the base chain at the hook
	chain  string // base, or DOCKER-USER, which Docker leaves to the administrator
	jump   int    // index in base of the jump to DOCKER-USER
	before uint64 // handle of the rule to insert before; 0 appends
	limit  int    // maximum number of others' rules before ours
}

// spot returns where the passage's accepts go; false if none are needed or
// there is no suitable chain.
func (o otherRules) spot(p passage, found []finding) (spot, bool) {
	s := spot{family: nftables.TableFamilyIPv4, base: p.chain, chain: p.chain}
	if !p.is4 {
		s.family = nftables.TableFamilyIPv6
	}
	i := slices.IndexFunc(o.set.chains, func(c ruleChain) bool {
		return c.base && !c.legacy && c.family == s.family && c.table == "filter" && c.name == p.chain && c.hook == *p.hook
	})
	if p.chain == "" || i < 0 {
		return s, false
	}
	base := o.set.chains[i]
	at, drops := len(base.rules), false
	var first finding
	for _, f := range found {
		if f.base.family != base.family || f.base.table != base.table || f.base.name != base.name || f.base.legacy || !f.certain || f.meant {
			continue
		}
		if !drops || f.at() < at {
			at, first = f.at(), f
		}
		drops = true
	}
	if p.chain == "FORWARD" {
		if jump := jumpsTo(base.rules, "DOCKER-USER"); jump >= 0 && jump <= at {
			if user, ok := o.set.chain(base, "DOCKER-USER"); ok {
				s.chain, s.jump, s.limit = user.name, jump, len(user.rules)
				if len(user.rules) > 0 {
					s.before = user.rules[0].Handle
				}
				if drops && at == jump && len(first.path) > 1 {
					s.limit = first.path[1].index
				}
				return s, true
			}
		}
	}
	s.limit = at
	if at < len(base.rules) {
		s.before = base.rules[at].Handle
	}
	return s, drops
}

// holds reports whether a rule of ours is at a position where it is effective.
func (s spot) holds(r ourRule) bool {
	return r.family == s.family && r.table == "filter" && r.chain == s.chain && r.after <= s.limit
}

// covers reports whether accepts at the spot prevent the finding.
func (s spot) covers(f finding) bool {
	if f.base.legacy || f.base.family != s.family || f.base.table != "filter" || f.base.name != s.base {
		return false
	}
	if s.chain != s.base {
		return f.at() > s.jump || f.at() == s.jump && (len(f.path) < 2 || f.path[1].index >= s.limit)
	}
	return f.at() >= s.limit
}

func jumpsTo(rules []*nftables.Rule, to string) int {
	return slices.IndexFunc(rules, func(r *nftables.Rule) bool {
		return slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
			v, ok := e.(*expr.Verdict)
			return ok && v.Kind == expr.VerdictJump && v.Chain == to
		})
	})
}

func (s spot) addStep(a accept) Step {
	comment := xt.Comment(names.RuleComment)
	table := &nftables.Table{Family: s.family, Name: "filter"}
	rule := &nftables.Rule{
		Table: table, Chain: &nftables.Chain{Table: table, Name: s.chain}, Position: s.before,
		Exprs: append(slices.Clip(a.exprs), &expr.Match{Name: "comment", Info: &comment}, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}),
	}
	flag := "-A"
	if s.before != 0 {
		flag = "-I"
	}
	return Step{
		Command: forwardCommand(s.family, flag, s.chain, a.text), Foreign: true,
		nft: func(c *nftables.Conn) error {
			if rule.Position != 0 {
				c.InsertRule(rule)
			} else {
				c.AddRule(rule)
			}
			return nil
		},
	}
}

func (r ourRule) deleteStep() Step {
	table := &nftables.Table{Family: r.family, Name: r.table}
	old := &nftables.Rule{Table: table, Chain: &nftables.Chain{Table: table, Name: r.chain}, Handle: r.handle}
	return Step{
		Command: forwardCommand(r.family, "-D", r.chain, r.text), Foreign: true,
		nft: func(c *nftables.Conn) error { return c.DelRule(old) },
	}
}

func forwardCommand(f nftables.TableFamily, flag, chain, match string) string {
	return fmt.Sprintf("%s %s %s %s -m comment --comment %s -j ACCEPT", iptablesProgram(f, "filter"), flag, chain, match, names.RuleComment)
}

// warning describes a finding and the commands that fix it.
func (p passage) warning(f finding) api.Warning {
	w := api.Warning{Check: p.check, Text: f.String()}
	for i, a := range p.accepts {
		if i > 0 {
			w.Fix += "; "
		}
		if program := f.base.program(); program != "" {
			table := ""
			if f.base.table != "filter" {
				table = " -t " + f.base.table
			}
			w.Fix += fmt.Sprintf("%s%s -I %s %s -j ACCEPT", program, table, f.base.name, a.text)
			continue
		}
		w.Fix += fmt.Sprintf("nft insert rule %s %s %s %s accept", familyText(f.base.family), f.base.table, f.base.name, a.nft)
	}
	return w
}

// forwardMatch matches an address as iptables writes it: a prefix length that
// is a multiple of 8 is compared by that many bytes, without a mask.
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

// forwardFlags maps iptables' flags to address fields.
var forwardFlags = map[string]string{"-s": "saddr", "-d": "daddr"}

// matchText decodes a rule of ours to iptables flags, such as "-s 10.5.0.0/16"
// or "-p udp --dport 8472"; "" if neither we nor iptables-restore write it like
// this.
func matchText(exprs []expr.Any, is4 bool) string {
	var load *expr.Payload
	var meta *expr.Meta
	bits, proto, text := -1, byte(0), ""
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Payload:
			load, meta, bits = e, nil, -1
		case *expr.Meta:
			load, meta = nil, e
		case *expr.Bitwise:
			bits = ones(e.Mask)
		case *expr.Match:
			if udp, ok := e.Info.(*xt.Udp); ok && udp.DstPorts[0] == udp.DstPorts[1] && udp.InvFlags == 0 && udp.SrcPorts == [2]uint16{0, 0xffff} {
				text = fmt.Sprintf("-p udp --dport %d", udp.DstPorts[0])
			}
		case *expr.Cmp:
			switch {
			case e.Op != expr.CmpOpEq:
				return ""
			case len(e.Data) == 1 && (meta != nil && meta.Key == expr.MetaKeyL4PROTO || is4 && load != nil && load.Base == expr.PayloadBaseNetworkHeader && load.Offset == 9):
				if proto = e.Data[0]; proto == unix.IPPROTO_IPIP {
					text = "-p 4"
				}
			case load != nil && load.Base == expr.PayloadBaseTransportHeader && load.Offset == 2 && len(e.Data) == 2 && proto == unix.IPPROTO_UDP:
				text = fmt.Sprintf("-p udp --dport %d", binary.BigEndian.Uint16(e.Data))
			case load != nil && load.Base == expr.PayloadBaseNetworkHeader:
				text = addressText(load.Offset, bits, e.Data, is4)
			default:
				return ""
			}
		}
	}
	return text
}

func addressText(offset uint32, bits int, data []byte, is4 bool) string {
	if bits < 0 {
		bits = 8 * len(data)
	}
	full := make([]byte, 16)
	if is4 {
		full = full[:4]
	}
	copy(full, data)
	a, _ := netip.AddrFromSlice(full)
	for flag, field := range forwardFlags {
		if offset == addressOffset(field, is4) {
			return flag + " " + netip.PrefixFrom(a, bits).String()
		}
	}
	return ""
}
