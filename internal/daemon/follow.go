package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"culvert/cni"
	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

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
				s.state.storeLost(n.error)
				continue
			}
			snapshot := s.withoutConflicts(ctx, n.Snapshot)
			s.state.setSnapshot(snapshot, s.log)
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

// lookAhead reads the leases before the datapath is opened, if that ends another one on
// this host: packets are lost only until these leases are applied, and not while the
// store is read.
func (s *session) lookAhead(ctx context.Context) error {
	s.state.notReady("reading the leases")
	for snapshot, err := range s.registry.Watch(ctx, s.lease) {
		if err != nil {
			s.state.storeLost(err)
			continue
		}
		snapshot = s.withoutConflicts(ctx, snapshot)
		s.state.setSnapshot(snapshot, s.log)
		s.last = &snapshot
		return nil
	}
	return context.Cause(ctx)
}

// applyAgain is the pause before retrying a snapshot that the datapath failed to
// apply.
const applyAgain = 2 * time.Second

// apply applies a snapshot to the datapath. After the first one the node is ready, and
// subnet.env tells the CNI plugin. If the datapath fails to apply it, the node goes on
// with what it has and follow retries.
func (s *session) apply(ctx context.Context, snapshot subnet.Snapshot) error {
	if b := snapshot.Config.Backend; b != s.backend && b != s.refused {
		s.log.Warn("the options of the wire format have changed; reopening the datapath", "before", s.backend, "now", b)
		s.last = &snapshot
		return reopen{s.at}
	} else if b != s.backend {
		snapshot.Config.Backend = s.backend
		s.state.refuseConfig(errors.New("no datapath could be opened with its options (see the log)"))
	}
	// In a takeover, have the running daemon stop carrying only now that this one is
	// prepared.
	if err := s.takeover.take(ctx, true); err != nil {
		return err
	}
	s.unapplied = nil
	if err := s.datapath.Apply(ctx, snapshot); err != nil {
		if s.takeover.pending() {
			return fmt.Errorf("cannot apply the leases to the datapath; the running daemon continues: %w", err)
		}
		s.unapplied = &snapshot
		if why := err.Error(); why != s.saidUnapplied { // it is retried every applyAgain
			s.saidUnapplied = why
			s.log.Error("cannot apply the leases to the datapath", "revision", snapshot.Revision, "error", err)
		}
		s.state.notReady("cannot apply the leases to the datapath: " + err.Error())
		return nil
	}
	s.saidUnapplied = ""
	lease := s.lease
	if held, ok := s.registry.Held(); ok && held.Key() == lease.Key() {
		lease.Expires = held.Expires
	}
	if err := s.file.write(subnetEnv(snapshot.Config, lease, s.datapath.Status().MTU)); err != nil && !s.reportedReady {
		return err
	} else if err != nil {
		s.last = &snapshot // the datapath has applied it
		s.log.Error("cannot write subnet.env; the CNI plugin keeps using the previous one", "error", err)
		s.state.setWarnings("subnet-file", subnetFileWarning(err))
		s.state.ready()
		return nil
	}
	s.state.setWarnings("subnet-file")
	s.publishConf()
	if !s.reportedReady {
		s.reportedReady = true
		if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
			s.log.Debug("cannot notify systemd", "error", err)
		}
		s.log.Info("node ready", "subnet", lease.Subnets(), "peers", len(snapshot.Peers))
	}
	s.last = &snapshot
	s.state.ready()
	return s.completeTakeover()
}

// publishConf installs the CNI configuration. The container runtime then begins to add
// pods, and a Kubernetes Node becomes Ready.
func (s *session) publishConf() {
	if s.options.CNIConfDir == "" || s.confPublished {
		return
	}
	done, err := cni.Publish(s.options.CNIConfDir)
	if err != nil {
		s.log.Error("cannot install the CNI configuration; the container runtime cannot add pods", "error", err)
		s.state.setWarnings("cni-conf", api.Warning{Check: "cni-conf", Text: err.Error(), Fix: "make --cni-conf-dir writable, or run culvert cni install on the node"})
		return
	}
	s.state.setWarnings("cni-conf")
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
			s.published.Store(&s.at.underlay.Addrs)
			return nil
		}
		err := s.update(ctx)
		switch {
		case ctx.Err() != nil || errors.Is(err, subnet.ErrLost): // Hold reports a lost lease
			return nil
		case err == nil:
			s.log.Info("our new address is published", "subnet", s.lease.Subnets(), "public", s.lease.Publics())
			s.published.Store(&s.at.underlay.Addrs)
			return nil
		}
		s.log.Error("cannot publish the new underlay address", "public", s.lease.Publics(), "error", err, "again", again)
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
	if f, err := host.ReadFacts(); err == nil && !f.HasAddrs(s.at.underlay.Addrs) {
		return fmt.Errorf("%s does not have %v now", s.at.underlay.Name, s.at.underlay.Addrs)
	}
	ctx, cancel := context.WithTimeout(ctx, updateTimeout)
	defer cancel()
	_, err := s.registry.Update(ctx, s.lease)
	return err
}

// updateTimeout bounds one attempt, so that an address is not written long after it
// was checked.
const updateTimeout = 2 * time.Second
