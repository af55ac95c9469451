// Package backend is what every datapath is to the daemon: something that is
// made equal to a snapshot of the leases, again and again.
//
// The wire format (vxlan, ipip, host-gw) is in the lease, since all nodes must
// agree on it. How this node produces it, in the kernel or in userspace, is a
// choice of its own, since the bytes are the same.
package backend

import (
	"context"
	"errors"
	"net/netip"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// Backend is one datapath of this node, open from its construction on.
type Backend interface {
	// Apply makes the datapath carry exactly what the snapshot says. It is
	// idempotent: the same snapshot a second time changes nothing. After an
	// error the datapath carries what it did before, as far as the kernel let it.
	Apply(ctx context.Context, s subnet.Snapshot) error
	// Run carries packets, where that is done here, and repairs; it returns
	// when ctx ends (nil) or when the datapath can no longer work.
	Run(ctx context.Context) error
	// Status says what is on, and why. It may be called at any time.
	Status() api.Datapath
	// Close ends the datapath, after Run has returned.
	Close(how How) error
}

// ErrBroken says, from Run, that somebody took away what the datapath works
// with: opened anew it may work again.
var ErrBroken = errors.New("what the datapath works with was taken away")

// How a datapath ends.
type How int

const (
	// Keep leaves in the kernel what does not need this process: pods keep
	// their way out, and the next start finds it and goes on.
	Keep How = iota
	// Remove takes away everything that is culvert's.
	Remove
)

// Node is what a datapath must know of the node besides the snapshots.
type Node struct {
	Underlay  host.Underlay
	PublicIPs []netip.Addr // as leased: at most one per family
	// IPMasq says that traffic from pods that leaves the cluster network is to
	// bear the node's address.
	IPMasq bool
	// NoMasq are destinations outside of it that see the pods' own addresses
	// all the same.
	NoMasq []netip.Prefix
	// TakeOver says that another program's routes to the leased subnets are to go
	// where the lease shows them to be that program's or stale.
	TakeOver bool
}

// Public returns the leased underlay address of a family, or the zero Addr.
func (n Node) Public(is4 bool) netip.Addr {
	for _, a := range n.PublicIPs {
		if a.Is4() == is4 {
			return a
		}
	}
	return netip.Addr{}
}
