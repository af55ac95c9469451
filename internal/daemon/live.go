package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"culvert/backend"
	"culvert/internal/host"
	"culvert/subnet"
)

// place is where a node is on the underlay.
type place struct {
	underlay host.Underlay
	publics  []netip.Addr // what others send to, at most one per family
}

// releasePatience is the daemon's patience with the store while it stops.
const releasePatience = 5 * time.Second

// live is the life of a node, from its first lease to its end:
//
//	begin ── carry ──┬─ told to stop ── (--release-on-exit) ── end
//	  ▲              └─ another node has the subnet ── fenced ──┐
//	  └───────────── no pod of the old subnet is left ──────────┘
func (d *node) live(ctx context.Context, r store, at place) error {
	// What is kept is of this boot: the node was restarted, and not all of them
	// by a power cut.
	if kept, _ := d.kept(r, at); kept == nil {
		if err := d.scatter(ctx); err != nil {
			return nil
		}
	}
	for {
		config, lease, err := d.begin(ctx, r, at)
		if err != nil {
			return stopped(ctx, err)
		}
		err = d.carry(ctx, r, config, lease, at)
		if !errors.Is(err, subnet.ErrLost) || ctx.Err() != nil {
			return stopped(ctx, err)
		}
		d.log.Error("the lease is lost", "error", err)
		// The address may be another by now.
		underlay, publics, err := d.findUnderlay()
		if err != nil {
			return err
		}
		at = place{underlay, publics}
	}
}

// scatter waits a random part of the jitter.
func (d *node) scatter(ctx context.Context) error {
	if d.options.StartJitter <= 0 {
		return nil
	}
	wait := rand.N(d.options.StartJitter)
	d.health.notReady("waiting for this node's turn to start (--start-jitter)")
	d.log.Info("waiting before the store is asked", "wait", wait.Round(time.Millisecond), "jitter", d.options.StartJitter)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(wait):
		return nil
	}
}

// moved is the end of a datapath whose underlay has become another, or the
// options of the wire format in the network configuration.
type moved struct{ to place }

func (m moved) Error() string { return "the datapath is to be another" }

// brokenSoon is the pause after a datapath that broke at once.
const brokenSoon = time.Second

// carry opens the datapath and serves the lease, with another datapath whenever
// the underlay has changed, until ctx ends (nil), the lease is lost, or the node
// cannot go on. The lease's subnets stay as they are.
func (d *node) carry(ctx context.Context, r store, config subnet.Config, lease subnet.Lease, at place) error {
	s := &session{node: d, registry: r, lease: lease, file: &subnetFile{path: d.options.SubnetFile}}
	opened := false
	for {
		s.at, s.backend = at, config.Backend
		path, err := d.open(config, s.lease, backend.Node{
			Underlay: at.underlay, PublicIPs: at.publics, IPMasq: d.options.IPMasq, NoMasq: d.options.NoMasq, TakeOver: d.options.TakeOverFlannel,
		})
		if err != nil && opened && config.Backend != s.worked.Backend {
			// The others use it, and so should we: but not at the cost of carrying
			// nothing at all.
			d.log.Error("the datapath cannot be made as the network configuration now says; the last one stands", "error", err)
			d.health.refuseConfig(err)
			s.refused, config = config.Backend, s.worked
			continue
		}
		if err != nil {
			return err
		}
		s.path, s.worked, opened = path, config, true
		began := time.Now()
		err = s.serve(ctx)
		if m, ok := errors.AsType[moved](err); ok {
			if err := path.Close(backend.Keep); err != nil {
				d.log.Warn("closing the datapath for another", "error", err)
			}
			if !slices.Equal(m.to.publics, at.publics) || m.to.underlay.Index != at.underlay.Index {
				r.Reconnect()
			}
			at = m.to
			s.lease = atPlace(s.lease, at)
			if s.last != nil && s.last.Config.Backend != s.refused {
				config = s.last.Config
			}
			continue
		}
		if errors.Is(err, backend.ErrBroken) && ctx.Err() == nil && !errors.Is(err, subnet.ErrLost) {
			d.log.Error("the datapath is broken and is opened anew", "error", err)
			d.health.repaired(string(host.KindLink), 1)
			if err := path.Close(backend.Keep); err != nil {
				d.log.Warn("closing the broken datapath", "error", err)
			}
			if time.Since(began) < brokenSoon {
				time.Sleep(brokenSoon)
			}
			continue
		}
		if _, err := daemon.SdNotify(false, daemon.SdNotifyStopping); err != nil && ctx.Err() != nil {
			d.log.Debug("systemd was not told", "error", err)
		}
		switch {
		case errors.Is(err, subnet.ErrLost):
			// Not Remove: for a moment the cluster network would be the default
			// route's. keepInside takes away all but the word that it is unreachable.
			return errors.Join(err, path.Close(backend.Keep), d.keepInside())
		case ctx.Err() != nil && d.options.ReleaseOnExit:
			return errors.Join(stopped(ctx, err), s.file.remove(), path.Close(backend.Remove), d.release(ctx, r, s.lease))
		}
		d.health.notReady("stopping")
		return errors.Join(stopped(ctx, err), path.Close(backend.Keep))
	}
}

// release gives the lease back. A failure is told and changes nothing: the lease
// then runs out by itself.
func (d *node) release(ctx context.Context, r store, l subnet.Lease) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releasePatience)
	defer cancel()
	if err := r.Release(ctx, l); err != nil {
		if d.options.Kubernetes != nil {
			return fmt.Errorf("--release-on-exit: %w (the annotations stay until the Node is deleted)", err)
		}
		return fmt.Errorf("--release-on-exit: %w (it runs out by itself, or `culvert lease release %s` ends it)", err, l.Subnets()[0])
	}
	d.log.Info("lease given back", "subnet", l.Subnets())
	return nil
}

// atPlace is the lease with the place's addresses.
func atPlace(l subnet.Lease, at place) subnet.Lease {
	l.Endpoints = slices.Clone(l.Endpoints)
	for i, e := range l.Endpoints {
		for _, a := range at.publics {
			if a.Is4() == e.Subnet.Addr().Is4() {
				l.Endpoints[i].Public = a
			}
		}
	}
	return l
}

// session is a lease that is served: by one datapath after another, if the
// underlay changes.
type session struct {
	*node
	registry store
	lease    subnet.Lease
	at       place
	path     backend.Backend
	backend  subnet.BackendConfig // that path was opened with
	refused  subnet.BackendConfig // one that no datapath could be opened with
	worked   subnet.Config        // the last one that one could
	file     *subnetFile
	last     *subnet.Snapshot // the newest; the following goroutine's
	told     bool             // that the node is ready
}

// serve runs the parts of a node that has its lease and its datapath, until
// ctx ends or one of them fails.
func (s *session) serve(ctx context.Context) error {
	s.health.setDatapath(s.path)
	// Packets are carried to the last, since the other parts take their time to
	// end.
	carrying, stop := context.WithCancel(context.WithoutCancel(ctx))
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var carrier errgroup.Group
	carrier.Go(func() error {
		err := s.path.Run(carrying)
		fail(err)
		return err
	})
	parts, ctx := errgroup.WithContext(ctx)
	parts.Go(func() error {
		err := s.registry.Hold(ctx, s.lease)
		if errors.Is(err, subnet.ErrLost) {
			return errors.Join(err, s.fence(err))
		}
		return err
	})
	parts.Go(func() error { return s.renewSubnetFile(ctx, s.file, s.registry.Held) })
	parts.Go(func() error { return s.follow(ctx) })
	parts.Go(func() error { return s.publish(ctx) })
	parts.Go(func() error { return s.awaitMove(ctx) })
	err := parts.Wait()
	stop()
	return errors.Join(err, carrier.Wait())
}

// follow makes the datapath equal to each snapshot. A datapath that replaces
// another begins with the other's last one, whether the store is there or not.
func (s *session) follow(ctx context.Context) error {
	if s.last != nil {
		snapshot := *s.last
		snapshot.Self = s.lease
		if err := s.apply(ctx, snapshot); err != nil {
			return err
		}
	}
	for snapshot, err := range s.registry.Watch(ctx, s.lease) {
		if err != nil {
			s.health.storeLost(err)
			continue
		}
		s.health.setSnapshot(snapshot, s.log)
		if err := s.apply(ctx, snapshot); err != nil {
			return err
		}
	}
	return nil
}

// apply makes the datapath equal to a snapshot. With the first one the node is
// ready, and says so to the CNI plugin by writing subnet.env. A datapath that
// does not follow is no end: it carries on, and the next snapshot tries again.
func (s *session) apply(ctx context.Context, snapshot subnet.Snapshot) error {
	if b := snapshot.Config.Backend; b != s.backend && b != s.refused {
		s.log.Warn("the options of the wire format have changed; opening the datapath anew", "before", s.backend, "now", b)
		s.last = &snapshot
		return moved{s.at}
	} else if b != s.backend {
		snapshot.Config.Backend = s.backend
		s.health.refuseConfig(errors.New("no datapath could be opened with its options (see the log)"))
	}
	if err := s.path.Apply(ctx, snapshot); err != nil {
		s.log.Error("the datapath does not follow the leases", "revision", snapshot.Revision, "error", err)
		s.health.notReady("the datapath does not follow the leases: " + err.Error())
		return nil
	}
	lease := s.lease
	if held, ok := s.registry.Held(); ok && held.Key() == lease.Key() {
		lease.Expires = held.Expires
	}
	if err := s.file.write(subnetEnv(snapshot.Config, lease, s.path.Status().MTU)); err != nil {
		return err
	}
	if !s.told {
		s.told = true
		if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
			s.log.Debug("systemd was not told", "error", err)
		}
		s.log.Info("node ready", "subnet", lease.Subnets(), "peers", len(snapshot.Peers))
	}
	s.last = &snapshot
	s.health.ready()
	return nil
}

// awaitMove ends the datapath when the underlay's interface, its MTU or its
// address is another, with one for each family of the lease.
func (s *session) awaitMove(ctx context.Context) error {
	to, err := host.AwaitMove(ctx, s.options.Underlay, func(u host.Underlay) bool {
		is, changed := s.at.underlay, false
		for _, e := range s.lease.Endpoints {
			is4 := e.Subnet.Addr().Is4()
			if !u.Addr(is4).IsValid() {
				return false
			}
			changed = changed || u.Addr(is4) != is.Addr(is4)
		}
		return changed || u.Index != is.Index || u.MTU != is.MTU
	})
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	s.log.Warn("the underlay has changed", "interface", to.Name, "addrs", to.Addrs, "mtu", to.MTU, "before", s.at.underlay.Addrs)
	s.health.setUnderlay(to)
	return moved{place{to, s.publics(to)}}
}

// publishAgain is when to try again to publish an address that another node
// has.
const publishAgain = 10 * time.Second

// publish tells the others our address, where it is another than the lease in
// the store says.
func (s *session) publish(ctx context.Context) error {
	for {
		held, ok := s.registry.Held()
		if !ok || slices.Equal(held.Publics(), s.lease.Publics()) {
			return nil
		}
		_, err := s.registry.Update(ctx, s.lease)
		switch {
		case ctx.Err() != nil || errors.Is(err, subnet.ErrLost): // Hold says so too
			return nil
		case err == nil:
			s.log.Info("our new address is published", "subnet", s.lease.Subnets(), "public", s.lease.Publics())
			return nil
		}
		s.log.Error("our new address cannot be published", "public", s.lease.Publics(), "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(publishAgain):
		}
	}
}
