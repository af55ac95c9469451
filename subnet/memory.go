package subnet

import (
	"context"
	"fmt"
	"iter"
	"sync"
	"time"
)

// Memory is an in-process Registry for simulations and tests. All nodes share
// one value; the Node of a claim or lease identifies the caller. It follows the
// rules of package subnet/etcd: the same Choose and BuildSnapshot, and leases
// that expire without Hold.
type Memory struct {
	mu        sync.Mutex
	revision  int64
	lastID    int64
	config    *Config
	entries   map[string]Entry
	lifetimes map[int64]*lifetime
	changed   chan struct{} // closed and replaced on every change
}

// lifetime corresponds to an etcd lease: it deletes its entry when it expires.
type lifetime struct {
	ttl   time.Duration
	timer *time.Timer
}

var _ Registry = (*Memory)(nil)

// NewMemory returns an empty registry without a configuration.
func NewMemory() *Memory {
	return &Memory{entries: map[string]Entry{}, lifetimes: map[int64]*lifetime{}, changed: make(chan struct{})}
}

// SetConfig sets the network configuration.
func (m *Memory) SetConfig(cfg Config) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.config = &cfg
	m.bump()
}

// Put writes an entry without any comparison, as another program might, and
// assigns the next revision.
func (m *Memory) Put(key string, value []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.put(key, value, 0)
}

// Delete removes an entry, whichever node owns it.
func (m *Memory) Delete(key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.remove(key)
}

// Config implements Registry.
func (m *Memory) Config(ctx context.Context) (Config, error) {
	for {
		m.mu.Lock()
		cfg, changed := m.config, m.changed
		m.mu.Unlock()
		if cfg != nil {
			return *cfg, nil
		}
		select {
		case <-ctx.Done():
			return Config{}, fmt.Errorf("wait for the network configuration: %w", ctx.Err())
		case <-changed:
		}
	}
}

// Acquire implements Registry.
func (m *Memory) Acquire(_ context.Context, c Claim) (Lease, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	choice, err := Choose(c, Occupied(m.all()))
	if err != nil {
		return Lease{}, fmt.Errorf("acquire a lease: %w", err)
	}
	value, err := choice.Lease.Value()
	if err != nil {
		return Lease{}, fmt.Errorf("acquire a lease: %w", err)
	}
	for _, drop := range choice.Drop {
		m.remove(drop.Key())
	}
	ttl := c.TTL
	if ttl <= 0 {
		ttl = 24 * time.Hour
	}
	return m.lease(choice.Lease, value, ttl)
}

// Hold implements Registry.
func (m *Memory) Hold(ctx context.Context, l Lease) error {
	for {
		wait, changed, err := m.renew(&l)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-changed:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// renew restarts the lease's lifetime, or recreates a deleted lease if its
// subnet is free. It returns when to call it again: after the duration, or once
// the channel is closed.
func (m *Memory) renew(l *Lease) (time.Duration, <-chan struct{}, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.entries[l.Key()]
	if !ok {
		for _, e := range m.entries {
			if other, err := e.Lease(); err == nil && (l.Overlaps(other) || l.Rival(other) != nil) {
				return 0, nil, fmt.Errorf("%w: it was deleted, and %s replaced it", ErrLost, other)
			}
		}
		value, err := l.Value()
		if err != nil {
			return 0, nil, err
		}
		again, err := m.lease(*l, value, 24*time.Hour)
		if err != nil {
			return 0, nil, err
		}
		*l, e = again, m.entries[l.Key()]
	} else if is, err := e.Lease(); err != nil {
		return 0, nil, fmt.Errorf("%w: the value at its key is malformed: %w", ErrLost, err)
	} else if is.Node != l.Node {
		return 0, nil, fmt.Errorf("%w: its key now holds %s", ErrLost, is)
	}
	life, ok := m.lifetimes[e.ID]
	if !ok {
		return time.Hour, m.changed, nil // has no lifetime
	}
	life.timer.Reset(life.ttl)
	return life.ttl / 3, m.changed, nil
}

// Update implements Registry.
func (m *Memory) Update(_ context.Context, l Lease) (Lease, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[l.Key()]
	is, err := e.Lease()
	if err != nil || is.Node != l.Node {
		return Lease{}, fmt.Errorf("update lease %s: %w", l, ErrLost)
	}
	for _, other := range Occupied(m.all()).Leases {
		if err := l.Rival(other); err != nil {
			return Lease{}, fmt.Errorf("update lease %s: %w", l, err)
		}
	}
	value, err := l.Value()
	if err != nil {
		return Lease{}, fmt.Errorf("update: %w", err)
	}
	m.put(e.Key, value, e.ID)
	return m.entries[e.Key].Lease()
}

// Release implements Registry.
func (m *Memory) Release(_ context.Context, l Lease) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if is, err := m.entries[l.Key()].Lease(); err == nil && is.Node == l.Node {
		m.remove(l.Key())
	}
	return nil
}

// Watch implements Registry. It never yields an error.
func (m *Memory) Watch(ctx context.Context, self Lease) iter.Seq2[Snapshot, error] {
	return func(yield func(Snapshot, error) bool) {
		var cfg Config
		for {
			m.mu.Lock()
			revision, entries, changed := m.revision, m.all(), m.changed
			refused := ""
			if m.config == nil {
				refused = "it is missing"
			} else if err := m.config.Admits(self); len(cfg.Networks) > 0 && err != nil {
				refused = err.Error()
			} else {
				cfg = *m.config
			}
			m.mu.Unlock()
			if len(cfg.Networks) > 0 {
				s := BuildSnapshot(cfg, self, entries, revision)
				s.ConfigRefused = refused
				if ctx.Err() != nil || !yield(s, nil) {
					return
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
		}
	}
}

// lease writes a value with a new lifetime.
func (m *Memory) lease(l Lease, value []byte, ttl time.Duration) (Lease, error) {
	key := l.Key()
	m.lastID++
	id := m.lastID
	m.lifetimes[id] = &lifetime{ttl: ttl, timer: time.AfterFunc(ttl, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.entries[key].ID == id {
			m.remove(key)
		}
	})}
	m.put(key, value, id)
	return m.entries[key].Lease()
}

func (m *Memory) put(key string, value []byte, id int64) {
	m.bump()
	old, ok := m.entries[key]
	if !ok {
		old.CreateRevision = m.revision
	}
	if old.ID != id {
		m.end(old.ID)
	}
	m.entries[key] = NewEntry(Entry{Key: key, Value: value, CreateRevision: old.CreateRevision, ModRevision: m.revision, ID: id})
}

func (m *Memory) remove(key string) {
	if e, ok := m.entries[key]; ok {
		m.end(e.ID)
		delete(m.entries, key)
		m.bump()
	}
}

func (m *Memory) end(id int64) {
	if life, ok := m.lifetimes[id]; ok {
		life.timer.Stop()
		delete(m.lifetimes, id)
	}
}

func (m *Memory) bump() {
	m.revision++
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *Memory) all() []Entry {
	all := make([]Entry, 0, len(m.entries))
	for _, e := range m.entries {
		all = append(all, e)
	}
	return all
}
