package host

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"culvert/internal/names"
	"culvert/internal/remedy"
)

// Underlay is the interface that sends and receives tunnel packets.
type Underlay struct {
	Name  string
	Index int
	MTU   int // in bytes of an IP packet
	// Addrs has at most one address per family, IPv4 first. An address may be
	// private, behind NAT: other nodes send to the leased public address. It
	// may be on a loopback or dummy interface.
	Addrs []netip.Addr
	// Networks are the prefixes of the usable addresses on the link.
	Networks []netip.Prefix
	// Why explains the choice.
	Why string
	// Former are addresses that were in use before the node had to use a
	// virtual address in Addrs. If the host has one again, it is preferred.
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

// UnderlaySelector is the operator's choice of the underlay. The first of
// Interfaces, Regexes and CanReach that is set decides. If none is, see Choose.
type UnderlaySelector struct {
	Interfaces []string     // names or addresses, in order of preference
	Regexes    []string     // matched against names, then addresses, in order
	CanReach   netip.Addr   // selects the interface of the route to it
	PublicIPs  []netip.Addr // an interface with one is preferred to the default route's
}

// UnderlayContext is further input to the choice of the underlay.
type UnderlayContext struct {
	// IPv4 and IPv6 are the required families. If neither is set, an address of
	// any family suffices.
	IPv4, IPv6 bool
	// Held are the addresses last in use, Former those of Underlay.Former.
	Held, Former []netip.Addr
	// Leased are the node's addresses in the store. A virtual one among them is
	// not preferred, because it may not have been chosen intentionally.
	Leased []netip.Addr
	// Pods are the present and former subnets of this node's pods, and Bridges
	// the names in its CNI records. Links with the gateway address of such a
	// subnet, with such a name, or attached to such a bridge belong to pods and
	// cannot be the underlay.
	Pods    []netip.Prefix
	Bridges []string
}

func (k UnderlayContext) families() []bool {
	switch {
	case k.IPv4 && k.IPv6:
		return []bool{true, false}
	case k.IPv4 || k.IPv6:
		return []bool{k.IPv4}
	}
	return nil
}

// FindUnderlay reads the facts and chooses. If that fails while duplicate
// address detection is running, it retries for up to tentativeWait.
func FindUnderlay(s UnderlaySelector, k UnderlayContext) (Underlay, error) {
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

// Choose chooses the underlay. It does no I/O. Candidates are all links except
// culvert's and the pods'. If the operator gives a list or patterns, the first
// match with an address of each required family is used. Otherwise the link
// with, in this order: a public address that the operator gave, a former
// address, the address in use, the leased one; then the default route with the
// lowest metric. The error says what was tried, why it was refused, and which
// interfaces there are.
func Choose(f Facts, s UnderlaySelector, k UnderlayContext) (Underlay, error) {
	c := chooser{facts: f, known: k, pods: f.podLinks(k)}
	u, err := c.choose(s)
	if err != nil {
		if len(c.refused) > 0 {
			err = fmt.Errorf("%w (%s)", err, strings.Join(c.refused, "; "))
		}
		what, do := remedy.Split(err)
		return Underlay{}, remedy.Errorf(cmp.Or(do, "name another")+"; interfaces here: "+c.describe(), "%s", what)
	}
	return u, nil
}

// chooser is the state of one choice.
type chooser struct {
	facts   Facts
	known   UnderlayContext
	pods    map[int]bool
	refused []string // refused candidates and reasons
}

func (c *chooser) choose(s UnderlaySelector) (Underlay, error) {
	switch {
	case len(s.Interfaces) > 0:
		for _, want := range s.Interfaces {
			if u, ok := c.named(want, "--iface "+want); ok {
				return u, nil
			}
		}
		return Underlay{}, fmt.Errorf("no interface has the name or the address %s", strings.Join(s.Interfaces, " or "))
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
			return Underlay{}, fmt.Errorf("--iface-can-reach %s: the interface of its route cannot be the underlay", s.CanReach)
		}
		return u, nil
	}
	for _, by := range []struct {
		addrs []netip.Addr
		why   string
	}{{s.PublicIPs, "has the address of --public-ip"}, {c.known.Former, "has the former address"}, {c.known.Held, "has the address in use"}, {c.known.Leased, "has the leased address"}} {
		for _, a := range by.addrs {
			if by.why == "has the leased address" && c.virtual(a) {
				continue
			}
			if u, ok := c.withAddr(a, by.why); ok {
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
		return Underlay{}, remedy.Errorf("name one with --iface", "no interface with a default route can be the underlay")
	}
	return Underlay{}, remedy.Errorf("name the interface with --iface", "there is no default route")
}

// candidate reports whether a link may be the underlay: packets leave by it,
// and it is neither culvert's nor the pods'.
func (c *chooser) candidate(index int) bool {
	l, ok := c.facts.link(index)
	return ok && !l.Local && !names.Ours(l.Name) && !c.pods[index]
}

// named returns the candidate with a name or an address; that address is then
// used.
func (c *chooser) named(want, why string) (Underlay, bool) {
	for _, l := range c.facts.Links {
		if l.Name == want {
			return c.use(l, why, netip.Addr{})
		}
	}
	if a, err := netip.ParseAddr(want); err == nil {
		return c.withAddr(a, why)
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
			if u, ok := c.withAddr(a.Prefix.Addr(), why); ok {
				return u, true
			}
		}
	}
	return Underlay{}, false
}

// withAddr returns the candidate that has an address, and uses that address.
func (c *chooser) withAddr(a netip.Addr, why string) (Underlay, bool) {
	if c.facts.duplicate(a) {
		c.refused = append(c.refused, fmt.Sprintf("another machine has %s", a))
		return Underlay{}, false
	}
	for _, index := range c.facts.bearers(a) {
		l, _ := c.facts.link(index)
		if u, ok := c.use(l, why, a); ok {
			return u, true
		}
	}
	return Underlay{}, false
}

// use returns a link as the underlay. For a loopback or dummy interface it
// returns the link of the default route, with the address of that interface.
func (c *chooser) use(l LinkFact, why string, pinned netip.Addr) (Underlay, bool) {
	if !l.Local {
		if !c.candidate(l.Index) {
			c.refused = append(c.refused, l.Name+" belongs to the pods or to culvert")
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
		c.refused = append(c.refused, fmt.Sprintf("%s is on %s, which sends no packets, and there is no default route", a, l.Name))
	}
	return Underlay{}, false
}

// fit returns a link as the underlay, with the best address of each family;
// pinned, if valid, is used for its family. It fails if a required family has
// no address.
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

// source returns the source address of packets by the link's default route: its
// preferred source or, if the link has no address, that of a loopback
// interface, as in the kernel.
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

// address returns the best address of a family on a link, or byRoute. The order
// of preference: a former address, the one in use, the leased one unless
// virtual, byRoute; then not virtual, not link-local, for IPv6 not dynamic, in
// the gateway's network, the oldest.
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

// usable reports whether an address may be chosen.
func (a AddrFact) usable() bool {
	addr := a.Prefix.Addr()
	return a.Global && !a.Tentative && !a.Deprecated && !a.Temporary && !addr.IsLoopback() && !(addr.Is6() && addr.IsLinkLocalUnicast())
}

// single reports whether an address has a full-length prefix, as virtual
// addresses do.
func (c *chooser) single(a netip.Addr) bool {
	return slices.ContainsFunc(c.facts.Addrs, func(x AddrFact) bool { return x.Prefix.Addr() == a && x.Prefix.IsSingleIP() })
}

// virtual reports whether an address has a full-length prefix and its link has
// another address of the family, as with VRRP.
func (c *chooser) virtual(a netip.Addr) bool {
	return slices.ContainsFunc(c.facts.Addrs, func(x AddrFact) bool {
		return x.Prefix.Addr() == a && x.Prefix.IsSingleIP() && slices.ContainsFunc(c.facts.Addrs, func(y AddrFact) bool {
			return y.Link == x.Link && y.usable() && !y.Prefix.IsSingleIP() && y.Prefix.Addr().Is4() == a.Is4()
		})
	})
}

// podLinks returns the links of this node's pods: bridges with the gateway
// address of a pod subnet or named in the CNI records, their ports, and links
// that routes to single pods lead to.
func (f Facts) podLinks(k UnderlayContext) map[int]bool {
	pods := make(map[int]bool)
	for _, a := range f.Addrs {
		for _, p := range k.Pods {
			if a.Prefix.Addr() == gatewayOf(p).Addr() {
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

// describe lists the interfaces for an error, without culvert's and the pods'.
func (c *chooser) describe() string {
	var words []string
	for _, l := range c.facts.Links {
		if names.Ours(l.Name) || c.pods[l.Index] {
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

// prefixOf converts an address with its prefix length; host bits are kept.
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

// IPNet converts a prefix for netlink.
func IPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
