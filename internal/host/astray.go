package host

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/firewall"
	"culvert/internal/names"
)

// How many peers' routes are looked up: policy rules may concern some of them, and
// routes of the underlay usually all.
const (
	mostInner = 64
	mostOuter = 16
)

// astray warns of what takes packets elsewhere although culvert's routes are right. It
// asks the kernel, which looks at policy rules (ip-rule(8)), IPsec policies (ip-xfrm(8))
// and all tables:
//
//	pod ── rules, tables ── IPsec ── culvert's device ── rules, tables ── peer's address
func (r reading) astray(want State) []api.Warning {
	var all []api.Warning
	for _, own := range want.Subnets {
		peers := want.peers(own.Addr().Is4())
		if len(peers) == 0 {
			continue
		}
		all = append(all, r.diverted(own, spread(peers, mostInner))...)
		for _, b := range IPsecBlocks(own.Addr().Is4()) {
			if i := slices.IndexFunc(peers, func(p firewall.Source) bool { return b.Matches(own, p.Inner) || b.Matches(p.Inner, own) }); i >= 0 {
				all = append(all, api.Warning{
					Check: "ipsec-block", Fix: b.Fix(),
					Text: fmt.Sprintf("%s drops packets between this node's pods and those in %s", b, peers[i].Inner),
				})
			}
		}
		all = append(all, r.unrouted(spread(peers, mostOuter))...)
	}
	return all
}

// peers returns the peers of a family. Outer is invalid for those without a tunnel.
func (s State) peers(is4 bool) []firewall.Source {
	var all []firewall.Source
	for _, t := range s.Firewall.Tunnels {
		if t.Network.Addr().Is4() == is4 {
			all = append(all, t.Peers...)
		}
	}
	for _, r := range s.Routes {
		if r.Link == "" || names.Ours(r.Link) || r.To.Addr().Is4() != is4 {
			continue
		}
		direct := firewall.Source{Inner: r.To}
		if i := slices.IndexFunc(all, func(p firewall.Source) bool { return p.Inner == r.To }); i >= 0 {
			all[i] = direct
		} else {
			all = append(all, direct)
		}
	}
	return all
}

// spread returns at most n elements, at equal distances.
func spread[T any](all []T, n int) []T {
	if len(all) <= n {
		return all
	}
	some := make([]T, 0, n)
	for i := range n {
		some = append(some, all[i*len(all)/n])
	}
	return some
}

// diverted warns if policy rules take packets from this node's pods elsewhere. Without
// such rules it is a route that does; see foreignRoutes.
func (r reading) diverted(own netip.Prefix, peers []firewall.Source) []api.Warning {
	is4 := own.Addr().Is4()
	rules, main := PolicyRules(is4)
	if len(rules) == 0 && main {
		return nil
	}
	ask := netlink.RouteGetOptions{SrcAddr: own.Masked().Addr().AsSlice()} // as the node itself
	for _, b := range r.bearers {
		if b.addr == gatewayOf(own) {
			ask = netlink.RouteGetOptions{SrcAddr: b.addr.Addr().Next().AsSlice(), IifIndex: b.Index}
		}
	}
	first, count := "", 0
	for _, p := range peers {
		if to := r.leads(ask, p); to != "" {
			if count++; first == "" {
				first = fmt.Sprintf("packets from pods to those in %s %s", p.Inner, to)
			}
		}
	}
	if count == 0 {
		return nil
	}
	if count > 1 {
		first += fmt.Sprintf(", as those to %d other subnets", count-1)
	}
	program := "ip"
	if !is4 {
		program = "ip -6"
	}
	w := api.Warning{Check: "policy-route"}
	if !main {
		w.Text = first + "; this host has no policy rule for the main table, where culvert's routes are"
		w.Fix = program + " rule add priority 32766 lookup main"
		return []api.Warning{w}
	}
	var words []string
	for _, rule := range rules {
		words = append(words, rule.String())
	}
	w.Text = fmt.Sprintf("%s; this host has policy rules: %s", first, strings.Join(words, "; "))
	w.Fix = fmt.Sprintf("`%s rule del priority %d`, if that rule is the cause; or add a rule before it: `%s rule add to NETWORK lookup main priority %d`",
		program, rules[0].Priority, program, max(1, rules[0].Priority-1))
	return []api.Warning{w}
}

// leads returns where the kernel sends packets from this node's pods to a peer's; "" if
// that is right, or not known.
func (r reading) leads(ask netlink.RouteGetOptions, p firewall.Source) string {
	routes, err := netlink.RouteGetWithOptions(p.Inner.Masked().Addr().Next().AsSlice(), &ask)
	if refused := refusal(err); refused != "" {
		return refused
	}
	if err != nil || len(routes) == 0 || !p.Outer.IsValid() {
		return ""
	}
	link := r.nameOf(routes[0].LinkIndex)
	switch {
	case link == "" || names.Ours(link):
		return ""
	case len(routes[0].Gw) > 0:
		return fmt.Sprintf("leave via %s dev %s", routes[0].Gw, link)
	}
	return "leave by " + link
}

// refusal says what an error of a route lookup means; "" for others.
func refusal(err error) string {
	switch {
	case errors.Is(err, unix.EINVAL):
		return "are dropped (blackhole)"
	case errors.Is(err, unix.EACCES):
		return "are refused (prohibit)"
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return "have no route"
	}
	return ""
}

// unrouted warns if tunnel packets to peers have no route, or one into the tunnel.
func (r reading) unrouted(peers []firewall.Source) []api.Warning {
	var first, how string
	count := 0
	for _, p := range peers {
		if !p.Outer.IsValid() {
			continue
		}
		routes, err := netlink.RouteGetWithOptions(p.Outer.AsSlice(), &netlink.RouteGetOptions{})
		to := refusal(err)
		if err == nil && len(routes) > 0 {
			if link := r.nameOf(routes[0].LinkIndex); names.Ours(link) {
				to = "lead into the tunnel itself, by " + link
			}
		}
		if to == "" {
			continue
		}
		if count++; count == 1 {
			first, how = p.Outer.String(), to
		}
	}
	if count == 0 {
		return nil
	}
	text := fmt.Sprintf("tunnel packets to the peer %s %s", first, how)
	if count > 1 {
		text += fmt.Sprintf(", as those to %d others", count-1)
	}
	return []api.Warning{{
		Check: "underlay-route", Text: text,
		Fix: fmt.Sprintf("`ip route get %s` and `ip rule` show why; restore the default route, or add one to the peers' network", first),
	}}
}

// nameOf returns the name of a link, "" if there is none.
func (r reading) nameOf(index int) string {
	for name, i := range r.indexes {
		if i == index {
			return name
		}
	}
	return ""
}
