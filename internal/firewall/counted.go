package firewall

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// Counted are the subnets whose packets are counted. A packet is counted in the
// form that the hook sees: GRO or GSO may have made one of many.
type Counted struct {
	Sent []netip.Prefix // packets to them, by whatever device
	// Direct are the subnets reached without a tunnel, for packets from them, which
	// arrive on Underlay. The rules that check a tunnel's packets count those.
	Direct   []netip.Prefix
	Underlay string
}

// sets returns the sets of the counted prefixes, one per family and length.
func (c Counted) sets() []set {
	var sets []set
	for _, kind := range []struct {
		setKind
		name string
		all  []netip.Prefix
	}{{destinations, "sent", c.Sent}, {origins, "direct", c.Direct}} {
		at := make(map[string]int)
		for _, p := range slices.SortedFunc(slices.Values(kind.all), func(a, b netip.Prefix) int {
			return cmp.Or(cmp.Compare(a.Addr().BitLen(), b.Addr().BitLen()), cmp.Compare(a.Bits(), b.Bits()), a.Compare(b))
		}) {
			name := fmt.Sprintf("%s%s_%d", kind.name, map[bool]string{true: "4", false: "6"}[p.Addr().Is4()], p.Bits())
			i, there := at[name]
			if !there {
				i = len(sets)
				at[name] = i
				sets = append(sets, set{name: name, kind: kind.setKind, is4: p.Addr().Is4(), bits: p.Bits()})
			}
			sets[i].elements = append(sets[i].elements, Source{Inner: p})
		}
	}
	return sets
}
