package test

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"culvert/subnet"
	"culvert/subnet/etcd"
)

// player is a node in the model test.
type player struct {
	*round
	n        int
	random   *rand.Rand
	registry *etcd.Registry
	line     *frozenLine
	dir      string      // of the files of a mortal node; others have none
	lost     atomic.Bool // Hold has returned that the lease is lost
	holding  sync.WaitGroup
	cancel   context.CancelFunc
}

// play acquires and gives up leases until the faults are over, and then until the node has
// a subnet or has been told that none is free.
func (p *player) play(ctx context.Context) (won bool) {
	p.pause(ctx, 500*time.Millisecond)
	for ctx.Err() == nil {
		last := !p.faults.Load()
		l, ok := p.acquire(ctx)
		switch {
		case ctx.Err() != nil:
			return false
		case !ok && last:
			return false
		case !ok:
			p.pause(ctx, time.Second)
			continue
		}
		index := int(l.Subnets()[0].Addr().As4()[2])
		// Keep the lease for a while; then release it or, if mortal, be cut off.
		for p.faults.Load() && p.random.IntN(3) != 0 {
			p.pause(ctx, 500*time.Millisecond)
		}
		switch {
		case p.lost.Load():
		case !p.faults.Load():
			return true
		case mortal(p.n):
			p.isolate(ctx, index)
		default:
			p.stopReady()
			at := p.now()
			if err := p.registry.Release(ctx, l); err != nil {
				p.t.Errorf("node %d releases %s: %v", p.n, l, err)
			}
			p.record(at, call{kind: "release", node: p.n, subnet: index})
			p.leave()
			p.pause(ctx, 300*time.Millisecond)
		}
	}
	return false
}

func (p *player) pause(ctx context.Context, most time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(time.Duration(p.random.Int64N(int64(most)))):
	}
}

// acquire acquires a lease and holds it.
func (p *player) acquire(ctx context.Context) (subnet.Lease, bool) {
	p.leave()
	p.line = &frozenLine{dial: p.members.dial, thawed: make(chan struct{})}
	cfg, _, err := subnet.ParseConfig([]byte(modelConfig))
	if err != nil {
		p.t.Error(err)
		return subnet.Lease{}, false
	}
	if p.registry, err = p.open(); err != nil {
		p.t.Error(err)
		return subnet.Lease{}, false
	}
	if mortal(p.n) { // it writes a snapshot, which needs the configuration
		if _, err := p.registry.Config(ctx); err != nil {
			return subnet.Lease{}, false
		}
	}
	claim := subnet.Claim{Node: nodeName(p.n), Config: cfg, TTL: 10 * time.Minute}
	if mortal(p.n) {
		claim.TTL = modelTTL
	}
	claim.Ends = []subnet.Endpoint{{Public: netip.AddrFrom4([4]byte{192, 0, 2, byte(p.n)}), VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(claim.Node, 1, false)}}}
	before, at := p.history.at(), p.now()
	l, err := p.registry.Acquire(ctx, claim)
	switch {
	case ctx.Err() != nil:
		return l, false
	case errors.Is(err, subnet.ErrExhausted):
		p.record(at, call{kind: "exhausted", node: p.n, revision: before})
		return l, false
	case err != nil:
		p.t.Errorf("node %d: %v", p.n, err)
		return l, false
	}
	p.lost.Store(false)
	p.startReady()
	p.record(at, call{kind: "acquire", node: p.n, subnet: int(l.Subnets()[0].Addr().As4()[2]), revision: l.CreateRevision})
	p.hold(ctx, l)
	return l, true
}

// open opens the registry of the node's process.
func (p *player) open() (*etcd.Registry, error) {
	o := etcd.Options{
		Endpoints: p.members.urls(), Prefix: p.prefix, Logger: slog.New(slog.DiscardHandler),
		RequestTimeout: 2 * time.Second, DialTimeout: 2 * time.Second, Dial: p.line.connect,
	}
	if p.dir != "" {
		o.StateFile, o.SnapshotFile = filepath.Join(p.dir, "lease.json"), filepath.Join(p.dir, "snapshot.json")
	}
	return etcd.New(o)
}

// hold holds the lease until leave; a mortal node also watches the leases.
func (p *player) hold(ctx context.Context, l subnet.Lease) {
	hctx, cancel := context.WithCancel(ctx)
	p.cancel = cancel
	registry := p.registry
	p.holding.Go(func() {
		if err := registry.Hold(hctx, l); err != nil {
			p.stopReady()
			p.lost.Store(true)
			if !mortal(p.n) && !strings.Contains(err.Error(), "released") {
				p.t.Errorf("node %d lost %s: %v", p.n, l, err)
			}
		}
	})
	if mortal(p.n) {
		p.holding.Go(func() {
			for range registry.Watch(hctx, l) {
				continue
			}
		})
	}
}

// restart ends the process of a node that is cut off and starts another, which resumes the
// lease from its files if that has not expired.
func (p *player) restart(ctx context.Context) {
	p.leave()
	p.line = &frozenLine{dial: p.members.dial, thawed: make(chan struct{})}
	p.line.freeze()
	var err error
	if p.registry, err = p.open(); err != nil {
		p.t.Error(err)
		return
	}
	k, err := p.registry.Kept(nodeName(p.n))
	if err != nil || k == nil {
		return // the lease has expired, or was not saved yet
	}
	p.registry.Resume(k, modelTTL)
	p.startReady()
	p.hold(ctx, k.Lease)
	p.mu.Lock()
	p.tally.resumed++
	p.mu.Unlock()
}

// isolate cuts the node off from etcd, without an error that it could notice, until its
// lease has expired and been deleted. Then the node's process ends.
func (p *player) isolate(ctx context.Context, index int) {
	p.line.freeze()
	deadline := time.Now().Add(8 * modelTTL)
	if p.random.IntN(2) == 0 {
		p.pause(ctx, modelTTL)
		p.restart(ctx)
	}
	gone := false
	for !gone && !p.lost.Load() && ctx.Err() == nil && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond)
		gone = !p.history.has(index, p.n)
	}
	// Another node may have the subnet now. Keep this node for a moment, so that the
	// sampler sees whether it still believes that it holds the lease.
	p.pause(ctx, time.Second)
	p.stopReady()
	p.leave()
	if !gone && !p.lost.Load() && ctx.Err() == nil {
		p.t.Errorf("node %d: the lease of subnet %d did not expire", p.n, index)
	}
}

// leave ends the node's process.
func (p *player) leave() {
	p.stopReady()
	if p.registry == nil {
		return
	}
	if p.cancel != nil {
		p.cancel()
	}
	p.line.close()
	p.holding.Wait()
	_ = p.registry.Close()
	p.registry, p.cancel = nil, nil
}

func (p *player) startReady() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready[p.n] = p.registry
}

func (p *player) stopReady() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready[p.n] = nil
}

// frozenLine makes a node's connections to etcd. Once frozen, they block without an error.
type frozenLine struct {
	dial   func(context.Context, string) (net.Conn, error)
	frozen atomic.Bool
	thawed chan struct{} // closed by close, which ends blocked calls
	once   sync.Once
}

func (f *frozenLine) freeze() { f.frozen.Store(true) }
func (f *frozenLine) close()  { f.once.Do(func() { close(f.thawed) }) }

func (f *frozenLine) connect(ctx context.Context, address string) (net.Conn, error) {
	if f.frozen.Load() {
		select {
		case <-f.thawed:
			return nil, net.ErrClosed
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	c, err := f.dial(ctx, address)
	if err != nil {
		return nil, err
	}
	return frozenConn{c, f}, nil
}

type frozenConn struct {
	net.Conn
	line *frozenLine
}

func (c frozenConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.line.frozen.Load() {
		<-c.line.thawed
		return 0, net.ErrClosed
	}
	return n, err
}

func (c frozenConn) Write(b []byte) (int, error) {
	if c.line.frozen.Load() {
		<-c.line.thawed
		return 0, net.ErrClosed
	}
	return c.Conn.Write(b)
}
