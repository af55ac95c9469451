package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/host"
	"culvert/internal/names"
)

// Way is how packets should go to the pods of another node.
type Way struct {
	Node   string
	Subnet netip.Prefix
	Direct bool // without a tunnel
}

// routing checks that the kernel sends pods' packets to other nodes by culvert's devices.
// The daemon keeps its routes in the main table; policy rules (ip-rule(8)) and IPsec
// policies come before it.
func routing(_ context.Context, h Host) (string, []Finding) {
	if h.Status == nil || h.Status.Lease == nil || len(h.Ways) == 0 {
		return "no other nodes are known", nil
	}
	var all []Finding
	for _, own := range h.Status.Lease.Subnets {
		is4 := own.Addr().Is4()
		ways := slices.DeleteFunc(slices.Clone(h.Ways), func(w Way) bool { return w.Subnet.Addr().Is4() != is4 })
		all = append(all, astray(own, ways)...)
		for _, b := range host.IPsecBlocks(is4) {
			if i := slices.IndexFunc(ways, func(w Way) bool { return b.Matches(own, w.Subnet) || b.Matches(w.Subnet, own) }); i >= 0 {
				f := bad(b.Fix(), "%s drops packets between this node's pods and those of %s", b, ways[i].name())
				f.Check = "ipsec-block"
				all = append(all, f)
			}
		}
	}
	if len(all) > 0 {
		return "", all
	}
	return "packets to other nodes' pods leave as they should", nil
}

func (w Way) name() string { return strings.TrimSpace(w.Node + " " + w.Subnet.String()) }

// astray returns a finding if policy rules take packets to another node elsewhere.
// Without such rules it is a route that does, which the daemon warns of.
func astray(own netip.Prefix, ways []Way) []Finding {
	is4 := own.Addr().Is4()
	rules := host.PolicyRules(is4)
	if len(rules) == 0 {
		return nil
	}
	var first string
	count := 0
	ask := asPod(own)
	for _, w := range ways {
		if to := leads(ask, w); to != "" {
			if count++; first == "" {
				first = fmt.Sprintf("packets from pods to those of %s %s", w.name(), to)
			}
		}
	}
	if count == 0 {
		return nil
	}
	if count > 1 {
		first += fmt.Sprintf(", as those to %d other subnets", count-1)
	}
	var words []string
	for _, r := range rules {
		words = append(words, r.String())
	}
	program := "ip"
	if !is4 {
		program = "ip -6"
	}
	f := bad(fmt.Sprintf("`%s rule del priority %d`, if that rule is the cause; or add a rule before it: `%s rule add to NETWORK lookup main priority %d`", program, rules[0].Priority, program, max(1, rules[0].Priority-1)),
		"%s; this host has policy rules: %s", first, strings.Join(words, "; "))
	f.Check = "policy-route"
	return []Finding{f}
}

// asPod returns the options to look up a route as for a packet of one of the subnet's pods;
// of the node itself if there is no bridge yet.
func asPod(own netip.Prefix) netlink.RouteGetOptions {
	from := own.Masked().Addr()
	if bridge := linkWith(from.Next()); bridge != "" {
		return netlink.RouteGetOptions{SrcAddr: from.Next().Next().AsSlice(), Iif: bridge}
	}
	return netlink.RouteGetOptions{SrcAddr: from.AsSlice()}
}

// leads returns where the kernel sends packets from this node's pods to another node's, ""
// if that is right, or not known.
func leads(ask netlink.RouteGetOptions, w Way) string {
	routes, err := netlink.RouteGetWithOptions(w.Subnet.Masked().Addr().Next().AsSlice(), &ask)
	switch {
	case errors.Is(err, unix.EINVAL):
		return "are dropped (blackhole)"
	case errors.Is(err, unix.EACCES):
		return "are refused (prohibit)"
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return "have no route"
	case err != nil || len(routes) == 0:
		return ""
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil || w.Direct || names.Ours(link.Attrs().Name) {
		return ""
	}
	if len(routes[0].Gw) > 0 {
		return fmt.Sprintf("leave via %s dev %s", routes[0].Gw, link.Attrs().Name)
	}
	return "leave by " + link.Attrs().Name
}

// linkWith returns the link that has an address, "" if none has.
func linkWith(a netip.Addr) string {
	links, err := net.Interfaces()
	if err != nil {
		return ""
	}
	for _, l := range links {
		addrs, err := l.Addrs()
		if err != nil {
			continue
		}
		for _, b := range addrs {
			if n, ok := b.(*net.IPNet); ok && n.IP.Equal(a.AsSlice()) {
				return l.Name
			}
		}
	}
	return ""
}
