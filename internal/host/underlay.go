package host

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Underlay is the interface that tunnel packets leave and enter by.
type Underlay struct {
	Name  string
	Index int
	MTU   int // bytes of an IP packet
	// Addrs holds the address to use of each family, IPv4 first; at most one
	// per family. It may be private, behind an address translation: what other
	// nodes send to is the leased public address. A loopback or dummy interface
	// may bear it.
	Addrs []netip.Addr
	// Networks are the prefixes of the usable addresses on the link.
	Networks []netip.Prefix
	// Why says how the interface was chosen.
	Why string
	// Former are addresses that were in use before one of Addrs, a virtual
	// address, had to be taken for want of another: when the host bears one
	// again, it is preferred.
	Former []netip.Addr
}

// Addr returns the interface's address of a family, or the zero Addr.
func (u Underlay) Addr(is4 bool) netip.Addr { return ofFamily(u.Addrs, is4) }

func ofFamily(addrs []netip.Addr, is4 bool) netip.Addr {
	for _, a := range addrs {
		if a.Is4() == is4 {
			return a
		}
	}
	return netip.Addr{}
}

// UnderlaySelector is what the operator says of the underlay. Of its first
// three fields the first that is set decides; with none, the addresses in use
// do, then the default route.
type UnderlaySelector struct {
	Interfaces []string     // names or addresses, in order of preference
	Regexes    []string     // matched against names, then addresses, in order
	CanReach   netip.Addr   // the interface that the route to it leaves by
	PublicIPs  []netip.Addr // an interface that bears one is preferred to the default route's
}

// Known is what the choice of the underlay goes by besides the operator's word.
type Known struct {
	// IPv4 and IPv6 are the families that the underlay must have. With neither,
	// one of any family is enough.
	IPv4, IPv6 bool
	// Held are the addresses that this node last used, and Former those of
	// Underlay.Former.
	Held, Former []netip.Addr
	// Leased are the addresses that the store has for this node. A virtual one
	// among them is not preferred, since nothing says whether it was a choice.
	Leased []netip.Addr
	// Pods are the subnets of this node's pods, now and formerly, and Bridges the
	// names that its CNI records know: what bears the gateway's address of the
	// former, has one of the latter, or is attached to such a bridge, is the
	// pods' and no underlay.
	Pods    []netip.Prefix
	Bridges []string
}

func (k Known) families() []bool {
	switch {
	case k.IPv4 && k.IPv6:
		return []bool{true, false}
	case k.IPv4 || k.IPv6:
		return []bool{k.IPv4}
	}
	return nil
}

// FindUnderlay reads the host's facts and chooses. IPv6 addresses that the
// kernel still checks for duplicates are waited for, a few seconds at most.
func FindUnderlay(s UnderlaySelector, k Known) (Underlay, error) {
	for end := time.Now().Add(tentativeWait); ; time.Sleep(tentativeWait / 20) {
		f, err := ReadFacts()
		if err != nil {
			return Underlay{}, err
		}
		u, err := Choose(f, s, k)
		tentative := slices.ContainsFunc(f.Addrs, func(a AddrFact) bool { return a.Tentative && a.Global })
		if err == nil || !tentative || time.Now().After(end) {
			return u, err
		}
	}
}

const tentativeWait = 4 * time.Second

// Choose chooses the underlay, purely. The candidates are all links but our own
// devices and the pods'. The operator's word comes first: of a list or a
// pattern, the first match that has an address of each needed family. Then a
// link that bears the address in use, then one that bears the leased one, then
// the default route with the lowest metric. The error names what was looked
// for, why it was not taken, and the interfaces that there are.
func Choose(f Facts, s UnderlaySelector, k Known) (Underlay, error) {
	c := chooser{facts: f, known: k, pods: f.podLinks(k)}
	u, err := c.choose(s)
	if err != nil {
		if len(c.refused) > 0 {
			err = fmt.Errorf("%w (%s)", err, strings.Join(c.refused, "; "))
		}
		return Underlay{}, fmt.Errorf("%w; interfaces here: %s", err, c.describe())
	}
	return u, nil
}

// chooser is one choice on its way.
type chooser struct {
	facts   Facts
	known   Known
	pods    map[int]bool
	refused []string // candidates that were not taken, and why
}

func (c *chooser) choose(s UnderlaySelector) (Underlay, error) {
	switch {
	case len(s.Interfaces) > 0:
		for _, want := range s.Interfaces {
			if u, ok := c.named(want, "--iface "+want); ok {
				return u, nil
			}
		}
		return Underlay{}, fmt.Errorf("no interface is, or bears, %s", strings.Join(s.Interfaces, " or "))
	case len(s.Regexes) > 0:
		for _, want := range s.Regexes {
			re, err := regexp.Compile(want)
			if err != nil {
				return Underlay{}, fmt.Errorf("--iface-regex %q: %w", want, err)
			}
			if u, ok := c.matching(re, "--iface-regex "+want); ok {
				return u, nil
			}
		}
		return Underlay{}, fmt.Errorf("no interface matches %s", strings.Join(s.Regexes, " or "))
	case s.CanReach.IsValid():
		r, ok := c.facts.route(s.CanReach, func(r RouteFact) bool { return c.candidate(r.Link) && !r.Ours })
		if !ok {
			return Underlay{}, fmt.Errorf("--iface-can-reach %s: there is no route to it", s.CanReach)
		}
		u, ok := c.fit(r.Link, "--iface-can-reach "+s.CanReach.String(), r.Source)
		if !ok {
			return Underlay{}, fmt.Errorf("--iface-can-reach %s: the interface of its route does not serve", s.CanReach)
		}
		return u, nil
	}
	for _, by := range []struct {
		addrs []netip.Addr
		why   string
	}{{s.PublicIPs, "bears --public-ip"}, {c.known.Former, "bears the former address"}, {c.known.Held, "bears the address in use"}, {c.known.Leased, "bears the leased address"}} {
		for _, a := range by.addrs {
			if by.why == "bears the leased address" && c.virtual(a) {
				continue
			}
			if u, ok := c.bearing(a, by.why); ok {
				return u, nil
			}
		}
	}
	for _, is4 := range []bool{true, false} {
		if families := c.known.families(); len(families) > 0 && !slices.Contains(families, is4) {
			continue
		}
		for _, r := range c.facts.defaults(is4) {
			if !c.candidate(r.Link) {
				continue
			}
			u, ok := c.fit(r.Link, "default route", netip.Addr{})
			if ok && slices.ContainsFunc(u.Addrs, netip.Addr.IsLinkLocalUnicast) {
				c.refused = append(c.refused, u.Name+" has a link-local address only")
				continue
			}
			if ok {
				return u, nil
			}
		}
	}
	if len(c.refused) > 0 {
		return Underlay{}, errors.New("no interface with a default route serves: name one with --iface")
	}
	return Underlay{}, errors.New("there is no default route: name the interface with --iface")
}

// candidate says whether a link may be the underlay: packets leave by it, and
// it is neither ours nor the pods'.
func (c *chooser) candidate(index int) bool {
	l, ok := c.facts.link(index)
	return ok && !l.Local && !OwnDevice(l.Name) && !c.pods[index]
}

// named finds a candidate by its name, or by an address, which is then the one
// to use.
func (c *chooser) named(want, why string) (Underlay, bool) {
	for _, l := range c.facts.Links {
		if l.Name == want {
			return c.use(l, why, netip.Addr{})
		}
	}
	if a, err := netip.ParseAddr(want); err == nil {
		return c.bearing(a, why)
	}
	return Underlay{}, false
}

func (c *chooser) matching(re *regexp.Regexp, why string) (Underlay, bool) {
	for _, l := range c.facts.Links {
		if re.MatchString(l.Name) {
			if u, ok := c.use(l, why, netip.Addr{}); ok {
				return u, true
			}
		}
	}
	for _, a := range c.facts.Addrs {
		if a.Global && re.MatchString(a.Prefix.Addr().String()) {
			if u, ok := c.bearing(a.Prefix.Addr(), why); ok {
				return u, true
			}
		}
	}
	return Underlay{}, false
}

// bearing finds the candidate that bears an address, and uses that address.
func (c *chooser) bearing(a netip.Addr, why string) (Underlay, bool) {
	for _, index := range c.facts.bearers(a) {
		l, _ := c.facts.link(index)
		if u, ok := c.use(l, why, a); ok {
			return u, true
		}
	}
	return Underlay{}, false
}

// use takes a link, or, where no packet leaves by it, the one that the default
// route of the address that it bears leaves by.
func (c *chooser) use(l LinkFact, why string, pinned netip.Addr) (Underlay, bool) {
	if !l.Local {
		if !c.candidate(l.Index) {
			c.refused = append(c.refused, l.Name+" is the pods' or culvert's own")
			return Underlay{}, false
		}
		return c.fit(l.Index, why, pinned)
	}
	for _, is4 := range []bool{true, false} {
		a := pinned
		if !a.IsValid() {
			a = c.address(l.Index, is4, netip.Addr{})
		}
		if !a.IsValid() || a.Is4() != is4 {
			continue
		}
		for _, r := range c.facts.defaults(is4) {
			if c.candidate(r.Link) {
				return c.fit(r.Link, why, a)
			}
		}
		c.refused = append(c.refused, fmt.Sprintf("%s is on %s, by which no packet leaves, and there is no default route", a, l.Name))
	}
	return Underlay{}, false
}

// fit makes a link the underlay, with the best address of each family; pinned,
// if valid, is the one of its family. It fails if a needed family has none.
func (c *chooser) fit(index int, why string, pinned netip.Addr) (Underlay, bool) {
	l, _ := c.facts.link(index)
	u := Underlay{Name: l.Name, Index: index, MTU: l.MTU, Why: why}
	for _, a := range c.facts.Addrs {
		if a.Link == index && a.usable() {
			u.Networks = append(u.Networks, a.Prefix)
		}
	}
	families := c.known.families()
	for _, is4 := range []bool{true, false} {
		if len(families) > 0 && !slices.Contains(families, is4) {
			continue
		}
		a := pinned
		if !a.IsValid() || a.Is4() != is4 {
			a = c.address(index, is4, c.source(index, is4))
		}
		if !a.IsValid() {
			if len(families) > 0 {
				c.refused = append(c.refused, fmt.Sprintf("%s has no usable %s address", l.Name, familyName(is4)))
				return u, false
			}
			continue
		}
		u.Addrs = append(u.Addrs, a)
		if a != pinned && c.single(a) {
			former := ofFamily(c.known.Former, is4)
			if !former.IsValid() {
				former = ofFamily(c.known.Held, is4)
			}
			if former.IsValid() && former != a {
				u.Former = append(u.Former, former)
			}
		}
	}
	if len(u.Addrs) == 0 {
		c.refused = append(c.refused, l.Name+" has no usable address")
		return u, false
	}
	return u, true
}

// source is what the default route by a link says that packets leave with: its
// preferred source, or, where the link bears no address, what the loopback
// interface bears, as the kernel chooses it.
func (c *chooser) source(index int, is4 bool) netip.Addr {
	for _, r := range c.facts.defaults(is4) {
		switch {
		case r.Link != index:
		case r.Source.IsValid() && len(c.facts.bearers(r.Source)) > 0:
			return r.Source
		case !c.address(index, is4, netip.Addr{}).IsValid():
			for _, l := range c.facts.Links {
				if a := c.address(l.Index, is4, netip.Addr{}); l.Local && a.IsValid() {
					return a
				}
			}
		}
	}
	return netip.Addr{}
}

// address returns the best address of a family on a link, or what the default
// route says. In this order: a former one, the one in use, the leased one unless
// it is virtual, the route's; then one that is not virtual, not link-local, for
// IPv6 not dynamic, in the gateway's network, the oldest.
func (c *chooser) address(index int, is4 bool, byRoute netip.Addr) netip.Addr {
	var gateways []netip.Addr
	for _, r := range c.facts.defaults(is4) {
		if r.Link == index && r.Via.IsValid() {
			gateways = append(gateways, r.Via)
		}
	}
	type choice struct {
		addr netip.Addr
		rank int
	}
	var all []choice
	for _, a := range c.facts.Addrs {
		addr := a.Prefix.Addr()
		held := slices.Contains(c.known.Held, addr)
		if addr.Is4() != is4 || a.Link != index && addr != byRoute || !a.Global || a.Tentative || !a.usable() && !held {
			continue
		}
		rank := 0
		for _, worse := range []bool{
			!slices.Contains(c.known.Former, addr), !held, c.virtual(addr) || !slices.Contains(c.known.Leased, addr), addr != byRoute,
			c.virtual(addr), addr.IsLinkLocalUnicast(), !is4 && a.Dynamic, !slices.ContainsFunc(gateways, a.Prefix.Contains),
		} {
			rank <<= 1
			if worse {
				rank |= 1
			}
		}
		all = append(all, choice{addr, rank})
	}
	if !is4 {
		slices.Reverse(all) // the kernel lists the newest first
	}
	if len(all) == 0 {
		return netip.Addr{}
	}
	return slices.MinFunc(all, func(a, b choice) int { return cmp.Compare(a.rank, b.rank) }).addr
}

// usable says whether an address may be chosen at all.
func (a AddrFact) usable() bool {
	addr := a.Prefix.Addr()
	return a.Global && !a.Tentative && !a.Deprecated && !a.Temporary && !addr.IsLoopback() && !(addr.Is6() && addr.IsLinkLocalUnicast())
}

// single says whether an address is alone in its prefix, as virtual addresses
// are.
func (c *chooser) single(a netip.Addr) bool {
	return slices.ContainsFunc(c.facts.Addrs, func(x AddrFact) bool { return x.Prefix.Addr() == a && x.Prefix.IsSingleIP() })
}

// virtual says whether an address is a single one beside another of its family
// on its link: as VRRP and its like add one.
func (c *chooser) virtual(a netip.Addr) bool {
	return slices.ContainsFunc(c.facts.Addrs, func(x AddrFact) bool {
		return x.Prefix.Addr() == a && x.Prefix.IsSingleIP() && slices.ContainsFunc(c.facts.Addrs, func(y AddrFact) bool {
			return y.Link == x.Link && y.usable() && !y.Prefix.IsSingleIP() && y.Prefix.Addr().Is4() == a.Is4()
		})
	})
}

// OwnDevice says whether a link is one of culvert's, the helper of the userspace
// datapath included.
func OwnDevice(name string) bool { return Ours(name) || name == "culvert0s" }

// podLinks returns the links of this node's pods: each bridge that bears the
// gateway's address of a subnet of theirs, or that the CNI records name, its
// ports, and the links that a route to a single pod leads into.
func (f Facts) podLinks(k Known) map[int]bool {
	pods := make(map[int]bool)
	for _, a := range f.Addrs {
		for _, p := range k.Pods {
			if a.Prefix.Addr() == p.Masked().Addr().Next() {
				pods[a.Link] = true
			}
		}
	}
	for _, l := range f.Links {
		if slices.Contains(k.Bridges, l.Name) {
			pods[l.Index] = true
		}
	}
	for _, l := range f.Links {
		if l.Master != 0 && pods[l.Master] {
			pods[l.Index] = true
		}
	}
	for _, r := range f.Routes {
		inside := func(p netip.Prefix) bool { return p.Contains(r.To.Addr()) }
		if r.To.IsSingleIP() && !r.Ours && r.Link != 0 && !r.Via.IsValid() && slices.ContainsFunc(k.Pods, inside) {
			pods[r.Link] = true
		}
	}
	return pods
}

// describe lists the interfaces for an error. Ours and the pods' would only
// lead astray.
func (c *chooser) describe() string {
	var words []string
	for _, l := range c.facts.Links {
		if OwnDevice(l.Name) || c.pods[l.Index] {
			continue
		}
		w := l.Name
		for _, is4 := range []bool{true, false} {
			for _, a := range c.facts.Addrs {
				if a.Link == l.Index && a.Prefix.Addr().Is4() == is4 && a.usable() {
					w += " " + a.Prefix.String()
				}
			}
		}
		if !l.Local || w != l.Name {
			words = append(words, w)
		}
	}
	if len(words) == 0 {
		return "none"
	}
	return strings.Join(words, ", ")
}

func familyName(is4 bool) string {
	if is4 {
		return "IPv4"
	}
	return "IPv6"
}

// prefixOf converts an address with its prefix length, host bits kept.
func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits), true
}

// IPNet converts a prefix to the form that netlink takes.
func IPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
