package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"culvert/backend"
	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// releasePatience bounds the request to the store that releases the lease on exit.
const releasePatience = 5 * time.Second

// live runs the node from its first lease to its end:
//
//	begin ── carry ──┬─ told to stop ── (--release-on-exit) ── end
//	  ▲              └─ another node has the subnet ── fenced ──┐
//	  └───────────── no pod of the old subnet is left ──────────┘
func (d *node) live(ctx context.Context, r store, at place) error {
	// A usable snapshot is from this boot, so only this daemon was restarted: no jitter
	// is needed.
	if kept, _, _ := d.kept(r); kept == nil {
		if err := d.scatter(ctx); err != nil {
			return nil
		}
	}
	for {
		waiting, done := d.untilAsked(ctx)
		t, err := d.begin(waiting, r, at)
		if request := done(); request != nil {
			if err := d.give(ctx, *request, nil); errors.Is(err, errHandedOver) || ctx.Err() != nil {
				return stopped(ctx, err)
			}
			continue
		}
		if err != nil {
			return stopped(ctx, err)
		}
		d.had = append(d.had, t.lease.Subnets()...)
		d.savePlace(t.at.underlay)
		err = d.carry(ctx, r, t)
		if !errors.Is(err, subnet.ErrLost) || ctx.Err() != nil {
			return stopped(ctx, err)
		}
		d.log.Error("the lease is lost", "error", err)
		// The underlay's address may have changed meanwhile.
		if at, err = d.relocate(ctx); err != nil {
			return stopped(ctx, err)
		}
	}
}

// scatter waits for a random time of at most StartJitter.
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

// moved stops the datapath so that it is reopened: at another place on the underlay,
// or with other wire format options in the network configuration.
type moved struct{ to place }

func (m moved) Error() string { return "the datapath is to be another" }

// brokenSoon is the pause before reopening a datapath that broke within that time.
const brokenSoon = time.Second

// reopenAfter is the pause before retrying to open a datapath.
const reopenAfter = time.Second

// carry opens the datapath and serves the lease, and reopens the datapath when the
// underlay or the wire format options change or it breaks. It returns when ctx ends
// (nil), the lease is lost, or the node cannot go on. The lease's subnets do not
// change.
func (d *node) carry(ctx context.Context, r store, t tenure) error {
	config, at := t.config, t.at
	s := &session{node: d, registry: r, lease: t.lease, nets: t.nets, networks: t.config.Networks, file: &subnetFile{path: d.options.SubnetFile}}
	s.announced.Store(&at.underlay.Addrs)
	opened, unopened := false, "" // unopened: the last error of open, "" after a success
	for {
		s.at, s.backend = at, config.Backend
		path, err := d.open(ctx, config, s.lease, backend.Node{
			Underlay: at.underlay, PublicIPs: at.publics, IPMasq: d.options.IPMasq, NoMasq: d.options.NoMasq, TakeOver: d.options.TakeOverFlannel, NoProbe: d.options.NoProbe,
		})
		if err != nil && opened && config.Backend != s.worked.Backend {
			// The datapath cannot use the new options: keep the previous ones rather than
			// carry nothing.
			d.log.Error("the datapath cannot be made as the network configuration now says; the last one stands", "error", err)
			d.health.refuseConfig(err)
			s.refused, config = config.Backend, s.worked
			continue
		}
		if err != nil && !opened {
			return err
		}
		if err != nil {
			// The cause may be transient, such as a missing address: hold the lease and
			// retry.
			if err.Error() != unopened {
				d.log.Error("the datapath cannot be opened; trying again", "error", err)
			}
			unopened = err.Error()
			path = backend.Down{Format: config.Backend.Type, Err: err, Retry: reopenAfter}
		} else {
			s.worked, opened, unopened = config, true, ""
		}
		s.path = path // hand may replace it
		began := time.Now()
		err = s.serve(ctx)
		if m, ok := errors.AsType[moved](err); ok {
			if err := s.path.Close(backend.Keep); err != nil {
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
		if errors.Is(err, errKept) && ctx.Err() == nil && !errors.Is(err, subnet.ErrLost) {
			if err := s.path.Close(backend.Keep); err != nil {
				d.log.Warn("closing the datapath to open it again", "error", err)
			}
			continue
		}
		if errors.Is(err, backend.ErrBroken) && ctx.Err() == nil && !errors.Is(err, subnet.ErrLost) {
			if unopened == "" {
				d.log.Error("the datapath is broken and is opened anew", "error", err)
				d.health.repaired(string(host.KindLink), 1)
			}
			if err := s.path.Close(backend.Keep); err != nil {
				d.log.Warn("closing the broken datapath", "error", err)
			}
			if time.Since(began) < brokenSoon && unopened == "" {
				time.Sleep(brokenSoon)
			}
			continue
		}
		if _, err := daemon.SdNotify(false, daemon.SdNotifyStopping); err != nil && ctx.Err() != nil {
			d.log.Debug("systemd was not told", "error", err)
		}
		switch {
		case errors.Is(err, errHandedOver), d.takeover.pending():
			return errors.Join(stopped(ctx, err), s.path.Close(backend.Keep))
		case errors.Is(err, subnet.ErrLost):
			// Not Remove: for a moment packets to the cluster network would leave by the
			// default route. keepInside removes all but the unreachable routes.
			return errors.Join(err, s.path.Close(backend.Keep), d.keepInside())
		case ctx.Err() != nil && d.options.ReleaseOnExit:
			return errors.Join(stopped(ctx, err), s.file.remove(), s.path.Close(backend.Remove), d.release(ctx, r, s.lease))
		}
		d.health.notReady("stopping")
		return errors.Join(stopped(ctx, err), s.path.Close(backend.Keep))
	}
}

// release releases the lease in the store.
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

// atPlace returns a copy of the lease with the place's public addresses.
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

// session serves one lease, with several datapaths in turn if the underlay changes.
type session struct {
	*node
	registry  store
	lease     subnet.Lease
	at        place
	path      backend.Backend
	backend   subnet.BackendConfig // with which path was opened
	refused   subnet.BackendConfig // with which no datapath could be opened
	worked    subnet.Config        // the last one with which a datapath was opened
	file      *subnetFile
	last      *subnet.Snapshot // the newest; follow's goroutine only
	unapplied *subnet.Snapshot // the newest, if the datapath failed to apply it; follow's goroutine only
	told      bool             // the node was reported ready
	nets      []subnet.HostNetwork
	networks  []subnet.Network // of the last accepted configuration; follow's goroutine only
	// confPublished is whether the CNI configuration is in place.
	confPublished bool
	// announced are the underlay addresses to which the lease in the store corresponds.
	announced atomic.Pointer[[]netip.Addr]
}

// serve runs the datapath and the parts that need the lease, until ctx ends or one of
// them fails.
func (s *session) serve(ctx context.Context) error {
	s.health.setDatapath(s.path)
	// The datapath stops last: it carries packets while the other parts end.
	told := ctx
	carrying, stop := context.WithCancel(context.WithoutCancel(ctx))
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var carrier errgroup.Group
	path, ended := s.path, make(chan struct{})
	carrier.Go(func() error {
		defer close(ended)
		err := path.Run(carrying)
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
	parts.Go(func() error { return s.renewSubnetFile(ctx, s.file, s.registry.Held, s.look) })
	parts.Go(func() error { return s.follow(ctx) })
	parts.Go(func() error { return s.publish(ctx) })
	parts.Go(func() error { return s.awaitMove(ctx) })
	parts.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case r := <-s.requests:
			return asked{r}
		}
	})
	err := parts.Wait()
	if a, ok := errors.AsType[asked](err); ok {
		err = s.hand(told, a.request, ended, func() error {
			stop()
			return carrier.Wait()
		})
	}
	stop()
	return errors.Join(err, carrier.Wait())
}

// hand hands the node over to a successor, with the datapath if it carries packets.
func (s *session) hand(ctx context.Context, r request, ended <-chan struct{}, stop func() error) error {
	if _, down := s.path.(backend.Down); down || !s.told {
		return s.give(ctx, r, nil)
	}
	kind := Datapath(s.path.Status().Kind)
	return s.give(ctx, r, &carrying{
		facts: s.datapathFacts(kind, s.worked, s.lease, s.at.underlay), stop: stop, ended: ended,
		drop: func() {
			if err := errors.Join(s.path.Close(backend.Keep), s.store.keep(nil)); err != nil {
				s.log.Warn("closing the datapath for the successor's", "error", err)
			}
			s.path = backend.Down{Format: s.backend.Type, Err: errKept, Retry: reopenAfter}
		},
	})
}

// follow applies each snapshot to the datapath. A reopened datapath starts with the
// last snapshot, even if the store is unreachable.
func (s *session) follow(ctx context.Context) error {
	if s.last != nil {
		snapshot := *s.last
		snapshot.Self = s.lease
		if err := s.apply(ctx, snapshot); err != nil {
			return err
		}
	}
	type news struct {
		subnet.Snapshot
		error
	}
	watched := make(chan news)
	ctx, stop := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer stop()
	watching.Go(func() {
		defer close(watched)
		for snapshot, err := range s.registry.Watch(ctx, s.lease) {
			select {
			case watched <- news{snapshot, err}:
			case <-ctx.Done():
				return
			}
		}
	})
	for {
		// Retry: the cause, such as a lack of descriptors or memory, may be gone long
		// before the leases change again.
		var again <-chan time.Time
		if s.unapplied != nil {
			again = time.After(applyAgain)
		}
		select {
		case n, ok := <-watched:
			switch {
			case !ok:
				return nil
			case n.error != nil:
				s.health.storeLost(n.error)
				continue
			}
			snapshot := s.fit(ctx, n.Snapshot)
			s.health.setSnapshot(snapshot, s.log)
			if err := s.apply(ctx, snapshot); err != nil {
				return err
			}
		case <-again:
			if err := s.apply(ctx, *s.unapplied); err != nil {
				return err
			}
		}
	}
}

// applyAgain is the pause before retrying a snapshot that the datapath failed to
// apply.
const applyAgain = 2 * time.Second

// apply applies a snapshot to the datapath. After the first one the node is ready, and
// subnet.env tells the CNI plugin. If the datapath fails to apply it, the node goes on
// with what it has and follow retries.
func (s *session) apply(ctx context.Context, snapshot subnet.Snapshot) error {
	if b := snapshot.Config.Backend; b != s.backend && b != s.refused {
		s.log.Warn("the options of the wire format have changed; opening the datapath anew", "before", s.backend, "now", b)
		s.last = &snapshot
		return moved{s.at}
	} else if b != s.backend {
		snapshot.Config.Backend = s.backend
		s.health.refuseConfig(errors.New("no datapath could be opened with its options (see the log)"))
	}
	// In a takeover, have the running daemon stop carrying only now that this one is
	// prepared.
	if err := s.takeover.take(ctx, true); err != nil {
		return err
	}
	s.unapplied = nil
	if err := s.path.Apply(ctx, snapshot); err != nil {
		if s.takeover.pending() {
			return fmt.Errorf("the datapath does not follow the leases, and the running daemon's does: %w", err)
		}
		s.unapplied = &snapshot
		s.log.Error("the datapath does not follow the leases", "revision", snapshot.Revision, "error", err)
		s.health.notReady("the datapath does not follow the leases: " + err.Error())
		return nil
	}
	lease := s.lease
	if held, ok := s.registry.Held(); ok && held.Key() == lease.Key() {
		lease.Expires = held.Expires
	}
	if err := s.file.write(subnetEnv(snapshot.Config, lease, s.path.Status().MTU)); err != nil && !s.told {
		return err
	} else if err != nil {
		s.last = &snapshot // the datapath has applied it
		s.log.Error("the CNI plugin goes on with the last subnet.env", "error", err)
		s.health.setWarnings("subnet-file", subnetFileWarning(err))
		s.health.ready()
		return nil
	}
	s.health.setWarnings("subnet-file")
	s.publishConf()
	if !s.told {
		s.told = true
		if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
			s.log.Debug("systemd was not told", "error", err)
		}
		s.log.Info("node ready", "subnet", lease.Subnets(), "peers", len(snapshot.Peers))
	}
	s.last = &snapshot
	s.health.ready()
	return s.tookOver()
}

// publishConf installs the CNI configuration. The container runtime then begins to add
// pods, and a Kubernetes Node becomes Ready.
func (s *session) publishConf() {
	if s.options.CNIConfDir == "" || s.confPublished {
		return
	}
	done, err := cni.Publish(s.options.CNIConfDir)
	if err != nil {
		s.log.Error("the runtime does not learn that pods can be added", "error", err)
		s.health.setWarnings("cni-conf", api.Warning{Check: "cni-conf", Text: err.Error(), Fix: "make --cni-conf-dir writable, or run culvert cni install on the node"})
		return
	}
	s.health.setWarnings("cni-conf")
	s.confPublished = true
	for _, path := range done {
		s.log.Info("the CNI configuration is in place", "path", path)
	}
}

// publishSoon is the first pause before retrying to publish an address: just after an
// address change the store is often unreachable. publishAgain is the longest pause, as
// for an address that another node has.
const (
	publishSoon  = 500 * time.Millisecond
	publishAgain = 10 * time.Second
)

// publish updates the lease in the store if its addresses differ from ours, and
// retries until it succeeds or ctx ends.
func (s *session) publish(ctx context.Context) error {
	for again := publishSoon; ; {
		held, ok := s.registry.Held()
		if !ok || slices.Equal(held.Publics(), s.lease.Publics()) {
			s.announced.Store(&s.at.underlay.Addrs)
			return nil
		}
		err := s.update(ctx)
		switch {
		case ctx.Err() != nil || errors.Is(err, subnet.ErrLost): // Hold reports a lost lease
			return nil
		case err == nil:
			s.log.Info("our new address is published", "subnet", s.lease.Subnets(), "public", s.lease.Publics())
			s.announced.Store(&s.at.underlay.Addrs)
			return nil
		}
		s.log.Error("our new address cannot be published", "public", s.lease.Publics(), "error", err, "again", again)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(again):
		}
		again = min(2*again, publishAgain)
	}
}

// update writes our lease with the current addresses, unless the host no longer has
// them.
func (s *session) update(ctx context.Context) error {
	if f, err := host.ReadFacts(); err == nil && !f.Bears(s.at.underlay.Addrs) {
		return fmt.Errorf("%s does not bear %v now", s.at.underlay.Name, s.at.underlay.Addrs)
	}
	ctx, cancel := context.WithTimeout(ctx, updatePatience)
	defer cancel()
	_, err := s.registry.Update(ctx, s.lease)
	return err
}

// updatePatience bounds one attempt, so that an address is not written long after it
// was checked.
const updatePatience = 2 * time.Second
