package host

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Underlay is the interface that tunnel packets leave and enter by.
type Underlay struct {
	Name  string
	Index int
	MTU   int // bytes of an IP packet
	// Addrs holds the address to use of each family, IPv4 first; at most one
	// per family. It may be private, behind an address translation: what other
	// nodes send to is the leased public address.
	Addrs []netip.Addr
	// Networks are the prefixes that are on the link.
	Networks []netip.Prefix
	// Why says how the interface was chosen.
	Why string
}

// Addr returns the interface's address of a family, or the zero Addr.
func (u Underlay) Addr(is4 bool) netip.Addr {
	for _, a := range u.Addrs {
		if a.Is4() == is4 {
			return a
		}
	}
	return netip.Addr{}
}

// UnderlaySelector says how to find the underlay. Of its fields the first that
// is set decides; with none, the default route does.
type UnderlaySelector struct {
	Interfaces []string     // names or addresses, in order of preference
	Regexes    []string     // matched against names, then addresses, in order
	CanReach   netip.Addr   // the interface that the route to it leaves by
	PublicIPs  []netip.Addr // an interface that bears one is preferred to the default route's
}

// FindUnderlay finds the underlay. The error names what was looked for and the
// interfaces that there are.
func FindUnderlay(s UnderlaySelector) (Underlay, error) {
	links, err := listLinks()
	if err != nil {
		return Underlay{}, fmt.Errorf("listing the network interfaces: %w", err)
	}
	found, why, err := s.choose(links)
	if err != nil {
		return Underlay{}, fmt.Errorf("%w; interfaces here: %s", err, describe(links))
	}
	if len(found.Addrs) == 0 {
		return Underlay{}, fmt.Errorf("interface %s has no usable address", found.Name)
	}
	found.Why = why
	return found, nil
}

func (s UnderlaySelector) choose(links []Underlay) (Underlay, string, error) {
	switch {
	case len(s.Interfaces) > 0:
		for _, want := range s.Interfaces {
			if u, ok := matchName(links, want); ok {
				return u, "--iface " + want, nil
			}
		}
		return Underlay{}, "", fmt.Errorf("no interface is, or bears, %s", strings.Join(s.Interfaces, " or "))
	case len(s.Regexes) > 0:
		for _, want := range s.Regexes {
			re, err := regexp.Compile(want)
			if err != nil {
				return Underlay{}, "", fmt.Errorf("--iface-regex %q: %w", want, err)
			}
			if u, ok := matchRegexp(links, re); ok {
				return u, "--iface-regex " + want, nil
			}
		}
		return Underlay{}, "", fmt.Errorf("no interface matches %s", strings.Join(s.Regexes, " or "))
	case s.CanReach.IsValid():
		u, err := routeTo(links, s.CanReach)
		if err != nil {
			return Underlay{}, "", fmt.Errorf("--iface-can-reach %s: %w", s.CanReach, err)
		}
		return u, "--iface-can-reach " + s.CanReach.String(), nil
	}
	for _, public := range s.PublicIPs {
		if u, ok := matchName(links, public.String()); ok {
			return u, "bears --public-ip", nil
		}
	}
	for _, anywhere := range []string{"192.0.2.1", "2001:db8::1"} { // RFC 5737, RFC 3849
		if u, err := routeTo(links, netip.MustParseAddr(anywhere)); err == nil {
			return u, "default route", nil
		}
	}
	return Underlay{}, "", errors.New("there is no default route: name the interface with --iface")
}

// matchName finds an interface by its name, or by an address, which is then
// the one to use.
func matchName(links []Underlay, want string) (Underlay, bool) {
	addr, err := netip.ParseAddr(want)
	for _, u := range links {
		if u.Name == want {
			return u, true
		}
		if err != nil {
			continue
		}
		for _, a := range u.allAddrs() {
			if a == addr {
				return u.using(a), true
			}
		}
	}
	return Underlay{}, false
}

func matchRegexp(links []Underlay, re *regexp.Regexp) (Underlay, bool) {
	for _, u := range links {
		if re.MatchString(u.Name) {
			return u, true
		}
	}
	for _, u := range links {
		for _, a := range u.allAddrs() {
			if re.MatchString(a.String()) {
				return u.using(a), true
			}
		}
	}
	return Underlay{}, false
}

// routeTo returns the interface, and its address, that packets to an address
// leave with.
func routeTo(links []Underlay, to netip.Addr) (Underlay, error) {
	routes, err := netlink.RouteGet(to.AsSlice())
	if err != nil {
		return Underlay{}, err
	}
	for _, r := range routes {
		for _, u := range links {
			if u.Index != r.LinkIndex {
				continue
			}
			if a, ok := netip.AddrFromSlice(r.Src); ok {
				u = u.using(a.Unmap())
			}
			return u, nil
		}
	}
	return Underlay{}, errors.New("its route leaves by no interface of ours")
}

// using returns u with the address as the one to use of its family.
func (u Underlay) using(a netip.Addr) Underlay {
	addrs := []netip.Addr{a}
	for _, b := range u.Addrs {
		if b.Is4() != a.Is4() {
			addrs = append(addrs, b)
		}
	}
	if len(addrs) == 2 && addrs[1].Is4() {
		addrs[0], addrs[1] = addrs[1], addrs[0]
	}
	u.Addrs = addrs
	return u
}

// allAddrs returns every address of the link.
func (u Underlay) allAddrs() []netip.Addr {
	var all []netip.Addr
	for _, n := range u.Networks {
		all = append(all, n.Addr())
	}
	return all
}

// listLinks returns every interface but loopback, with the first global
// address of each family as the one to use.
func listLinks() ([]Underlay, error) {
	links, err := Retry(netlink.LinkList)
	if err != nil {
		return nil, err
	}
	addrs, err := Retry(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	var all []Underlay
	for _, l := range links {
		if l.Attrs().Flags&net.FlagLoopback == 0 {
			all = append(all, underlayOf(l, addrs))
		}
	}
	return all, nil
}

// underlayOf describes a link; addrs are those of all links.
func underlayOf(l netlink.Link, addrs []netlink.Addr) Underlay {
	a := l.Attrs()
	u := Underlay{Name: a.Name, Index: a.Index, MTU: a.MTU}
	for _, family := range []bool{true, false} {
		first := true
		for _, addr := range addrs {
			prefix, ok := prefixOf(addr.IPNet)
			if !ok || addr.LinkIndex != a.Index || prefix.Addr().Is4() != family ||
				addr.Scope != unix.RT_SCOPE_UNIVERSE || addr.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DEPRECATED) != 0 {
				continue
			}
			u.Networks = append(u.Networks, prefix)
			if first {
				u.Addrs = append(u.Addrs, prefix.Addr())
				first = false
			}
		}
	}
	return u
}

func describe(links []Underlay) string {
	var words []string
	for _, u := range links {
		w := u.Name
		for _, n := range u.Networks {
			w += " " + n.String()
		}
		words = append(words, w)
	}
	if len(words) == 0 {
		return "none"
	}
	return strings.Join(words, ", ")
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
