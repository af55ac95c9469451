package firewall

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// rule is one rule of a chain, as nft text and as expressions. A part of a rule
// (a match or a verdict) is a rule too: all joins parts.
type rule struct {
	text  string
	exprs []expr.Any
	// reason is the drop reason under which the rule's packets are counted;
	// empty for a rule that does not drop.
	reason string
}

// all joins matches and a verdict into one rule.
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

func verdict(kind expr.VerdictKind, text string) rule {
	return rule{text: text, exprs: []expr.Any{&expr.Verdict{Kind: kind}}}
}

func leave() rule { return verdict(expr.VerdictReturn, "return") }

// drop drops packets and counts them under a reason.
func drop(reason string) rule {
	return rule{"counter drop", []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}, reason}
}

// familyIs matches the address family. Its text is empty in rules that compare
// addresses, because nft deduces the family from them.
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

// address matches a packet's source (saddr) or destination (daddr) against a
// prefix.
func address(field string, equal bool, p netip.Prefix) rule {
	n := uint32(p.Addr().BitLen() / 8)
	op, word := expr.CmpOpEq, ""
	if !equal {
		op, word = expr.CmpOpNeq, "!= "
	}
	return rule{fmt.Sprintf("%s %s %s%s", family(p.Addr().Is4()), field, word, p), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: addressOffset(field, p.Addr().Is4()), Len: n},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: n, Mask: prefixMask(p), Xor: make([]byte, n)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}, ""}
}

func prefixMask(p netip.Prefix) net.IPMask { return net.CIDRMask(p.Bits(), p.Addr().BitLen()) }

// addressOffset returns the offset of an address in an IP header (RFC 791, RFC
// 8200).
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

// protocol matches the transport protocol.
func protocol(number byte, text string) rule {
	return rule{text, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{number}},
	}, ""}
}

// udpPort matches the UDP destination port.
func udpPort(port uint16) rule {
	r := transport(2, 2, true, binaryutil.BigEndian.PutUint16(port))
	return rule{fmt.Sprintf("udp dport %d", port), append(protocol(unix.IPPROTO_UDP, "").exprs, r.exprs...), ""}
}

// notUDP matches packets other than UDP, notUDPPort UDP packets to another
// port.
func notUDP() rule {
	return meta("meta l4proto != udp", expr.MetaKeyL4PROTO, expr.CmpOpNeq, []byte{unix.IPPROTO_UDP})
}

func notUDPPort(port uint16) rule {
	r := transport(2, 2, false, binaryutil.BigEndian.PutUint16(port))
	return rule{fmt.Sprintf("udp dport != %d", port), append(protocol(unix.IPPROTO_UDP, "").exprs, r.exprs...), ""}
}

// transport compares bytes at an offset of the transport header.
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
	mask, data := prefixMask(p), p.Masked().Addr().AsSlice()
	return rule{fmt.Sprintf("@th,128,32 & 0x%x == 0x%x", []byte(mask), data), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: addressOffset("daddr", true), Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data},
	}, ""}
}

// inputDevice matches the input interface.
func inputDevice(name string) rule {
	return meta("iifname "+name, expr.MetaKeyIIFNAME, expr.CmpOpEq, nameBytes(name))
}

func notInputDevice(name string) rule {
	return meta("iifname != "+name, expr.MetaKeyIIFNAME, expr.CmpOpNeq, nameBytes(name))
}

// inputKind matches the input interface's kind (IFLA_INFO_KIND), which physical
// interfaces do not have.
func inputKind(kind string) rule {
	const iifkind = 26 // NFT_META_IIFKIND (Linux 5.0), missing in x/sys/unix
	return meta(fmt.Sprintf("meta iifkind %q", kind), iifkind, expr.CmpOpEq, nameBytes(kind))
}

// someInput matches packets that did not originate on this node. Before Linux
// 5.7 the postrouting hook has no input interface, and it matches nothing
// there.
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

// notTheWayBack matches packets whose source is not reachable through the
// interface they arrived by (reverse path check). For a local source there is
// no such interface.
func notTheWayBack() rule {
	return rule{"fib saddr . iif oif 0", []expr.Any{
		&expr.Fib{Register: 1, ResultOIF: true, FlagSADDR: true, FlagIIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)},
	}, ""}
}

// translated matches packets whose destination was translated (DNAT),
// untranslated those whose destination was not. Neither matches packets that
// conntrack does not track.
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
