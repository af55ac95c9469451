package firewall

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"unsafe"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
)

// Legacy iptables (x_tables) keeps its rules apart from nftables. They are read
// as iptables-legacy-save does and evaluated like the others. Nothing is
// inserted there, because a table can only be replaced as a whole.

// legacyFamily has the layout of one family's structures
// (linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h).
type legacyFamily struct {
	family   nftables.TableFamily
	names    string // file that lists the tables
	domain   int
	level    int
	addr     int // length of an address in bytes
	links    int // offset of the interface names in an entry
	proto    int // offset of the protocol
	flags    int // offset of the flags, followed by the inversion flags
	offsets  int // offset of the offsets of the target and the next entry
	entry    int // length of the fixed part of an entry in bytes
	fragment byte
}

var legacyFamilies = []legacyFamily{
	{
		family: nftables.TableFamilyIPv4, names: "/proc/thread-self/net/ip_tables_names", domain: unix.AF_INET, level: unix.IPPROTO_IP,
		addr: 4, links: 16, proto: 80, flags: 82, offsets: 88, entry: 112, fragment: 1,
	},
	{
		family: nftables.TableFamilyIPv6, names: "/proc/thread-self/net/ip6_tables_names", domain: unix.AF_INET6, level: unix.IPPROTO_IPV6,
		addr: 16, links: 64, proto: 128, flags: 131, offsets: 140, entry: 168,
	},
}

// legacyHooks are the names of the base chains, by hook number.
var legacyHooks = [5]string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}

// readLegacy reads the tables in use, except nat. A table that cannot be read
// gives a warning.
func readLegacy() (chains []ruleChain, warnings []api.Warning) {
	for _, f := range legacyFamilies {
		names, err := os.ReadFile(f.names)
		if err != nil {
			continue
		}
		for _, table := range strings.Fields(string(names)) {
			if table == "nat" {
				continue
			}
			read, err := f.read(table)
			if err != nil {
				program := iptablesProgram(f.family, "filter")
				warnings = append(warnings, api.Warning{
					Check: "forward-unreadable",
					Text:  fmt.Sprintf("the legacy %s is in use, and its table %s cannot be read here: %v", program, table, err),
					Fix:   fmt.Sprintf("check that its FORWARD chain accepts the cluster network, and INPUT the tunnel (`%s-legacy -S`)", program),
				})
				continue
			}
			chains = append(chains, read...)
		}
	}
	return chains, warnings
}

// read fetches and parses a table.
func (f legacyFamily) read(table string) ([]ruleChain, error) {
	fd, err := unix.Socket(f.domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	const getInfo, getEntries = 64, 65 // IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES
	info := make([]byte, 84)           // struct ipt_getinfo
	copy(info[:31], table)
	if err := getsockopt(fd, f.level, getInfo, info); err != nil {
		return nil, err
	}
	u32 := func(at int) uint32 { return binary.NativeEndian.Uint32(info[at:]) }
	const head = 40 // struct ipt_get_entries, without the entries
	size := u32(80)
	b := make([]byte, head+int(size))
	copy(b[:31], table)
	binary.NativeEndian.PutUint32(b[32:], size)
	if err := getsockopt(fd, f.level, getEntries, b); err != nil {
		return nil, err
	}
	var begin, end [5]int
	for h := range legacyHooks {
		begin[h], end[h] = -1, -1
		if u32(32)&(1<<h) != 0 {
			begin[h], end[h] = int(u32(36+4*h)), int(u32(56+4*h))
		}
	}
	return f.parse(table, b[head:], begin, end)
}

func getsockopt(fd, level, name int, b []byte) error {
	n := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// parse decodes a table. A base chain extends from its hook's entry offset to
// its policy; any other chain follows an ERROR entry with its name. A jump's
// target is the offset of the chain's first rule.
func (f legacyFamily) parse(table string, b []byte, begin, end [5]int) ([]ruleChain, error) {
	const (
		errorTarget = "ERROR"
		headLen     = 32 // struct xt_entry_match, struct xt_entry_target: size, name, revision
	)
	var chains []ruleChain
	at := map[int]string{} // chain names by the offset of the first rule
	type jump struct {
		v  *expr.Verdict
		to int
	}
	var jumps []jump
	var current *ruleChain
	for offset := 0; offset < len(b); {
		if offset+f.entry > len(b) {
			return nil, fmt.Errorf("the entry at %d is cut", offset)
		}
		e := b[offset:]
		target, next := int(binary.NativeEndian.Uint16(e[f.offsets:])), int(binary.NativeEndian.Uint16(e[f.offsets+2:]))
		if target < f.entry || next < target+headLen || next > len(e) {
			return nil, fmt.Errorf("the entry at %d is malformed", offset)
		}
		if h := slices.Index(begin[:], offset); h >= 0 {
			chains = append(chains, ruleChain{family: f.family, table: table, name: legacyHooks[h], legacy: true, base: true, hook: nftables.ChainHook(h)})
			current = &chains[len(chains)-1]
		}
		name := text(e[target+2 : target+31])
		data := e[target+headLen : next]
		h := slices.Index(end[:], offset)
		switch {
		case name == errorTarget:
			if next < len(e) { // otherwise the end of the table
				chains = append(chains, ruleChain{family: f.family, table: table, name: text(data), legacy: true})
				current = &chains[len(chains)-1]
				at[offset+next] = current.name
			}
		case current == nil:
			return nil, fmt.Errorf("the entry at %d is in no chain", offset)
		case h >= 0 && name == "" && len(data) >= 4:
			current.drops = int32(binary.NativeEndian.Uint32(data)) == legacyDrop
		default:
			exprs, err := f.matches(e[:target])
			if err != nil {
				return nil, fmt.Errorf("the entry at %d: %w", offset, err)
			}
			if name == "" && len(data) >= 4 {
				v := &expr.Verdict{}
				switch code := int(int32(binary.NativeEndian.Uint32(data))); {
				case code >= 0:
					v.Kind = expr.VerdictJump
					if e[f.flags]&legacyGoto != 0 && f.addr == 4 || e[f.flags]&legacyGoto6 != 0 && f.addr == 16 {
						v.Kind = expr.VerdictGoto
					}
					jumps = append(jumps, jump{v, code})
				case code == legacyAccept:
					v.Kind = expr.VerdictAccept
				case code == legacyDrop:
					v.Kind = expr.VerdictDrop
				case code == legacyQueue:
					v.Kind = expr.VerdictQueue
				default: // XT_RETURN
					v.Kind = expr.VerdictReturn
				}
				exprs = append(exprs, v)
			} else {
				exprs = append(exprs, &expr.Target{Name: name, Info: &xt.Unknown{}})
			}
			current.rules = append(current.rules, &nftables.Rule{Exprs: exprs})
		}
		offset += next
	}
	for _, j := range jumps {
		j.v.Chain = at[j.to]
	}
	return chains, nil
}

// Verdicts are encoded as -NF_verdict - 1 (x_tables.h); a value that is not
// negative is the offset to jump to.
const (
	legacyDrop, legacyAccept, legacyQueue = -1, -2, -4
	legacyGoto, legacyGoto6               = 2, 4 // IPT_F_GOTO, IP6T_F_GOTO
)

func text(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

// matches translates an entry's matches to nftables expressions.
func (f legacyFamily) matches(e []byte) ([]expr.Any, error) {
	const viaIn, viaOut, source, destination, proto = 1, 2, 8, 16, 64 // IPT_INV_...
	inverse := e[f.flags+1]
	op := func(bit byte) expr.CmpOp {
		if inverse&bit != 0 {
			return expr.CmpOpNeq
		}
		return expr.CmpOpEq
	}
	is4 := f.addr == 4
	var exprs []expr.Any
	for i, bit := range []byte{source, destination} {
		mask := e[(2+i)*f.addr : (3+i)*f.addr]
		if ones(mask) == 0 {
			continue
		}
		exprs = append(exprs,
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: addressOffset([]string{"saddr", "daddr"}[i], is4), Len: uint32(f.addr)},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(f.addr), Mask: net.IPMask(mask), Xor: make([]byte, f.addr)},
			&expr.Cmp{Op: op(bit), Register: 1, Data: e[i*f.addr : (1+i)*f.addr]})
	}
	for i, key := range []expr.MetaKey{expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME} {
		name, mask := e[f.links+16*i:][:16], e[f.links+32+16*i:][:16]
		n := bytes.LastIndexByte(mask, 0xff) + 1
		if n == 0 {
			continue
		}
		exprs = append(exprs, &expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op([]byte{viaIn, viaOut}[i]), Register: 1, Data: name[:n]})
	}
	if p := binary.NativeEndian.Uint16(e[f.proto:]); p != 0 {
		exprs = append(exprs, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: op(proto), Register: 1, Data: []byte{byte(p)}})
	}
	if e[f.flags]&f.fragment != 0 {
		exprs = append(exprs, &expr.Match{Name: "fragment", Info: &xt.Unknown{}})
	}
	for at := f.entry; at < len(e); {
		size := int(binary.NativeEndian.Uint16(e[at:]))
		if size < 32 || at+size > len(e) {
			return nil, fmt.Errorf("a match of %d bytes", size)
		}
		name, revision := text(e[at+2:at+31]), uint32(e[at+31])
		info, err := xt.Unmarshal(name, xt.TableFamily(f.family), revision, e[at+32:at+size])
		if err != nil {
			info = &xt.Unknown{}
		}
		exprs = append(exprs, &expr.Match{Name: name, Rev: revision, Info: info})
		at += size
	}
	return exprs, nil
}
