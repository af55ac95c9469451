package subnet_test

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"culvert/subnet"

	"pgregory.net/rapid"
)

// subnetsOf enumerates the subnets of a small network: slow and obvious.
func subnetsOf(n subnet.Network) []netip.Prefix {
	var all []netip.Prefix
	for p := netip.PrefixFrom(n.SubnetMin, n.SubnetLen); ; {
		all = append(all, p)
		if p.Addr() == n.SubnetMax {
			return all
		}
		a := p.Addr()
		for range 1 << (a.BitLen() - n.SubnetLen) {
			a = a.Next()
		}
		p = netip.PrefixFrom(a, n.SubnetLen)
	}
}

// drawNetwork returns a network of at most 64 subnets anywhere in the address
// space, including both ends.
func drawNetwork(t *rapid.T) subnet.Network {
	bits := 32
	if rapid.Bool().Draw(t, "ipv6") {
		bits = 128
	}
	host := rapid.IntRange(2, 5).Draw(t, "host bits")
	wide := rapid.IntRange(2, 6).Draw(t, "subnet bits")
	raw := make([]byte, bits/8)
	switch rapid.IntRange(0, 2).Draw(t, "place") {
	case 0:
		for i := range raw {
			raw[i] = 0xff
		}
	case 1:
		for i := range raw {
			raw[i] = rapid.Byte().Draw(t, "octet")
		}
	}
	a, _ := netip.AddrFromSlice(raw)
	p := netip.PrefixFrom(a, bits-host-wide).Masked()
	n := subnet.Network{Prefix: p, SubnetLen: bits - host, SubnetMin: p.Addr()}
	all := make([]netip.Prefix, 0, 1<<wide)
	for a := p.Addr(); len(all) < 1<<wide; {
		all = append(all, netip.PrefixFrom(a, n.SubnetLen))
		for range 1 << host {
			a = a.Next()
		}
	}
	first := rapid.IntRange(0, len(all)-1).Draw(t, "first")
	last := rapid.IntRange(first, len(all)-1).Draw(t, "last")
	n.SubnetMin, n.SubnetMax = all[first].Addr(), all[last].Addr()
	return n
}

func TestSearchAgainstEnumeration(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := drawNetwork(t)
		all := subnetsOf(n)
		if got := n.Capacity(); got != int64(len(all)) {
			t.Fatalf("capacity %d, counted %d", got, len(all))
		}
		// Prefixes of any length within and around the network.
		drawPrefixes := func(label string) []netip.Prefix {
			return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) netip.Prefix {
				p := rapid.SampledFrom(all).Draw(t, "at")
				length := p.Bits() + rapid.IntRange(-2, 2).Draw(t, "longer")
				return netip.PrefixFrom(p.Addr(), min(max(length, 1), p.Addr().BitLen())).Masked()
			}), 0, 2*len(all)).Draw(t, label)
		}
		s := subnet.Search{
			Network: n, Taken: drawPrefixes("taken"), Quarantined: drawPrefixes("quarantined"), Prefer: drawPrefixes("prefer"),
			Seed: rapid.Uint64().Draw(t, "seed"),
		}
		isFree := func(p netip.Prefix) bool { return !slices.ContainsFunc(s.Taken, p.Overlaps) }
		var free, rested []netip.Prefix
		for _, p := range all {
			if isFree(p) {
				free = append(free, p)
				if slices.ContainsFunc(s.Quarantined, p.Overlaps) {
					rested = append(rested, p)
				}
			}
		}
		got, err := s.Next()
		if len(free) == 0 {
			if !errors.Is(err, subnet.ErrExhausted) {
				t.Fatalf("nothing is free, but got %v, %v", got, err)
			}
			return
		}
		if err != nil || !slices.Contains(free, got) {
			t.Fatalf("got %v, %v; free are %v", got, err, free)
		}
		if again, _ := s.Next(); again != got {
			t.Fatalf("not deterministic: %v, then %v", got, again)
		}
		if i := slices.IndexFunc(s.Prefer, func(p netip.Prefix) bool { return slices.Contains(free, p) }); i >= 0 {
			if got != s.Prefer[i] {
				t.Fatalf("got %v, preferred %v", got, s.Prefer[i])
			}
			return
		}
		if len(rested) < len(free) && slices.Contains(rested, got) {
			t.Fatalf("got %v, which is in quarantine, but %v are free", got, free)
		}
		if i := slices.IndexFunc(s.Quarantined, func(p netip.Prefix) bool { return slices.Contains(free, p) }); len(rested) == len(free) && i >= 0 && got != s.Quarantined[i] {
			t.Fatalf("got %v, want the longest unused %v", got, s.Quarantined[i])
		}
	})
}

// Successive allocations use every subnet once; then the error says how many
// there are.
func TestSearchUsesEverySubnet(t *testing.T) {
	cfg, _, err := subnet.ParseConfig([]byte(`{"Network":"10.5.0.0/16","SubnetMin":"10.5.10.0","SubnetMax":"10.5.109.0"}`))
	if err != nil {
		t.Fatal(err)
	}
	var taken []netip.Prefix
	for {
		p, err := subnet.Search{Network: cfg.Networks[0], Taken: taken, Seed: rand.Uint64()}.Next()
		if err != nil {
			const want = "no free subnet is left in the network: the 100 subnets of /24 between 10.5.10.0 and 10.5.109.0 in 10.5.0.0/16 are all leased or reserved"
			if err.Error() != want {
				t.Errorf("got  %v\nwant %s", err, want)
			}
			break
		}
		if slices.Contains(taken, p) {
			t.Fatalf("%v allocated twice", p)
		}
		taken = append(taken, p)
	}
	if len(taken) != 100 {
		t.Errorf("%d subnets", len(taken))
	}
}

func TestSearchInAVastNetwork(t *testing.T) {
	cfg, _, err := subnet.ParseConfig([]byte(`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"2000::/3","IPv6SubnetLen":126,"Backend":{"Type":"vxlan"}}`))
	if err != nil {
		t.Fatal(err)
	}
	n := cfg.Networks[0]
	if c := n.Capacity(); c != 1<<63-1 {
		t.Errorf("capacity %d", c)
	}
	half := netip.MustParsePrefix("2000::/4")
	p, err := subnet.Search{Network: n, Taken: []netip.Prefix{half}, Seed: 12345}.Next()
	if err != nil || p.String() != "3000::/126" {
		t.Errorf("%v, %v", p, err)
	}
	_, err = subnet.Search{Network: n, Taken: []netip.Prefix{half, netip.MustParsePrefix("3000::/4")}}.Next()
	if !errors.Is(err, subnet.ErrExhausted) || !strings.Contains(err.Error(), "2^122 or more") {
		t.Errorf("%v", err)
	}
}

func TestSeedsSpread(t *testing.T) {
	cfg, _, err := subnet.ParseConfig([]byte(`{"Network":"10.5.0.0/16"}`))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[netip.Prefix]int{}
	for i := range 100 {
		p, err := subnet.Search{Network: cfg.Networks[0], Seed: subnet.NodeSeed(string(rune('a' + i)))}.Next()
		if err != nil {
			t.Fatal(err)
		}
		seen[p]++
	}
	if len(seen) < 70 { // expected: 82 distinct in 100 draws from 255
		t.Errorf("100 nodes start at only %d subnets", len(seen))
	}
}

func BenchmarkSearch5000(b *testing.B) {
	cfg, _, err := subnet.ParseConfig([]byte(`{"Network":"10.0.0.0/8"}`))
	if err != nil {
		b.Fatal(err)
	}
	var taken []netip.Prefix
	for i := range 5000 {
		taken = append(taken, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24))
	}
	for b.Loop() {
		if _, err := (subnet.Search{Network: cfg.Networks[0], Taken: taken}).Next(); err != nil {
			b.Fatal(err)
		}
	}
}
