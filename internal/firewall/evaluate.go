package firewall

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// ruleset is other programs' nftables rules, including those of iptables-nft:
// the chains that a packet may traverse and the sets that their rules look up.
type ruleset struct {
	chains []ruleChain
	sets   []ruleSet
}

type ruleChain struct {
	family nftables.TableFamily
	table  string
	name   string
	base   bool // a base chain: the kernel calls it at a hook
	hook   nftables.ChainHook
	// atIngress is set if the chain is at the ingress hook of some links, which
	// precedes the one in hook.
	atIngress bool
	links     []string
	drops     bool // its policy is drop
	legacy    bool // from x_tables (iptables-legacy), not nftables
	rules     []*nftables.Rule
}

type ruleSet struct {
	family   nftables.TableFamily
	table    string
	name     string
	interval bool
	elements []nftables.SetElement
}

// finding is a place where a probe may be dropped.
type finding struct {
	probe probe
	base  ruleChain
	// path leads from the base chain to the rule that drops: each element but
	// the last is a jump. It is empty if the base chain's policy drops.
	path []place
	// certain is set if every packet of the probe that gets there is dropped:
	// all matches on the path could be evaluated.
	certain bool
	// meant is set if a rule on the path explicitly matches the cluster network
	// or the tunnel: the administrator intends the drop.
	meant bool
}

type place struct {
	chain  string
	index  int // of the rule in the chain, from 0
	handle uint64
	does   string
}

// rule names the rule, without its chain.
func (p place) rule() string {
	if p.handle == 0 {
		return fmt.Sprintf("rule %d (%s)", p.index+1, p.does)
	}
	return fmt.Sprintf("rule %d (%s, handle %d)", p.index+1, p.does, p.handle)
}

// at returns the index of the base chain's rule that loses the probe; the
// number of rules if it is the policy.
func (f finding) at() int {
	if len(f.path) == 0 {
		return len(f.base.rules)
	}
	return f.path[0].index
}

func (f finding) String() string {
	verb := "drops"
	if !f.certain {
		verb = "may drop"
	}
	where := fmt.Sprintf("%s, chain %s", tableText(f.base), f.base.name)
	if len(f.path) == 0 {
		return fmt.Sprintf("%s, by its policy %s %s", where, verb, f.probe.what)
	}
	for i, p := range f.path {
		if i > 0 {
			where += ", chain " + p.chain
		}
		where += ", " + p.rule()
	}
	return fmt.Sprintf("%s, %s %s", where, verb, f.probe.what)
}

// tableText names a table in the operator's terms.
func tableText(c ruleChain) string {
	if program := c.program(); program != "" {
		return program + ", table " + c.table
	}
	return "nftables, table " + familyText(c.family) + " " + c.table
}

// program returns the iptables program that owns the chain; empty for nft.
func (c ruleChain) program() string {
	program := iptablesProgram(c.family, c.table)
	if c.legacy {
		program += "-legacy"
	}
	return program
}

func familyText(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyINet:
		return "inet"
	case nftables.TableFamilyNetdev:
		return "netdev"
	case nftables.TableFamilyBridge:
		return "bridge"
	case nftables.TableFamilyARP:
		return "arp"
	}
	return fmt.Sprintf("family %d", f)
}

// iptablesProgram returns the iptables program that owns the table; empty for
// nft.
func iptablesProgram(family nftables.TableFamily, table string) string {
	if !slices.Contains([]string{"filter", "mangle", "raw", "security", "nat"}, table) {
		return ""
	}
	switch family {
	case nftables.TableFamilyIPv4:
		return "iptables"
	case nftables.TableFamilyIPv6:
		return "ip6tables"
	}
	return ""
}

// evaluate walks a probe through all base chains at a hook and returns where it
// may be lost. It does no I/O. The order of the base chains does not matter: a
// packet that one accepts can still be dropped by another.
func (s ruleset) evaluate(hook nftables.ChainHook, p probe) []finding {
	var all []finding
	for _, c := range s.chains {
		if !c.base || c.hook != hook || !c.sees(p) {
			continue
		}
		w := walker{set: s, base: c, probe: p}
		if w.walk(c, arrival{sure: every}) > none && c.drops {
			w.found = append(w.found, finding{probe: p, base: c, certain: true})
		}
		all = append(all, w.found...)
	}
	return all
}

// sees reports whether packets of the probe traverse the chain.
func (c ruleChain) sees(p probe) bool {
	if c.atIngress {
		return slices.Contains(c.links, p.in.Name)
	}
	switch c.family {
	case nftables.TableFamilyINet:
		return true
	case nftables.TableFamilyIPv4:
		return p.is4
	case nftables.TableFamilyIPv6:
		return !p.is4
	}
	return false
}

// walker walks a probe through one base chain.
type walker struct {
	set   ruleset
	base  ruleChain
	probe probe
	found []finding

	registers [64]cell
	named     [64]int // bits of the probe's address or port that the register holds
	marked    bool    // a rule may have set the mark
	meant     bool    // the current rule explicitly matches the probe's packets
	acts      string  // what the current rule does with each packet, see perPacket
	each      *place  // the first rule that must see each packet
	narrow    bool    // also consider rules that match only few packets of the probe
}

// maxDepth limits nested jumps; the kernel's limit is 16.
const maxDepth = 16

// arrival describes how the probe reached a chain.
type arrival struct {
	sure  match // whether the matches of the jumps on the path hold
	meant bool  // one of them explicitly matches the probe's packets
	path  []place
}

// walk evaluates one chain and returns whether any packet leaves it at its end.
func (w *walker) walk(c ruleChain, came arrival) match {
	returned := none
	for i, r := range c.rules {
		outcomes := w.rule(r)
		if w.acts != "" && w.each == nil {
			w.each = &place{chain: c.name, index: i, handle: r.Handle, does: w.acts}
		}
		for _, o := range outcomes {
			if o.match == none || o.match == few && !w.narrow {
				continue
			}
			at := arrival{
				sure: min(came.sure, o.match), meant: came.meant || w.meant,
				path: append(slices.Clip(came.path), place{chain: c.name, index: i, handle: r.Handle, does: o.text()}),
			}
			goesOn := none // whether packets that the rule matches continue to the next one
			switch o.verdict.Kind {
			case expr.VerdictDrop:
				w.lost(at)
			case expr.VerdictQueue:
				at.sure = some
				w.lost(at)
			case expr.VerdictAccept, expr.VerdictStolen, expr.VerdictStop:
			case expr.VerdictReturn:
				returned = every
			case expr.VerdictJump, expr.VerdictGoto:
				goesOn = every
				if target, ok := w.set.chain(c, o.verdict.Chain); ok && len(came.path) < maxDepth {
					goesOn = w.walk(target, at)
				}
				if o.verdict.Kind == expr.VerdictGoto {
					returned, goesOn = max(returned, goesOn), none
				}
			default:
				goesOn = every
			}
			if goesOn == none && o.match == every {
				return returned
			}
		}
	}
	return every
}

func (w *walker) lost(a arrival) {
	w.found = append(w.found, finding{probe: w.probe, base: w.base, path: a.path, certain: a.sure == every, meant: a.meant})
}

// chain returns the chain with a name in the same table.
func (s ruleset) chain(of ruleChain, name string) (ruleChain, bool) {
	i := slices.IndexFunc(s.chains, func(c ruleChain) bool {
		return c.family == of.family && c.table == of.table && c.name == name && c.legacy == of.legacy
	})
	if i < 0 {
		return ruleChain{}, false
	}
	return s.chains[i], true
}

// outcome is a rule's effect on the packets that it matches.
type outcome struct {
	match   match
	verdict expr.Verdict
	word    string // for verdicts that nftables does not define
}

func (o outcome) text() string {
	switch {
	case o.word != "":
		return o.word
	case o.verdict.Kind == expr.VerdictJump:
		return "jump " + o.verdict.Chain
	case o.verdict.Kind == expr.VerdictGoto:
		return "goto " + o.verdict.Chain
	case o.verdict.Kind == expr.VerdictDrop:
		return "drop"
	case o.verdict.Kind == expr.VerdictQueue:
		return "queue"
	}
	return "rule"
}

// rule returns the outcomes of a rule: none, one, or several for a verdict map.
func (w *walker) rule(r *nftables.Rule) []outcome {
	w.registers, w.named, w.meant, w.acts = [64]cell{}, [64]int{}, false, ""
	for i := range w.registers {
		w.registers[i].dark = 0xff
	}
	m := every
	for _, e := range r.Exprs {
		if does := w.probe.perPacket(e); does != "" && w.acts == "" {
			w.acts = does
		}
		switch e := e.(type) {
		case *expr.Verdict:
			return []outcome{{match: m, verdict: *e}}
		case *expr.Reject:
			return []outcome{{m, expr.Verdict{Kind: expr.VerdictDrop}, "reject"}}
		case *expr.Queue:
			return []outcome{{m, expr.Verdict{Kind: expr.VerdictQueue}, "queue"}}
		case *expr.Target:
			switch e.Name {
			case "REJECT", "DROP", "TARPIT", "STEAL":
				return []outcome{{m, expr.Verdict{Kind: expr.VerdictDrop}, e.Name}}
			case "NFQUEUE":
				return []outcome{{m, expr.Verdict{Kind: expr.VerdictQueue}, e.Name}}
			case "MARK", "CONNMARK":
				w.marked = w.marked || m > few
			}
		case *expr.Match:
			m = min(m, w.extension(e))
		case *expr.Cmp:
			m = min(m, w.compare(e))
		case *expr.Range:
			f := w.load(e.Register, len(e.FromData))
			in := f.between(e.FromData, e.ToData)
			if e.Op == expr.CmpOpNeq {
				in = in.not()
			}
			m = min(m, in)
		case *expr.Lookup:
			if e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT {
				return w.verdicts(e, m)
			}
			m = min(m, w.lookup(e))
		case *expr.Limit, *expr.Quota, *expr.Connlimit, *expr.Dynset:
			m = min(m, some)
		default:
			w.compute(e, m)
		}
		if m == none {
			return nil
		}
	}
	return nil
}

// slot returns the offset of a register's bytes (nf_tables.h, enum
// nft_registers: four of 16 bytes, or 16 of four).
func slot(register uint32) int {
	if register >= unix.NFT_REG32_00 {
		return int(register-unix.NFT_REG32_00) * 4
	}
	return max(int(register)-1, 0) * 16
}

func (w *walker) load(register uint32, n int) field {
	at := min(slot(register), len(w.registers))
	return w.registers[at:min(at+n, len(w.registers))]
}

// store writes a field to a register; named is how many of its bits are of the
// probe's address or port.
func (w *walker) store(register uint32, f field, named int) {
	at := min(slot(register), len(w.registers))
	copy(w.registers[at:], f)
	if at < len(w.named) {
		w.named[at] = named
	}
}

// compute evaluates an expression that writes to a register.
func (w *walker) compute(e expr.Any, m match) {
	p := w.probe
	switch e := e.(type) {
	case *expr.Payload:
		if e.OperationType != expr.PayloadLoad {
			return
		}
		f, named := p.payload(e)
		w.store(e.DestRegister, f, named)
	case *expr.Meta:
		if e.SourceRegister {
			w.marked = w.marked || e.Key == expr.MetaKeyMARK && m > few
			return
		}
		f := p.meta(e.Key)
		if e.Key == expr.MetaKeyMARK && w.marked {
			f = dark(4)
		}
		named := 0
		if e.Key == expr.MetaKeyL4PROTO && p.proto == unix.IPPROTO_IPIP {
			named = 8
		}
		w.store(e.Register, f, named)
	case *expr.Ct:
		if !e.SourceRegister {
			w.store(e.Register, p.conntrack(e.Key), 0)
		}
	case *expr.Fib:
		w.store(e.Register, p.fib(e), 0)
	case *expr.Immediate:
		w.store(e.Register, known(e.Data...), 0)
	case *expr.Bitwise:
		at := min(slot(e.SourceRegister), len(w.named)-1)
		named := 0
		if w.named[at] > 0 {
			named = min(w.named[at], ones(e.Mask))
		}
		w.store(e.DestRegister, w.load(e.SourceRegister, int(e.Len)).and(e.Mask, e.Xor), named)
	case *expr.Numgen:
		w.store(e.Register, dark(4), 0)
	case *expr.Hash:
		w.store(e.DestRegister, dark(4), 0)
	}
}

func ones(b []byte) int {
	n := 0
	for _, v := range b {
		for ; v != 0; v &= v - 1 {
			n++
		}
	}
	return n
}

// payload returns the bytes of the packet that the expression loads.
func (p probe) payload(e *expr.Payload) (f field, named int) {
	var of field
	switch e.Base {
	case expr.PayloadBaseNetworkHeader:
		of = p.ip
		for _, name := range []string{"saddr", "daddr"} {
			if e.Offset == addressOffset(name, p.is4) {
				named = int(e.Len) * 8
			}
		}
		if p.is4 && e.Offset == 9 && p.proto == unix.IPPROTO_IPIP {
			named = 8
		}
	case expr.PayloadBaseTransportHeader:
		of = p.transport
		if e.Offset == 2 && e.Len == 2 {
			named = 16
		}
	default:
		return dark(int(e.Len)), 0
	}
	end := int(e.Offset + e.Len)
	if end > len(of) {
		return dark(int(e.Len)), 0
	}
	return of[e.Offset:end], named
}

func (p probe) meta(key expr.MetaKey) field {
	switch key {
	case expr.MetaKeyNFPROTO:
		if p.is4 {
			return known(unix.NFPROTO_IPV4)
		}
		return known(unix.NFPROTO_IPV6)
	case expr.MetaKeyPROTOCOL:
		if p.is4 {
			return known(0x08, 0x00)
		}
		return known(0x86, 0xdd)
	case expr.MetaKeyL4PROTO:
		return known(p.proto)
	case expr.MetaKeyIIFNAME:
		return p.in.field()
	case expr.MetaKeyOIFNAME:
		return p.out.field()
	case expr.MetaKeyIIF:
		return p.in.number()
	case expr.MetaKeyOIF:
		return p.out.number()
	case expr.MetaKeyMARK:
		return known(binaryutil.NativeEndian.PutUint32(p.mark)...)
	case expr.MetaKeyPKTTYPE:
		return known(unix.PACKET_HOST)
	case expr.MetaKeyLEN:
		return free(4)
	}
	return dark(16)
}

// state returns the packet's conntrack state, as a bit (nf_conntrack_common.h).
func (p probe) state() uint32 {
	if p.stateNew {
		return expr.CtStateBitNEW
	}
	return expr.CtStateBitESTABLISHED
}

func (p probe) conntrack(key expr.CtKey) field {
	switch key {
	case expr.CtKeySTATE:
		return known(binaryutil.NativeEndian.PutUint32(p.state())...)
	case expr.CtKeyDIRECTION:
		return known(0)
	case expr.CtKeySTATUS: // no NAT has been done
		f := dark(4)
		const translated = 1<<4 | 1<<5 // IPS_SRC_NAT, IPS_DST_NAT (nf_conntrack_common.h)
		for i, b := range binaryutil.NativeEndian.PutUint32(translated) {
			f[i] = cell{known: b, dark: ^b}
		}
		return f
	case expr.CtKeyMARK:
		return known(0, 0, 0, 0)
	case expr.CtKeyPROTOCOL:
		return known(p.proto)
	}
	return dark(16)
}

// fib returns the result of a FIB lookup, assuming that the packet arrived by
// the interface that replies would leave by.
func (p probe) fib(e *expr.Fib) field {
	switch {
	case e.ResultADDRTYPE:
		kind := uint32(unix.RTN_UNICAST)
		if e.FlagDADDR && p.local {
			kind = unix.RTN_LOCAL
		}
		return known(binaryutil.NativeEndian.PutUint32(kind)...)
	case e.FlagPRESENT:
		return known(1)
	case e.ResultOIF:
		return known(0xff, 0xff, 0xff, 0x7f) // any value but 0
	}
	return dark(16)
}

func (w *walker) compare(e *expr.Cmp) match {
	f := w.load(e.Register, len(e.Data))
	named := w.named[min(slot(e.Register), len(w.named)-1)]
	least, most := make([]byte, len(e.Data)), bytes.Repeat([]byte{0xff}, len(e.Data))
	switch e.Op {
	case expr.CmpOpEq:
		m := f.equal(e.Data)
		w.names(m, min(named, len(e.Data)*8))
		return m
	case expr.CmpOpNeq:
		return f.equal(e.Data).not()
	case expr.CmpOpLte:
		return f.between(least, e.Data)
	case expr.CmpOpGt:
		return f.between(least, e.Data).not()
	case expr.CmpOpGte:
		return f.between(e.Data, most)
	case expr.CmpOpLt:
		return f.between(e.Data, most).not()
	}
	return some
}

// names sets meant if a matching rule compares at least probe.names bits of the
// probe's address or port.
func (w *walker) names(m match, bits int) {
	least := w.probe.names
	if m >= some && bits > 0 && bits >= least {
		w.meant = true
	}
}

// lookup evaluates a set lookup.
func (w *walker) lookup(e *expr.Lookup) match {
	if e.IsDestRegSet { // a map's value is not evaluated
		w.store(e.DestRegister, dark(16), 0)
		return some
	}
	set, ok := w.set.find(w.base, e.SetName)
	if !ok {
		return some
	}
	m := none
	for _, r := range set.ranges() {
		m = max(m, r.holds(w.load(e.SourceRegister, len(r.from))))
	}
	w.names(m, w.named[min(slot(e.SourceRegister), len(w.named)-1)])
	if e.Invert {
		return m.not()
	}
	return m
}

// verdicts evaluates a verdict map lookup.
func (w *walker) verdicts(e *expr.Lookup, m match) []outcome {
	set, ok := w.set.find(w.base, e.SetName)
	if !ok {
		return []outcome{{min(m, some), expr.Verdict{Kind: expr.VerdictDrop}, "verdict map " + e.SetName}}
	}
	var all []outcome
	for _, r := range set.ranges() {
		if r.verdict == nil {
			continue
		}
		holds := r.holds(w.load(e.SourceRegister, len(r.from)))
		if holds > few {
			all = append(all, outcome{match: min(m, holds), verdict: *r.verdict})
		}
	}
	return all
}

func (s ruleset) find(of ruleChain, name string) (ruleSet, bool) {
	i := slices.IndexFunc(s.sets, func(t ruleSet) bool { return t.family == of.family && t.table == of.table && t.name == name })
	if i < 0 {
		return ruleSet{}, false
	}
	return s.sets[i], true
}

// keyRange is an element of a set: a range of keys, inclusive.
type keyRange struct {
	from, to []byte
	concat   bool // several fields, each with its own range
	verdict  *expr.Verdict
}

func (r keyRange) holds(f field) match {
	if !r.concat || len(f) != len(r.from) {
		return f.between(r.from, r.to)
	}
	// The field boundaries are unknown: a byte with a range may match.
	m := every
	for i := range r.from {
		if r.from[i] == r.to[i] {
			m = min(m, f[i:].equal(r.from[i:i+1]))
		} else {
			m = min(m, some)
		}
	}
	return m
}

// ranges returns the set's elements. An interval set holds the start of each
// interval and the value after its end.
func (s ruleSet) ranges() []keyRange {
	var all []keyRange
	if !s.interval || slices.ContainsFunc(s.elements, func(e nftables.SetElement) bool { return len(e.KeyEnd) > 0 }) {
		for _, e := range s.elements {
			r := keyRange{from: e.Key, to: e.Key, verdict: e.VerdictData}
			if len(e.KeyEnd) == len(e.Key) {
				r.to, r.concat = e.KeyEnd, true
			}
			all = append(all, r)
		}
		return all
	}
	sorted := slices.SortedStableFunc(slices.Values(s.elements), func(a, b nftables.SetElement) int {
		if c := bytes.Compare(a.Key, b.Key); c != 0 {
			return c
		}
		switch {
		case a.IntervalEnd == b.IntervalEnd:
			return 0
		case a.IntervalEnd:
			return -1
		}
		return 1
	})
	for i, e := range sorted {
		if e.IntervalEnd {
			continue
		}
		r := keyRange{from: e.Key, to: bytes.Repeat([]byte{0xff}, len(e.Key)), verdict: e.VerdictData}
		if i+1 < len(sorted) {
			r.to = before(sorted[i+1].Key)
		}
		all = append(all, r)
	}
	return all
}

// before returns b-1, as a big-endian number.
func before(b []byte) []byte {
	out := slices.Clone(b)
	for i := len(out) - 1; i >= 0; i-- {
		out[i]--
		if out[i] != 0xff {
			break
		}
	}
	return out
}

// extension evaluates an xtables match. Unknown matches may match (some).
func (w *walker) extension(e *expr.Match) match {
	p := w.probe
	yes := func(b, invert bool) match {
		if b != invert {
			return every
		}
		return none
	}
	port := func(at int, ports [2]uint16, invert bool) match {
		if ports == [2]uint16{0, 0xffff} {
			return every
		}
		f := p.transport[at : at+2]
		m := f.between(binaryutil.BigEndian.PutUint16(ports[0]), binaryutil.BigEndian.PutUint16(ports[1]))
		if at == 2 && !invert && ports[0] == ports[1] {
			w.names(m, 16)
		}
		if invert {
			return m.not()
		}
		return m
	}
	switch i := e.Info.(type) {
	case *xt.Comment:
		return every
	case *xt.ConntrackMtinfo1:
		return w.conntrackMatch(i.MatchFlags, i.InvertFlags, uint32(i.StateMask))
	case *xt.ConntrackMtinfo2:
		return w.conntrackMatch(i.MatchFlags, i.InvertFlags, uint32(i.StateMask))
	case *xt.ConntrackMtinfo3:
		return w.conntrackMatch(i.MatchFlags, i.InvertFlags, uint32(i.StateMask))
	case *xt.Udp:
		return min(yes(p.proto == unix.IPPROTO_UDP, false), port(0, i.SrcPorts, i.InvFlags&1 != 0), port(2, i.DstPorts, i.InvFlags&2 != 0))
	case *xt.Tcp:
		m := min(yes(p.proto == unix.IPPROTO_TCP, false), port(0, i.SrcPorts, i.InvFlags&1 != 0), port(2, i.DstPorts, i.InvFlags&2 != 0))
		if i.FlagsMask != 0 {
			m = min(m, yes(tcpSYN&i.FlagsMask == i.FlagsCmp, i.InvFlags&4 != 0))
		}
		if i.Option != 0 {
			m = min(m, some)
		}
		return m
	case *xt.AddrTypeV1:
		kind := uint16(1 << unix.RTN_UNICAST)
		to := kind
		if p.local {
			to = 1 << unix.RTN_LOCAL
		}
		m := every
		if i.Source != 0 {
			m = min(m, yes(i.Source&kind != 0, i.Flags&1 != 0))
		}
		if i.Dest != 0 {
			m = min(m, yes(i.Dest&to != 0, i.Flags&2 != 0))
		}
		return m
	case *xt.Unknown:
		return w.raw(e.Name, e.Rev, *i, yes)
	}
	return some
}

// tcpSYN is the TCP flags of the packet that opens a connection.
const tcpSYN = 0x02

// conntrackMatch evaluates xt_conntrack.
func (w *walker) conntrackMatch(flags, invert uint16, states uint32) match {
	m := every
	if flags&uint16(xt.ConntrackState) != 0 {
		if (w.probe.state()&states != 0) == (invert&uint16(xt.ConntrackState) != 0) {
			m = none
		}
	}
	if flags&^uint16(xt.ConntrackState|xt.ConntrackStateAlias) != 0 {
		m = min(m, some)
	}
	return m
}

// raw evaluates extensions that the library does not decode
// (linux/netfilter/xt_*.h).
func (w *walker) raw(name string, rev uint32, b []byte, yes func(is, invert bool) match) match {
	p := w.probe
	u32 := func(at int) uint32 { return binary.NativeEndian.Uint32(b[at:]) }
	switch {
	case name == "mark" && rev == 1 && len(b) >= 9:
		if w.marked {
			return some
		}
		return yes(p.mark&u32(4) == u32(0), b[8] != 0)
	case name == "state" && len(b) >= 4:
		return yes(p.state()&u32(0) != 0, false)
	case name == "pkttype" && len(b) >= 8:
		return yes(u32(0) == unix.PACKET_HOST, u32(4) != 0)
	case name == "rpfilter" && len(b) >= 1: // assumes that replies leave by the input interface
		return yes(true, b[0]&8 != 0)
	case (name == "icmp" || name == "icmp6") && len(b) >= 4:
		echo := byte(8)
		if name == "icmp6" {
			echo = 128
		}
		return yes(b[0] == 0xff && name == "icmp" || b[0] == echo, b[3]&1 != 0)
	case name == "multiport" && rev == 1 && len(b) >= 48:
		if p.proto != unix.IPPROTO_TCP && p.proto != unix.IPPROTO_UDP {
			return none
		}
		m := none
		for i := 0; i < min(int(b[1]), 15); i++ {
			lo := binary.NativeEndian.Uint16(b[2+2*i:])
			hi := lo
			if b[32+i] != 0 && i+1 < 15 {
				hi = binary.NativeEndian.Uint16(b[2+2*(i+1):])
				i++
			}
			in := func(at int) match {
				return p.transport[at:at+2].between(binaryutil.BigEndian.PutUint16(lo), binaryutil.BigEndian.PutUint16(hi))
			}
			switch b[0] {
			case 0:
				m = max(m, in(0))
			case 1:
				m = max(m, in(2))
			default:
				m = max(m, in(0), in(2))
			}
		}
		if b[47] != 0 {
			return m.not()
		}
		return m
	}
	return some
}
