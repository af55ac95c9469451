package daemon

import (
	"context"
	"slices"

	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/internal/overlap"
	"culvert/subnet"
)

// Routes to the cluster network's subnets take its addresses away from other uses on
// the host. So the daemon checks for overlaps (package overlap):
//
//	addresses the node needs (store, gateways, resolvers)  error at the start, before leasing
//	networks of the host's links                           not leased by this node; peers' leases there are rejected
//	networks that appear while the node runs               a warning

// needs returns the addresses that this node needs.
func (d *node) needs(ctx context.Context, f host.Facts, u host.Underlay) []overlap.Need {
	return overlap.Needs(ctx, d.options.servers(), f, u)
}

// checkOverlaps checks a configuration against the host before leasing. It returns the
// networks that the cluster must leave to the host.
func (d *node) checkOverlaps(ctx context.Context, config subnet.Config, at place) ([]subnet.HostNetwork, error) {
	f, err := host.ReadFacts()
	if err != nil {
		return nil, err
	}
	needs := d.needs(ctx, f, at.underlay)
	warned, refused := overlap.CutOff(config, f, needs)
	d.state.setWarnings("needs", warned...)
	if refused != nil {
		return nil, refused
	}
	return overlap.Kept(config, f, needs, f.Networks(d.podLinks())), nil
}

// staleRoutes is overlap.StaleRoutes for this node's store, with a log line for each.
func (d *node) staleRoutes(ctx context.Context) []api.Warning {
	all := overlap.StaleRoutes(ctx, d.options.servers())
	for _, w := range all {
		d.log.Warn(w.Text, "check", w.Check, "fix", w.Fix)
	}
	return all
}

// podLinks returns the context that distinguishes the pods' links from the host's.
func (d *node) podLinks() host.UnderlayContext {
	return host.UnderlayContext{Pods: d.podSubnets(), Bridges: cni.RecordedBridges(cniDataDirs...)}
}

// withoutConflicts removes from a snapshot what this host cannot apply: peers' leases that overlap
// its own networks, and changed networks that would cut it off from what it needs.
func (s *session) withoutConflicts(ctx context.Context, snapshot subnet.Snapshot) subnet.Snapshot {
	if !slices.Equal(snapshot.Config.Networks, s.networks) {
		f, err := host.ReadFacts()
		if err == nil {
			_, err = overlap.CutOff(snapshot.Config, f, s.needs(ctx, f, s.at.underlay))
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
