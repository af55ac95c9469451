package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
	"culvert/subnet/etcd"
)

// Routes to the cluster network's subnets take its addresses away from other uses on
// the host. So the daemon checks for overlaps:
//
//	addresses the node needs (store, gateways, resolvers)  error at the start, before leasing
//	networks of the host's links                           not leased by this node; peers' leases there are rejected
//	networks that appear while the node runs               a warning

// need is an address that the node must reach.
type need struct {
	what string // such as "the etcd server 10.9.0.5"
	addr netip.Addr
	// soft: the node itself works without it; only warn.
	soft bool
}

// needs returns the addresses that the node needs: the etcd servers, the gateways of
// the underlay, and the resolvers. Resolvers are soft unless an etcd server is given
// by name.
func (d *node) needs(ctx context.Context, f host.Facts, u host.Underlay) []need {
	var all []need
	named := false
	if d.options.storeName() == "etcd" {
		for _, e := range d.options.Etcd.Endpoints {
			for _, a := range resolve(ctx, hostOf(e)) {
				all = append(all, need{what: "the etcd server " + a.String(), addr: a})
			}
			_, err := netip.ParseAddr(hostOf(e))
			named = named || err != nil
		}
	}
	for _, r := range f.Routes {
		if r.To.Bits() == 0 && r.Link == u.Index && r.Via.IsValid() && !r.Ours {
			all = append(all, need{what: fmt.Sprintf("the gateway %s of %s", r.Via, u.Name), addr: r.Via})
		}
	}
	for _, a := range resolvers("/etc/resolv.conf") {
		all = append(all, need{what: fmt.Sprintf("the resolver %s of /etc/resolv.conf", a), addr: a, soft: !named})
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
	ctx, cancel := context.WithTimeout(ctx, resolvePatience)
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

const resolvePatience = 2 * time.Second

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

// cutOff returns the needs that the cluster network would cut off: addresses inside
// it that are not the host's own and have no more specific route than the network.
// Soft ones are warnings, others an error. It does no I/O.
func cutOff(c subnet.Config, f host.Facts, needs []need) (warned []api.Warning, refused error) {
	warned, lost := losses(c, f, needs)
	var errs []error
	for _, w := range lost {
		errs = append(errs, errors.New(w.String()))
	}
	return warned, errors.Join(errs...)
}

// losses is cutOff with both kinds as warnings.
func losses(c subnet.Config, f host.Facts, needs []need) (soft, hard []api.Warning) {
	for _, w := range needs {
		if w.addr.IsLoopback() || f.Bears([]netip.Addr{w.addr}) {
			continue
		}
		for _, n := range c.Networks {
			given, inside := n.AllocatableOverlap(netip.PrefixFrom(w.addr, w.addr.BitLen()))
			if !inside {
				continue
			}
			if r, ok := f.RouteOfOthers(w.addr); ok && r.To.Bits() > given.Bits() {
				continue
			}
			text := fmt.Sprintf("%s lies in the cluster network %s, which would cut this node off from it", w.what, given)
			if given != n.Prefix {
				text = fmt.Sprintf("%s lies in %s of the cluster network %s, which would cut this node off from it", w.what, given, n.Prefix)
			}
			const fix = "give the cluster another Network, or one whose SubnetMin and SubnetMax leave it out, or this host a more specific route to it"
			if w.soft {
				soft = append(soft, api.Warning{Check: "resolver-in-network", Text: text, Fix: fix})
				continue
			}
			hard = append(hard, api.Warning{Check: "store-in-network", Text: text, Fix: fix})
		}
	}
	return soft, hard
}

// overlapping returns a warning for each of the host's networks that overlaps the
// allocatable part of the cluster network, except those inside the node's own subnets,
// which are the pods'. It does no I/O.
func overlapping(c subnet.Config, own []netip.Prefix, networks []host.LinkNetwork) []api.Warning {
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
				Text: fmt.Sprintf("%s has %s, which overlaps the cluster network %s: the node reaches either what is on %s or the nodes that lease subnets there", h.Link, h.Prefix, given, h.Link),
			})
		}
	}
	return all
}

// survey checks a configuration against the host before leasing. It returns the
// networks that the cluster must leave to the host.
func (d *node) survey(ctx context.Context, config subnet.Config, at place) ([]subnet.HostNetwork, error) {
	f, err := host.ReadFacts()
	if err != nil {
		return nil, err
	}
	needs := d.needs(ctx, f, at.underlay)
	warned, refused := cutOff(config, f, needs)
	d.health.setWarnings("needs", warned...)
	if refused != nil {
		return nil, refused
	}
	keep := hostNetworks(config, f.Networks(d.podLinks()))
	for _, w := range needs {
		// A more specific route keeps the address reachable. Keep it free of leases,
		// which could be more specific still.
		r, ok := f.RouteOfOthers(w.addr)
		inside := slices.ContainsFunc(config.Networks, func(n subnet.Network) bool { return n.Prefix.Contains(w.addr) })
		if l, named := f.LinkName(r.Link); ok && named && r.To.Bits() > 0 && inside {
			keep = append(keep, subnet.HostNetwork{Link: l, Prefix: netip.PrefixFrom(w.addr, w.addr.BitLen())})
		}
	}
	return keep, nil
}

// hostNetworks returns the host's networks inside the cluster network, where peers'
// leases are rejected. A host network that contains the whole cluster network is not
// among them, since all peers overlap it; overlapping warns of it.
func hostNetworks(config subnet.Config, networks []host.LinkNetwork) []subnet.HostNetwork {
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

// podLinks is what distinguishes the pods' links from the host's.
func (d *node) podLinks() host.Known {
	return host.Known{Pods: d.podSubnets(), Bridges: cni.RecordedBridges(cniDataDirs...)}
}

// leftBehind warns of a culvert route of an earlier run that covers a server of the
// store. Without the warning the daemon would wait for the store and not say why.
func (d *node) leftBehind(ctx context.Context) []api.Warning {
	f, err := host.ReadFacts()
	if err != nil {
		return nil
	}
	var all []api.Warning
	for _, w := range d.needs(ctx, f, host.Underlay{}) {
		if r, ok := f.Route(w.addr); ok && r.Ours && !w.soft && !f.Bears([]netip.Addr{w.addr}) {
			all = append(all, api.Warning{
				Check: "store-in-network", Fix: "`culvert cleanup` removes the route; then give the cluster a Network without that address",
				Text: fmt.Sprintf("culvert's own route to %s, of an earlier run, cuts this node off from %s", r.To, w.what),
			})
		}
	}
	for _, w := range all {
		d.log.Warn(w.Text, "check", w.Check, "fix", w.Fix)
	}
	return all
}

// CutOff returns a sentence if a culvert route covers one of the etcd servers, with the
// remedy, else "". Commands that cannot reach etcd show it, since the server is not the
// cause.
func CutOff(ctx context.Context, endpoints []string) string {
	d := &node{log: slog.New(slog.DiscardHandler), options: Options{Etcd: etcd.Options{Endpoints: endpoints}}}
	for _, w := range d.leftBehind(ctx) {
		if strings.Contains(w.Text, "the etcd server") {
			return w.String()
		}
	}
	return ""
}

// fit removes from a snapshot what this host cannot apply: peers' leases that overlap
// its own networks, and changed networks that would cut it off from what it needs.
func (s *session) fit(ctx context.Context, snapshot subnet.Snapshot) subnet.Snapshot {
	if !slices.Equal(snapshot.Config.Networks, s.networks) {
		f, err := host.ReadFacts()
		if err == nil {
			_, err = cutOff(snapshot.Config, f, s.needs(ctx, f, s.at.underlay))
		}
		if err != nil {
			snapshot = snapshot.WithNetworks(s.networks)
			snapshot.ConfigRefused = err.Error()
		} else {
			s.networks = snapshot.Config.Networks
		}
	}
	return snapshot.WithoutOverlaps(s.nets)
}
