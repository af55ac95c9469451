// Package backend defines the interface between the daemon and a datapath, and
// implements the datapaths that the kernel forwards (Kernel). A datapath is
// applied whole snapshots of the leases; it does not read the store, choose the
// underlay or manage the lease. The plans for each wire format are in the
// subpackages, the userspace datapath in backend/tunnel; the kernel's state
// (links, routes, nftables) is owned by internal/host.
//
// The wire format (vxlan, ipip, host-gw) is part of the lease, since all nodes
// must agree on it. Whether the kernel or a userspace process produces it is
// each node's choice: the packets are the same.
package backend

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// Backend is one datapath of this node. Its constructor opens it.
type Backend interface {
	// Apply makes the datapath match the snapshot. It is idempotent: applying
	// the same snapshot again changes nothing. After an error the datapath may
	// be only partly updated.
	Apply(ctx context.Context, s subnet.Snapshot) error
	// Run forwards packets, if userspace does, and repairs what other programs
	// change. It returns nil when ctx ends, or an error when the datapath can
	// no longer work.
	Run(ctx context.Context) error
	// Status returns the datapath's state and the reason for it. It is safe for
	// concurrent use.
	Status() api.Datapath
	// Look compares the kernel with the wanted state at once, while Run runs, instead of at
	// the next change or after some seconds, and returns when that is done or ctx ends.
	Look(ctx context.Context)
	// Peers returns the state of the path to each peer, by subnet and without names, and
	// the pods' MTU. It is safe for concurrent use.
	Peers() (all []api.PeerState, mtu int)
	// Close closes the datapath. Call it after Run has returned.
	Close(how How) error
}

// ErrBroken is returned by Run when the datapath lost something that it needs,
// such as its device. Reopening the datapath may succeed.
var ErrBroken = errors.New("the datapath lost its device or its sockets")

// How tells Close what to do with the kernel's state.
type How int

const (
	// Keep leaves the state that works without this process in the kernel: pods
	// stay connected, and the next start takes it over.
	Keep How = iota
	// Remove removes everything that culvert created.
	Remove
)

// Node is the node's configuration, as far as a datapath needs it.
type Node struct {
	Underlay  host.Underlay
	PublicIPs []netip.Addr // the addresses in the lease: at most one per family
	// IPMasq enables masquerading of pods' traffic that leaves the cluster
	// network.
	IPMasq bool
	// NoMasq are destinations outside the cluster network that are exempt from
	// masquerading.
	NoMasq []netip.Prefix
	// TakeOver removes other programs' routes to leased subnets, such as those
	// that flannel's host-gw backend left.
	TakeOver bool
	// PodBridges are the names of the bridges in the CNI records that are pods' gateways.
	PodBridges []string
	// ProbeInterval is how often a peer without traffic is probed; 0: not at all.
	ProbeInterval time.Duration
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
