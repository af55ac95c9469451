package daemon

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"culvert/backend"
	"culvert/cni"
	"culvert/internal/host"
	"culvert/subnet"
)

// reopen stops the datapath so that it is reopened: at another place on the underlay,
// or with other wire format options in the network configuration.
type reopen struct{ to place }

func (r reopen) Error() string { return "the datapath must be reopened" }

// brokenSoon is the pause before reopening a datapath that broke within that time.
const brokenSoon = time.Second

// reopenAfter is the pause before retrying to open a datapath.
const reopenAfter = time.Second

// serve opens the datapath and serves the lease, and reopens the datapath when the
// underlay or the wire format options change or it breaks. It returns when ctx ends
// (nil), the lease is lost, or the node cannot go on. The lease's subnets do not
// change.
func (d *node) serve(ctx context.Context, r store, t grant) error {
	config, at := t.config, t.at
	s := &session{node: d, registry: r, lease: t.lease, nets: t.nets, networks: t.config.Networks, file: &subnetFile{path: d.options.SubnetFile}}
	s.published.Store(&at.underlay.Addrs)
	opened, openError := false, "" // openError: the last error of open, "" after a success
	for {
		s.at, s.backend = at, config.Backend
		node := backend.Node{
			Underlay: at.underlay, PublicIPs: at.publics, IPMasq: d.options.IPMasq, NoMasq: d.options.NoMasq, TakeOver: d.options.TakeOverFlannel, ProbeInterval: d.options.ProbeInterval,
			PodBridges: cni.GatewayBridges(cniDataDirs...),
		}
		if s.last == nil && d.interrupts(config, s.lease, node) {
			if err := s.lookAhead(ctx); err != nil {
				return stopped(ctx, err)
			}
		}
		path, err := d.open(ctx, config, s.lease, node)
		if err != nil && opened && config.Backend != s.worked.Backend {
			// The datapath cannot use the new options: keep the previous ones rather than
			// carry nothing.
			d.log.Error("cannot apply the changed network configuration; keeping the current datapath", "error", err)
			d.state.refuseConfig(err)
			s.refused, config = config.Backend, s.worked
			continue
		}
		if err != nil && !opened {
			return err
		}
		if err != nil {
			// The cause may be transient, such as a missing address: hold the lease and
			// retry.
			if err.Error() != openError {
				d.log.Error("cannot open the datapath; retrying", "error", err)
			}
			openError = err.Error()
			path = backend.Down{Format: config.Backend.Type, Err: err, Retry: reopenAfter}
		} else {
			s.worked, opened, openError = config, true, ""
		}
		s.datapath = path // hand may replace it
		began := time.Now()
		err = s.run(ctx)
		if m, ok := errors.AsType[reopen](err); ok {
			if err := s.datapath.Close(backend.Keep); err != nil {
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
		if errors.Is(err, errHandoverFailed) && ctx.Err() == nil && !errors.Is(err, subnet.ErrLost) {
			if err := s.datapath.Close(backend.Keep); err != nil {
				d.log.Warn("closing the datapath to open it again", "error", err)
			}
			continue
		}
		if errors.Is(err, backend.ErrBroken) && ctx.Err() == nil && !errors.Is(err, subnet.ErrLost) {
			if openError == "" {
				d.log.Error("the datapath failed; reopening it", "error", err)
				d.state.repaired(string(host.KindLink), 1)
			}
			if err := s.datapath.Close(backend.Keep); err != nil {
				d.log.Warn("closing the broken datapath", "error", err)
			}
			if time.Since(began) < brokenSoon && openError == "" {
				time.Sleep(brokenSoon)
			}
			continue
		}
		if _, err := daemon.SdNotify(false, daemon.SdNotifyStopping); err != nil && ctx.Err() != nil {
			d.log.Debug("cannot notify systemd", "error", err)
		}
		switch {
		case errors.Is(err, errHandedOver), d.takeover.pending():
			return errors.Join(stopped(ctx, err), s.datapath.Close(backend.Keep))
		case errors.Is(err, subnet.ErrLost):
			// Not Remove: for a moment packets to the cluster network would leave by the
			// default route. leaveUnreachable removes all but the unreachable routes.
			return errors.Join(err, s.datapath.Close(backend.Keep), d.leaveUnreachable())
		case ctx.Err() != nil && d.options.ReleaseOnExit:
			return errors.Join(stopped(ctx, err), s.file.remove(), s.datapath.Close(backend.Remove), d.release(ctx, r, s.lease))
		}
		d.state.notReady("stopping")
		return errors.Join(stopped(ctx, err), s.datapath.Close(backend.Keep))
	}
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
	registry      store
	lease         subnet.Lease
	at            place
	datapath      backend.Backend
	backend       subnet.BackendConfig // with which path was opened
	refused       subnet.BackendConfig // with which no datapath could be opened
	worked        subnet.Config        // the last one with which a datapath was opened
	file          *subnetFile
	last          *subnet.Snapshot // the newest; follow's goroutine only
	unapplied     *subnet.Snapshot // the newest, if the datapath failed to apply it; follow's goroutine only
	saidUnapplied string           // why, as last logged; the same
	reportedReady bool             // the node was reported ready
	nets          []subnet.HostNetwork
	networks      []subnet.Network // of the last accepted configuration; follow's goroutine only
	// confPublished is whether the CNI configuration is in place.
	confPublished bool
	// published are the underlay addresses to which the lease in the store corresponds.
	published atomic.Pointer[[]netip.Addr]
}

// run runs the datapath and the parts that need the lease, until ctx ends or one of
// them fails.
func (s *session) run(ctx context.Context) error {
	s.state.setDatapath(s.datapath)
	// The datapath stops last: it carries packets while the other parts end.
	told := ctx
	carrying, stop := context.WithCancel(context.WithoutCancel(ctx))
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var carrier errgroup.Group
	path, ended := s.datapath, make(chan struct{})
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
	parts.Go(func() error { return s.renewSubnetFile(ctx, s.file, s.registry.Held, s.verifyLease) })
	parts.Go(func() error { return s.follow(ctx) })
	parts.Go(func() error { return s.publish(ctx) })
	parts.Go(func() error { return s.watchUnderlay(ctx) })
	parts.Go(func() error {
		s.trim(ctx)
		return nil
	})
	parts.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case r := <-s.requests:
			return handoverRequested{r}
		}
	})
	err := parts.Wait()
	if a, ok := errors.AsType[handoverRequested](err); ok {
		err = s.handOver(told, a.request, ended, func() error {
			stop()
			return carrier.Wait()
		})
	}
	stop()
	return errors.Join(err, carrier.Wait())
}

// handOver hands the node over to a successor, with the datapath if it carries packets.
func (s *session) handOver(ctx context.Context, r request, ended <-chan struct{}, stop func() error) error {
	if _, down := s.datapath.(backend.Down); down || !s.reportedReady {
		return s.node.handOver(ctx, r, nil)
	}
	kind := Datapath(s.datapath.Status().Kind)
	return s.node.handOver(ctx, r, &runningDatapath{
		facts: s.datapathFacts(kind, s.worked, s.lease, s.at.underlay), stop: stop, ended: ended,
		drop: func() {
			if err := errors.Join(s.datapath.Close(backend.Keep), s.store.keep(nil)); err != nil {
				s.log.Warn("closing the datapath for the successor's", "error", err)
			}
			s.datapath = backend.Down{Format: s.backend.Type, Err: errHandoverFailed, Retry: reopenAfter}
		},
	})
}
