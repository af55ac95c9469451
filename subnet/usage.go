package subnet

import (
	"net/netip"
	"slices"
)

// Usage is the allocation state of one cluster network.
type Usage struct {
	Network  netip.Prefix `json:"network"`
	Capacity int64        `json:"capacity"` // subnets between SubnetMin and SubnetMax, at most 2^63-1
	Used     int64        `json:"used"`     // subnets that overlap a lease or a reservation
}

// Share returns the fraction in use, 0 to 1.
func (u Usage) Share() float64 {
	if u.Capacity == 0 {
		return 1
	}
	return float64(u.Used) / float64(u.Capacity)
}

// NearlyFull is the Share from which the network should be enlarged.
const NearlyFull = 0.8

// Usage returns the usage of each network by leases and reservations, including
// malformed ones.
func (c Config) Usage(entries []Entry) []Usage {
	taken := make([]netip.Prefix, 0, len(entries))
	for i := range entries {
		if l, err := entries[i].Lease(); err == nil {
			for _, e := range l.Endpoints {
				taken = append(taken, e.Subnet)
			}
		} else if subnets, err := ParseKey(entries[i].Key); err == nil {
			taken = append(taken, subnets...)
		}
	}
	usage := make([]Usage, len(c.Networks))
	for i, n := range c.Networks {
		usage[i] = Usage{Network: n.Prefix, Capacity: n.Capacity(), Used: n.used(taken)}
	}
	return usage
}

// used counts the network's subnets that overlap any of the prefixes.
func (n Network) used(taken []netip.Prefix) int64 {
	hostBits := n.Prefix.Addr().BitLen() - n.SubnetLen
	index := func(a u128) u128 { return a.shr(hostBits) }
	low, high := index(toU128(n.SubnetMin)), index(toU128(n.SubnetMax))
	var touched []span // ranges of subnet indexes
	for _, p := range taken {
		if p.Addr().Is4() != n.Prefix.Addr().Is4() {
			continue
		}
		s := span{index(toU128(p.Masked().Addr())), index(lastOf(p))}
		if s.last.compare(low) < 0 || s.first.compare(high) > 0 {
			continue
		}
		if s.first.compare(low) < 0 {
			s.first = low
		}
		if s.last.compare(high) > 0 {
			s.last = high
		}
		touched = append(touched, s)
	}
	slices.SortFunc(touched, func(a, b span) int { return a.first.compare(b.first) })
	var sum, next u128 // next is the first index not counted yet
	for _, s := range touched {
		if s.first.compare(next) < 0 {
			s.first = next
		}
		if s.last.compare(s.first) < 0 {
			continue
		}
		next = s.last.add(u128{lo: 1})
		sum = sum.add(next.sub(s.first))
	}
	if sum.hi != 0 || sum.lo > 1<<63-1 {
		return 1<<63 - 1
	}
	return int64(sum.lo)
}
