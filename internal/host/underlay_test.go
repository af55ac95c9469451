package host_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"culvert/internal/host"
)

// facts parses a host's facts from lines similar to the output of `ip`:
//
//	link 2 eth0 [mtu 9000] [master 5] [local]
//	addr eth0 192.168.50.11/24 [deprecated] [temporary] [tentative] [dynamic]
//	route default [via 192.168.50.1] dev eth0 [metric 303] [src ...] [ours]
func facts(t *testing.T, text string) host.Facts {
	t.Helper()
	var f host.Facts
	index := map[string]int{}
	number := func(s string) (n int) {
		if _, err := fmt.Sscan(s, &n); err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		return n
	}
	for line := range strings.Lines(text) {
		w := strings.Fields(line)
		if len(w) == 0 {
			continue
		}
		has := func(word string) bool { return strings.Contains(line, " "+word) }
		after := func(word string) string {
			for i := range w[:len(w)-1] {
				if w[i] == word {
					return w[i+1]
				}
			}
			return ""
		}
		switch w[0] {
		case "link":
			l := host.LinkFact{Index: number(w[1]), Name: w[2], MTU: 1500, Local: has("local"), Bridge: has("bridge")}
			if m := after("mtu"); m != "" {
				l.MTU = number(m)
			}
			if m := after("master"); m != "" {
				l.Master = number(m)
			}
			index[l.Name] = l.Index
			f.Links = append(f.Links, l)
		case "addr":
			f.Addrs = append(f.Addrs, host.AddrFact{
				Link: index[w[1]], Prefix: netip.MustParsePrefix(w[2]), Global: true,
				Deprecated: has("deprecated"), Temporary: has("temporary"), Tentative: has("tentative") || has("duplicate"), Duplicate: has("duplicate"), Dynamic: has("dynamic"),
			})
		case "route":
			r := host.RouteFact{Link: index[after("dev")], Ours: has("ours")}
			to := w[1]
			if to == "default" {
				to = "0.0.0.0/0"
			} else if to == "default6" {
				to = "::/0"
			}
			r.To = netip.MustParsePrefix(to)
			if m := after("metric"); m != "" {
				r.Metric = number(m)
			}
			if a := after("via"); a != "" {
				r.Via = netip.MustParseAddr(a)
			}
			if a := after("src"); a != "" {
				r.Source = netip.MustParseAddr(a)
			}
			f.Routes = append(f.Routes, r)
		default:
			t.Fatalf("%q is no fact", line)
		}
	}
	return f
}

const plainHost = `
	link 1 lo local
	link 2 eth0
	addr eth0 192.168.50.11/24
	route default via 192.168.50.1 dev eth0 metric 303
`

func addrs(t *testing.T, text string) (all []netip.Addr) {
	t.Helper()
	for _, w := range strings.Fields(text) {
		all = append(all, netip.MustParseAddr(w))
	}
	return all
}

// TestChoose chooses the underlay on typical hosts.
func TestChoose(t *testing.T) {
	dual := host.UnderlayContext{IPv4: true, IPv6: true}
	pods := host.UnderlayContext{Pods: []netip.Prefix{netip.MustParsePrefix("10.5.72.0/24")}}
	for _, c := range []struct {
		name     string
		host     string
		selector host.UnderlaySelector
		known    host.UnderlayContext
		want     string // interface, addresses and former ones; or part of the error
	}{
		{"a plain host", plainHost, host.UnderlaySelector{}, host.UnderlayContext{}, "eth0 [192.168.50.11] []"},

		// culvert's devices and the pods' are not candidates.
		{"a default route on our own device", plainHost + `
			link 7 cvt.1
			addr cvt.1 169.254.77.7/16
			route default dev cvt.1 metric 206 src 169.254.77.7`, host.UnderlaySelector{}, host.UnderlayContext{}, "eth0 [192.168.50.11] []"},
		{"the same on the TUN device and its helper", plainHost + `
			link 7 culvert0
			link 8 culvert0s
			addr culvert0 169.254.77.7/16
			addr culvert0s 169.254.77.8/16
			route default dev culvert0 metric 6
			route default dev culvert0s metric 7`, host.UnderlaySelector{}, host.UnderlayContext{}, "eth0 [192.168.50.11] []"},
		{"the same on the pods' bridge, known by the gateway's address", plainHost + `
			link 7 cni0
			addr cni0 10.5.72.1/24
			addr cni0 172.20.1.1/16
			route default dev cni0 metric 6 src 172.20.1.1`, host.UnderlaySelector{}, pods, "eth0 [192.168.50.11] []"},
		{"and on a pod's veth, a port of it", plainHost + `
			link 7 cni0
			link 8 veth7 master 7
			addr cni0 10.5.72.1/24
			addr veth7 172.20.1.1/16
			route default dev veth7 metric 6`, host.UnderlaySelector{}, pods, "eth0 [192.168.50.11] []"},
		{"and on one that a pod is routed into", plainHost + `
			link 8 veth7
			addr veth7 172.20.1.1/16
			route 10.5.72.9/32 dev veth7
			route default dev veth7 metric 6`, host.UnderlaySelector{}, pods, "eth0 [192.168.50.11] []"},
		{"a bridge known by the CNI records", plainHost + `
			link 7 pods0
			addr pods0 172.20.1.1/16
			route default dev pods0 metric 6`, host.UnderlaySelector{}, host.UnderlayContext{Bridges: []string{"pods0"}}, "eth0 [192.168.50.11] []"},
		{"a host's bridge is a right underlay", `
			link 2 eth0 master 3
			link 3 br0
			addr br0 192.168.50.11/24
			route default via 192.168.50.1 dev br0`, host.UnderlaySelector{}, pods, "br0 [192.168.50.11] []"},
		{"our own device by name", plainHost + `
			link 7 cvt.1
			addr cvt.1 10.5.72.0/32`, host.UnderlaySelector{Interfaces: []string{"cvt.1"}}, host.UnderlayContext{}, "belongs to the pods or to culvert"},
		{"a link-local address is no default", `
			link 2 eth1
			addr eth1 169.254.3.4/16
			route default dev eth1`, host.UnderlaySelector{}, host.UnderlayContext{}, "eth1 has a link-local address only"},
		{"but can be named", `
			link 2 eth1
			addr eth1 169.254.3.4/16`, host.UnderlaySelector{Interfaces: []string{"eth1"}}, host.UnderlayContext{}, "eth1 [169.254.3.4] []"},

		// Lists and patterns.
		{"the first has no address", plainHost + `
			link 4 bond0
			link 5 eth1
			addr bond0 10.0.0.5/24`, host.UnderlaySelector{Interfaces: []string{"eth9", "eth1", "bond0"}}, host.UnderlayContext{}, "bond0 [10.0.0.5] []"},
		{"the pattern's first match has none", `
			link 2 eth0
			link 4 eth1
			addr eth1 10.0.0.5/24`, host.UnderlaySelector{Regexes: []string{"^eth"}}, host.UnderlayContext{}, "eth1 [10.0.0.5] []"},
		{"the first lacks a family", plainHost + `
			link 4 bond0
			addr bond0 10.0.0.5/24
			addr bond0 fd00::5/64`, host.UnderlaySelector{Interfaces: []string{"eth0", "bond0"}}, dual, "bond0 [10.0.0.5 fd00::5] []"},
		{"all lack it", plainHost, host.UnderlaySelector{Interfaces: []string{"eth0"}}, dual, "eth0 has no usable IPv6 address"},
		{"so does the default route's", plainHost, host.UnderlaySelector{}, dual, "eth0 has no usable IPv6 address"},
		{"IPv6 alone is needed", plainHost + `
			link 4 eth1
			addr eth1 fd00::5/64
			route default6 via fe80::1 dev eth1`, host.UnderlaySelector{}, host.UnderlayContext{IPv6: true}, "eth1 [fd00::5] []"},

		// The default route.
		{"the lowest metric", plainHost + `
			link 4 eth1
			addr eth1 10.0.0.5/24
			route default via 10.0.0.1 dev eth1 metric 100`, host.UnderlaySelector{}, host.UnderlayContext{}, "eth1 [10.0.0.5] []"},
		{"its source", `
			link 2 eth0
			addr eth0 192.168.50.11/24
			addr eth0 192.168.50.12/24
			route default via 192.168.50.1 dev eth0 src 192.168.50.12`, host.UnderlaySelector{}, host.UnderlayContext{}, "eth0 [192.168.50.12] []"},
		{"the gateway's network", `
			link 2 eth0
			addr eth0 10.99.0.5/24
			addr eth0 192.168.50.11/24
			route default via 192.168.50.1 dev eth0`, host.UnderlaySelector{}, host.UnderlayContext{}, "eth0 [192.168.50.11] []"},
		{"a host with one address alone in its prefix", `
			link 2 eth0
			addr eth0 10.128.0.2/32
			route default via 10.128.0.1 dev eth0`, host.UnderlaySelector{}, host.UnderlayContext{}, "eth0 [10.128.0.2] []"},
		{"no default route", `
			link 2 eth0
			addr eth0 192.168.50.11/24`, host.UnderlaySelector{}, host.UnderlayContext{}, "there is no default route"},
		{"can reach", plainHost + `
			link 4 eth1
			addr eth1 10.0.0.5/24
			route 10.0.0.0/24 dev eth1`, host.UnderlaySelector{CanReach: netip.MustParseAddr("10.0.0.77")}, host.UnderlayContext{}, "eth1 [10.0.0.5] []"},

		// Addresses on loopback interfaces.
		{"the route's source is on lo", `
			link 1 lo local
			link 2 eth0
			addr lo 192.168.99.11/32
			addr eth0 192.168.50.11/24
			route default via 192.168.50.1 dev eth0 src 192.168.99.11`, host.UnderlaySelector{}, host.UnderlayContext{}, "eth0 [192.168.99.11] []"},
		{"an unnumbered uplink", `
			link 1 lo local
			link 2 eth0
			addr lo 192.168.99.11/32
			route default via fe80::1 dev eth0`, host.UnderlaySelector{}, host.UnderlayContext{}, "eth0 [192.168.99.11] []"},
		{"named by address", `
			link 1 lo local
			link 2 eth0
			addr lo 192.168.99.11/32
			addr eth0 192.168.50.11/24
			route default via 192.168.50.1 dev eth0`, host.UnderlaySelector{Interfaces: []string{"192.168.99.11"}}, host.UnderlayContext{}, "eth0 [192.168.99.11] []"},
		{"named by interface", `
			link 1 lo local
			link 2 eth0
			addr lo 192.168.99.11/32
			addr eth0 192.168.50.11/24
			route default via 192.168.50.1 dev eth0`, host.UnderlaySelector{Interfaces: []string{"lo"}}, host.UnderlayContext{}, "eth0 [192.168.99.11] []"},
		{"where no packet leaves", `
			link 1 lo local
			addr lo 192.168.99.11/32`, host.UnderlaySelector{Interfaces: []string{"lo"}}, host.UnderlayContext{}, "192.168.99.11 is on lo, which sends no packets"},

		// IPv6.
		{"temporary, deprecated and tentative ones are not chosen", `
			link 2 eth0
			addr eth0 fd00:50::1/64 temporary dynamic
			addr eth0 fd00:50::2/64 deprecated dynamic
			addr eth0 fd00:50::3/64 tentative
			addr eth0 fd00:50::4/64 dynamic
			route default6 via fe80::1 dev eth0`, host.UnderlaySelector{}, host.UnderlayContext{IPv6: true}, "eth0 [fd00:50::4] []"},
		{"one that another machine has is not kept", `
			link 2 eth0
			addr eth0 fd00:50::4/64
			addr eth0 fd00:50::3/64 duplicate
			route default6 via fe80::1 dev eth0`, host.UnderlaySelector{}, host.UnderlayContext{IPv6: true, Held: addrs(t, "fd00:50::3")}, "eth0 [fd00:50::4] []"},
		{"a static one before a dynamic one", `
			link 2 eth0
			addr eth0 fd00:50::4/64 dynamic
			addr eth0 fd00:50::11/64
			addr eth0 fd00:50::5/64 dynamic
			route default6 via fe80::1 dev eth0`, host.UnderlaySelector{}, host.UnderlayContext{IPv6: true}, "eth0 [fd00:50::11] []"},
		{"the oldest of two", `
			link 2 eth0
			addr eth0 fd00:50::100/64
			addr eth0 fd00:50::11/64
			route default6 via fe80::1 dev eth0`, host.UnderlaySelector{}, host.UnderlayContext{IPv6: true}, "eth0 [fd00:50::11] []"},
		{"a /128 beside a /64", `
			link 2 eth0
			addr eth0 fd00:50::4/64 dynamic
			addr eth0 fd00:50::200/128
			route default6 via fe80::1 dev eth0`, host.UnderlaySelector{}, host.UnderlayContext{IPv6: true}, "eth0 [fd00:50::4] []"},

		// Addresses in use are kept.
		{"the address in use, whatever the default route", plainHost + `
			link 4 wg0
			addr wg0 10.99.0.2/24
			route default dev wg0 metric 1`, host.UnderlaySelector{}, host.UnderlayContext{Held: addrs(t, "192.168.50.11")}, "eth0 [192.168.50.11] []"},
		{"the leased address", plainHost + `
			link 4 wg0
			addr wg0 10.99.0.2/24
			route default dev wg0 metric 1`, host.UnderlaySelector{}, host.UnderlayContext{Leased: addrs(t, "192.168.50.11")}, "eth0 [192.168.50.11] []"},
		{"of several on the named interface", `
			link 2 eth0
			addr eth0 192.168.50.11/24
			addr eth0 192.168.50.12/24`, host.UnderlaySelector{Interfaces: []string{"eth0"}}, host.UnderlayContext{Held: addrs(t, "192.168.50.12")}, "eth0 [192.168.50.12] []"},
		{"an IPv6 one that is deprecated by now", `
			link 2 eth0
			addr eth0 fd00:50::2/64 deprecated dynamic
			addr eth0 fd00:50::4/64 dynamic
			route default6 via fe80::1 dev eth0`, host.UnderlaySelector{}, host.UnderlayContext{IPv6: true, Held: addrs(t, "fd00:50::2")}, "eth0 [fd00:50::2] []"},
		{"the flag comes first", plainHost + `
			link 4 eth1
			addr eth1 10.0.0.5/24`, host.UnderlaySelector{Interfaces: []string{"eth1"}}, host.UnderlayContext{Held: addrs(t, "192.168.50.11")}, "eth1 [10.0.0.5] []"},
		{"so does --public-ip", plainHost + `
			link 4 eth1
			addr eth1 10.0.0.5/24`, host.UnderlaySelector{PublicIPs: addrs(t, "10.0.0.5")}, host.UnderlayContext{Held: addrs(t, "192.168.50.11")}, "eth1 [10.0.0.5] []"},

		// Virtual addresses.
		{"not beside another", `
			link 2 eth0
			addr eth0 192.168.50.200/32
			addr eth0 192.168.50.11/24
			route default via 192.168.50.1 dev eth0`, host.UnderlaySelector{}, host.UnderlayContext{}, "eth0 [192.168.50.11] []"},
		{"not because the store says so", `
			link 2 eth0
			addr eth0 192.168.50.200/32
			addr eth0 192.168.50.11/24
			route default via 192.168.50.1 dev eth0`, host.UnderlaySelector{}, host.UnderlayContext{Leased: addrs(t, "192.168.50.200")}, "eth0 [192.168.50.11] []"},
		{"for want of another, which is remembered", `
			link 2 eth0
			addr eth0 192.168.50.200/32`, host.UnderlaySelector{Interfaces: []string{"eth0"}}, host.UnderlayContext{Held: addrs(t, "192.168.50.11")}, "eth0 [192.168.50.200] [192.168.50.11]"},
		{"and still is", `
			link 2 eth0
			addr eth0 192.168.50.200/32`, host.UnderlaySelector{Interfaces: []string{"eth0"}}, host.UnderlayContext{Held: addrs(t, "192.168.50.200"), Former: addrs(t, "192.168.50.11")}, "eth0 [192.168.50.200] [192.168.50.11]"},
		{"and preferred when it is back", `
			link 2 eth0
			addr eth0 192.168.50.200/32
			addr eth0 192.168.50.11/24`, host.UnderlaySelector{Interfaces: []string{"eth0"}}, host.UnderlayContext{Held: addrs(t, "192.168.50.200"), Former: addrs(t, "192.168.50.11")}, "eth0 [192.168.50.11] []"},
		{"the same without a flag", plainHost + `
			addr eth0 192.168.50.200/32`, host.UnderlaySelector{}, host.UnderlayContext{Held: addrs(t, "192.168.50.200"), Former: addrs(t, "192.168.50.11")}, "eth0 [192.168.50.11] []"},
		{"by its flag", plainHost + `
			addr eth0 192.168.50.200/32`, host.UnderlaySelector{Interfaces: []string{"192.168.50.200"}}, host.UnderlayContext{Held: addrs(t, "192.168.50.11")}, "eth0 [192.168.50.200] []"},
		{"one that was chosen when it was alone stays", `
			link 2 eth0
			addr eth0 10.128.0.2/32
			addr eth0 10.99.0.1/24
			route default via 10.128.0.1 dev eth0`, host.UnderlaySelector{}, host.UnderlayContext{Held: addrs(t, "10.128.0.2")}, "eth0 [10.128.0.2] []"},
	} {
		t.Run(c.name, func(t *testing.T) {
			u, err := host.Choose(facts(t, c.host), c.selector, c.known)
			got := fmt.Sprintf("%s %v %v", u.Name, u.Addrs, u.Former)
			if err != nil {
				got = err.Error()
			}
			if err == nil && got != c.want || !strings.Contains(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// TestHold compares an underlay in use with changed hosts.
func TestHold(t *testing.T) {
	at := host.Underlay{Name: "eth0", Index: 2, MTU: 1500, Addrs: addrs(t, "192.168.50.11")}
	for _, c := range []struct {
		name, host string
		former     string
		want       string
	}{
		{"as it was", plainHost, "", "eth0 1500 holds"},
		{"renamed, with another MTU", "link 2 ens3 mtu 9000\naddr ens3 192.168.50.11/24", "", "ens3 9000 holds"},
		{"a better route and another address", plainHost + "addr eth0 192.168.50.5/24\nlink 4 wg0\naddr wg0 10.9.9.9/24\nroute default dev wg0", "", "eth0 1500 holds"},
		{"deprecated", "link 2 eth0\naddr eth0 192.168.50.11/24 deprecated", "", "eth0 1500 holds"},
		{"the address is gone", "link 2 eth0", "", "eth0 1500 missing [192.168.50.11] elsewhere []"},
		{"another machine has it", "link 2 eth0\naddr eth0 192.168.50.11/24 duplicate", "", "eth0 1500 missing [192.168.50.11] elsewhere []"},
		{"the link is a port", "link 3 br0 bridge\nlink 2 eth0 master 3\naddr eth0 192.168.50.11/24", "", "eth0 1500 holds port of br0"},
		{"the link is a VRF's", "link 3 vrf0\nlink 2 eth0 master 3\naddr eth0 192.168.50.11/24", "", "eth0 1500 holds"},
		{"it is on another link", "link 2 eth0\nlink 3 br0\naddr br0 192.168.50.11/24", "", "eth0 1500 missing [] elsewhere [192.168.50.11]"},
		{"it is on lo", "link 1 lo local\nlink 2 eth0\naddr lo 192.168.50.11/32", "", "eth0 1500 holds"},
		{"the link is gone, and its name is another's", "link 9 eth0\naddr eth0 192.168.50.11/24", "", "gone missing [] elsewhere [192.168.50.11]"},
		{"the former address is back", plainHost + "addr eth0 192.168.50.10/24", "192.168.50.10", "eth0 1500 missing [] elsewhere [] returned"},
		{"it is still away", plainHost, "192.168.50.10", "eth0 1500 holds"},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := at
			u.Former = addrs(t, c.former)
			h := host.CheckUnderlay(facts(t, c.host), u)
			got := fmt.Sprintf("%s %d", h.Now.Name, h.Now.MTU)
			if h.Gone {
				got = "gone"
			}
			if h.Unchanged() {
				got += " holds"
			} else {
				got += fmt.Sprintf(" missing %v elsewhere %v", h.Missing, h.Elsewhere)
			}
			if h.Returned {
				got += " returned"
			}
			if h.PortOf != "" {
				got += " port of " + h.PortOf
			}
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}
