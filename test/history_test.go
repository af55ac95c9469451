package test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"culvert/subnet"
)

// history is the sequence of changes of the lease keys under a prefix, read by a watch.
type history struct {
	prefix string

	mu       sync.Mutex
	revision int64
	changes  []change
	errs     []string
}

// change is a change of a subnet's owner, 0 if the lease was deleted.
type change struct {
	revision      int64
	subnet, owner int
	seen          time.Time
}

func newHistory(prefix string, after int64) *history {
	return &history{prefix: prefix + "/subnets/", revision: after}
}

// follow reads the history until ctx ends, and watches again after failures of etcd
// members. A compaction of revisions that it has not read is a problem: the test avoids
// that.
func (h *history) follow(ctx context.Context, c *clientv3.Client) {
	for ctx.Err() == nil {
		wctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
		for resp := range c.Watch(wctx, h.prefix, clientv3.WithPrefix(), clientv3.WithRev(h.at()+1), clientv3.WithPrevKV()) {
			if resp.Err() != nil {
				if resp.CompactRevision != 0 {
					h.problem("etcd was compacted at revision %d, but the history had been read only to %d", resp.CompactRevision, h.at())
					cancel()
					return
				}
				break
			}
			h.read(resp)
		}
		cancel()
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (h *history) problem(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.errs = append(h.errs, fmt.Sprintf(format, args...))
}

func (h *history) read(resp clientv3.WatchResponse) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range resp.Events {
		if e.Kv.ModRevision <= h.revision {
			continue // repeated by a new watch
		}
		key := strings.TrimPrefix(string(e.Kv.Key), h.prefix)
		if key == "end" {
			continue
		}
		subnets, err := subnet.ParseKey(key)
		if err != nil {
			h.errs = append(h.errs, fmt.Sprintf("revision %d: %v", e.Kv.ModRevision, err))
			continue
		}
		ch := change{revision: e.Kv.ModRevision, subnet: int(subnets[0].Addr().As4()[2]), seen: time.Now()}
		if e.Type == mvccpb.PUT {
			l, err := subnet.ParseLease(key, e.Kv.Value)
			if err != nil {
				h.errs = append(h.errs, fmt.Sprintf("revision %d: %v", e.Kv.ModRevision, err))
				continue
			}
			ch.owner = nodeNumber(l.Node)
		}
		h.changes = append(h.changes, ch)
	}
	if len(resp.Events) > 0 {
		h.revision = max(h.revision, resp.Events[len(resp.Events)-1].Kv.ModRevision)
	}
}

// at returns the revision up to which everything has been read.
func (h *history) at() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.revision
}

func (h *history) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.changes)
}

// has reports whether the node owns the subnet at the last revision read.
func (h *history) has(index, node int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	owner := 0
	for _, c := range h.changes {
		if c.subnet == index {
			owner = c.owner
		}
	}
	return owner == node
}

// ownersAt returns the owners of all subnets at a revision.
func (h *history) ownersAt(revision int64) owners {
	h.mu.Lock()
	defer h.mu.Unlock()
	var o owners
	for _, c := range h.changes {
		if c.revision <= revision {
			o[c.subnet] = c.owner
		}
	}
	return o
}

// fullWithout reports whether at some revision between from and to other nodes than this
// one owned all subnets.
func (h *history) fullWithout(node int, from, to int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	var o owners
	full := func() bool {
		for _, owner := range o[1:] {
			if owner == 0 || owner == node {
				return false
			}
		}
		return true
	}
	for _, c := range h.changes {
		if c.revision > from && full() {
			return true
		}
		if c.revision > to {
			return false
		}
		o[c.subnet] = c.owner
	}
	return full()
}

// problems returns the violations: a subnet that changed its owner without having been
// deleted, or a node with two subnets.
func (h *history) problems() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	problems := h.errs
	var o owners
	has := map[int]int{}
	for _, c := range h.changes {
		was := o[c.subnet]
		if was != 0 && c.owner != 0 && was != c.owner {
			problems = append(problems, fmt.Sprintf("revision %d: subnet %d goes from node %d to node %d", c.revision, c.subnet, was, c.owner))
		}
		if c.owner != 0 && has[c.owner] != 0 && has[c.owner] != c.subnet {
			problems = append(problems, fmt.Sprintf("revision %d: node %d has the subnets %d and %d", c.revision, c.owner, has[c.owner], c.subnet))
		}
		if c.owner == 0 {
			delete(has, was)
		} else {
			has[c.owner] = c.subnet
		}
		o[c.subnet] = c.owner
	}
	return problems
}
