package etcd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"culvert/subnet"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
)

const (
	// lostAfter is how long no connection may stand before it is reported.
	lostAfter = 2 * time.Second
	// quietLimit is how long a watch may say nothing at all, not even that
	// nothing has changed, which etcd says every 10 minutes.
	quietLimit = 30 * time.Minute
)

var (
	errCompacted = errors.New("the watched revision was compacted")
	errFlapped   = errors.New("the connection was made anew")
	errSilent    = errors.New("the watch has been silent for too long")
	errSettled   = errors.New("the time to settle is over")
)

// Watch implements subnet.Registry. One goroutine mirrors the store; the
// consumer's own pace decides how many changes one snapshot holds. The sequence
// may be ranged over once at a time.
func (r *Registry) Watch(ctx context.Context, self subnet.Lease) iter.Seq2[subnet.Snapshot, error] {
	return func(yield func(subnet.Snapshot, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		m := newMirror(r, self)
		var mirroring sync.WaitGroup
		mirroring.Go(func() { r.mirror(ctx, m) })
		mirroring.Go(func() { r.keep(ctx, m) })
		defer mirroring.Wait()
		defer cancel()
		subnet.Pace(ctx, m.news, m.take, yield)
	}
}

// mirror follows the store until ctx ends, again and again.
func (r *Registry) mirror(ctx context.Context, m *mirror) {
	var pause backoff
	away := outage{log: r.log}
	for {
		listed, err := r.follow(ctx, m, &away)
		if ctx.Err() != nil {
			return
		}
		if listed {
			pause.reset()
		}
		if errors.Is(err, errCompacted) || errors.Is(err, errFlapped) || errors.Is(err, errSilent) {
			r.log.Info("reading all leases anew", "reason", err)
		} else {
			err = r.Explain(ctx, err)
			away.failed("etcd is out of reach; the last leases stand", err)
			m.fail(fmt.Errorf("watch the leases: %w", err))
		}
		if pause.wait(ctx) != nil || sleep(ctx, m.spread()) != nil {
			return
		}
	}
}

// spread is a random part of a millisecond for each lease there is: nodes that
// lost etcd at one moment do not all list thousands of leases at one moment.
// What was last read stands meanwhile.
func (m *mirror) spread() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return rand.N(time.Duration(len(m.entries))*time.Millisecond + 1)
}

// follow lists everything, publishes it, and watches from the next revision on
// until the watch ends, and says whether it got as far as the list.
func (r *Registry) follow(ctx context.Context, m *mirror, away *outage) (listed bool, err error) {
	resp := r.takeListed()
	if resp == nil {
		if resp, err = r.listAll(ctx); err != nil {
			return false, err
		}
	}
	away.over()
	m.replace(resp)
	r.mu.Lock()
	r.resumed = nil
	r.mu.Unlock()

	wctx, stop := context.WithCancelCause(clientv3.WithRequireLeader(ctx))
	defer stop(nil)
	var watching sync.WaitGroup
	defer watching.Wait()
	watching.Go(func() { superviseConnection(wctx, r.client.ActiveConnection(), stop) })
	defer stop(nil)

	changes := r.client.Watch(wctx, r.directory(), clientv3.WithPrefix(),
		clientv3.WithRev(resp.Header.Revision+1), clientv3.WithProgressNotify())
	quiet := time.NewTimer(quietLimit)
	defer quiet.Stop()
	var settle <-chan time.Time
	if m.unsettled() {
		timer := time.NewTimer(r.opts.Settle)
		defer timer.Stop()
		settle = timer.C
	}
	for {
		select {
		case <-wctx.Done():
			return true, context.Cause(wctx)
		case <-quiet.C:
			return true, errSilent
		case <-settle:
			r.log.Info("peers that have not come back are gone", "reason", errSettled)
			m.settle()
		case resp, ok := <-changes:
			switch {
			case !ok:
				return true, cmp.Or(context.Cause(wctx), errors.New("the watch ended"))
			case resp.CompactRevision != 0 || errors.Is(resp.Err(), rpctypes.ErrCompacted):
				return true, errCompacted
			case resp.Err() != nil:
				return true, resp.Err()
			}
			quiet.Reset(quietLimit)
			m.change(resp)
		}
	}
}

// superviseConnection stops the watch when the connection was lost, since the
// client would resume it in silence, and at a revision that a restored store
// may not have reached: a loss that lasts is reported, a short one is followed
// by a fresh list. It sends nothing.
func superviseConnection(ctx context.Context, conn *grpc.ClientConn, stop context.CancelCauseFunc) {
	for state := conn.GetState(); state == connectivity.Ready; state = conn.GetState() {
		if !conn.WaitForStateChange(ctx, state) {
			return
		}
	}
	lctx, cancel := context.WithTimeout(ctx, lostAfter)
	defer cancel()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		conn.Connect()
		if !conn.WaitForStateChange(lctx, state) {
			if ctx.Err() == nil {
				stop(fmt.Errorf("no connection for %v", lostAfter))
			}
			return
		}
	}
	stop(errFlapped)
}

// mirror is the store's directory as last read. The goroutine that follows
// the store writes it; the consumer of the watch reads whole snapshots of it.
type mirror struct {
	r    *Registry
	news chan struct{} // capacity 1: there is something to take
	// changed is news for what is kept on disk.
	changed chan struct{}

	mu       sync.Mutex
	self     subnet.Lease
	entries  map[string]subnet.Entry
	missed   map[string]subnet.Entry // peers that a store gone back in time lacks
	revision int64
	cluster  uint64
	config   subnet.Config
	refused  string
	settings string // the configuration's text that config and refused come from
	fresh    bool
	err      error
	told     map[string]int64 // ModRevision of the rejections in the log
	version  int              // counts what was published
	listed   bool             // etcd was read
	kept     time.Time        // when what there is was kept, until etcd was read
}

func newMirror(r *Registry, self subnet.Lease) *mirror {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := &mirror{
		r: r, news: make(chan struct{}, 1), changed: make(chan struct{}, 1), self: self, config: r.config, settings: r.text,
		entries: map[string]subnet.Entry{}, missed: map[string]subnet.Entry{}, told: map[string]int64{},
	}
	if k := r.resumed; k != nil && k.Lease.Key() == self.Key() {
		m.revision, m.cluster, m.kept = k.Revision, k.Cluster, k.Saved
		for _, e := range k.Entries {
			m.entries[e.Key] = e
		}
		m.publish()
	}
	return m
}

// replace takes over a whole list.
func (m *mirror) replace(resp *clientv3.TxnResponse) {
	m.mu.Lock()
	defer m.mu.Unlock()
	config, subnets := resp.Responses[0].GetResponseRange().Kvs, resp.Responses[1].GetResponseRange().Kvs
	entries := make(map[string]subnet.Entry, len(subnets))
	for _, kv := range subnets {
		e, ok := m.entries[strings.TrimPrefix(string(kv.Key), m.r.subnetsDir())]
		if !ok || e.ModRevision != kv.ModRevision || e.CreateRevision != kv.CreateRevision {
			e = m.r.entry(kv)
		}
		entries[e.Key] = e
	}
	if len(config) == 1 {
		m.configure(config[0].Value)
	} else {
		m.configure(nil)
	}
	if m.cluster != 0 && (resp.Header.ClusterId != m.cluster || resp.Header.Revision < m.revision) {
		m.r.log.Warn("etcd was wiped or restored to an older state; the last peers stand while their nodes come back",
			"revision", resp.Header.Revision, "before", m.revision, "settle", m.r.opts.Settle)
		for key, e := range m.entries {
			e.CreateRevision = math.MaxInt64 // whatever is in the store goes before
			m.missed[key] = subnet.NewEntry(e)
		}
	}
	for key := range entries {
		delete(m.missed, key)
	}
	delete(m.missed, m.self.Key())
	first := m.cluster == 0 // and may be of before our own lease
	m.listed, m.kept = true, time.Time{}
	m.entries, m.revision, m.cluster = entries, resp.Header.Revision, resp.Header.ClusterId
	if e, ok := entries[m.self.Key()]; !first && (!ok || !m.current(e)) {
		m.r.look()
	}
	m.publish()
}

// change takes over what the watch says.
func (m *mirror) change(resp clientv3.WatchResponse) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.revision = max(m.revision, resp.Header.Revision)
	changed := false
	for _, event := range resp.Events {
		key, isSubnet := strings.CutPrefix(string(event.Kv.Key), m.r.subnetsDir())
		gone := event.Type == mvccpb.DELETE
		switch {
		case string(event.Kv.Key) == m.r.configKey() && gone:
			m.configure(nil)
		case string(event.Kv.Key) == m.r.configKey():
			m.configure(event.Kv.Value)
		case !isSubnet:
			continue
		case gone:
			delete(m.entries, key)
			delete(m.missed, key)
		default:
			m.entries[key] = m.r.entry(event.Kv)
			delete(m.missed, key)
		}
		changed = true
		if key == m.self.Key() && (gone || !m.current(m.entries[key])) {
			m.r.look()
		}
	}
	if changed {
		m.publish()
	}
}

// current reports whether our key is as we last knew it.
func (m *mirror) current(e subnet.Entry) bool {
	held, ok := m.r.Held()
	return !ok || held.Key() != e.Key || held.ModRevision == e.ModRevision
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

const missingConfig = "it is missing from etcd"

// configure takes over the configuration's text if a running node can live
// with it; nil is a missing one.
func (m *mirror) configure(text []byte) {
	if text != nil && m.settings == string(text) {
		return
	}
	if text == nil {
		if m.refused != missingConfig {
			m.r.log.Warn("the network configuration is gone from etcd; the last one stands", "key", m.r.configKey())
		}
		m.settings, m.refused = "", missingConfig
		return
	}
	m.settings = string(text)
	cfg, warnings, err := subnet.ParseConfig(text)
	if err == nil && len(m.self.Endpoints) > 0 {
		err = cfg.Admits(m.self)
	}
	if err != nil {
		m.refused = err.Error()
		m.r.log.Warn("the network configuration in etcd is refused; the last one stands", "key", m.r.configKey(), "error", err)
		return
	}
	for _, w := range warnings {
		m.r.log.Warn("network configuration", "key", w.Key, "warning", w.Message)
	}
	m.config, m.refused = cfg, ""
	m.r.rememberConfig(cfg, m.settings)
}

// publish wakes the consumer. Nothing is published before there is a
// configuration to read the leases by.
func (m *mirror) publish() {
	if len(m.config.Networks) == 0 {
		return
	}
	m.fresh, m.err = true, nil
	m.version++
	m.wake()
	select {
	case m.changed <- struct{}{}:
	default:
	}
}

func (m *mirror) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
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
	for _, e := range m.entries {
		all = append(all, e)
	}
	for _, e := range m.missed {
		all = append(all, e)
	}
	self := m.self
	if held, ok := m.r.Held(); ok && held.Key() == self.Key() {
		self = held
	}
	s = subnet.BuildSnapshot(m.config, self, all, m.revision)
	if s.Self.ID == self.ID {
		s.Self.Expires = self.Expires
	}
	s.ConfigRefused, s.Kept = m.refused, m.kept
	m.tell(s.Rejected)
	return s, true, err
}

// tell logs each rejected value once.
func (m *mirror) tell(rejected []subnet.Rejection) {
	for _, rejection := range rejected {
		revision := m.entries[rejection.Key].ModRevision
		if m.told[rejection.Key] != revision {
			m.told[rejection.Key] = revision
			m.r.log.Warn("a lease is set aside", "subnet", rejection.Key, "reason", rejection.Reason)
		}
	}
	for key := range m.told {
		if !slices.ContainsFunc(rejected, func(x subnet.Rejection) bool { return x.Key == key }) {
			delete(m.told, key)
		}
	}
}
