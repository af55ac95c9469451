// Package etcd implements subnet.Registry and subnet.Admin on etcd v3, in
// flannel's layout: <prefix>/config is the network configuration,
// <prefix>/subnets/<key> a lease.
//
// etcd owns the state. The mirror in memory and the state and snapshot files on
// disk are copies of it. Every write is a transaction conditional on the
// revisions it is based on, so that it never overwrites another node's lease. An
// unreachable etcd is not a loss of the lease: Registry's methods retry with
// exponential backoff, and the last snapshot remains valid; the methods of Admin
// fail. The package does not choose subnets (subnet.Choose) and does not
// configure the host.
package etcd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"strings"
	"sync"
	"time"

	"culvert/internal/boottime"
	"culvert/internal/remedy"
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

// Registry is one node's client of the lease store; it holds at most one lease.
// It is also the administrator's client (subnet.Admin). Its methods are safe for
// concurrent use.
type Registry struct {
	client *clientv3.Client
	conns  *connections
	// contact records the result of the last attempt to reach each server.
	contact *contact
	opts    Options
	log     *slog.Logger
	copy    *kept.Copy // in the snapshot file

	// keyLock serializes writers of our own key, across all requests of one operation.
	keyLock subnet.Lock
	// verifyNow makes Hold verify our key at once.
	verifyNow subnet.Signal
	writtenID int64 // lease ID that this process wrote to the state file; guarded by keyLock
	markLease int64 // etcd lease ID of our subnet's mark, 0 if unknown; used only by Hold

	mu      sync.Mutex
	held    subnet.Lease  // as last written or read; no Endpoints: none
	endsUp  time.Duration // when held ends, by CLOCK_BOOTTIME
	ttl     time.Duration // from the claim
	config  subnet.Config // last valid one; no Networks: none
	text    string        // source of config
	listed  *listing      // read by Acquire, used by the first list of Watch
	resumed *kept.State   // start of Watch while etcd is unreachable; nil once etcd was read
}

// listing is a response of listAll and when it arrived.
type listing struct {
	resp *clientv3.TxnResponse
	at   time.Time
}

// listingMaxAge is the maximum age of a listing that a watch starts from.
const listingMaxAge = 10 * time.Second

var (
	_ subnet.Registry = (*Registry)(nil)
	_ subnet.Admin    = (*Registry)(nil)
)

// New returns a registry without sending anything. It fails if the options are
// invalid. The caller must call Close.
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
		o.Logger.Warn("the etcd password is sent unencrypted; use https endpoints", "endpoints", o.Endpoints)
	}
	cfg := clientv3.Config{
		Endpoints:   o.Endpoints,
		DialTimeout: o.DialTimeout,
		TLS:         tlsConfig,
		Logger:      zap.NewNop(),
		// While there is a watch, a silent server is detected after 15 s. etcd
		// disconnects clients that ping more often than every 5 s or without a
		// stream.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		// The callers have their own backoff.
		MaxUnaryRetries:    2,
		BackoffWaitBetween: 100 * time.Millisecond,
		// gRPC's default backoff between connection attempts grows to 2 minutes.
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           grpcbackoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.3, MaxDelay: 5 * time.Second},
			MinConnectTimeout: o.DialTimeout,
		})},
	}
	if o.Observe != nil {
		cfg.DialOptions = append(cfg.DialOptions, grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			began := time.Now()
			err := invoke(ctx, method, req, reply, cc, opts...)
			o.Observe(path.Base(method), time.Since(began), err != nil)
			return err
		}))
	}
	reached := newContact(o)
	conns := newConnections(o, reached, tlsConfig == nil)
	cfg.DialOptions = append(cfg.DialOptions, grpc.WithContextDialer(conns.connect))
	if tlsConfig != nil {
		cfg.DialOptions = append(cfg.DialOptions, grpc.WithTransportCredentials(&reloadingTLS{o, reached}))
	}
	r := &Registry{opts: o, conns: conns, contact: reached, log: o.Logger, copy: kept.NewCopy(o.SnapshotFile, o.Logger), keyLock: subnet.NewLock(), verifyNow: subnet.NewSignal()}
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

// Close closes the connections. It does not release the lease (Release).
func (r *Registry) Close() error { return r.client.Close() }

// clockStep is the smallest step of the wall clock that Held corrects for.
const clockStep = time.Second

// Held returns the lease that this registry holds, as last written or read, and
// whether there is one. Expires is recomputed from CLOCK_BOOTTIME if the wall
// clock was stepped.
func (r *Registry) Held() (subnet.Lease, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.held
	if up, err := boottime.Up(); err == nil && !l.Expires.IsZero() {
		// Compare wall clock readings: Expires may carry a monotonic one. The
		// two clocks are not read at the same instant, so they differ slightly.
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
	r.setHeldLocked(l)
}

// setHeldLocked is setHeld for callers that hold mu.
func (r *Registry) setHeldLocked(l subnet.Lease) {
	r.held, r.endsUp = l, 0
	// Read this clock first: too early an expiry is harmless.
	if up, err := boottime.Up(); err == nil {
		r.endsUp = up + time.Until(l.Expires)
	}
}

// VerifyLease makes Hold compare the held lease with etcd at once. Call it after a
// clock was stepped, or the machine was suspended or restored to an earlier snapshot.
func (r *Registry) VerifyLease() { r.verifyNow.Raise() }

// lifetime returns the claimed TTL, for granting the lease again.
func (r *Registry) lifetime() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return cmp.Or(r.ttl, DefaultTTL)
}

func (r *Registry) directory() string  { return r.opts.Prefix + "/" }
func (r *Registry) configKey() string  { return r.opts.Prefix + "/config" }
func (r *Registry) subnetsDir() string { return r.opts.Prefix + "/subnets/" }

// request limits one request to RequestTimeout and requires a member that has a
// leader.
func (r *Registry) request(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(clientv3.WithRequireLeader(ctx), r.opts.RequestTimeout)
}

// leaseRequest limits a request that the lease depends on to a tenth of its lifetime, if
// that is shorter than RequestTimeout. Requests go to the members in turn; if all
// connections are silently dead, each must time out before it is replaced.
func (r *Registry) leaseRequest(ctx context.Context) (context.Context, context.CancelFunc) {
	most := min(max(r.lifetime()/10, time.Second), r.opts.RequestTimeout)
	return context.WithTimeout(clientv3.WithRequireLeader(ctx), most)
}

// entries lists all keys under subnets/ and returns the revision.
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

// listAll reads the configuration and all leases at one revision. It does not
// read the other keys under the prefix.
func (r *Registry) listAll(ctx context.Context) (*clientv3.TxnResponse, error) {
	rctx, cancel := r.request(ctx)
	defer cancel()
	resp, err := r.client.Txn(rctx).Then(clientv3.OpGet(r.configKey()), clientv3.OpGet(r.subnetsDir(), clientv3.WithPrefix())).Commit()
	if err != nil {
		return nil, fmt.Errorf("list the leases: %w", err)
	}
	return resp, nil
}

// takeListed returns the listing of Acquire, once, unless it is too old. The watch
// continues from its revision, so that a joining node lists all leases only once.
func (r *Registry) takeListed() *clientv3.TxnResponse {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.listed
	r.listed = nil
	if l == nil || time.Since(l.at) > listingMaxAge {
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

// permanent reports whether retrying is pointless: etcd rejected the credentials
// or permissions, or this package decided the outcome.
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

// unwrapAll returns the innermost error, which carries gRPC's status.
func unwrapAll(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}

// expired reports whether etcd does not know the lease.
func expired(err error) bool { return errors.Is(err, rpctypes.ErrLeaseNotFound) }

// failFast makes requests fail at once if no server can be reached.
func failFast(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoke(ctx, method, req, reply, conn, append(opts, grpc.WaitForReady(false))...)
}

// Trouble returns why etcd is unreachable and what to do about it, on one line;
// nil if a server answered last, or none has been tried.
func (r *Registry) Trouble() error { return r.contact.trouble() }

// Explain rewords the error of a failed request: it says why etcd is unreachable,
// where the client reports only "context deadline exceeded", or what to do about
// a refusal. errors.Is still matches the original error. ctx is the caller's
// context, without the request's own timeout.
func (r *Registry) Explain(ctx context.Context, err error) error {
	server := strings.Join(r.opts.Endpoints, ", ")
	switch {
	case errors.Is(err, rpctypes.ErrAuthFailed):
		return rewordedError{remedy.Errorf("set the right ones with --etcd-username and --etcd-password-file", "etcd at %s rejects the user %q or its password", server, r.opts.User), err}
	case errors.Is(err, rpctypes.ErrUserEmpty):
		return rewordedError{remedy.Errorf("set a user with --etcd-username and --etcd-password-file", "etcd at %s requires authentication", server), err}
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return rewordedError{remedy.Errorf(fmt.Sprintf("grant its role readwrite on the prefix %s/", r.opts.Prefix), "etcd at %s denies the user %q access to %s", server, r.opts.User, r.opts.Prefix), err}
	}
	code := status.Code(unwrapAll(err))
	if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) && code != codes.Unavailable && code != codes.DeadlineExceeded {
		return err
	}
	if why := r.Trouble(); why != nil {
		return rewordedError{why, err}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return rewordedError{remedy.Errorf("is this etcd's client port, and is a majority of its members up?", "no answer from etcd at %s within %v", server, r.opts.RequestTimeout), err}
	}
	return err
}

// rewordedError is err with another message.
type rewordedError struct{ words, err error }

func (w rewordedError) Error() string   { return w.words.Error() }
func (w rewordedError) Unwrap() []error { return []error{w.words, w.err} }

// outage returns an Outage that logs with the given attributes.
func (r *Registry) outage(attributes ...any) *subnet.Outage {
	return subnet.NewOutage(r.log.With(attributes...), "etcd answers again")
}
