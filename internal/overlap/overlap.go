// Package overlap finds conflicts between the cluster network and what else the host
// uses: addresses that the node needs, and networks of its links. It reads resolv.conf
// and resolves names, but neither changes the host nor decides what follows from a
// conflict: the daemon does. It holds no state.
package overlap

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/remedy"
	"culvert/subnet"
)

// Routes to the cluster network's subnets take its addresses away from other uses on
// the host. So the daemon checks for overlaps:
//
//	addresses the node needs (store, gateways, resolvers)  error at the start, before leasing
//	networks of the host's links                           not leased by this node; peers' leases there are rejected
//	networks that appear while the node runs               a warning

// Need is an address that the node must reach.
type Need struct {
	What string // such as "the etcd server 10.9.0.5"
	Addr netip.Addr
	// Soft: the node itself works without it; only warn.
	Soft bool
}

// Servers are the servers of the store.
type Servers struct {
	What string // one of them: "the etcd server"
	URLs []string
}

// Needs returns the addresses that the node needs: the store's servers, the gateways of
// the underlay, and the resolvers. Resolvers are soft unless a server is given by name.
func Needs(ctx context.Context, s Servers, f host.Facts, u host.Underlay) []Need {
	var all []Need
	named := false
	for _, e := range s.URLs {
		for _, a := range resolve(ctx, hostOf(e)) {
			all = append(all, Need{What: s.What + " " + a.String(), Addr: a})
		}
		_, err := netip.ParseAddr(hostOf(e))
		named = named || err != nil
	}
	for _, r := range f.Routes {
		if r.To.Bits() == 0 && r.Link == u.Index && r.Via.IsValid() && !r.Ours {
			all = append(all, Need{What: fmt.Sprintf("the gateway %s of %s", r.Via, u.Name), Addr: r.Via})
		}
	}
	for _, a := range resolvers("/etc/resolv.conf") {
		all = append(all, Need{What: fmt.Sprintf("the resolver %s of /etc/resolv.conf", a), Addr: a, Soft: !named})
	}
	return all
}

// hostOf returns the host of an endpoint, with or without a scheme and a port.
func hostOf(endpoint string) string {
	if !strings.Contains(endpoint, "://") {
		endpoint = "http://" + endpoint
	}
	u, err := url.Parse(endpoint)
	if err != nil {
		return ""
	}
	return u.Hostname()
}

// resolve returns the addresses of a name, none if it cannot be resolved; the store's
// client then reports the error.
func resolve(ctx context.Context, name string) []netip.Addr {
	if a, err := netip.ParseAddr(name); err == nil {
		return []netip.Addr{a.WithZone("")}
	}
	if name == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	if err != nil {
		return nil
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	return addrs
}

const resolveTimeout = 2 * time.Second

// resolvers returns the name servers in a resolv.conf(5).
func resolvers(path string) []netip.Addr {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	var all []netip.Addr
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if w := strings.Fields(lines.Text()); len(w) > 1 && w[0] == "nameserver" {
			if a, err := netip.ParseAddr(w[1]); err == nil {
				all = append(all, a.WithZone("").Unmap())
			}
		}
	}
	return all
}

// CutOff returns the needs that the cluster network would cut off: addresses inside
// it that are not the host's own and have no more specific route than the network.
// Soft ones are warnings, others an error. It does no I/O.
func CutOff(c subnet.Config, f host.Facts, needs []Need) (warned []api.Warning, refused error) {
	warned, lost := Losses(c, f, needs)
	if len(lost) == 0 {
		return warned, nil
	}
	var texts []string
	for _, w := range lost {
		texts = append(texts, w.Text)
	}
	return warned, remedy.Errorf(lost[0].Fix, "%s", strings.Join(texts, "; ")) // all have one fix
}

// Losses is CutOff with both kinds as warnings.
func Losses(c subnet.Config, f host.Facts, needs []Need) (soft, hard []api.Warning) {
	for _, w := range needs {
		if w.Addr.IsLoopback() || f.HasAddrs([]netip.Addr{w.Addr}) {
			continue
		}
		for _, n := range c.Networks {
			given, inside := n.AllocatableOverlap(netip.PrefixFrom(w.Addr, w.Addr.BitLen()))
			if !inside {
				continue
			}
			if r, ok := f.RouteOfOthers(w.Addr); ok && r.To.Bits() > given.Bits() {
				continue
			}
			text := fmt.Sprintf("%s is in the cluster network %s, which would cut this node off from it", w.What, given)
			if given != n.Prefix {
				text = fmt.Sprintf("%s is in %s of the cluster network %s, which would cut this node off from it", w.What, given, n.Prefix)
			}
			const fix = "give the cluster another Network (in Kubernetes: and kube-controller-manager the same --cluster-cidr), or set SubnetMin and SubnetMax to exclude it, or add a more specific route to it on this host"
			if w.Soft {
				soft = append(soft, api.Warning{Check: "resolver-in-network", Text: text, Fix: fix})
				continue
			}
			hard = append(hard, api.Warning{Check: "store-in-network", Text: text, Fix: fix})
		}
	}
	return soft, hard
}

// Networks returns a warning for each of the host's networks that overlaps the
// allocatable part of the cluster network, except those inside the node's own subnets,
// which are the pods'. It does no I/O.
func Networks(c subnet.Config, own []netip.Prefix, networks []host.LinkNetwork) []api.Warning {
	var all []api.Warning
	for _, h := range networks {
		if slices.ContainsFunc(own, func(p netip.Prefix) bool { return p.Contains(h.Prefix.Addr()) && p.Bits() <= h.Prefix.Bits() }) {
			continue
		}
		for _, n := range c.Networks {
			given, overlaps := n.AllocatableOverlap(h.Prefix)
			if !overlaps {
				continue
			}
			all = append(all, api.Warning{
				Check: "network-overlap", Fix: "give one of the two another network",
				Text: fmt.Sprintf("%s has %s, which overlaps the cluster network %s: this node can reach either the hosts on %s or the nodes with subnets there", h.Link, h.Prefix, given, h.Link),
			})
		}
	}
	return all
}

// Kept returns the networks inside the cluster network that it must leave to the host:
// the host's own, and needed addresses that a more specific route makes reachable,
// since a lease could be more specific still.
func Kept(c subnet.Config, f host.Facts, needs []Need, networks []host.LinkNetwork) []subnet.HostNetwork {
	keep := HostNetworks(c, networks)
	for _, w := range needs {
		r, ok := f.RouteOfOthers(w.Addr)
		inside := slices.ContainsFunc(c.Networks, func(n subnet.Network) bool { return n.Prefix.Contains(w.Addr) })
		if l, named := f.LinkName(r.Link); ok && named && r.To.Bits() > 0 && inside {
			keep = append(keep, subnet.HostNetwork{Link: l, Prefix: netip.PrefixFrom(w.Addr, w.Addr.BitLen())})
		}
	}
	return keep
}

// HostNetworks returns the host's networks inside the cluster network, where peers'
// leases are rejected. A host network that contains the whole cluster network is not
// among them, since all peers overlap it; Networks warns of it.
func HostNetworks(config subnet.Config, networks []host.LinkNetwork) []subnet.HostNetwork {
	var keep []subnet.HostNetwork
	for _, h := range networks {
		for _, n := range config.Networks {
			if given, overlaps := n.AllocatableOverlap(h.Prefix); overlaps && h.Prefix.Bits() > given.Bits() {
				keep = append(keep, subnet.HostNetwork{Link: h.Link, Prefix: h.Prefix})
			}
		}
	}
	return keep
}

// StaleRoutes warns of culvert's routes of an earlier run that cover a server of the
// store. Without the warning the daemon would wait for the store and not say why.
func StaleRoutes(ctx context.Context, s Servers) []api.Warning {
	f, err := host.ReadFacts()
	if err != nil {
		return nil
	}
	var all []api.Warning
	for _, w := range Needs(ctx, s, f, host.Underlay{}) {
		if r, ok := f.Route(w.Addr); ok && r.Ours && !w.Soft && !f.HasAddrs([]netip.Addr{w.Addr}) {
			all = append(all, api.Warning{
				Check: "store-in-network", Fix: "`culvert cleanup` removes the route; then give the cluster a Network without that address",
				Text: fmt.Sprintf("culvert's own route to %s, of an earlier run, cuts this node off from %s", r.To, w.What),
			})
		}
	}
	return all
}

// StaleRoute returns the warning of a culvert route that covers one of the etcd servers,
// if there is one. Commands that cannot reach etcd show it, since the server is not the
// cause.
func StaleRoute(ctx context.Context, etcd []string) (w api.Warning, found bool) {
	for _, w := range StaleRoutes(ctx, Servers{EtcdServer, etcd}) {
		if strings.Contains(w.Text, EtcdServer) {
			return w, true
		}
	}
	return api.Warning{}, false
}

// EtcdServer is Servers.What of etcd.
const EtcdServer = "the etcd server"
