package subnet

import (
	"context"
	"errors"
	"iter"
	"net/netip"
	"time"
)

// Registry is one node's interface to the lease store. It is implemented on
// etcd (subnet/etcd), on the Kubernetes API (subnet/kube) and in memory
// (Memory).
type Registry interface {
	// Config waits until the store holds a valid network configuration and
	// returns it. While the configuration is missing or invalid it keeps waiting
	// and logs how to set one.
	Config(ctx context.Context) (Config, error)
	// Acquire returns a lease owned by this node: the one it held before if that
	// is still valid, else a free subnet. ErrExhausted, ErrConflict.
	Acquire(ctx context.Context, c Claim) (Lease, error)
	// Hold keeps the lease alive. It returns nil when ctx ends, and ErrLost,
	// wrapped with the reason, when the lease is lost. An unreachable store is
	// not a loss.
	Hold(ctx context.Context, l Lease) error
	// Update publishes this node's changed address, MAC or backend data.
	Update(ctx context.Context, l Lease) (Lease, error)
	// Release deletes the lease.
	Release(ctx context.Context, l Lease) error
	// Watch yields a complete snapshot at once and after every change. A slow
	// consumer skips intermediate snapshots. A yielded error reports that the
	// store is unreachable; the last snapshot remains valid, and the next one
	// reports that the store is reachable again. The sequence ends with ctx.
	Watch(ctx context.Context, self Lease) iter.Seq2[Snapshot, error]
}

// Claim is a node's request for a lease.
type Claim struct {
	Node   string // stable identity
	Config Config // as Registry.Config returned it
	// Ends holds the public address and the VTEP for each family of Config, in
	// the same order; the subnets are ignored.
	Ends []Endpoint
	// Previous are the subnets this node last used (from subnet.env). They are
	// preferred if no lease has this node's identity or address.
	Previous []netip.Prefix
	// Avoid are the host's other networks; no new subnet may overlap them.
	Avoid []netip.Prefix
	TTL   time.Duration // lifetime without renewal; 24 h by default
}

// Snapshot holds all leases at one revision of the store. It is immutable.
type Snapshot struct {
	Revision int64
	Config   Config
	Self     Lease   // this node's own lease, from the store, or as last held
	Peers    []Lease // every other lease in force, sorted by subnet
	Rejected []Rejection
	Usage    []Usage // per network of Config; nil if the store does not allocate subnets
	// ConfigRefused is why the configuration in the store is not in use: it is
	// missing, invalid, or requires a restart. Config is then the last good one.
	// Empty if the configuration is in use.
	ConfigRefused string
	// Kept is when this snapshot was saved to disk, if it was loaded from disk
	// because the store is unreachable; zero for a snapshot from the store.
	Kept time.Time
}

// Rejection is a key of the store that was ignored, and why.
type Rejection struct {
	Key    string
	Reason string
}

// Admin is the administrator's interface to the store. Unlike Registry, its
// methods do not wait for an unreachable store but return an error.
type Admin interface {
	// Entries returns every key under subnets/, including malformed ones, sorted
	// by key, and the store's revision. With withExpiry it also sets Expires and
	// Lifetime, which costs one request per entry.
	Entries(ctx context.Context, withExpiry bool) ([]Entry, int64, error)
	// ConfigText returns the raw network configuration and its ModRevision; nil
	// and 0 if there is none.
	ConfigText(ctx context.Context) ([]byte, int64, error)
	// SetConfig stores a configuration that ParseConfig accepts and returns its
	// ModRevision. It fails with ErrChanged unless the current ModRevision is
	// replaces; 0 means that there is no configuration yet, AnyRevision disables
	// the check.
	SetConfig(ctx context.Context, text []byte, replaces int64) (int64, error)
	// Reserve reserves the subnets, at most one per family, so that no node
	// leases them until they are released; owner is a label. ErrTaken.
	Reserve(ctx context.Context, owner string, subnets []netip.Prefix) (Lease, error)
	// ReleaseKey deletes the entry, whichever node owns it, if its ModRevision is still
	// at (AnyRevision disables the check). A running node recreates its lease.
	// ErrChanged, ErrAbsent.
	ReleaseKey(ctx context.Context, key string, at int64) error
	// Quarantined returns the subnets in quarantine, the longest unused first.
	Quarantined(ctx context.Context) ([]QuarantinedSubnet, error)
}

// QuarantinedSubnet is a subnet in quarantine: free, but released recently, so other nodes
// may still have cached state of its old owner.
type QuarantinedSubnet struct {
	Key   string    // key of the released lease
	Node  string    // previous owner
	Until time.Time // end of the quarantine
}

// AnyRevision in place of a ModRevision disables the comparison.
const AnyRevision = -1

// Errors that callers test for.
var (
	ErrExhausted = errors.New("no free subnet is left in the network")
	ErrConflict  = errors.New("another node holds this identity or address")
	ErrLost      = errors.New("the lease is lost")
	ErrChanged   = errors.New("it was changed concurrently")
	ErrTaken     = errors.New("the subnet is leased or reserved")
	ErrAbsent    = errors.New("there is no such entry")
)
