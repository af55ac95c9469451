package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"sync"
	"time"

	"culvert/subnet"
)

const (
	// watchLasts is the minimum duration requested for a watch; the maximum is
	// twice that, so that nodes do not all reconnect at once.
	watchLasts = 5 * time.Minute
	// fewUnknown is up to how many Nodes are read individually for their
	// podCIDRs; above that, listing whole Nodes is cheaper.
	fewUnknown = 32
)

// Watch implements subnet.Registry. A goroutine mirrors the Nodes; Pace yields
// snapshots of the mirror. Only one iteration may run at a time.
func (r *Registry) Watch(ctx context.Context, self subnet.Lease) iter.Seq2[subnet.Snapshot, error] {
	return func(yield func(subnet.Snapshot, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		m := newMirror(r, self)
		var mirroring sync.WaitGroup
		mirroring.Go(func() { r.follow(ctx, m) })
		mirroring.Go(func() { r.followConfig(ctx, m) })
		mirroring.Go(func() { r.persist(ctx, m) })
		defer mirroring.Wait()
		defer cancel()
		subnet.Pace(ctx, m.notify, m.take, yield)
	}
}

// followConfig polls the configuration file until ctx ends.
func (r *Registry) followConfig(ctx context.Context, m *mirror) {
	for subnet.Sleep(ctx, readConfigEvery) == nil {
		text, err := os.ReadFile(r.opts.NetConf)
		m.configure(text, err)
	}
}

var errSettled = errors.New("the settle time is over")

// follow mirrors the Nodes until ctx ends: it lists them, then runs one watch after
// another, each from where the last ended. It lists again if the API server has
// discarded that revision.
func (r *Registry) follow(ctx context.Context, m *mirror) {
	var pause subnet.Backoff
	away := r.outage()
	after := "" // revision to watch from; "": list first
	for {
		var err error
		if after != "" {
			err = r.checkReached(ctx, m, after)
		}
		if err == nil && after == "" {
			after, err = r.list(ctx, m)
		}
		if err == nil && after != "" {
			away.Over()
			began := time.Now()
			err = r.watch(ctx, m, &after, away)
			if time.Since(began) > subnet.BackoffLimit {
				pause.Reset()
			}
		}
		switch {
		case ctx.Err() != nil:
			return
		case err == nil, errors.Is(err, io.EOF): // the server ends every watch after a while
			err = nil
		case errors.Is(err, errWentBack):
			after, err = "", nil
		case has(err, http.StatusGone):
			r.log.Info("listing all Nodes again: the API server has discarded the watched revision", "revision", after)
			after, err = "", nil
		case has(err, http.StatusBadRequest), has(err, http.StatusNotFound), has(err, http.StatusGatewayTimeout):
			// The server does not know the revision, as after a restore.
			after = ""
		}
		if err != nil {
			away.Failed("the API server is unreachable or rejects requests; the last leases remain in force", err)
			m.fail(err)
		}
		if pause.Wait(ctx, retryAfter(err)) != nil {
			return
		}
	}
}

var errWentBack = errors.New("the API server was restored to an older state")

// checkReached returns errWentBack if the store has not reached the revision, as
// after a restore. A watch from there would be silent until it does.
func (r *Registry) checkReached(ctx context.Context, m *mirror, after string) error {
	if revision(after) == 0 {
		return nil
	}
	at, err := r.c.list(ctx, metadataList, url.Values{"limit": {"1"}}, func(*object) {})
	if err == nil && revision(at) < revision(after) {
		return errWentBack
	}
	if err == nil {
		m.contact()
	}
	return err
}

// list reads the metadata of all Nodes, and the podCIDRs it lacks.
func (r *Registry) list(ctx context.Context, m *mirror) (string, error) {
	query := url.Values{"resourceVersion": {"0"}} // any cached state
	if last := m.last(); last > 0 {
		// Not from a server whose cache is older than what we have read.
		query = url.Values{"resourceVersion": {fmt.Sprint(last)}, "resourceVersionMatch": {"NotOlderThan"}}
	}
	found := map[string]facts{}
	take := func(o *object) {
		f, err := r.keys.facts(o)
		if err != nil {
			r.log.Warn("a Node is ignored", "node", o.Metadata.Name, "error", err)
		}
		found[o.Metadata.Name] = f
	}
	at, err := r.c.list(ctx, metadataList, query, take)
	if has(err, http.StatusGatewayTimeout) && m.last() > 0 {
		// No server is that far: the store was restored to an older state, or
		// the server's cache lags. Read from the store itself.
		clear(found)
		at, err = r.c.list(ctx, metadataList, nil, take)
	}
	if err != nil {
		return "", err
	}
	var unknown []string
	for name, f := range found {
		if f = m.known(name, f); f.managed && len(f.cidrs) == 0 {
			unknown = append(unknown, name)
		}
		found[name] = f
	}
	if err := r.resolve(ctx, found, unknown, at); err != nil {
		return "", err
	}
	if err := r.resolve(ctx, found, disputed(found, m.self.Subnets()), at); err != nil {
		return "", err
	}
	m.replace(found, at)
	return at, nil
}

// resolve reads the podCIDRs of the Nodes in unknown: those without the annotation,
// or whose annotation is disputed.
func (r *Registry) resolve(ctx context.Context, found map[string]facts, unknown []string, at string) error {
	fill := func(o *object) {
		f, ok := found[o.Metadata.Name]
		if !ok || f.uid != o.Metadata.UID || !slices.Contains(unknown, o.Metadata.Name) {
			return
		}
		claimed := f.cidrs
		f.cidrs, _ = o.podCIDRs() // if empty, entry reports it
		f.fromSpec = true
		found[o.Metadata.Name] = f
		if len(claimed) > 0 && !slices.Equal(claimed, f.cidrs) {
			r.log.Error("a Node's annotation does not match its podCIDRs; using its podCIDRs",
				"node", o.Metadata.Name, "annotation", podCIDRsAnnotation, "claims", claimed, "has", f.cidrs)
		}
	}
	if len(unknown) > fewUnknown {
		_, err := r.c.list(ctx, whole, url.Values{"resourceVersion": {at}, "resourceVersionMatch": {"NotOlderThan"}}, fill)
		return err
	}
	for _, name := range unknown {
		o, err := r.c.node(ctx, name, "0")
		if has(err, http.StatusNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		fill(o)
	}
	return nil
}

// watch follows the Nodes from revision *after and advances it.
func (r *Registry) watch(ctx context.Context, m *mirror, after *string, away *subnet.Outage) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	lasting := watchLasts + rand.N(watchLasts)
	// The server ends the watch after lasting. If it does not, the connection is dead.
	silent := time.AfterFunc(lasting+30*time.Second, func() { stop(errors.New("the API server did not end the watch in time")) })
	defer silent.Stop()
	if m.unsettled() {
		settle := time.AfterFunc(r.opts.Settle, func() {
			r.log.Info("removing the peers that have not returned", "reason", errSettled)
			m.settle()
		})
		defer settle.Stop()
	}
	began := func() {
		away.Over()
		m.contact()
	}
	return r.c.watch(ctx, *after, lasting, began, func(e *event) error {
		o := &e.Object.object
		f, err := r.keys.facts(o)
		if err != nil {
			r.log.Warn("a Node is ignored", "node", o.Metadata.Name, "error", err)
		}
		switch e.Type {
		case "ADDED", "MODIFIED":
			name := o.Metadata.Name
			f = m.known(name, f)
			changed := map[string]facts{name: f}
			if f.managed && len(f.cidrs) == 0 {
				if err := r.resolve(ctx, changed, []string{name}, *after); err != nil {
					return err
				}
			}
			changed = m.affected(name, changed[name])
			if err := r.resolve(ctx, changed, disputed(changed, m.self.Subnets()), *after); err != nil {
				return err
			}
			for name, f := range changed {
				m.change(name, f, false)
			}
		case "DELETED":
			m.change(o.Metadata.Name, f, true)
		}
		if o.Metadata.ResourceVersion != "" {
			*after = o.Metadata.ResourceVersion
			m.reached(o.Metadata.ResourceVersion)
		}
		m.contact()
		return nil
	})
}

// mirror is a copy of the Nodes. The goroutine that follows them writes it; the
// consumer of the watch takes snapshots of it.
type mirror struct {
	r      *Registry
	notify subnet.Signal // take has something new
	// changed signals the same to persist.
	changed subnet.Signal

	mu           sync.Mutex
	self         subnet.Lease
	own          facts                   // of our Node
	nodes        map[string]facts        // of the other managed Nodes
	entries      map[string]subnet.Entry // leases of nodes, by the Node's name
	retained     map[string]subnet.Entry // peers missing from a restored store, kept until settle
	revision     int64
	config       subnet.Config
	refused      string
	configSource string // text that config and refused come from
	fresh        bool
	err          error
	lost         bool // fail was called, and there was no contact since
	rejections   subnet.RejectionLog
	version      int       // incremented by publish
	listed       bool      // the API server was read
	kept         time.Time // when the content was saved to disk; zero once the API server was read
}

func newMirror(r *Registry, self subnet.Lease) *mirror {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := &mirror{
		r: r, notify: subnet.NewSignal(), changed: subnet.NewSignal(), self: self, config: r.config, configSource: r.text,
		nodes: map[string]facts{}, entries: map[string]subnet.Entry{}, retained: map[string]subnet.Entry{},
	}
	if k := r.resumed; k != nil && k.Lease.Key() == self.Key() {
		m.revision, m.kept = k.Revision, k.Saved
		for _, e := range k.Entries {
			if l, err := e.Lease(); err == nil && l.Node != self.Node {
				m.entries[l.Node] = e
			}
		}
		m.publish()
	}
	r.mirror = m
	return m
}

// last returns the revision reached, 0 if none.
func (m *mirror) last() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.revision
}

// known adds podCIDRs that are already known for the same Node to its metadata.
func (m *mirror) known(name string, f facts) facts {
	m.mu.Lock()
	defer m.mu.Unlock()
	is, ok := m.nodes[name]
	if ok && is.uid == f.uid && (len(f.cidrs) == 0 || is.fromSpec) {
		f.cidrs, f.fromSpec = is.cidrs, is.fromSpec
	}
	// Our own podCIDRs are verified by Hold.
	if name == m.self.Node {
		f.cidrs, f.fromSpec = m.self.Subnets(), true
	}
	return f
}

// affected returns the Node and, if it has changed, the other Nodes whose podCIDRs
// overlap its.
func (m *mirror) affected(name string, f facts) map[string]facts {
	m.mu.Lock()
	defer m.mu.Unlock()
	changed := map[string]facts{name: f}
	if is, ok := m.nodes[name]; name == m.self.Node || ok && is.same(f) {
		return changed
	}
	for other, g := range m.nodes {
		if other != name && slices.ContainsFunc(g.cidrs, func(p netip.Prefix) bool { return slices.ContainsFunc(f.cidrs, p.Overlaps) }) {
			changed[other] = g
		}
	}
	return changed
}

// replace applies a complete list.
func (m *mirror) replace(found map[string]facts, at string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	reached := revision(at)
	gone := m.revision != 0 && reached < m.revision
	if gone {
		m.r.log.Warn("the API server was restored to an older state; keeping the last peers until their nodes return",
			"revision", reached, "before", m.revision, "settle", m.r.opts.Settle)
		for name, e := range m.entries {
			if e.Key != name { // the key of a malformed entry is the name
				e.CreateRevision = math.MaxInt64 // entries in the store take precedence
				m.retained[name] = subnet.NewEntry(e)
			}
		}
	}
	own, there := found[m.self.Node]
	if !there || !own.same(m.own) {
		m.own = own
		m.r.verifyNow.Raise()
	}
	nodes, entries := map[string]facts{}, map[string]subnet.Entry{}
	for name, f := range found {
		delete(m.retained, name)
		if name == m.self.Node || !f.managed {
			continue
		}
		nodes[name] = f
		if is, ok := m.nodes[name]; ok && is.same(f) {
			entries[name] = m.entries[name]
		} else {
			entries[name] = f.entry(name, m.config)
		}
	}
	m.nodes, m.entries, m.revision = nodes, entries, reached
	m.listed, m.kept = true, time.Time{}
	m.checkContention()
	m.r.mu.Lock()
	m.r.resumed = nil
	m.r.mu.Unlock()
	m.publish()
}

// change applies the change or deletion of one Node.
func (m *mirror) change(name string, f facts, deleted bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if name == m.self.Node {
		if deleted {
			f = facts{}
		}
		if deleted || !f.same(m.own) {
			m.own = f
			m.r.verifyNow.Raise()
		}
		return
	}
	_, retained := m.retained[name]
	delete(m.retained, name)
	is, known := m.nodes[name]
	switch {
	case deleted || !f.managed:
		delete(m.nodes, name)
		delete(m.entries, name)
		if !known && !retained {
			return // was no peer
		}
	case known && is.same(f) && !retained:
		return // unchanged, such as a heartbeat
	default:
		m.nodes[name] = f
		m.entries[name] = f.entry(name, m.config)
		m.checkContention()
	}
	m.publish()
}

// same reports whether two facts of a Node are equal, except for the revision.
func (f facts) same(as facts) bool {
	return f.uid == as.uid && f.managed == as.managed && f.notes == as.notes && slices.Equal(f.cidrs, as.cidrs) && f.fromSpec == as.fromSpec
}

// checkContention makes Hold verify our lease if another Node has our subnet, which is
// possible only while our Node does not exist.
func (m *mirror) checkContention() {
	if held, ok := m.r.Held(); ok && !held.Expires.IsZero() && m.ownerLocked(held) != "" {
		m.r.verifyNow.Raise()
	}
}

// owner returns another Node that overlaps the lease's subnets, "" if none.
func (m *mirror) owner(l subnet.Lease) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ownerLocked(l)
}

func (m *mirror) ownerLocked(l subnet.Lease) string {
	for name, e := range m.entries {
		if other, err := e.Lease(); err == nil && l.Overlaps(other) {
			return "the Node " + name
		}
	}
	return ""
}

// reached advances the revision.
func (m *mirror) reached(at string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.revision = max(m.revision, revision(at))
}

func (m *mirror) contact() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.lost {
		m.publish()
	}
}

// unsettled reports whether peers are kept that a restored store lacks.
func (m *mirror) unsettled() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.retained) > 0
}

func (m *mirror) settle() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.retained)
	m.publish()
}

// configure applies the configuration's text if a running node can follow it.
func (m *mirror) configure(text []byte, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	refuse := func(why string) {
		if m.refused != why {
			m.r.log.Warn("the network configuration cannot be applied; the last one remains in force", "file", m.r.opts.NetConf, "error", why)
			m.refused = why
			m.publish()
		}
	}
	if err != nil {
		m.configSource = ""
		refuse(err.Error())
		return
	}
	if m.configSource == string(text) {
		return
	}
	m.configSource = string(text)
	cfg, warnings, err := subnet.ParseConfig(text)
	if err == nil {
		err = cfg.Admits(m.self)
	}
	if err != nil {
		refuse(err.Error())
		return
	}
	m.r.warn(warnings)
	m.config, m.refused = cfg, ""
	m.r.rememberConfig(cfg, m.configSource)
	m.publish()
}

// publish signals the consumers. Nothing is published without a configuration,
// which is needed to interpret the leases, nor before anything was read.
func (m *mirror) publish() {
	if len(m.config.Networks) == 0 || !m.listed && m.kept.IsZero() {
		return
	}
	m.fresh, m.err, m.lost = true, nil, false
	m.version++
	m.notify.Raise()
	m.changed.Raise()
}

// refresh publishes another snapshot because our own lease has changed.
func (m *mirror) refresh() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.publish()
}

func (m *mirror) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err, m.lost = err, true
	m.notify.Raise()
}

// take returns a snapshot, if there is a new one, and the error since the last
// call.
func (m *mirror) take() (s subnet.Snapshot, fresh bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fresh, err = m.fresh, m.err
	m.fresh, m.err = false, nil
	if !fresh {
		return subnet.Snapshot{}, false, err
	}
	all := make([]subnet.Entry, 0, len(m.entries)+len(m.retained))
	for _, entries := range []map[string]subnet.Entry{m.entries, m.retained} {
		for name, e := range entries {
			e.Key = name // so that a rejection names the Node
			all = append(all, e)
		}
	}
	self := m.self
	if held, ok := m.r.Held(); ok && held.Key() == self.Key() {
		self = held
	}
	s = subnet.BuildSnapshot(m.config, self, all, m.revision)
	s.Usage = nil // the Node controller allocates
	s.ConfigRefused, s.Kept = m.refused, m.kept
	for _, x := range m.rejections.New(s.Rejected, func(name string) int64 { return m.entries[name].ModRevision }) {
		m.r.log.Warn("a Node is ignored", "node", x.Key, "reason", x.Reason)
	}
	return s, true, err
}
