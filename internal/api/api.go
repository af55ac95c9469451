// Package api is how a node daemon is asked about itself: what it says, the
// server on its unix socket, and the small client that the commands and the
// CNI plugin use.
package api

import (
	"net/netip"
	"time"
)

// Status is everything that a daemon says of itself.
type Status struct {
	Version string    `json:"version"`
	Node    string    `json:"node"`
	Started time.Time `json:"started"`
	// Ready says that pods can be added; otherwise NotReady says why not.
	Ready    bool   `json:"ready"`
	NotReady string `json:"not_ready,omitempty"`

	Networks   []netip.Prefix `json:"networks"`
	Lease      *Lease         `json:"lease,omitempty"`
	SubnetFile string         `json:"subnet_file"`
	Store      Store          `json:"store"`
	Underlay   Underlay       `json:"underlay"`
	Datapath   Datapath       `json:"datapath"`
	Peers      []Peer         `json:"peers"`
	Rejected   []Rejection    `json:"rejected,omitempty"`
	// Fenced says that another has the subnet that this node had.
	Fenced *Fenced `json:"fenced,omitempty"`
	// Usage is how full the cluster networks are.
	Usage []Usage `json:"usage,omitempty"`
	// Warnings are conditions that keep packets from being carried, or may.
	Warnings []Warning `json:"warnings,omitempty"`
}

// Fenced is the state of a node whose subnet is another's.
type Fenced struct {
	Subnets []netip.Prefix `json:"subnets"`
	Since   time.Time      `json:"since"`
	Reason  string         `json:"reason"`
	Pods    int            `json:"pods,omitempty"` // of the lost subnet, that are still here
}

// Usage is how much of one cluster network is given out, in subnets.
type Usage struct {
	Network  netip.Prefix `json:"network"`
	Used     int64        `json:"used"`
	Capacity int64        `json:"capacity"`
}

// Lease is this node's own lease.
type Lease struct {
	Subnets   []netip.Prefix `json:"subnets"`
	PublicIPs []netip.Addr   `json:"public_ips"`
	Expires   time.Time      `json:"expires,omitzero"`
}

// Store is the state of the contact with etcd.
type Store struct {
	Kind      string    `json:"kind"` // etcd or kubernetes
	Endpoints []string  `json:"endpoints"`
	Prefix    string    `json:"prefix"`
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since,omitzero"` // of the last change of Connected
	Error     string    `json:"error,omitempty"`
	Revision  int64     `json:"revision"`
	// Snapshot is when the leases that this node serves from were put on its
	// disk, while they come from there: the store has been unreachable since it
	// started.
	Snapshot time.Time `json:"snapshot,omitzero"`
	// ConfigRefused says why the network configuration in the store is not the one
	// in use.
	ConfigRefused string `json:"config_refused,omitempty"`
}

// Name is what the store is called in a message.
func (s Store) Name() string {
	if s.Kind == "kubernetes" {
		return "the API server"
	}
	return "etcd"
}

// Underlay is what tunnel packets leave by.
type Underlay struct {
	Interface string       `json:"interface"`
	MTU       int          `json:"mtu"`
	Addrs     []netip.Addr `json:"addrs"`
	Why       string       `json:"why"`
}

// Datapath is how packets are carried.
type Datapath struct {
	WireFormat string      `json:"wire_format"` // vxlan, ipip, host-gw
	Kind       string      `json:"kind"`        // userspace, kernel
	Why        string      `json:"why"`
	Device     string      `json:"device"`
	MTU        int         `json:"mtu"` // of pods
	Peers      int         `json:"peers"`
	Mechanisms []Mechanism `json:"mechanisms,omitempty"`
	Egress     Traffic     `json:"egress"`
	Ingress    Traffic     `json:"ingress"`
	Drops      []Drop      `json:"drops"`
	// FastPath is what stands before the datapath; nil if nothing can. Egress and
	// Ingress include what it carried.
	FastPath *FastPath `json:"fast_path,omitempty"`
	// Repairs counts, by kind, what others did to the host and was undone.
	Repairs map[string]uint64 `json:"repairs,omitempty"`
	// Warnings are the datapath's share of Status.Warnings.
	Warnings []Warning `json:"-"`
	// StalePods are the host ends of pods that were made for another MTU.
	StalePods []string `json:"stale_pods,omitempty"`
	// NarrowPaths are the peers, by subnet, whose path takes less than MTU, as
	// routers on it said.
	NarrowPaths []NarrowPath `json:"narrow_paths,omitempty"`
	// SilentPeers are those to which this node sends and from which nothing comes.
	SilentPeers []SilentPeer `json:"silent_peers,omitempty"`
}

// SilentPeer is a peer of which nothing is heard, by subnet.
type SilentPeer struct {
	Subnet   netip.Prefix `json:"subnet"`
	PublicIP netip.Addr   `json:"public_ip"`
	Since    time.Time    `json:"since"` // of the first packet to it that nothing came after
}

// FastPath is how packets pass before the datapath that they would else take.
type FastPath struct {
	Mode    string  `json:"mode"` // as asked for: auto, on, off
	On      bool    `json:"on"`
	Why     string  `json:"why,omitempty"` // it is off
	Egress  Traffic `json:"egress"`
	Ingress Traffic `json:"ingress"`
	// Joined are those of Ingress.Frames that were joined to larger ones first.
	Joined uint64 `json:"joined"`
	// Slow counts what was left to the datapath, by reason.
	Slow []Drop `json:"slow,omitempty"`
}

// NarrowPath is what is known of the way to a peer's subnet.
type NarrowPath struct {
	Subnet   netip.Prefix `json:"subnet"`
	PublicIP netip.Addr   `json:"public_ip"`
	MTU      int          `json:"mtu"` // of pods' packets
	By       netip.Addr   `json:"by,omitzero"`
	Since    time.Time    `json:"since"`
	Until    time.Time    `json:"until"` // it is believed
}

// Mechanism is one of the kernel's offers that make the datapath fast.
type Mechanism struct {
	Name string `json:"name"`
	On   bool   `json:"on"`
	Why  string `json:"why,omitempty"` // it is off
}

// Traffic is what one direction has carried since the start.
type Traffic struct {
	Packets uint64 `json:"packets"` // as on the wire
	Bytes   uint64 `json:"bytes"`   // of inner packets
	Frames  uint64 `json:"frames"`  // device reads or writes
	// SuperFrames are those of Frames that left whole, to be cut by the uplink.
	SuperFrames uint64 `json:"superFrames,omitempty"`
	Syscalls    uint64 `json:"syscalls"`
	Waits       uint64 `json:"waits"`
}

// Drop is how many packets were dropped for one reason.
type Drop struct {
	Reason  string `json:"reason"`
	Packets uint64 `json:"packets"`
}

// Peer is another node.
type Peer struct {
	Node      string         `json:"node,omitempty"`
	Backend   string         `json:"backend"`
	Subnets   []netip.Prefix `json:"subnets"`
	PublicIPs []netip.Addr   `json:"public_ips"`
}

// Rejection is a lease that was set aside, and why.
type Rejection struct {
	Key    string `json:"key"`
	Reason string `json:"reason"`
}
