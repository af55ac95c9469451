package firewall

import (
	"bytes"
	"math/big"
	"net/netip"

	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"
)

// probe is a kind of packet that must pass other programs' firewalls: some of
// its bits are known, the others may have any value. Rules are evaluated bit by
// bit (cell).
type probe struct {
	what      string // for messages
	is4       bool
	proto     byte
	ip        field // IP header
	transport field // payload of the IP header
	in, out   Device
	stateNew  bool   // conntrack sees the first packet of a connection
	local     bool   // the destination is an address of this host
	mark      uint32 // initial mark
	// names is how many bits of an address or port a rule must match to be
	// about this kind of packet specifically.
	names int
}

// cell is a byte with partly known bits. A bit is known; or coarse (it
// distinguishes leases of the cluster network, or peers); or dark (it cannot be
// determined here); or fine (it varies by packet, such as a port).
type cell struct{ val, known, coarse, dark byte }

type field []cell

// known returns a field of known bytes.
func known(b ...byte) field {
	f := make(field, len(b))
	for i, v := range b {
		f[i] = cell{val: v, known: 0xff}
	}
	return f
}

// free returns n bytes that vary by packet.
func free(n int) field { return make(field, n) }

// dark returns n bytes that cannot be determined.
func dark(n int) field {
	f := make(field, n)
	for i := range f {
		f[i].dark = 0xff
	}
	return f
}

// prefixField returns an address within a prefix. The bits after the prefix are
// coarse up to bit coarse, then fine.
func prefixField(p netip.Prefix, coarse int) field {
	a := p.Masked().Addr().AsSlice()
	f := known(a...)
	for i := range len(a) * 8 {
		bit := byte(0x80) >> (i % 8)
		if i >= p.Bits() {
			f[i/8].known &^= bit
			if i < coarse {
				f[i/8].coarse |= bit
			}
		}
	}
	return f
}

// newProbe returns a probe with its headers: for TCP the first packet of a
// connection, for ICMP an echo request.
func newProbe(what string, proto byte, from, to field, ports [2]field) probe {
	p := probe{what: what, is4: len(from) == 4, proto: proto, stateNew: true}
	if p.is4 {
		p.ip = free(20)
		copy(p.ip, known(0x45))
		copy(p.ip[6:], known(0x40, 0)) // no fragment
		copy(p.ip[9:], known(proto))
		copy(p.ip[12:], from)
		copy(p.ip[16:], to)
	} else {
		p.ip = free(40)
		copy(p.ip[6:], known(proto))
		copy(p.ip[8:], from)
		copy(p.ip[24:], to)
	}
	p.transport = free(64)
	switch proto {
	case unix.IPPROTO_TCP:
		copy(p.transport[13:], known(0x02)) // SYN
		fallthrough
	case unix.IPPROTO_UDP:
		copy(p.transport, ports[0])
		copy(p.transport[2:], ports[1])
	case unix.IPPROTO_ICMP:
		copy(p.transport, known(8, 0))
	case unix.IPPROTO_ICMPV6:
		copy(p.transport, known(128, 0))
	}
	return p
}

// match says for how many of a probe's packets something is true.
type match int

const (
	none match = iota
	few        // a specific part: one address, one port
	some       // undetermined, or a large part
	every
)

func (m match) not() match {
	switch m {
	case none, few:
		return every
	case every:
		return none
	}
	return some
}

// equal compares the field with bytes.
func (f field) equal(b []byte) match {
	if len(b) > len(f) {
		return some
	}
	m := every
	for i, v := range b {
		c := f[i]
		if (c.val^v)&c.known != 0 {
			return none
		}
		switch unknown := ^c.known; {
		case unknown&^(c.coarse|c.dark) != 0:
			m = min(m, few)
		case unknown != 0:
			m = min(m, some)
		}
	}
	return m
}

// and returns f & mask ^ xor.
func (f field) and(mask, xor []byte) field {
	if len(mask) != len(f) || len(xor) != len(f) {
		return dark(len(f))
	}
	out := make(field, len(f))
	for i, c := range f {
		m := mask[i]
		out[i] = cell{val: c.val&m ^ xor[i], known: c.known | ^m, coarse: c.coarse & m, dark: c.dark & m}
	}
	return out
}

// between compares the field with a range, inclusive, in network byte order.
func (f field) between(lo, hi []byte) match {
	if len(lo) > len(f) || len(lo) != len(hi) {
		return some
	}
	f = f[:len(lo)]
	least, most, own := make([]byte, len(f)), make([]byte, len(f)), make([]byte, len(f))
	for i, c := range f {
		if c.dark != 0 {
			return some
		}
		least[i], most[i] = c.val&c.known, c.val&c.known|^c.known
		own[i] = ^c.known &^ c.coarse
	}
	switch {
	case bytes.Compare(hi, least) < 0 || bytes.Compare(lo, most) > 0:
		return none
	case bytes.Compare(lo, least) <= 0 && bytes.Compare(hi, most) >= 0:
		return every
	}
	// A part is large if it is half of all possible values, or a whole lease.
	number := func(b []byte) *big.Int { return new(big.Int).SetBytes(b) }
	if bytes.Compare(lo, least) < 0 {
		lo = least
	}
	if bytes.Compare(hi, most) > 0 {
		hi = most
	}
	part := new(big.Int).Sub(number(hi), number(lo))
	whole := new(big.Int).Sub(number(most), number(least))
	lease := number(own)
	if part.Lsh(part, 1).Cmp(whole) >= 0 || lease.BitLen() < whole.BitLen() && part.Rsh(part, 1).Cmp(lease) >= 0 {
		return some
	}
	return few
}

// field returns a device's name as rules compare it.
func (d Device) field() field {
	if d.Name == "" {
		return dark(unix.IFNAMSIZ)
	}
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, d.Name)
	return known(b...)
}

// number returns a device's index as rules compare it.
func (d Device) number() field {
	if d.Index == 0 {
		return dark(4)
	}
	return known(binaryutil.NativeEndian.PutUint32(uint32(d.Index))...)
}
