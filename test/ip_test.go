package test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/host"
	"culvert/internal/lab"
)

// ipDo runs commands in a namespace, in a subset of iproute2's syntax, without needing
// iproute2:
//
//	link add NAME type bridge|veth [peer NAME]     link del NAME
//	link set NAME [up|down|name NEW|mtu N|master BRIDGE|nomaster]
//	addr add|del PREFIX dev NAME                   (IPv6: nodad)
//	route add|del|replace PREFIX|default|default6|unreachable PREFIX [via A] [dev NAME] [src A] [metric N]
//	sysctl KEY VALUE
func ipDo(t testing.TB, n *lab.Namespace, commands ...string) {
	t.Helper()
	for _, c := range commands {
		if err := tryIP(n, c); err != nil {
			t.Fatal(err)
		}
	}
}

func tryIP(n *lab.Namespace, command string) error {
	err := n.Do(func() error { return runIP(strings.Fields(command)) })
	if err != nil {
		return fmt.Errorf("ip %s: %w", command, err)
	}
	return nil
}

// ipCommands returns a function that runs commands as runIP does, one after the other,
// until one fails.
func ipCommands(commands ...string) func() error {
	return func() error {
		for _, command := range commands {
			if err := runIP(strings.Fields(command)); err != nil {
				return fmt.Errorf("%s: %w", command, err)
			}
		}
		return nil
	}
}

func runIP(w []string) error {
	word := func(name string) string {
		for i := 2; i < len(w)-1; i++ {
			if w[i] == name {
				return w[i+1]
			}
		}
		return ""
	}
	device := func(name string) (netlink.Link, error) {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		return l, nil
	}
	switch w[0] {
	case "sysctl":
		return os.WriteFile("/proc/sys/"+w[1], []byte(w[2]), 0)
	case "link":
		if w[1] == "add" {
			attrs := netlink.LinkAttrs{Name: w[2]}
			if word("type") == "veth" {
				return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: word("peer")})
			}
			return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
		}
		l, err := device(w[2])
		if err != nil {
			return err
		}
		if w[1] == "del" {
			return netlink.LinkDel(l)
		}
		return linkDo(l, w[3:])
	case "addr":
		p, err := netip.ParsePrefix(w[2])
		if err != nil {
			return err
		}
		l, err := device(word("dev"))
		if err != nil {
			return err
		}
		a := &netlink.Addr{IPNet: host.IPNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if w[1] == "del" {
			return netlink.AddrDel(l, a)
		}
		return netlink.AddrAdd(l, a)
	case "route":
		return runRoute(w[1], w[2:], word, device)
	}
	return fmt.Errorf("%v: no such command", w)
}

func linkDo(l netlink.Link, w []string) error {
	switch w[0] {
	case "up":
		return netlink.LinkSetUp(l)
	case "down":
		return netlink.LinkSetDown(l)
	case "name":
		return netlink.LinkSetName(l, w[1])
	case "nomaster":
		return netlink.LinkSetNoMaster(l)
	case "master":
		m, err := netlink.LinkByName(w[1])
		if err != nil {
			return err
		}
		return netlink.LinkSetMaster(l, m)
	case "mtu":
		mtu, err := strconv.Atoi(w[1])
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(l, mtu)
	}
	return fmt.Errorf("%v: no such setting", w)
}

func runRoute(verb string, w []string, word func(string) string, device func(string) (netlink.Link, error)) error {
	r := &netlink.Route{}
	to := w[0]
	switch to {
	case "default":
		to = "0.0.0.0/0"
	case "default6":
		to = "::/0"
	case "unreachable":
		r.Type, to = unix.RTN_UNREACHABLE, w[1]
	}
	p, err := netip.ParsePrefix(to)
	if err != nil {
		return err
	}
	r.Dst = host.IPNet(p)
	if name := word("dev"); name != "" {
		l, err := device(name)
		if err != nil {
			return err
		}
		r.LinkIndex, r.Scope = l.Attrs().Index, netlink.SCOPE_LINK
	}
	if a := word("via"); a != "" {
		r.Gw, r.Scope = net.ParseIP(a), netlink.SCOPE_UNIVERSE
	}
	if a := word("src"); a != "" {
		r.Src = net.ParseIP(a)
	}
	if m := word("metric"); m != "" {
		if r.Priority, err = strconv.Atoi(m); err != nil {
			return err
		}
	}
	switch verb {
	case "add":
		return netlink.RouteAdd(r)
	case "replace":
		return netlink.RouteReplace(r)
	}
	r.Scope = netlink.SCOPE_NOWHERE // any
	return netlink.RouteDel(r)
}

// absentAddress returns an error if a link of a node has an address.
func absentAddress(n *lab.Node, link, addr string) error {
	return n.Do(func() error {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		all, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, a := range all {
			if a.IP.String() == addr {
				return fmt.Errorf("%s has the address %s", link, addr)
			}
		}
		return nil
	})
}
