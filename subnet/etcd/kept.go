package etcd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"culvert/subnet"
	"culvert/subnet/kept"

	"google.golang.org/grpc/connectivity"
)

// The state last read from etcd is saved to a file, so that a daemon restarted
// while etcd is unreachable continues as if it had not stopped:
//
//	etcd ── list, watch ── mirror ── Snapshot
//	                        │  ▲
//	                persist ▼  │ Resume: replaces the first list while etcd is unreachable
//	                        file
//
// Package kept owns the file, decides how long it is valid, and writes it at most once
// a second.

// Kept returns the state saved by this node, nil if there is none, or an error that
// says why it cannot be used.
func (r *Registry) Kept(node string) (*kept.State, error) {
	k, err := r.copy.Read(node)
	if err != nil || k == nil {
		return nil, err
	}
	switch {
	case k.Prefix != r.opts.Prefix:
		return nil, fmt.Errorf("it belongs to the network at %s", k.Prefix)
	case !slices.ContainsFunc(k.Endpoints, func(e string) bool { return slices.Contains(r.opts.Endpoints, e) }):
		return nil, fmt.Errorf("it is from another etcd, at %v", k.Endpoints)
	case k.Lease.ID != 0 && r.opts.StateFile != "" && r.savedID() != k.Lease.ID:
		return nil, errors.New("this node has acquired another lease since")
	}
	return k, nil
}

// Resume makes the registry hold the saved lease and the next Watch start with the
// saved leases, as if this process had read them. Changes since then are found as
// after any outage: by Hold and by the first list.
func (r *Registry) Resume(k *kept.State, ttl time.Duration) {
	r.rememberConfig(k.Config, "")
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ttl, r.resumed = ttl, k
	r.setHeldLocked(k.Lease)
}

// Answers returns an error if etcd is unreachable: no server accepts a connection,
// or none that has a leader answers before ctx ends.
func (r *Registry) Answers(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	conn := r.client.ActiveConnection()
	conn.Connect()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
			if state == connectivity.TransientFailure {
				why := r.Trouble()
				if why == nil {
					why = fmt.Errorf("none of the servers %v can be reached", r.opts.Endpoints)
				}
				stop(why)
				return
			}
			if !conn.WaitForStateChange(ctx, state) {
				return
			}
		}
	}()
	_, _, _, err := r.configText(ctx)
	cause := context.Cause(ctx)
	stop(nil)
	<-watched
	switch {
	case err == nil || permanent(err):
		return nil
	case cause != nil:
		return cause
	}
	return err
}

// Forget deletes the saved state and stops saving it: the lease is not this node's
// any more, or may soon not be.
func (r *Registry) Forget() { r.copy.Forget() }

// persist saves the mirror's state until ctx ends.
func (r *Registry) persist(ctx context.Context, m *mirror) {
	var last savedState
	r.copy.Save(ctx, m.changed, func() (*kept.State, func()) {
		s, now := m.state(last)
		return s, func() { last = now }
	})
}

// savedState identifies a saved state.
type savedState struct {
	version int // mirror.version
	held    subnet.Lease
}

// state returns the state to save, or nil if it does not differ enough from the last
// one. There is none before etcd was read, nor without a lease whose expiry is known.
func (m *mirror) state(last savedState) (*kept.State, savedState) {
	held, ok := m.r.Held()
	m.mu.Lock()
	defer m.mu.Unlock()
	now := savedState{m.version, held}
	if !ok || held.Key() != m.self.Key() || held.ID != 0 && held.Expires.IsZero() || !m.listed || len(m.config.Networks) == 0 || !now.differs(last) {
		return nil, last
	}
	s := &kept.State{
		Node: held.Node, Prefix: m.r.opts.Prefix, Endpoints: m.r.opts.Endpoints,
		Config: m.config, Lease: held, Cluster: m.cluster, Revision: m.revision,
	}
	for _, entries := range []map[string]subnet.Entry{m.entries, m.retained} {
		for _, e := range entries {
			if _, err := e.Lease(); err == nil {
				s.Entries = append(s.Entries, e)
			}
		}
	}
	return s, now
}

// differs reports whether the state is worth saving: any lease has changed, or our
// own now lasts longer by an eighth of its remaining time.
func (s savedState) differs(last savedState) bool {
	return s.version != last.version || s.held.ID != last.held.ID || s.held.ModRevision != last.held.ModRevision ||
		s.held.Expires.Sub(last.held.Expires).Abs() > time.Until(s.held.Expires).Abs()/8
}
