package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"culvert/subnet"
	"culvert/subnet/kept"
)

// The state last read is saved to disk (package kept), so that a daemon restarted
// while the API server is unreachable continues as if it had not stopped. podCIDRs
// do not expire, so the saved state is valid until the host reboots; then no pod
// is left that needs it.

// Kept returns the state saved by this node, nil if there is none, or an error that
// says why it cannot be used.
func (r *Registry) Kept(node string) (*kept.State, error) {
	k, err := r.copy.Read(node)
	if err != nil || k == nil {
		return nil, err
	}
	if k.Prefix != r.opts.Prefix || !slices.Contains(k.Endpoints, r.Server()) {
		return nil, fmt.Errorf("it belongs to another cluster, %s at %v", k.Prefix, k.Endpoints)
	}
	return k, nil
}

// Resume makes the registry hold the saved lease and the next Watch start with the
// saved leases. Changes since then are found as after any outage.
func (r *Registry) Resume(k *kept.State, _ time.Duration) {
	r.rememberConfig(k.Config, "")
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held, r.resumed = k.Lease, k
}

// Answers returns an error if the API server is unreachable or does not answer
// before ctx ends. A response below 500 is an answer, even if it is a refusal.
func (r *Registry) Answers(ctx context.Context) error {
	_, err := r.c.node(ctx, r.opts.Node, "0")
	if e, ok := errors.AsType[*apiError](err); ok && e.code < http.StatusInternalServerError {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// Forget deletes the saved state and stops saving it: the lease is not this node's
// any more, or may soon not be.
func (r *Registry) Forget() { r.copy.Forget() }

// persist saves the mirror's state until ctx ends.
func (r *Registry) persist(ctx context.Context, m *mirror) {
	last := 0
	r.copy.Save(ctx, m.changed, func() (*kept.State, func()) {
		s, now := m.state(last)
		return s, func() { last = now }
	})
}

// state returns the state to save and its version, or nil if that is the last one.
// There is none before the API server was read, nor while our lease is in doubt.
func (m *mirror) state(last int) (*kept.State, int) {
	held, ok := m.r.Held()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !ok || held.Key() != m.self.Key() || !held.Expires.IsZero() || !m.listed || len(m.config.Networks) == 0 || m.version == last {
		return nil, last
	}
	s := &kept.State{
		Node: held.Node, Prefix: m.r.opts.Prefix, Endpoints: []string{m.r.Server()},
		Config: m.config, Lease: held, Cluster: 1, Revision: max(m.revision, 1),
	}
	value, err := held.Value()
	if err != nil {
		return nil, last
	}
	s.Entries = append(s.Entries, subnet.NewEntry(subnet.Entry{Key: held.Key(), Value: value, CreateRevision: held.CreateRevision, ModRevision: held.ModRevision}))
	for _, entries := range []map[string]subnet.Entry{m.entries, m.retained} {
		for _, e := range entries {
			if _, err := e.Lease(); err == nil {
				s.Entries = append(s.Entries, e)
			}
		}
	}
	return s, m.version
}
