package subnet

import (
	"context"
	"errors"
	"iter"
	"net/netip"
	"time"
)

// Registry is where leases live. There are two implementations that meet
// here: etcd, and the in-memory one that simulations and unit tests use.
type Registry interface {
	// Config waits until the store holds a valid network configuration and
	// returns it. It does not fail because there is none yet, or an invalid
	// one: it says so through the logger, with the command that helps.
	Config(ctx context.Context) (Config, error)
	// Acquire returns a lease that this node owns: the one that it held before
	// where it still can, else a free one. ErrExhausted, ErrConflict.
	Acquire(ctx context.Context, c Claim) (Lease, error)
	// Hold keeps the lease alive. It returns only when ctx ends (nil) or when
	// the lease is truly lost (ErrLost, wrapped with the reason).
	Hold(ctx context.Context, l Lease) error
	// Update publishes this node's changed address, MAC or backend data.
	Update(ctx context.Context, l Lease) (Lease, error)
	// Release gives the lease back.
	Release(ctx context.Context, l Lease) error
	// Watch yields whole snapshots, at once and at every change; the latest
	// wins when the consumer is slow. A yielded error informs that the store is
	// out of reach (the last snapshot still stands); a snapshot that follows
	// says that contact is back. The sequence ends only with ctx.
	Watch(ctx context.Context, self Lease) iter.Seq2[Snapshot, error]
}

// Claim is what a node asks for.
type Claim struct {
	Node   string // stable identity
	Config Config // as Registry.Config returned it
	// Ends has the public address and the VTEP of each family of Config, in its
	// order; the subnets are ignored.
	Ends []Endpoint
	// Previous are the subnets that the node used last (from subnet.env), asked
	// for again if no lease bears our identity or address.
	Previous []netip.Prefix
	// Avoid are networks of the host's own, within which it leases no new subnet.
	Avoid []netip.Prefix
	TTL   time.Duration // lifetime without renewal; 24 h by default
}

// Snapshot is every lease at one revision of the store. It is immutable.
type Snapshot struct {
	Revision int64
	Config   Config
	Self     Lease   // this node's own lease, as the store has it or as last held
	Peers    []Lease // every other lease in force, sorted by subnet
	Rejected []Rejection
	Usage    []Usage // of each of Config's networks
	// ConfigRefused says why the configuration in the store is not Config: it
	// is missing, invalid, or one that a running node cannot change to. Config
	// is then the last good one. Empty otherwise.
	ConfigRefused string
	// Kept is when the snapshot was put on this node's disk, where it comes from
	// since the store is away. Zero for one of the store.
	Kept time.Time
}

// Rejection is a key of the store that was set aside, and why.
type Rejection struct {
	Key    string
	Reason string
}

// Admin is what an administrator does, beside the nodes. Unlike a Registry's,
// its calls do not wait for the store: they fail, with what was attempted.
type Admin interface {
	// Entries returns every key under subnets/, malformed ones too, sorted by
	// key, and the store's revision. Expires is filled in where asked for, which
	// costs one request per entry.
	Entries(ctx context.Context, withExpiry bool) ([]Entry, int64, error)
	// ConfigText returns the network configuration as it stands in the store
	// and its ModRevision; nil and 0 if there is none.
	ConfigText(ctx context.Context) ([]byte, int64, error)
	// SetConfig stores a configuration that ParseConfig accepts and returns its
	// ModRevision. Replaces is that of the one it takes the place of: 0 for none yet,
	// AnyRevision for whatever is there. ErrChanged if another one is.
	SetConfig(ctx context.Context, text []byte, replaces int64) (int64, error)
	// Reserve keeps the subnets, one of each family at most, from every node
	// until they are released; owner says for whom. ErrTaken.
	Reserve(ctx context.Context, owner string, subnets []netip.Prefix) (Lease, error)
	// ReleaseKey deletes the entry, whoever holds it, if it is still at this
	// ModRevision (AnyRevision: at any). A node that runs writes its lease anew.
	// ErrChanged, ErrAbsent.
	ReleaseKey(ctx context.Context, key string, at int64) error
	// Resting returns the subnets in quarantine, the longest unused first.
	Resting(ctx context.Context) ([]Rest, error)
}

// Rest is a subnet in quarantine: free, but leased lately, so that others may
// still have its old owner in their caches.
type Rest struct {
	Key   string    // of the lease that stood there
	Node  string    // whose it was
	Until time.Time // the quarantine's end
}

// AnyRevision is given in place of a ModRevision to write without comparing.
const AnyRevision = -1

// Errors that a caller branches on.
var (
	ErrExhausted = errors.New("no free subnet is left in the network")
	ErrConflict  = errors.New("another node holds this identity or address")
	ErrLost      = errors.New("the lease is lost")
	ErrChanged   = errors.New("somebody else has changed it meanwhile")
	ErrTaken     = errors.New("the subnet is leased or reserved")
	ErrAbsent    = errors.New("there is no such entry")
)
