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

// What is given out of the cluster network is taken from whatever else has those
// addresses. So it is compared with all that the host has:
//
//	what the node needs (the store, gateways, resolvers)  refused at the start, before a lease is taken
//	the networks of the host's links                      not leased by this node; a peer's lease there is set aside
//	what comes up while the node runs                     a warning

// need is an address without which the node is cut off.
type need struct {
	what string // such as "the etcd server 10.9.0.5"
	addr netip.Addr
	// soft says that the node itself gets by without it: it is warned of.
	soft bool
}

// needs returns what the node needs: the servers of the store, by name or
// address, the gateways of the underlay, and the resolvers.
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

// resolve returns the addresses of a name. One that cannot be resolved has none:
// the store's client says so.
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

// resolvers returns the name servers of a resolv.conf(5).
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

// cutOff says, purely, which needs a node would lose to the cluster network: what
// lies in it, unless the host itself bears it or a more specific route than the
// network's leads there.
func cutOff(c subnet.Config, f host.Facts, needs []need) (warned []api.Warning, refused error) {
	warned, lost := losses(c, f, needs)
	var errs []error
	for _, w := range lost {
		errs = append(errs, errors.New(w.String()))
	}
	return warned, errors.Join(errs...)
}

// losses is cutOff with both as warnings.
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

// overlapping warns, purely, of the host's networks that overlap what is given
// out. What lies within the node's own subnets is pods' business.
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

// survey compares the host with a configuration before a lease is asked for. It
// returns the networks that are to be left to the host.
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
		// A more specific route leads there: no lease may be more specific still.
		r, ok := f.RouteOfOthers(w.addr)
		inside := slices.ContainsFunc(config.Networks, func(n subnet.Network) bool { return n.Prefix.Contains(w.addr) })
		if l, named := f.LinkName(r.Link); ok && named && r.To.Bits() > 0 && inside {
			keep = append(keep, subnet.HostNetwork{Link: l, Prefix: netip.PrefixFrom(w.addr, w.addr.BitLen())})
		}
	}
	return keep, nil
}

// hostNetworks are those of the host's networks within the cluster's that no
// peer's lease may have. A network around the whole cluster's is not lost to a
// peer, but to all of them: it is warned of.
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

// podLinks is what tells the pods' links from the host's.
func (d *node) podLinks() host.Known {
	return host.Known{Pods: d.podSubnets(), Bridges: cni.RecordedBridges(cniDataDirs...)}
}

// leftBehind says that a route of culvert's that an earlier run left leads where
// a server of the store is: a daemon that waits for the store would not say why.
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

// CutOff says, as a sentence, that a route of culvert's own leads where one of the
// etcd servers is, and what to do; empty if none does. It is for who cannot reach
// them, and would look at the server.
func CutOff(ctx context.Context, endpoints []string) string {
	d := &node{log: slog.New(slog.DiscardHandler), options: Options{Etcd: etcd.Options{Endpoints: endpoints}}}
	for _, w := range d.leftBehind(ctx) {
		if strings.Contains(w.Text, "the etcd server") {
			return w.String()
		}
	}
	return ""
}

// fit leaves out of a snapshot what this host cannot follow: leases of peers that
// overlap its own networks, and a network that has grown over what it needs.
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
