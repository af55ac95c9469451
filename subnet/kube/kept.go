package kube

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"time"

	"culvert/subnet"
	"culvert/subnet/kept"
)

// What was last read is kept on the disk (package kept), so that a daemon which
// is restarted while the API server is unreachable goes on as though it had
// never stopped. A podCIDR has no end, and so what is kept serves until this
// boot's: after it no pod is left that needs it.

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
	case k.Prefix != r.opts.Prefix || !slices.Contains(k.Endpoints, r.Server()):
		return nil, fmt.Errorf("it is of another cluster, %s at %v", k.Prefix, k.Endpoints)
	}
	return k, nil
}

// Resume has the registry hold the kept lease, and the next Watch begin with the
// kept leases. What has changed since is found as after any absence.
func (r *Registry) Resume(k *kept.State, _ time.Duration) {
	r.rememberConfig(k.Config, "")
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held, r.resumed = k.Lease, k
}

// Answers returns an error if the API server is unreachable, or does not answer
// before ctx ends. A refusal is an answer.
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
		r.log.Warn("what is kept for a start without the API server cannot be removed", "file", r.opts.SnapshotFile, "error", err)
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
	written := 0
	away := outage{log: r.log}
	for last := false; !last; {
		select {
		case <-ctx.Done():
			last = true
		case <-m.changed:
		}
		began := time.Now()
		state, version, news := m.state(written)
		if !news {
			continue
		}
		if err := r.writeKept(state); err != nil {
			away.failed("the Nodes cannot be kept for a start without the API server", err)
		} else {
			written = version
		}
		if !last && sleep(ctx, max(keepEvery, 50*time.Since(began))) != nil {
			continue // to the last writing
		}
	}
}

func (r *Registry) writeKept(s kept.State) error {
	r.keeping.Lock()
	defer r.keeping.Unlock()
	if r.forgotten {
		return nil
	}
	return kept.Write(r.opts.SnapshotFile, s)
}

// state returns what there is to keep, if it is worth writing: nothing before
// the API server was read, nor while our subnet is in doubt.
func (m *mirror) state(written int) (kept.State, int, bool) {
	held, ok := m.r.Held()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !ok || held.Key() != m.self.Key() || !held.Expires.IsZero() || !m.listed || len(m.config.Networks) == 0 || m.version == written {
		return kept.State{}, 0, false
	}
	s := kept.State{
		Node: held.Node, Prefix: m.r.opts.Prefix, Endpoints: []string{m.r.Server()},
		Config: m.config, Lease: held, Cluster: 1, Revision: max(m.revision, 1),
	}
	value, err := held.Value()
	if err != nil {
		return kept.State{}, 0, false
	}
	s.Entries = append(s.Entries, subnet.NewEntry(subnet.Entry{Key: held.Key(), Value: value, CreateRevision: held.CreateRevision, ModRevision: held.ModRevision}))
	for _, entries := range []map[string]subnet.Entry{m.entries, m.missed} {
		for _, e := range entries {
			if _, err := e.Lease(); err == nil {
				s.Entries = append(s.Entries, e)
			}
		}
	}
	return s, m.version, true
}
