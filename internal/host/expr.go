package host

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// rule is one line of a chain, in the words of nft and as expressions. Parts of
// a line are rules too: all joins them.
type rule struct {
	text  string
	exprs []expr.Any
	// reason is the name under which the packets that the line drops are
	// counted; empty for a line that drops none.
	reason string
}

// all joins matches and a verdict to a line.
func all(parts ...rule) rule {
	var r rule
	for _, p := range parts {
		if r.text != "" && p.text != "" {
			r.text += " "
		}
		r.text += p.text
		r.exprs = append(r.exprs, p.exprs...)
		if p.reason != "" {
			r.reason = p.reason
		}
	}
	return r
}

// Verdicts.
func verdict(kind expr.VerdictKind, text string) rule {
	return rule{text: text, exprs: []expr.Any{&expr.Verdict{Kind: kind}}}
}

func leave() rule { return verdict(expr.VerdictReturn, "return") }

// drop counts the packets that it drops under a reason.
func drop(reason string) rule {
	return rule{"counter drop", []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}, reason}
}

// familyIs is not written in a line that compares addresses: nft deduces it
// from them.
func familyIs(is4 bool, text string) rule {
	proto := byte(unix.NFPROTO_IPV4)
	if !is4 {
		proto = unix.NFPROTO_IPV6
	}
	return rule{text, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}, ""}
}

// address matches a packet's source (saddr) or destination (daddr) with a
// prefix.
func address(field string, equal bool, p netip.Prefix) rule {
	n := uint32(p.Addr().BitLen() / 8)
	op, word := expr.CmpOpEq, ""
	if !equal {
		op, word = expr.CmpOpNeq, "!= "
	}
	return rule{fmt.Sprintf("%s %s %s%s", family(p.Addr().Is4()), field, word, p), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: addressOffset(field, p.Addr().Is4()), Len: n},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: n, Mask: IPNet(p).Mask, Xor: make([]byte, n)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}, ""}
}

// addressOffset is where an address stands in an IP header (RFC 791, RFC 8200).
func addressOffset(field string, is4 bool) uint32 {
	offset, n := uint32(12), uint32(4)
	if !is4 {
		offset, n = 8, 16
	}
	if field == "daddr" {
		offset += n
	}
	return offset
}

func family(is4 bool) string {
	if is4 {
		return "ip"
	}
	return "ip6"
}

// protocol matches what is above IP.
func protocol(number byte, text string) rule {
	return rule{text, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{number}},
	}, ""}
}

// udpPort matches UDP's destination port.
func udpPort(port uint16) rule {
	r := transport(2, 2, true, binaryutil.BigEndian.PutUint16(port))
	return rule{fmt.Sprintf("udp dport %d", port), append(protocol(unix.IPPROTO_UDP, "").exprs, r.exprs...), ""}
}

// notUDP matches what is not UDP, and notUDPPort UDP to another port.
func notUDP() rule {
	return meta("meta l4proto != udp", expr.MetaKeyL4PROTO, expr.CmpOpNeq, []byte{unix.IPPROTO_UDP})
}

func notUDPPort(port uint16) rule {
	r := transport(2, 2, false, binaryutil.BigEndian.PutUint16(port))
	return rule{fmt.Sprintf("udp dport != %d", port), append(protocol(unix.IPPROTO_UDP, "").exprs, r.exprs...), ""}
}

// transport compares bytes at an offset in what is above IP.
func transport(offset, length uint32, equal bool, data []byte) rule {
	op, word := expr.CmpOpEq, ""
	if !equal {
		op, word = expr.CmpOpNeq, "!= "
	}
	return rule{fmt.Sprintf("@th,%d,%d %s0x%x", offset*8, length*8, word, data), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: length},
		&expr.Cmp{Op: op, Register: 1, Data: data},
	}, ""}
}

// innerDestination compares the inner destination of an IPIP packet.
func innerDestination(p netip.Prefix) rule {
	mask, data := IPNet(p).Mask, p.Masked().Addr().AsSlice()
	return rule{fmt.Sprintf("@th,128,32 & 0x%x == 0x%x", []byte(mask), data), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: addressOffset("daddr", true), Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data},
	}, ""}
}

// inputDevice matches what came in by a device.
func inputDevice(name string) rule {
	return meta("iifname "+name, expr.MetaKeyIIFNAME, expr.CmpOpEq, nameBytes(name))
}

func notInputDevice(name string) rule {
	return meta("iifname != "+name, expr.MetaKeyIIFNAME, expr.CmpOpNeq, nameBytes(name))
}

// inputKind matches what came in by a device of a kind (IFLA_INFO_KIND), which a
// physical one has not.
func inputKind(kind string) rule {
	const iifkind = 26 // NFT_META_IIFKIND (Linux 5.0), which x/sys/unix lacks
	return meta(fmt.Sprintf("meta iifkind %q", kind), iifkind, expr.CmpOpEq, nameBytes(kind))
}

// someInput matches what did not begin on this node. A kernel before 5.7 does
// not tell in the postrouting hook, and there it matches nothing.
func someInput() rule { return meta("iif != 0", expr.MetaKeyIIF, expr.CmpOpNeq, make([]byte, 4)) }

func meta(text string, key expr.MetaKey, op expr.CmpOp, data []byte) rule {
	return rule{text, []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: data},
	}, ""}
}

func nameBytes(name string) []byte {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return data
}

// notTheWayBack matches what came in by a link by which no packet to its source
// would leave. A local address has no such link.
func notTheWayBack() rule {
	return rule{"fib saddr . iif oif 0", []expr.Any{
		&expr.Fib{Register: 1, ResultOIF: true, FlagSADDR: true, FlagIIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)},
	}, ""}
}

// translated matches what had another destination when it came, and untranslated
// what had not. What conntrack does not follow is matched by neither.
func translated() rule { return dnat("ct status dnat", expr.CmpOpNeq) }

func untranslated() rule { return dnat("ct status & dnat == 0", expr.CmpOpEq) }

func dnat(text string, op expr.CmpOp) rule {
	status := binaryutil.NativeEndian.PutUint32(1 << 5) // IPS_DST_NAT (nf_conntrack_common.h)
	return rule{text, []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATUS},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: status, Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: make([]byte, 4)},
	}, ""}
}

func marked() rule {
	mark := binaryutil.NativeEndian.PutUint32(kubeMark)
	return rule{"meta mark & 0x4000 == 0x4000", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mark, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: mark},
	}, ""}
}
