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
	TTL      time.Duration // lifetime without renewal; 24 h by default
}

// Snapshot is every lease at one revision of the store. It is immutable.
type Snapshot struct {
	Revision int64
	Config   Config
	Self     Lease   // this node's own lease, as the store has it or as last held
	Peers    []Lease // every other lease in force, sorted by subnet
	Rejected []Rejection
}

// Rejection is a key of the store that was set aside, and why.
type Rejection struct {
	Key    string
	Reason string
}

// Errors that a caller branches on.
var (
	ErrExhausted = errors.New("no free subnet is left in the network")
	ErrConflict  = errors.New("another node holds this identity or address")
	ErrLost      = errors.New("the lease is lost")
)
