package etcd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
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
// Package kept owns the file and decides how long it is valid. It is written at
// most once a second.

// persistEvery is the shortest interval between two writes. It is longer if a write
// takes long, so that writing uses at most 2 % of a core.
const persistEvery = time.Second

// Kept returns the state saved by this node, nil if there is none, or an error that
// says why it cannot be used.
func (r *Registry) Kept(node string) (*kept.State, error) {
	if r.opts.SnapshotFile == "" {
		return nil, nil
	}
	k, err := kept.Read(r.opts.SnapshotFile)
	if err != nil || k == nil {
		return nil, err
	}
	switch {
	case k.Node != node:
		return nil, fmt.Errorf("it belongs to the node %q", k.Node)
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
func (r *Registry) Forget() {
	r.snapshotMu.Lock()
	defer r.snapshotMu.Unlock()
	r.snapshotOff = true
	if r.opts.SnapshotFile == "" {
		return
	}
	if err := os.Remove(r.opts.SnapshotFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.log.Warn("cannot remove the snapshot file", "file", r.opts.SnapshotFile, "error", err)
	}
}

// allowSnapshot makes persist save the state again, for a new lease.
func (r *Registry) allowSnapshot() {
	r.snapshotMu.Lock()
	defer r.snapshotMu.Unlock()
	r.snapshotOff = false
}

// persist saves the mirror's state whenever it changes, until ctx ends, and then once
// more.
func (r *Registry) persist(ctx context.Context, m *mirror) {
	if r.opts.SnapshotFile == "" {
		return
	}
	var written snapshotState
	away := outage{log: r.log}
	tick := time.NewTicker(persistEvery) // a renewal does not signal m.changed
	defer tick.Stop()
	for {
		last := false
		select {
		case <-ctx.Done():
			last = true
		case <-m.changed:
		case <-tick.C:
		}
		began := time.Now()
		state, dirty := m.state(written)
		if dirty {
			if err := r.writeSnapshot(state); err != nil {
				away.failed("cannot write the snapshot file", err)
			} else {
				written, written.entries = state, nil
			}
		}
		if last {
			return
		}
		if took := time.Since(began); dirty && sleep(ctx, max(persistEvery, 50*took)) != nil {
			continue // to the final write
		}
	}
}

// writeSnapshot writes the state, unless the lease was lost or released meanwhile.
func (r *Registry) writeSnapshot(s snapshotState) error {
	r.snapshotMu.Lock()
	defer r.snapshotMu.Unlock()
	if r.snapshotOff {
		return nil
	}
	return kept.Write(r.opts.SnapshotFile, kept.State{
		Node: s.held.Node, Prefix: r.opts.Prefix, Endpoints: r.opts.Endpoints,
		Config: s.config, Lease: s.held, Cluster: s.cluster, Revision: s.at, Entries: s.entries,
	})
}

// snapshotState is the state to save.
type snapshotState struct {
	version int // mirror.version
	held    subnet.Lease
	config  subnet.Config
	cluster uint64
	at      int64 // revision
	entries []subnet.Entry
}

// state returns the state to save, if it differs enough from what was written.
// There is none before etcd was read, nor without a lease whose expiry is known.
func (m *mirror) state(written snapshotState) (snapshotState, bool) {
	held, ok := m.r.Held()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !ok || held.Key() != m.self.Key() || held.ID != 0 && held.Expires.IsZero() || !m.listed || len(m.config.Networks) == 0 {
		return snapshotState{}, false
	}
	s := snapshotState{version: m.version, held: held, config: m.config, cluster: m.cluster, at: m.revision}
	if !s.differs(written) {
		return snapshotState{}, false
	}
	for _, entries := range []map[string]subnet.Entry{m.entries, m.retained} {
		for _, e := range entries {
			if _, err := e.Lease(); err == nil {
				s.entries = append(s.entries, e)
			}
		}
	}
	return s, true
}

// differs reports whether the state is worth writing: any lease has changed, or
// our own now lasts longer by an eighth of its remaining time.
func (s snapshotState) differs(written snapshotState) bool {
	return s.version != written.version || s.held.ID != written.held.ID || s.held.ModRevision != written.held.ModRevision ||
		s.held.Expires.Sub(written.held.Expires).Abs() > time.Until(s.held.Expires).Abs()/8
}
