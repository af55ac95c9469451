package subnet

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
)

// Search is a request for a free subnet of one address family.
type Search struct {
	Network Network
	// Prefer are subnets to try first, in this order. Those that are taken or do
	// not fit the network are skipped.
	Prefer []netip.Prefix
	// Taken are never allocated: leases and reservations of any length.
	Taken []netip.Prefix
	// Quarantined are free subnets in quarantine, the longest unused first. They are
	// allocated, in this order, only if no other subnet is free.
	Quarantined []netip.Prefix
	// Seed selects where the search starts, so that nodes searching at the same
	// time try different subnets (NodeSeed).
	Seed uint64
}

// NodeSeed returns a node's Seed, derived from its identity.
func NodeSeed(node string) uint64 {
	sum := sha256.Sum256([]byte("culvert subnet\x00" + node))
	return binary.BigEndian.Uint64(sum[:8])
}

// Next returns the subnet to try: the first free preferred one, else the first
// free one at or after the seed's position, else the one that has been in
// quarantine longest, else ErrExhausted, wrapped with the figures. It does no
// I/O; the time depends on the number of prefixes, not the network's size.
func (s Search) Next() (netip.Prefix, error) {
	n := s.Network
	is4 := n.Prefix.Addr().Is4()
	taken := ranges(s.Taken, is4)
	free := func(p netip.Prefix) bool { return n.Fits(p) && !taken.overlap(p) }
	for _, p := range s.Prefer {
		if free(p) {
			return p, nil
		}
	}
	unavailable := ranges(append(slices.Clone(s.Quarantined), s.Taken...), is4)
	if p, ok := n.firstFree(unavailable, s.Seed); ok {
		return p, nil
	}
	for _, p := range s.Quarantined {
		if free(p) {
			return p, nil
		}
	}
	// A subnet in quarantine may have another length than SubnetLen, if the
	// configuration has changed.
	if p, ok := n.firstFree(taken, s.Seed); ok {
		return p, nil
	}
	return netip.Prefix{}, fmt.Errorf("%w: the %s subnets of /%d between %s and %s in %s are all leased or reserved",
		ErrExhausted, n.capacity(), n.SubnetLen, n.SubnetMin, n.SubnetMax, n.Prefix)
}

// Fits reports whether this network allocates the subnet: its length, alignment
// and bounds match. A subnet leased before a change of the configuration may no
// longer fit.
func (n Network) Fits(p netip.Prefix) bool {
	return p.IsValid() && p.Bits() == n.SubnetLen && p == p.Masked() && n.Prefix.Contains(p.Addr()) &&
		!p.Addr().Less(n.SubnetMin) && !n.SubnetMax.Less(p.Addr())
}

// holds reports whether the network contains the subnet, of whatever length.
func (n Network) holds(p netip.Prefix) bool {
	return p.IsValid() && n.Prefix.Contains(p.Addr()) && p.Bits() >= n.Prefix.Bits()
}

// Capacity is the number of subnets the network can allocate, at most 2^63-1.
func (n Network) Capacity() int64 {
	c := n.capacity()
	if c.hi != 0 || c.lo > 1<<63-1 {
		return 1<<63 - 1
	}
	return int64(c.lo)
}

func (n Network) capacity() u128 {
	span := toU128(n.SubnetMax).sub(toU128(n.SubnetMin))
	return span.shr(n.Prefix.Addr().BitLen() - n.SubnetLen).add(u128{lo: 1})
}

// firstFree searches from the seed's position to the end, then from the
// beginning.
func (n Network) firstFree(taken spans, seed uint64) (netip.Prefix, bool) {
	is4 := n.Prefix.Addr().Is4()
	hostBits := n.Prefix.Addr().BitLen() - n.SubnetLen
	first, last := toU128(n.SubnetMin), toU128(n.SubnetMax)
	index := u128{lo: seed}
	if c := n.capacity(); c.hi == 0 {
		index.lo = seed % c.lo
	}
	start := first.add(index.shl(hostBits))
	for _, from := range []u128{start, first} {
		if at, ok := taken.gap(from, last, hostBits); ok {
			return netip.PrefixFrom(at.addr(is4), n.SubnetLen), true
		}
	}
	return netip.Prefix{}, false
}

// span is a range of addresses, both ends inclusive.
type span struct{ first, last u128 }

// spans are sorted and do not overlap.
type spans []span

func ranges(prefixes []netip.Prefix, is4 bool) spans {
	all := make(spans, 0, len(prefixes))
	for _, p := range prefixes {
		if p.IsValid() && p.Addr().Is4() == is4 {
			all = append(all, span{toU128(p.Masked().Addr()), lastOf(p)})
		}
	}
	slices.SortFunc(all, func(a, b span) int { return a.first.compare(b.first) })
	merged := all[:0]
	for _, s := range all {
		if k := len(merged); k > 0 && s.first.compare(merged[k-1].last) <= 0 {
			if s.last.compare(merged[k-1].last) > 0 {
				merged[k-1].last = s.last
			}
			continue
		}
		merged = append(merged, s)
	}
	return merged
}

func (ss spans) overlap(p netip.Prefix) bool {
	first, last := toU128(p.Addr()), lastOf(p)
	i, _ := slices.BinarySearchFunc(ss, first, func(s span, a u128) int { return s.last.compare(a) })
	return i < len(ss) && ss[i].first.compare(last) <= 0
}

// gap returns the first subnet at or after from, and not after last, that
// overlaps none of the spans.
func (ss spans) gap(from, last u128, hostBits int) (u128, bool) {
	size := u128pow2(hostBits)
	at := from
	i, _ := slices.BinarySearchFunc(ss, at, func(s span, a u128) int { return s.last.compare(a) })
	for at.compare(last) <= 0 {
		for i < len(ss) && ss[i].last.compare(at) < 0 {
			i++ // ends within the subnet just skipped
		}
		end := at.add(size).sub(u128{lo: 1})
		if i == len(ss) || ss[i].first.compare(end) > 0 {
			return at, true
		}
		next := ss[i].last.shr(hostBits).shl(hostBits).add(size) // the first subnet after the span
		if next.compare(at) <= 0 {
			break // wrapped at the end of the address space
		}
		at = next
	}
	return u128{}, false
}

// u128 is an address as an integer; IPv4 addresses are below 2^32.
type u128 struct{ hi, lo uint64 }

func toU128(a netip.Addr) u128 {
	if a.Is4() {
		b := a.As4()
		return u128{lo: uint64(binary.BigEndian.Uint32(b[:]))}
	}
	b := a.As16()
	return u128{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

func (u u128) addr(is4 bool) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], u.hi)
	binary.BigEndian.PutUint64(b[8:], u.lo)
	if is4 {
		return netip.AddrFrom4([4]byte(b[12:]))
	}
	return netip.AddrFrom16(b)
}

// lastOf returns the highest address in the prefix.
func lastOf(p netip.Prefix) u128 {
	return toU128(p.Masked().Addr()).add(u128pow2(p.Addr().BitLen() - p.Bits())).sub(u128{lo: 1})
}

// u128pow2 returns 2^n. 2^128 wraps to 0; the callers subtract 1, which gives the
// highest address.
func u128pow2(n int) u128 { return u128{lo: 1}.shl(n) }

func (u u128) add(v u128) u128 {
	lo, carry := bits.Add64(u.lo, v.lo, 0)
	hi, _ := bits.Add64(u.hi, v.hi, carry)
	return u128{hi, lo}
}

func (u u128) sub(v u128) u128 {
	lo, borrow := bits.Sub64(u.lo, v.lo, 0)
	hi, _ := bits.Sub64(u.hi, v.hi, borrow)
	return u128{hi, lo}
}

func (u u128) shl(n int) u128 {
	if n >= 64 {
		return u128{u.lo << (n - 64), 0}
	}
	return u128{u.hi<<n | u.lo>>(64-n), u.lo << n}
}

func (u u128) shr(n int) u128 {
	if n >= 64 {
		return u128{0, u.hi >> (n - 64)}
	}
	return u128{u.hi >> n, u.lo>>n | u.hi<<(64-n)}
}

func (u u128) compare(v u128) int {
	return cmp.Or(cmp.Compare(u.hi, v.hi), cmp.Compare(u.lo, v.lo))
}

// String returns the number in decimal, or a power of two if it is 2^64 or more.
func (u u128) String() string {
	if u.hi == 0 {
		return fmt.Sprint(u.lo)
	}
	return fmt.Sprintf("2^%d or more", 63+bits.Len64(u.hi))
}
