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

// What was last read from etcd is kept in a file, so that a daemon which is
// restarted while etcd is away goes on as though it had never stopped:
//
//	etcd ── list, watch ── mirror ── Snapshot
//	                        │  ▲
//	                   keep ▼  │ Resume: the first list, of a start without etcd
//	                        file
//
// Package kept has the file, and says for how long it is believed. It is
// written at most once a second.

// keepEvery is the least time between two writings; a large file waits longer,
// so that writing takes a fiftieth of a core at most.
const keepEvery = time.Second

// Kept returns what is kept on disk of this node, nil if there is nothing, or
// the reason why it cannot be relied on.
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
		return nil, fmt.Errorf("it is of the node %q", k.Node)
	case k.Prefix != r.opts.Prefix:
		return nil, fmt.Errorf("it is of the network at %s", k.Prefix)
	case !slices.ContainsFunc(k.Endpoints, func(e string) bool { return slices.Contains(r.opts.Endpoints, e) }):
		return nil, fmt.Errorf("it is of another etcd, at %v", k.Endpoints)
	case k.Lease.ID != 0 && r.opts.StateFile != "" && r.savedID() != k.Lease.ID:
		return nil, errors.New("this node has had another lease since")
	}
	return k, nil
}

// Resume has the registry hold the kept lease, and the next Watch begin with the
// kept leases, as though this process had read them. What has changed since is
// found as after any absence: by Hold and by the first list.
func (r *Registry) Resume(k *kept.State, ttl time.Duration) {
	r.rememberConfig(k.Config, "")
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ttl, r.resumed = ttl, k
	r.keepHeld(k.Lease)
}

// Answers returns an error if etcd is away: no server can be reached, or none
// that has a leader answers before ctx ends.
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
					why = fmt.Errorf("no server of %v can be reached", r.opts.Endpoints)
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

// Forget removes what is kept, and keeps nothing more: the lease is not this
// node's any longer, or soon may not be.
func (r *Registry) Forget() {
	r.keeping.Lock()
	defer r.keeping.Unlock()
	r.forgotten = true
	if r.opts.SnapshotFile == "" {
		return
	}
	if err := os.Remove(r.opts.SnapshotFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.log.Warn("what is kept for a start without etcd cannot be removed", "file", r.opts.SnapshotFile, "error", err)
	}
}

// remember undoes Forget for another lease.
func (r *Registry) remember() {
	r.keeping.Lock()
	defer r.keeping.Unlock()
	r.forgotten = false
}

// keep writes what the mirror has, as it changes, until ctx ends, and then once
// more.
func (r *Registry) keep(ctx context.Context, m *mirror) {
	if r.opts.SnapshotFile == "" {
		return
	}
	var written keptState
	away := outage{log: r.log}
	tick := time.NewTicker(keepEvery) // the lease is renewed without a word
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
		state, news := m.state(written)
		if news {
			if err := r.writeKept(state); err != nil {
				away.failed("what etcd says cannot be kept for a start without it", err)
			} else {
				written, written.entries = state, nil
			}
		}
		if last {
			return
		}
		if took := time.Since(began); news && sleep(ctx, max(keepEvery, 50*took)) != nil {
			continue // to the last writing
		}
	}
}

// writeKept writes the state, unless the lease was lost or given back meanwhile.
func (r *Registry) writeKept(s keptState) error {
	r.keeping.Lock()
	defer r.keeping.Unlock()
	if r.forgotten {
		return nil
	}
	return kept.Write(r.opts.SnapshotFile, kept.State{
		Node: s.held.Node, Prefix: r.opts.Prefix, Endpoints: r.opts.Endpoints,
		Config: s.config, Lease: s.held, Cluster: s.cluster, Revision: s.at, Entries: s.entries,
	})
}

// keptState is what there is to keep.
type keptState struct {
	version int // of the mirror
	held    subnet.Lease
	config  subnet.Config
	cluster uint64
	at      int64 // revision
	entries []subnet.Entry
}

// state returns what there is to keep, if it is worth writing; nothing before
// etcd has been read, nor without a lease whose end is known.
func (m *mirror) state(written keptState) (keptState, bool) {
	held, ok := m.r.Held()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !ok || held.Key() != m.self.Key() || held.ID != 0 && held.Expires.IsZero() || !m.listed || len(m.config.Networks) == 0 {
		return keptState{}, false
	}
	s := keptState{version: m.version, held: held, config: m.config, cluster: m.cluster, at: m.revision}
	if !s.differs(written) {
		return keptState{}, false
	}
	for _, entries := range []map[string]subnet.Entry{m.entries, m.missed} {
		for _, e := range entries {
			if _, err := e.Lease(); err == nil {
				s.entries = append(s.entries, e)
			}
		}
	}
	return s, true
}

// differs says whether it is worth writing: as soon as a lease is another, and
// when our own lasts an eighth longer.
func (s keptState) differs(written keptState) bool {
	return s.version != written.version || s.held.ID != written.held.ID || s.held.ModRevision != written.held.ModRevision ||
		s.held.Expires.Sub(written.held.Expires).Abs() > time.Until(s.held.Expires).Abs()/8
}
