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
	// watchLasts is after how long the API server ends a watch, at least; up to
	// twice that, so that not all nodes return at once.
	watchLasts = 5 * time.Minute
	// fewUnknown is up to how many Nodes are read one by one for their podCIDRs;
	// for more, one list of whole Nodes is the cheaper.
	fewUnknown = 32
)

// Watch implements subnet.Registry. One goroutine mirrors the Nodes; the
// consumer's own pace decides how many changes one snapshot holds. The sequence
// may be ranged over once at a time.
func (r *Registry) Watch(ctx context.Context, self subnet.Lease) iter.Seq2[subnet.Snapshot, error] {
	return func(yield func(subnet.Snapshot, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		m := newMirror(r, self)
		var mirroring sync.WaitGroup
		mirroring.Go(func() { r.follow(ctx, m) })
		mirroring.Go(func() { r.followConfig(ctx, m) })
		mirroring.Go(func() { r.keep(ctx, m) })
		defer mirroring.Wait()
		defer cancel()
		subnet.Pace(ctx, m.news, m.take, yield)
	}
}

// followConfig reads the configuration's file as it changes, until ctx ends.
func (r *Registry) followConfig(ctx context.Context, m *mirror) {
	for sleep(ctx, readConfigEvery) == nil {
		text, err := os.ReadFile(r.opts.NetConf)
		m.configure(text, err)
	}
}

var errSettled = errors.New("the time to settle is over")

// follow mirrors the Nodes until ctx ends: a list, then one watch after another
// from where the last ended, and a list again where the API server has forgotten
// that revision.
func (r *Registry) follow(ctx context.Context, m *mirror) {
	var pause backoff
	away := outage{log: r.log}
	after := "" // the revision that the next watch follows; "" is before the list
	for {
		var err error
		if after != "" {
			err = r.checkReached(ctx, m, after)
		}
		if err == nil && after == "" {
			after, err = r.list(ctx, m)
		}
		if err == nil && after != "" {
			away.over()
			began := time.Now()
			err = r.watch(ctx, m, &after, &away)
			if time.Since(began) > pauseCeiling {
				pause.reset()
			}
		}
		switch {
		case ctx.Err() != nil:
			return
		case err == nil, errors.Is(err, io.EOF): // the server ends each watch some time
			err = nil
		case errors.Is(err, errWentBack):
			after, err = "", nil
		case has(err, http.StatusGone):
			r.log.Info("reading all Nodes anew: the API server has forgotten the revision that was watched", "revision", after)
			after, err = "", nil
		case has(err, http.StatusBadRequest), has(err, http.StatusNotFound), has(err, http.StatusGatewayTimeout):
			// Not a revision that this server knows, such as one of before a restore.
			after = ""
		}
		if err != nil {
			away.failed("the API server is unreachable or refuses; the last leases stand", err)
			m.fail(err)
		}
		if pause.wait(ctx, err) != nil {
			return
		}
	}
}

var errWentBack = errors.New("the API server is at an older state")

// checkReached asks how far the store is. A watch of a revision that a restored
// store has not reached yet would be silent until it has.
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

// list reads the metadata of all Nodes, and what that lacks.
func (r *Registry) list(ctx context.Context, m *mirror) (string, error) {
	query := url.Values{"resourceVersion": {"0"}} // what the server has at hand
	if last := m.last(); last > 0 {
		// Not from a server whose cache is behind what we know.
		query = url.Values{"resourceVersion": {fmt.Sprint(last)}, "resourceVersionMatch": {"NotOlderThan"}}
	}
	found := map[string]facts{}
	take := func(o *object) {
		f, err := r.keys.facts(o)
		if err != nil {
			r.log.Warn("a Node is set aside", "node", o.Metadata.Name, "error", err)
		}
		found[o.Metadata.Name] = f
	}
	at, err := r.c.list(ctx, metadataList, query, take)
	if has(err, http.StatusGatewayTimeout) && m.last() > 0 {
		// No server is as far: the store was restored to an older state, or the
		// server is slow. The store itself knows.
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

// resolve reads the podCIDRs of Nodes that do not repeat them in an annotation,
// or whose annotation is not to be relied on.
func (r *Registry) resolve(ctx context.Context, found map[string]facts, unknown []string, at string) error {
	fill := func(o *object) {
		f, ok := found[o.Metadata.Name]
		if !ok || f.uid != o.Metadata.UID || !slices.Contains(unknown, o.Metadata.Name) {
			return
		}
		said := f.cidrs
		f.cidrs, _ = o.podCIDRs() // the entry says that there is none
		f.sure = true
		found[o.Metadata.Name] = f
		if len(said) > 0 && !slices.Equal(said, f.cidrs) {
			r.log.Error("a Node's annotation claims other podCIDRs than it has; going by those that it has",
				"node", o.Metadata.Name, "annotation", podCIDRsAnnotation, "claims", said, "has", f.cidrs)
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

// watch follows the Nodes from a revision on, which it moves.
func (r *Registry) watch(ctx context.Context, m *mirror, after *string, away *outage) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	lasting := watchLasts + rand.N(watchLasts)
	// The server ends it then; one that does not is gone.
	silent := time.AfterFunc(lasting+30*time.Second, func() { stop(errors.New("the watch did not end in its time")) })
	defer silent.Stop()
	if m.unsettled() {
		settle := time.AfterFunc(r.opts.Settle, func() {
			r.log.Info("peers that have not come back are gone", "reason", errSettled)
			m.settle()
		})
		defer settle.Stop()
	}
	began := func() {
		away.over()
		m.contact()
	}
	return r.c.watch(ctx, *after, lasting, began, func(e *event) error {
		o := &e.Object.object
		f, err := r.keys.facts(o)
		if err != nil {
			r.log.Warn("a Node is set aside", "node", o.Metadata.Name, "error", err)
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

// mirror is the Nodes as last read. The goroutine that follows them writes it;
// the consumer of the watch reads whole snapshots of it.
type mirror struct {
	r    *Registry
	news chan struct{} // capacity 1: there is something to take
	// changed is news for what is kept on disk.
	changed chan struct{}

	mu       sync.Mutex
	self     subnet.Lease
	own      facts                   // of our Node
	nodes    map[string]facts        // of the others that are managed
	entries  map[string]subnet.Entry // the same as leases, by the Node's name
	missed   map[string]subnet.Entry // peers that a store gone back in time lacks
	revision int64
	config   subnet.Config
	refused  string
	settings string // the configuration's text that config and refused come from
	fresh    bool
	err      error
	lost     bool             // an error was told, and no contact since
	told     map[string]int64 // revision of the rejections in the log
	version  int              // counts what was published
	listed   bool             // the API server was read
	kept     time.Time        // when what there is was kept, until it was read
}

func newMirror(r *Registry, self subnet.Lease) *mirror {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := &mirror{
		r: r, news: make(chan struct{}, 1), changed: make(chan struct{}, 1), self: self, config: r.config, settings: r.text,
		nodes: map[string]facts{}, entries: map[string]subnet.Entry{}, missed: map[string]subnet.Entry{}, told: map[string]int64{},
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

// last is the revision that was reached, zero for none.
func (m *mirror) last() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.revision
}

// known completes the metadata by what is known of the same Node.
func (m *mirror) known(name string, f facts) facts {
	m.mu.Lock()
	defer m.mu.Unlock()
	is, ok := m.nodes[name]
	if ok && is.uid == f.uid && (len(f.cidrs) == 0 || is.sure) {
		f.cidrs, f.sure = is.cidrs, is.sure
	}
	// Our own are Hold's matter.
	if name == m.self.Node {
		f.cidrs, f.sure = m.self.Subnets(), true
	}
	return f
}

// affected returns the Node, and with it the others that claim an address of its
// podCIDRs, if it is not as it was.
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

// replace takes over a whole list.
func (m *mirror) replace(found map[string]facts, at string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	reached := revision(at)
	gone := m.revision != 0 && reached < m.revision
	if gone {
		m.r.log.Warn("the API server came back at an older state; the last peers stand while their nodes come back",
			"revision", reached, "before", m.revision, "settle", m.r.opts.Settle)
		for name, e := range m.entries {
			if e.Key != name { // malformed ones bear the name
				e.CreateRevision = math.MaxInt64 // whatever is in the store goes before
				m.missed[name] = subnet.NewEntry(e)
			}
		}
	}
	own, there := found[m.self.Node]
	if !there || !own.same(m.own) {
		m.own = own
		m.r.look()
	}
	nodes, entries := map[string]facts{}, map[string]subnet.Entry{}
	for name, f := range found {
		delete(m.missed, name)
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
	m.contend()
	m.r.mu.Lock()
	m.r.resumed = nil
	m.r.mu.Unlock()
	m.publish()
}

// change takes over one Node, or its end.
func (m *mirror) change(name string, f facts, deleted bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if name == m.self.Node {
		if deleted {
			f = facts{}
		}
		if deleted || !f.same(m.own) {
			m.own = f
			m.r.look()
		}
		return
	}
	_, missed := m.missed[name]
	delete(m.missed, name)
	is, known := m.nodes[name]
	switch {
	case deleted || !f.managed:
		delete(m.nodes, name)
		delete(m.entries, name)
		if !known && !missed {
			return // nobody's peer
		}
	case known && is.same(f) && !missed:
		return // a heartbeat
	default:
		m.nodes[name] = f
		m.entries[name] = f.entry(name, m.config)
		m.contend()
	}
	m.publish()
}

// same reports whether what matters of a Node is as it was.
func (f facts) same(as facts) bool {
	return f.uid == as.uid && f.managed == as.managed && f.notes == as.notes && slices.Equal(f.cidrs, as.cidrs) && f.sure == as.sure
}

// contend has Hold look when our subnet may be another's, which is so only while
// our Node is not there.
func (m *mirror) contend() {
	if held, ok := m.r.Held(); ok && !held.Expires.IsZero() && m.ownerLocked(held) != "" {
		m.r.look()
	}
}

// owner names another Node that has an address of the lease's subnets, "" for
// none.
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

// reached moves the revision; contact says that the API server is there.
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

// unsettled and settle are about the peers that a store gone back in time does
// not have.
func (m *mirror) unsettled() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.missed) > 0
}

func (m *mirror) settle() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.missed)
	m.publish()
}

// configure takes over the configuration's text if a running node can live with
// it.
func (m *mirror) configure(text []byte, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	refuse := func(why string) {
		if m.refused != why {
			m.r.log.Warn("the network configuration is refused; the last one stands", "file", m.r.opts.NetConf, "error", why)
			m.refused = why
			m.publish()
		}
	}
	if err != nil {
		m.settings = ""
		refuse(err.Error())
		return
	}
	if m.settings == string(text) {
		return
	}
	m.settings = string(text)
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
	m.r.rememberConfig(cfg, m.settings)
	m.publish()
}

// publish wakes the consumer. Nothing is published before there is a
// configuration to read the leases by, nor before there is anything to say.
func (m *mirror) publish() {
	if len(m.config.Networks) == 0 || !m.listed && m.kept.IsZero() {
		return
	}
	m.fresh, m.err, m.lost = true, nil, false
	m.version++
	m.wake()
	select {
	case m.changed <- struct{}{}:
	default:
	}
}

// refresh has another snapshot built, since our own lease has changed.
func (m *mirror) refresh() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.publish()
}

func (m *mirror) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err, m.lost = err, true
	m.wake()
}

func (m *mirror) wake() {
	select {
	case m.news <- struct{}{}:
	default:
	}
}

// take returns the state as of now: a snapshot if there is a new one, and the
// failure that came after it.
func (m *mirror) take() (s subnet.Snapshot, fresh bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fresh, err = m.fresh, m.err
	m.fresh, m.err = false, nil
	if !fresh {
		return subnet.Snapshot{}, false, err
	}
	all := make([]subnet.Entry, 0, len(m.entries)+len(m.missed))
	for _, entries := range []map[string]subnet.Entry{m.entries, m.missed} {
		for name, e := range entries {
			e.Key = name // a rejection names the Node
			all = append(all, e)
		}
	}
	self := m.self
	if held, ok := m.r.Held(); ok && held.Key() == self.Key() {
		self = held
	}
	s = subnet.BuildSnapshot(m.config, self, all, m.revision)
	s.Usage = nil // the Node controller's matter
	s.ConfigRefused, s.Kept = m.refused, m.kept
	m.tell(s.Rejected)
	return s, true, err
}

// tell logs each rejected Node once.
func (m *mirror) tell(rejected []subnet.Rejection) {
	for _, x := range rejected {
		at := m.entries[x.Key].ModRevision
		if was, ok := m.told[x.Key]; !ok || was != at {
			m.told[x.Key] = at
			m.r.log.Warn("a Node is set aside", "node", x.Key, "reason", x.Reason)
		}
	}
	for key := range m.told {
		if !slices.ContainsFunc(rejected, func(x subnet.Rejection) bool { return x.Key == key }) {
			delete(m.told, key)
		}
	}
}
