package subnet

import (
	"fmt"
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

func TestUsage(t *testing.T) {
	c, _, err := ParseConfig([]byte(`{"Network":"10.5.0.0/20","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}`))
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		keys  []string
		used4 int64
		used6 int64
	}{
		{nil, 0, 0},
		{[]string{"10.5.1.0-24&fd00:0:0:1::-64", "10.5.2.0-24&fd00:0:0:2::-64"}, 2, 2},
		{[]string{"10.5.1.0-24", "10.5.1.0-26", "10.5.1.64-26"}, 1, 0}, // three leases overlap one subnet
		{[]string{"10.5.0.0-24", "10.6.0.0-24", "nonsense"}, 0, 0},     // below SubnetMin, outside, malformed
		{[]string{"10.5.8.0-21", "10.5.9.0-24", "10.5.0.0-16"}, 15, 0}, // the whole network is reserved
		{[]string{"fd00::-48"}, 0, 1<<16 - 1},
	} {
		u := c.Usage(keyed(step.keys))
		if u[0].Used != step.used4 || u[1].Used != step.used6 || u[0].Capacity != 15 || u[1].Capacity != 1<<16-1 {
			t.Errorf("%v: %+v", step.keys, u)
		}
	}
	if (Usage{Capacity: 10, Used: 8}).Share() != NearlyFull {
		t.Error("8 of 10 is not 80 %")
	}
}

// The oracle tests every subnet for overlap with one of the prefixes.
func TestUsageAgreesWithCounting(t *testing.T) {
	c, _, err := ParseConfig([]byte(`{"Network":"10.5.0.0/20","SubnetLen":26,"SubnetMin":"10.5.1.0","SubnetMax":"10.5.14.192","Backend":{"Type":"vxlan"}}`))
	if err != nil {
		t.Fatal(err)
	}
	n := c.Networks[0]
	rapid.Check(t, func(t *rapid.T) {
		var keys []string
		var taken []netip.Prefix
		for range rapid.IntRange(0, 12).Draw(t, "leases") {
			a := netip.AddrFrom4([4]byte{10, 5, byte(rapid.IntRange(0, 16).Draw(t, "c")), byte(rapid.IntRange(0, 255).Draw(t, "d"))})
			p := netip.PrefixFrom(a, rapid.IntRange(19, 32).Draw(t, "length")).Masked()
			taken = append(taken, p)
			keys = append(keys, fmt.Sprintf("%s-%d", p.Addr(), p.Bits()))
		}
		var want int64
		for a := n.SubnetMin; !n.SubnetMax.Less(a); {
			s := netip.PrefixFrom(a, n.SubnetLen)
			for _, p := range taken {
				if p.Overlaps(s) {
					want++
					break
				}
			}
			a = lastOf(s).add(u128{lo: 1}).addr(true)
		}
		if got := c.Usage(keyed(keys))[0].Used; got != want {
			t.Fatalf("%v: %d, counted %d", keys, got, want)
		}
	})
}

// keyed returns entries with these keys and malformed values.
func keyed(keys []string) []Entry {
	var entries []Entry
	for _, k := range keys {
		entries = append(entries, NewEntry(Entry{Key: k}))
	}
	return entries
}
