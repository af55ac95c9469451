package firewall

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/names"
)

// set is an nftables set of Sources whose inner prefixes have the same length, or
// of one of their two fields (kind).
// An element's key is the outer source address and the masked inner source,
// loaded at an offset from the transport header. So a lookup is an exact match
// in a hash table (nft_set_hash.c); an interval set would be compared by field,
// 4 bits at a time (nft_set_pipapo.c).
type set struct {
	name     string
	kind     setKind
	is4      bool
	bits     int    // length of the inner prefixes
	offset   uint32 // of the inner source, in bytes from the transport header
	elements []Source
	// foreign is set if a set that was read has an element that is not ours.
	foreign bool
	// unlike is set if a set that was read is not of the type that add creates,
	// such as an interval set.
	unlike bool
}

// setKind says what a set's elements are.
type setKind int

const (
	pairs          setKind = iota // outer source and inner source
	outerAddresses                // nodes4, nodes6: count what was dropped with them as source
	destinations                  // inner prefixes only, to count what is sent to them: sent4_24
	origins                       // inner prefixes only, to count what came from them without a tunnel: direct4_24
)

// setKinds maps the first part of a set's name.
var setKinds = map[string]setKind{"peers": pairs, "nodes": outerAddresses, "sent": destinations, "direct": origins}

// setOf describes a set that was read, without its elements.
func setOf(n *nftables.Set) set {
	first, length, _ := strings.Cut(n.Name, "_")
	s := set{name: n.Name, kind: setKinds[strings.TrimRight(first, "46")], bits: -1}
	if bits, err := strconv.Atoi(length); err == nil {
		s.bits = bits
	}
	s.is4 = n.KeyType.Bytes == 4
	if s.kind == pairs {
		s.is4 = n.KeyType.Bytes == 2*4
	}
	s.unlike = n.KeyType.Bytes != s.keyLen() || n.Interval || n.IsMap || n.Constant || n.Dynamic || n.HasTimeout || n.Size != 0
	return s
}

// keyText returns the key in nft syntax. The second field has no name there.
func (s set) keyText() string {
	if s.kind != pairs {
		return family(s.is4) + " " + s.field()
	}
	return fmt.Sprintf("%s saddr . @th,%d,%d", family(s.is4), s.offset*8, s.width()*8)
}

// pair matches packets whose outer and inner source are a pair in the set.
func (s set) pair() rule {
	n, second := s.width(), uint32(unix.NFT_REG32_01)
	if !s.is4 {
		second = unix.NFT_REG_2
	}
	text := s.keyText()
	exprs := []expr.Any{
		&expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseNetworkHeader, Offset: addressOffset("saddr", s.is4), Len: n},
		&expr.Payload{DestRegister: second, Base: expr.PayloadBaseTransportHeader, Offset: s.offset, Len: n},
	}
	if mask := net.CIDRMask(s.bits, int(n)*8); s.bits < int(n)*8 {
		text += fmt.Sprintf(" & 0x%x", []byte(mask))
		exprs = append(exprs, &expr.Bitwise{SourceRegister: second, DestRegister: second, Len: n, Mask: mask, Xor: make([]byte, n)})
	}
	return rule{text + " @" + s.name, append(exprs, &expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: s.name}), ""}
}

// holds matches packets whose address (saddr or daddr) is in a set of outer addresses;
// lacks matches the others.
func (s set) holds(field string) rule { return s.lookup(field, false) }

func (s set) lacks(field string) rule { return s.lookup(field, true) }

func (s set) lookup(field string, invert bool) rule {
	word := ""
	if invert {
		word = "!= "
	}
	return rule{family(s.is4) + " " + field + " " + word + "@" + s.name, []expr.Any{
		&expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseNetworkHeader, Offset: addressOffset(field, s.is4), Len: s.width()},
		&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: s.name, Invert: invert},
	}, ""}
}

// field returns the address field that is looked up in a set of single addresses.
func (s set) field() string {
	if s.kind == destinations {
		return "daddr"
	}
	return "saddr"
}

// counted returns a rule that counts the packets to, or from, the prefixes of a set. It
// accepts and drops nothing. network contains the prefixes.
func (s set) counted(network netip.Prefix) rule {
	n := s.width()
	text := family(s.is4) + " " + s.field()
	exprs := []expr.Any{&expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseNetworkHeader, Offset: addressOffset(s.field(), s.is4), Len: n}}
	if mask := net.CIDRMask(s.bits, int(n)*8); s.bits < int(n)*8 {
		text += fmt.Sprintf(" & %s", net.IP(mask))
		exprs = append(exprs, &expr.Bitwise{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, Len: n, Mask: mask, Xor: make([]byte, n)})
	}
	lookup := rule{text + " @" + s.name, append(exprs, &expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: s.name}), ""}
	return all(familyIs(s.is4, ""), address(s.field(), true, network), lookup)
}

func (s set) width() uint32 {
	if s.is4 {
		return 4
	}
	return 16
}

// keyLen is the length of a key in bytes.
func (s set) keyLen() uint32 {
	if s.kind != pairs {
		return s.width()
	}
	return 2 * s.width()
}

func (s set) nft() *nftables.Set { return &nftables.Set{Table: ourTable(), Name: s.name} }

// addStep returns the step that creates the set.
func (s set) addStep() Step {
	return Step{
		Command: fmt.Sprintf("nft add set inet %s %s { typeof %s; counter; }", names.Table, s.name, s.keyText()),
		do:      s.add,
	}
}

// add creates the set, and the table if missing, in its own transaction:
// google/nftables cannot set the user data that nft needs to print the set in a
// form that it can read back.
func (s set) add() error {
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	e.String(unix.NFTA_SET_TABLE, names.Table)
	e.String(unix.NFTA_SET_NAME, s.name)
	e.Uint32(unix.NFTA_SET_FLAGS, 0)
	e.Uint32(unix.NFTA_SET_KEY_TYPE, s.keyType())
	e.Uint32(unix.NFTA_SET_KEY_LEN, s.keyLen())
	e.Uint32(unix.NFTA_SET_ID, 1)
	e.Bytes(unix.NFTA_SET_USERDATA, s.typeof())
	const setExpr = 17 // NFTA_SET_EXPR (Linux 5.7): one counter per element; older kernels ignore it
	e.Nested(setExpr, func(e *netlink.AttributeEncoder) error {
		e.String(unix.NFTA_EXPR_NAME, "counter")
		e.Nested(unix.NFTA_EXPR_DATA, func(*netlink.AttributeEncoder) error { return nil })
		return nil
	})
	attrs, err := e.Encode()
	if err != nil {
		return err
	}
	t := netlink.NewAttributeEncoder()
	t.String(unix.NFTA_TABLE_NAME, names.Table)
	tableAttrs, err := t.Encode()
	if err != nil {
		return err
	}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	const request = netlink.Request | netlink.Acknowledge | netlink.Create
	nft := func(kind uint16) netlink.HeaderType { return netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind) }
	batch := func(kind netlink.HeaderType) netlink.Message { // struct nfgenmsg, res_id in network byte order
		return netlink.Message{Header: netlink.Header{Type: kind, Flags: netlink.Request}, Data: []byte{0, 0, 0, unix.NFNL_SUBSYS_NFTABLES}}
	}
	inet := []byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}
	if _, err := c.SendMessages([]netlink.Message{
		batch(unix.NFNL_MSG_BATCH_BEGIN),
		{Header: netlink.Header{Type: nft(unix.NFT_MSG_NEWTABLE), Flags: request}, Data: append(slices.Clip(inet), tableAttrs...)},
		{Header: netlink.Header{Type: nft(unix.NFT_MSG_NEWSET), Flags: request}, Data: append(slices.Clip(inet), attrs...)},
		batch(unix.NFNL_MSG_BATCH_END),
	}); err != nil {
		return err
	}
	for range 2 {
		if _, err := c.Receive(); err != nil {
			return err
		}
	}
	return nil
}

// nft's type numbers (datatype.h, TYPE_...). A concatenation has six bits per
// type.
const (
	nftInteger = 4
	nftIPv4    = 7
	nftIPv6    = 8
)

func (s set) keyType() uint32 {
	switch {
	case s.kind != pairs && s.is4:
		return nftIPv4
	case s.kind != pairs:
		return nftIPv6
	case s.is4:
		return nftIPv4<<6 | nftInteger
	}
	return nftIPv6<<6 | nftInteger
}

// typeof is the key's user data, which lets nft print the set in a form that it
// can read back (nftables, expression.c, payload.c): a concatenation of a named
// and a raw payload expression.
func (s set) typeof() []byte {
	const ( // expression.h, proto.h, payload.c
		exprPayload, exprConcat = 7, 13
		descIP, descIP6         = 12, 13
		fieldSource4            = 11 // the destination is the next one
		fieldSource6            = 8
		baseTransport           = 3
		keyByteOrder, keyTypeof = 0, 3 // NFTNL_UDATA_SET_...
		byteOrderBig            = 2
	)
	desc, field := uint32(descIP), uint32(fieldSource4)
	if !s.is4 {
		desc, field = descIP6, fieldSource6
	}
	if s.field() == "daddr" {
		field++
	}
	payload := func(description ...[]byte) []byte {
		return slices.Concat(udata32(0, exprPayload), udata(1, description...))
	}
	named := payload(udata32(0, desc), udata32(1, field))
	if s.kind != pairs {
		return slices.Concat(udata32(keyByteOrder, byteOrderBig), udata(keyTypeof, named))
	}
	nameless := payload(udata32(0, 0), udata32(1, 0), udata32(2, baseTransport), udata32(3, s.offset*8), udata32(4, s.width()*8))
	return slices.Concat(udata32(keyByteOrder, 0),
		udata(keyTypeof, udata32(0, exprConcat), udata(1, udata(0, named), udata(1, nameless))))
}

// udata encodes an attribute of libnftnl's user data: type, length, value.
func udata(kind byte, parts ...[]byte) []byte {
	value := slices.Concat(parts...)
	return append([]byte{kind, byte(len(value))}, value...)
}

func udata32(kind byte, v uint32) []byte {
	return udata(kind, binaryutil.NativeEndian.PutUint32(v))
}

// diffElements returns the steps that change the elements of have into those of
// s.
func diffElements(s set, have set) []Step {
	var steps []Step
	n := s.nft()
	old := have.elements
	if have.foreign {
		steps = append(steps, Step{
			Command: "nft flush set inet " + names.Table + " " + s.name,
			nft:     func(c *nftables.Conn) error { c.FlushSet(n); return nil },
		})
		old = nil
	}
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
	// A message has room for 64 KB of elements.
	for part := range slices.Chunk(surplus, 200) {
		steps = append(steps, Step{
			Command: "nft delete element inet " + names.Table + " " + s.name + " " + elementsText(part),
			nft:     func(c *nftables.Conn) error { return c.SetDeleteElements(n, elements(part)) },
		})
	}
	for part := range slices.Chunk(missing, 200) {
		steps = append(steps, Step{
			Command: "nft add element inet " + names.Table + " " + s.name + " " + elementsText(part),
			nft:     func(c *nftables.Conn) error { return c.SetAddElements(n, elements(part)) },
		})
	}
	return steps
}

func elementsText(all []Source) string {
	words := make([]string, len(all))
	for i, e := range all {
		if !e.Inner.IsValid() {
			words[i] = e.Outer.String()
			continue
		}
		if !e.Outer.IsValid() {
			words[i] = e.Inner.Addr().String()
			continue
		}
		words[i] = fmt.Sprintf("%s . 0x%x", e.Outer, e.Inner.Masked().Addr().AsSlice())
	}
	return "{ " + strings.Join(words, ", ") + " }"
}

func elements(all []Source) []nftables.SetElement {
	list := make([]nftables.SetElement, len(all))
	for i, e := range all {
		if !e.Inner.IsValid() {
			list[i] = nftables.SetElement{Key: e.Outer.AsSlice()}
			continue
		}
		if !e.Outer.IsValid() {
			list[i] = nftables.SetElement{Key: e.Inner.Masked().Addr().AsSlice()}
			continue
		}
		list[i] = nftables.SetElement{Key: append(e.Outer.AsSlice(), e.Inner.Masked().Addr().AsSlice()...)}
	}
	return list
}

// sourceOf decodes the key of an element; false if elements does not produce such a key.
func (s set) sourceOf(key []byte) (Source, bool) {
	switch s.kind {
	case outerAddresses:
		outer, ok := netip.AddrFromSlice(key)
		return Source{Outer: outer}, ok
	case destinations, origins:
		inner, ok := netip.AddrFromSlice(key)
		p := netip.PrefixFrom(inner, s.bits)
		return Source{Inner: p}, ok && p.IsValid() && p == p.Masked()
	}
	n := len(key) / 2
	outer, ok1 := netip.AddrFromSlice(key[:n])
	inner, ok2 := netip.AddrFromSlice(key[n:])
	source := Source{outer, netip.PrefixFrom(inner, s.bits)}
	return source, ok1 && ok2 && source.Inner.IsValid() && source.Inner == source.Inner.Masked()
}
