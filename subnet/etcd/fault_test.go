package etcd

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"culvert/subnet"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// lines is a log writer that a test can read.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *lines) count(text string) int { return strings.Count(l.String(), text) }

func (l *lines) options(o *Options) {
	o.Logger = slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

var errUnanswered = errors.New("the response was lost")

// lossyKV drops the responses of transactions, or delays the requests.
type lossyKV struct {
	clientv3.KV
	lose    atomic.Int32 // how many to drop
	delayed bool         // send the request only when deliver is called
	late    []func()
}

func (kv *lossyKV) Txn(ctx context.Context) clientv3.Txn {
	return &lossyTxn{Txn: kv.KV.Txn(ctx), kv: kv, again: func() clientv3.Txn { return kv.KV.Txn(context.Background()) }}
}

func (kv *lossyKV) deliver() {
	for _, f := range kv.late {
		f()
	}
}

type lossyTxn struct {
	clientv3.Txn
	kv    *lossyKV
	again func() clientv3.Txn
	ifs   []clientv3.Cmp
	then  []clientv3.Op
}

func (t *lossyTxn) If(ifs ...clientv3.Cmp) clientv3.Txn { t.ifs = ifs; return t }

func (t *lossyTxn) Then(ops ...clientv3.Op) clientv3.Txn { t.then = ops; return t }

func (t *lossyTxn) Commit() (*clientv3.TxnResponse, error) {
	if !writes(t.then) || t.kv.lose.Add(-1) < 0 {
		return t.Txn.If(t.ifs...).Then(t.then...).Commit()
	}
	if t.kv.delayed {
		t.kv.late = append(t.kv.late, func() { _, _ = t.again().If(t.ifs...).Then(t.then...).Commit() })
	} else if _, err := t.Txn.If(t.ifs...).Then(t.then...).Commit(); err != nil {
		return nil, err
	}
	return nil, errUnanswered
}

// brokenLease makes every renewal fail at once.
type brokenLease struct {
	clientv3.Lease
	broken atomic.Bool
	asked  atomic.Int32
}

func (b *brokenLease) KeepAliveOnce(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseKeepAliveResponse, error) {
	b.asked.Add(1)
	if b.broken.Load() {
		return nil, errUnanswered
	}
	return b.Lease.KeepAliveOnce(ctx, id)
}

// instantLease answers every renewal at once, with a lifetime of 0, so that the next
// is due immediately, and calls each with its number.
type instantLease struct {
	clientv3.Lease
	asked int
	each  func(n int) error
}

func (l *instantLease) KeepAliveOnce(_ context.Context, id clientv3.LeaseID) (*clientv3.LeaseKeepAliveResponse, error) {
	l.asked++
	return &clientv3.LeaseKeepAliveResponse{ID: id}, l.each(l.asked)
}

// faultyWatcher can inject responses into the watches.
type faultyWatcher struct {
	clientv3.Watcher
	inject chan clientv3.WatchResponse
}

func (w *faultyWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	real := w.Watcher.Watch(ctx, key, opts...)
	out := make(chan clientv3.WatchResponse)
	go func() {
		defer close(out)
		for {
			var resp clientv3.WatchResponse
			var ok bool
			select {
			case resp, ok = <-real:
				if !ok {
					return
				}
			case resp = <-w.inject:
			}
			select {
			case out <- resp:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// watching runs Watch and records what it yields.
type watching struct {
	mu        sync.Mutex
	snapshots []subnet.Snapshot
	errs      []error
	running   sync.WaitGroup
	stop      func() // ends the watch; called at the end of the test
}

func watch(t *testing.T, r *Registry, self subnet.Lease) *watching {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := &watching{}
	w.stop = func() { cancel(); w.running.Wait() }
	w.running.Go(func() {
		for s, err := range r.Watch(ctx, self) {
			w.mu.Lock()
			if err != nil {
				w.errs = append(w.errs, err)
			} else {
				w.snapshots = append(w.snapshots, s)
			}
			w.mu.Unlock()
		}
	})
	t.Cleanup(w.stop)
	return w
}

func (w *watching) last() subnet.Snapshot {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.snapshots) == 0 {
		return subnet.Snapshot{}
	}
	return w.snapshots[len(w.snapshots)-1]
}

func (w *watching) count() (snapshots, errs int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.snapshots), len(w.errs)
}

// hold runs Hold and sends its error when it returns.
func hold(t *testing.T, r *Registry, l subnet.Lease) <-chan error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	var running sync.WaitGroup
	running.Go(func() { done <- r.Hold(ctx, l) })
	t.Cleanup(func() { cancel(); running.Wait() })
	return done
}

func contains(err error, text string) bool { return err != nil && strings.Contains(err.Error(), text) }

func mustPrefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// slowLease delays the responses by 500 ms, as if the process had been stopped.
type slowLease struct{ clientv3.Lease }

func (s slowLease) KeepAliveOnce(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseKeepAliveResponse, error) {
	resp, err := s.Lease.KeepAliveOnce(ctx, id)
	time.Sleep(500 * time.Millisecond)
	return resp, err
}

// writes reports whether a transaction has a put or a delete.
func writes(ops []clientv3.Op) bool {
	return slices.ContainsFunc(ops, func(o clientv3.Op) bool { return o.IsPut() || o.IsDelete() })
}
