// Package etcd is the lease registry on etcd v3, in flannel's layout:
// <prefix>/config is the network configuration, <prefix>/subnets/<key> a lease.
//
// Every write is a transaction that compares what the writer believes, so that
// nobody's lease is ever overwritten. etcd being away is never a loss: each
// call waits for it, with a pause that grows to a ceiling, and what was last
// read stands meanwhile.
package etcd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"culvert/internal/boottime"
	"culvert/subnet"
	"culvert/subnet/kept"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Registry is one node's way to the leases: it holds one lease at most. It is
// also the administrator's (subnet.Admin). Its methods may be called at one
// time.
type Registry struct {
	client *clientv3.Client
	conns  *connections
	// contact is how the attempts to reach the servers went.
	contact *contact
	opts    Options
	log     *slog.Logger

	// turn is taken by whoever writes our own key, over all of its requests.
	turn chan struct{}
	// poke tells Hold to look at our own key.
	poke chan struct{}
	kept int64 // the handle in the state file, if this process wrote it; under turn
	mark int64 // the etcd lease of our subnet's mark, zero if not known; Hold's alone

	mu      sync.Mutex
	held    subnet.Lease  // as last written or read; without Endpoints: none
	endsUp  time.Duration // when held ends, by CLOCK_BOOTTIME
	ttl     time.Duration // as claimed
	config  subnet.Config // the last valid one; without Networks: none
	text    string        // that config was read from
	listed  *listing      // what Acquire read, for Watch to begin with
	resumed *kept.State   // for Watch to begin with; nil once etcd was read

	keeping   sync.Mutex // the snapshot's file
	forgotten bool       // nothing is to be kept any more
}

// listing is an answer of listAll, and when it was had.
type listing struct {
	resp *clientv3.TxnResponse
	at   time.Time
}

// listedLimit is how old a listing may be to begin a watch with.
const listedLimit = 10 * time.Second

var (
	_ subnet.Registry = (*Registry)(nil)
	_ subnet.Admin    = (*Registry)(nil)
)

// New makes a registry; nothing is sent yet. An error says what in the options
// cannot work. The caller ends it with Close.
func New(o Options) (*Registry, error) {
	o, err := o.complete()
	if err != nil {
		return nil, err
	}
	tlsConfig, err := o.tls()
	if err != nil {
		return nil, err
	}
	if o.User != "" && tlsConfig == nil {
		o.Logger.Warn("the etcd password travels unencrypted; use https endpoints", "endpoints", o.Endpoints)
	}
	cfg := clientv3.Config{
		Endpoints:   o.Endpoints,
		DialTimeout: o.DialTimeout,
		TLS:         tlsConfig,
		Logger:      zap.NewNop(),
		// A silent peer is given up after 15 s, while anything is watched. Servers
		// refuse pings that come faster than 5 s, and those of idle clients.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		// The callers here have their own pauses.
		MaxUnaryRetries:    2,
		BackoffWaitBetween: 100 * time.Millisecond,
		// gRPC's pause between attempts to connect grows to 2 minutes by default.
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           grpcbackoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.3, MaxDelay: 5 * time.Second},
			MinConnectTimeout: o.DialTimeout,
		})},
	}
	reached := newContact(o)
	conns := newConnections(o, reached, tlsConfig == nil)
	cfg.DialOptions = append(cfg.DialOptions, grpc.WithContextDialer(conns.connect))
	if tlsConfig != nil {
		cfg.DialOptions = append(cfg.DialOptions, grpc.WithTransportCredentials(&renewedTLS{o, reached}))
	}
	r := &Registry{opts: o, conns: conns, contact: reached, log: o.Logger, turn: make(chan struct{}, 1), poke: make(chan struct{}, 1)}
	if o.FailFast {
		cfg.DialOptions = append(cfg.DialOptions, grpc.WithChainUnaryInterceptor(failFast))
	}
	if o.User != "" {
		auth := newAuthentication(o)
		cfg.DialOptions = append(cfg.DialOptions, grpc.WithChainUnaryInterceptor(auth.unary), grpc.WithChainStreamInterceptor(auth.stream))
	}
	if r.client, err = clientv3.New(cfg); err != nil {
		return nil, fmt.Errorf("etcd: connect to %s: %w", strings.Join(o.Endpoints, ", "), err)
	}
	return r, nil
}

// Close ends the connection. It does not give the lease back (Release).
func (r *Registry) Close() error { return r.client.Close() }

// clockStep is by how much the wall clock must have been set to be noticed.
const clockStep = time.Second

// Held returns the lease that this registry holds, as last written or read,
// and whether there is one. Expires moves with each renewal, and when the wall
// clock is set: it is what is left of the lifetime by the clock that nobody sets,
// from now on.
func (r *Registry) Held() (subnet.Lease, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.held
	if up, err := boottime.Up(); err == nil && !l.Expires.IsZero() {
		// As the wall clock has it now, by its own reading: Expires may have a
		// monotonic one. Two readings of two clocks lie a little apart by themselves.
		ends := time.Now().Add(r.endsUp - up)
		if ends.Round(0).Sub(l.Expires.Round(0)).Abs() > clockStep {
			l.Expires = ends
		}
	}
	return l, len(l.Endpoints) > 0
}

func (r *Registry) setHeld(l subnet.Lease) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keepHeld(l)
}

// keepHeld is setHeld for who has mu.
func (r *Registry) keepHeld(l subnet.Lease) {
	r.held, r.endsUp = l, 0
	// This clock first: too early an end does no harm.
	if up, err := boottime.Up(); err == nil {
		r.endsUp = up + time.Until(l.Expires)
	}
}

// Look has the held lease compared with etcd's at once: a clock was set, or the
// machine was suspended or put back to an earlier state.
func (r *Registry) Look() { r.look() }

// lifetime is what was claimed, for a lease that must be granted again.
func (r *Registry) lifetime() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return cmp.Or(r.ttl, DefaultTTL)
}

func (r *Registry) directory() string  { return r.opts.Prefix + "/" }
func (r *Registry) configKey() string  { return r.opts.Prefix + "/config" }
func (r *Registry) subnetsDir() string { return r.opts.Prefix + "/subnets/" }

// request gives one request its time, and asks for a member that has a leader.
func (r *Registry) request(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(clientv3.WithRequireLeader(ctx), r.opts.RequestTimeout)
}

// brief gives a request that a lease hangs on a tenth of its lifetime, if that is
// less: requests go to the members in turn, and where all connections have died
// without a word each has to be tried before it is known of.
func (r *Registry) brief(ctx context.Context) (context.Context, context.CancelFunc) {
	most := min(max(r.lifetime()/10, time.Second), r.opts.RequestTimeout)
	return context.WithTimeout(clientv3.WithRequireLeader(ctx), most)
}

// entries reads all keys under subnets/ at one revision.
func (r *Registry) entries(ctx context.Context) ([]subnet.Entry, int64, error) {
	rctx, cancel := r.request(ctx)
	defer cancel()
	resp, err := r.client.Get(rctx, r.subnetsDir(), clientv3.WithPrefix())
	if err != nil {
		return nil, 0, fmt.Errorf("list the leases: %w", err)
	}
	entries := make([]subnet.Entry, 0, len(resp.Kvs))
	for _, kv := range resp.Kvs {
		entries = append(entries, r.entry(kv))
	}
	return entries, resp.Header.Revision, nil
}

// listAll reads the configuration and all leases at one revision, without what
// else lives in the directory.
func (r *Registry) listAll(ctx context.Context) (*clientv3.TxnResponse, error) {
	rctx, cancel := r.request(ctx)
	defer cancel()
	resp, err := r.client.Txn(rctx).Then(clientv3.OpGet(r.configKey()), clientv3.OpGet(r.subnetsDir(), clientv3.WithPrefix())).Commit()
	if err != nil {
		return nil, fmt.Errorf("list the leases: %w", err)
	}
	return resp, nil
}

// takeListed returns what Acquire read, once, if it is of now: the watch goes on
// from its revision, so that a node that joins reads all leases only once.
func (r *Registry) takeListed() *clientv3.TxnResponse {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.listed
	r.listed = nil
	if l == nil || time.Since(l.at) > listedLimit {
		return nil
	}
	return l.resp
}

func (r *Registry) entry(kv *mvccpb.KeyValue) subnet.Entry {
	return subnet.NewEntry(subnet.Entry{
		Key: strings.TrimPrefix(string(kv.Key), r.subnetsDir()), Value: kv.Value,
		CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision, ID: kv.Lease,
	})
}

// takeTurn returns the function that ends the turn.
func (r *Registry) takeTurn(ctx context.Context) (func(), error) {
	select {
	case r.turn <- struct{}{}:
		return func() { <-r.turn }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// look asks Hold to compare our key with what it should be.
func (r *Registry) look() {
	select {
	case r.poke <- struct{}{}:
	default:
	}
}

// permanent reports whether trying again cannot help: what etcd answers to
// wrong credentials or rights, and what this package decides itself.
func permanent(err error) bool {
	for _, e := range []error{subnet.ErrConflict, subnet.ErrExhausted, subnet.ErrLost, rpctypes.ErrAuthFailed, rpctypes.ErrPermissionDenied} {
		if errors.Is(err, e) {
			return true
		}
	}
	var code codes.Code
	if e, ok := errors.AsType[rpctypes.EtcdError](err); ok {
		code = e.Code()
	} else {
		code = status.Code(unwrapAll(err))
	}
	return code == codes.PermissionDenied || code == codes.InvalidArgument && !errors.Is(err, rpctypes.ErrAuthOldRevision)
}

// unwrapAll returns the innermost error, where gRPC's status is.
func unwrapAll(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}

// expired reports whether etcd says that it has no such lease.
func expired(err error) bool { return errors.Is(err, rpctypes.ErrLeaseNotFound) }

// failFast has requests fail when no server can be reached.
func failFast(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoke(ctx, method, req, reply, conn, append(opts, grpc.WaitForReady(false))...)
}

// Trouble says why etcd cannot be reached, on one line, with what to do about
// it; nil while a server answers, or if none has been tried.
func (r *Registry) Trouble() error { return r.contact.trouble() }

// Explain puts a failed request in words: why etcd was not reached, where the
// client says no more than "context deadline exceeded", and what to do about a
// refusal. The error stays what it is to errors.Is. ctx is the caller's, without
// the request's own limit.
func (r *Registry) Explain(ctx context.Context, err error) error {
	server := strings.Join(r.opts.Endpoints, ", ")
	switch {
	case errors.Is(err, rpctypes.ErrAuthFailed):
		return worded{fmt.Errorf("etcd at %s refuses the user %q or its password: give the right ones with --etcd-username and --etcd-password-file", server, r.opts.User), err}
	case errors.Is(err, rpctypes.ErrUserEmpty):
		return worded{fmt.Errorf("etcd at %s asks for a user: give one with --etcd-username and --etcd-password-file", server), err}
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return worded{fmt.Errorf("etcd at %s does not let the user %q at %s: grant its role readwrite on the prefix %s/", server, r.opts.User, r.opts.Prefix, r.opts.Prefix), err}
	}
	code := status.Code(unwrapAll(err))
	if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) && code != codes.Unavailable && code != codes.DeadlineExceeded {
		return err
	}
	if why := r.Trouble(); why != nil {
		return worded{why, err}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer from %s within %v: %w", server, r.opts.RequestTimeout, err)
	}
	return err
}

// worded is err in other words.
type worded struct{ words, err error }

func (w worded) Error() string { return w.words.Error() }
func (w worded) Unwrap() error { return w.err }

// outage says in the log that etcd does not answer: at once, then once a
// minute, and when it does again.
type outage struct {
	log         *slog.Logger
	since, said time.Time
}

const sayEvery = time.Minute

func (o *outage) failed(message string, err error) {
	now := time.Now()
	if o.since.IsZero() {
		o.since = now
	}
	if o.said.IsZero() || now.Sub(o.said) >= sayEvery {
		o.said = now
		o.log.Warn(message, "error", err)
	}
}

func (o *outage) over() {
	if !o.since.IsZero() {
		o.log.Info("etcd answers again", "after", time.Since(o.since).Round(time.Millisecond))
		o.since, o.said = time.Time{}, time.Time{}
	}
}

// backoff is a pause that doubles from 50 ms to 10 s, each cut by up to a half
// so that nodes that failed together do not return together.
type backoff struct{ next time.Duration }

const (
	pauseFirst   = 50 * time.Millisecond
	pauseCeiling = 10 * time.Second
)

// wait returns ctx's error if it ends first.
func (b *backoff) wait(ctx context.Context) error {
	b.next = min(max(b.next*2, pauseFirst), pauseCeiling)
	return sleep(ctx, b.next/2+rand.N(b.next/2+1))
}

func (b *backoff) reset() { b.next = 0 }

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
