package etcd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"math/rand/v2"
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
	// lostAfter is how long there may be no connection before it is reported.
	lostAfter = 2 * time.Second
	// watchIdleLimit is how long a watch may receive nothing, not even one of the
	// progress notifications that etcd sends every 10 minutes.
	watchIdleLimit = 30 * time.Minute
)

var (
	errCompacted   = errors.New("the watched revision was compacted")
	errReconnected = errors.New("the connection was re-established")
	errWatchIdle   = errors.New("the watch received nothing for too long")
	errSettled     = errors.New("the settle time is over")
)

// Watch implements subnet.Registry. A goroutine mirrors the store; Pace yields
// snapshots of the mirror. Only one iteration may run at a time.
func (r *Registry) Watch(ctx context.Context, self subnet.Lease) iter.Seq2[subnet.Snapshot, error] {
	return func(yield func(subnet.Snapshot, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		m := newMirror(r, self)
		var mirroring sync.WaitGroup
		mirroring.Go(func() { r.mirror(ctx, m) })
		mirroring.Go(func() { r.persist(ctx, m) })
		defer mirroring.Wait()
		defer cancel()
		subnet.Pace(ctx, m.notify, m.take, yield)
	}
}

// mirror follows the store, reconnecting with backoff, until ctx ends.
func (r *Registry) mirror(ctx context.Context, m *mirror) {
	var pause subnet.Backoff
	away := r.outage()
	for {
		listed, err := r.follow(ctx, m, away)
		if ctx.Err() != nil {
			return
		}
		if listed {
			pause.Reset()
		}
		if errors.Is(err, errCompacted) || errors.Is(err, errReconnected) || errors.Is(err, errWatchIdle) {
			r.log.Info("listing all leases again", "reason", err)
		} else {
			err = r.Explain(ctx, err)
			away.Failed("etcd is unreachable; the last leases remain in force", err)
			m.fail(fmt.Errorf("watch the leases: %w", err))
		}
		if pause.Wait(ctx, 0) != nil || subnet.Sleep(ctx, m.spread()) != nil {
			return
		}
	}
}

// spread returns a random delay of up to 1 ms per lease, so that nodes that lost
// etcd at the same time do not list thousands of leases at the same time. The last
// snapshot remains valid meanwhile.
func (m *mirror) spread() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return rand.N(time.Duration(len(m.entries))*time.Millisecond + 1)
}

// follow lists everything, publishes it, and watches from the next revision until
// the watch ends. listed reports whether the list succeeded.
func (r *Registry) follow(ctx context.Context, m *mirror, away *subnet.Outage) (listed bool, err error) {
	resp := r.takeListed()
	if resp == nil {
		if resp, err = r.listAll(ctx); err != nil {
			return false, err
		}
	}
	away.Over()
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
	quiet := time.NewTimer(watchIdleLimit)
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
			return true, errWatchIdle
		case <-settle:
			r.log.Info("removing the peers that have not returned", "reason", errSettled)
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
			quiet.Reset(watchIdleLimit)
			m.change(resp)
		}
	}
}

// superviseConnection stops the watch when the connection is lost. Otherwise the
// client would silently resume it, at a revision that a restored store may not
// have reached. A loss of more than lostAfter is reported as an error; after a
// shorter one the leases are listed again. It sends nothing.
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
	stop(errReconnected)
}

// mirror is a copy of the network's keys in the store. The goroutine that follows
// the store writes it; the consumer of the watch takes snapshots of it.
type mirror struct {
	r      *Registry
	notify subnet.Signal // take has something new
	// changed signals the same to persist.
	changed subnet.Signal

	mu           sync.Mutex
	self         subnet.Lease
	entries      map[string]subnet.Entry
	retained     map[string]subnet.Entry // peers missing from a wiped or restored store, kept until settle
	revision     int64
	cluster      uint64
	config       subnet.Config
	refused      string
	configSource string // text that config and refused come from
	fresh        bool
	err          error
	rejections   subnet.RejectionLog
	version      int       // incremented by publish
	listed       bool      // etcd was read
	kept         time.Time // when the content was saved to disk; zero once etcd was read
}

func newMirror(r *Registry, self subnet.Lease) *mirror {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := &mirror{
		r: r, notify: subnet.NewSignal(), changed: subnet.NewSignal(), self: self, config: r.config, configSource: r.text,
		entries: map[string]subnet.Entry{}, retained: map[string]subnet.Entry{},
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

// replace applies a complete list.
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
		m.r.log.Warn("etcd was wiped or restored to an older state; keeping the last peers until their nodes return",
			"revision", resp.Header.Revision, "before", m.revision, "settle", m.r.opts.Settle)
		for key, e := range m.entries {
			e.CreateRevision = math.MaxInt64 // entries in the store take precedence
			m.retained[key] = subnet.NewEntry(e)
		}
	}
	for key := range entries {
		delete(m.retained, key)
	}
	delete(m.retained, m.self.Key())
	first := m.cluster == 0 // which may be older than our own lease
	m.listed, m.kept = true, time.Time{}
	m.entries, m.revision, m.cluster = entries, resp.Header.Revision, resp.Header.ClusterId
	if e, ok := entries[m.self.Key()]; !first && (!ok || !m.current(e)) {
		m.r.verifyNow.Raise()
	}
	m.publish()
}

// change applies the events of a watch response.
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
			delete(m.retained, key)
		default:
			m.entries[key] = m.r.entry(event.Kv)
			delete(m.retained, key)
		}
		changed = true
		if key == m.self.Key() && (gone || !m.current(m.entries[key])) {
			m.r.verifyNow.Raise()
		}
	}
	if changed {
		m.publish()
	}
}

// current reports whether our key is at the revision that we hold.
func (m *mirror) current(e subnet.Entry) bool {
	held, ok := m.r.Held()
	return !ok || held.Key() != e.Key || held.ModRevision == e.ModRevision
}

// unsettled reports whether peers are kept that a wiped or restored store lacks.
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

const missingConfig = "it is missing from etcd"

// configure applies the configuration's text if a running node can follow it; nil
// means that it is missing.
func (m *mirror) configure(text []byte) {
	if text != nil && m.configSource == string(text) {
		return
	}
	if text == nil {
		if m.refused != missingConfig {
			m.r.log.Warn("the network configuration is missing from etcd; the last one remains in force", "key", m.r.configKey())
		}
		m.configSource, m.refused = "", missingConfig
		return
	}
	m.configSource = string(text)
	cfg, warnings, err := subnet.ParseConfig(text)
	if err == nil && len(m.self.Endpoints) > 0 {
		err = cfg.Admits(m.self)
	}
	if err != nil {
		m.refused = err.Error()
		m.r.log.Warn("the network configuration in etcd cannot be applied; the last one remains in force", "key", m.r.configKey(), "error", err)
		return
	}
	for _, w := range warnings {
		m.r.log.Warn("network configuration", "key", w.Key, "warning", w.Message)
	}
	m.config, m.refused = cfg, ""
	m.r.rememberConfig(cfg, m.configSource)
}

// publish signals the consumers. Nothing is published without a configuration,
// which is needed to interpret the leases.
func (m *mirror) publish() {
	if len(m.config.Networks) == 0 {
		return
	}
	m.fresh, m.err = true, nil
	m.version++
	m.notify.Raise()
	m.changed.Raise()
}

func (m *mirror) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
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
	for _, e := range m.entries {
		all = append(all, e)
	}
	for _, e := range m.retained {
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
	for _, x := range m.rejections.New(s.Rejected, func(key string) int64 { return m.entries[key].ModRevision }) {
		m.r.log.Warn("a lease is ignored", "subnet", x.Key, "reason", x.Reason)
	}
	return s, true, err
}
