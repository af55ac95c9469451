// Package api is the local API of the node daemon: the status document, the server
// on the daemon's unix socket, and the client used by the commands. The daemon owns
// the state; the package only transports it. The CNI plugin's query is in
// api/readiness.
package api

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Status is the complete state of a daemon.
type Status struct {
	Version string    `json:"version"`
	Node    string    `json:"node"`
	Started time.Time `json:"started"`
	// Ready reports whether pods can be added; if not, NotReady says why.
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
	// Fenced is set if another node holds the subnet that this node had.
	Fenced *Fenced `json:"fenced,omitempty"`
	// Handover says that this daemon took over from one that ran.
	Handover *Handover `json:"handover,omitempty"`
	// Usage is the allocation state of each cluster network.
	Usage []Usage `json:"usage,omitempty"`
	// Warnings are conditions that prevent packets from being forwarded, or may.
	Warnings []Warning `json:"warnings,omitempty"`
}

// Fenced describes a node that was fenced because another node holds its subnet.
type Fenced struct {
	Subnets []netip.Prefix `json:"subnets"`
	Since   time.Time      `json:"since"`
	Reason  string         `json:"reason"`
	Pods    int            `json:"pods,omitempty"` // pods of the lost subnet still on this node
}

// Handover is how a daemon took over from its predecessor.
type Handover struct {
	PID       int       `json:"pid"` // the predecessor's, as it says
	Version   string    `json:"version"`
	At        time.Time `json:"at"`
	Inherited bool      `json:"inherited"`     // the datapath was never closed
	Why       string    `json:"why,omitempty"` // it was not inherited
}

// Usage is the number of subnets allocated from one cluster network.
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

// Store is the state of the connection to the store.
type Store struct {
	Kind      string    `json:"kind"` // etcd or kubernetes
	Endpoints []string  `json:"endpoints"`
	Prefix    string    `json:"prefix"`
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since,omitzero"` // when Connected changed last
	Error     string    `json:"error,omitempty"`
	Revision  int64     `json:"revision"`
	// Snapshot is when the leases in use were saved to disk, if they were loaded
	// from disk because the store has been unreachable since the start.
	Snapshot time.Time `json:"snapshot,omitzero"`
	// ConfigRefused is why the network configuration in the store is not in use.
	ConfigRefused string `json:"config_refused,omitempty"`
}

// Name returns the store's name for messages.
func (s Store) Name() string {
	if s.Kind == "kubernetes" {
		return "the API server"
	}
	return "etcd"
}

// Underlay is the interface and the addresses that tunnel packets are sent from.
type Underlay struct {
	Interface string       `json:"interface"`
	MTU       int          `json:"mtu"`
	Addrs     []netip.Addr `json:"addrs"`
	Why       string       `json:"why"`
}

// Datapath is the state of the datapath.
type Datapath struct {
	WireFormat string      `json:"wire_format"` // vxlan, ipip, host-gw
	Kind       string      `json:"kind"`        // userspace, kernel
	Why        string      `json:"why"`
	Device     string      `json:"device"`
	MTU        int         `json:"mtu"` // of pods' interfaces
	Peers      int         `json:"peers"`
	Mechanisms []Mechanism `json:"mechanisms,omitempty"`
	Egress     Traffic     `json:"egress"`
	Ingress    Traffic     `json:"ingress"`
	Drops      []Drop      `json:"drops"`
	// Reasons are all reasons that the datapath counts drops under. Metrics serve those
	// without drops as 0: a counter that appears with its first drops shows no increase.
	Reasons []string `json:"-"`
	// FastPath is the eBPF fast path in front of the datapath; nil if it cannot
	// use one. Egress and Ingress include its packets.
	FastPath *FastPath `json:"fast_path,omitempty"`
	// Repairs counts, by kind, changes by other programs that were reverted.
	Repairs map[string]uint64 `json:"repairs,omitempty"`
	// RepairTimes has the durations of the repairs, in seconds.
	RepairTimes Histogram `json:"-"`
	// Warnings are the datapath's part of Status.Warnings.
	Warnings []Warning `json:"-"`
	// StalePods are the host interfaces of pods created with another MTU.
	StalePods []string `json:"stale_pods,omitempty"`
	// NarrowPaths are the peers to which the path MTU is below MTU, as reported by
	// routers.
	NarrowPaths []NarrowPath `json:"narrow_paths,omitempty"`
	// SilentPeers are the peers to which this node sends but from which it receives
	// nothing.
	SilentPeers []SilentPeer `json:"silent_peers,omitempty"`
	// Probes are the results of the daemon's echo requests to peers; nil if it sends
	// none.
	Probes *Probes `json:"-"`
}

// SilentPeer is a peer from which nothing is received.
type SilentPeer struct {
	Subnet   netip.Prefix `json:"subnet"`
	PublicIP netip.Addr   `json:"public_ip"`
	Since    time.Time    `json:"since"` // when the first unanswered packet was sent
}

// FastPath is the state of the eBPF fast path.
type FastPath struct {
	Mode    string  `json:"mode"` // as configured: auto, on, off, pod
	On      bool    `json:"on"`
	Why     string  `json:"why,omitempty"` // reason, if off
	Egress  Traffic `json:"egress"`
	Ingress Traffic `json:"ingress"`
	// Joined counts the Ingress.Frames that passed the veth pair, which
	// coalesces them (GRO).
	Joined uint64 `json:"joined"`
	// Slow counts packets left to the datapath, by reason.
	Slow []Drop `json:"slow,omitempty"`
	// Pods is the short way from pod to pod; nil if it is off.
	Pods *PodPath `json:"pods,omitempty"`
}

// PodPath is the short way from pod to pod. Frames are counted in FastPath too.
type PodPath struct {
	Links   int            `json:"links"`              // pods' links that have it
	LeftOut map[string]int `json:"left_out,omitempty"` // pods' links that have not, by reason
	Egress  uint64         `json:"egress"`             // frames
	Ingress uint64         `json:"ingress"`
	Why     string         `json:"why,omitempty"` // why no pod has it
}

// Carries reports whether some pod's flows may take the short way; p may be nil.
func (p *PodPath) Carries() bool { return p != nil && p.Why == "" && p.Links > 0 }

// NarrowPath is the learned path MTU to a peer's subnet.
type NarrowPath struct {
	Subnet   netip.Prefix `json:"subnet"`
	PublicIP netip.Addr   `json:"public_ip"`
	MTU      int          `json:"mtu"` // inner packet size in bytes
	By       netip.Addr   `json:"by,omitzero"`
	Since    time.Time    `json:"since"`
	Until    time.Time    `json:"until"` // expiry
}

// Mechanism is a kernel offload that the datapath can use.
type Mechanism struct {
	Name string `json:"name"`
	On   bool   `json:"on"`
	Why  string `json:"why,omitempty"` // reason, if off
}

// Traffic counts what one direction has carried since the daemon started.
type Traffic struct {
	Packets uint64 `json:"packets"` // inner packets, counted as segments on the wire
	Bytes   uint64 `json:"bytes"`   // bytes of inner packets
	Frames  uint64 `json:"frames"`  // reads or writes of the device
	// SuperFrames counts the Frames that the uplink segments.
	SuperFrames uint64 `json:"super_frames,omitempty"`
	Syscalls    uint64 `json:"syscalls"`
	Waits       uint64 `json:"waits"`
}

// Drop counts packets dropped for one reason.
type Drop struct {
	Reason  string `json:"reason"`
	Packets uint64 `json:"packets"`
}

// Peer is a peer node.
type Peer struct {
	Node      string         `json:"node,omitempty"`
	Backend   string         `json:"backend"`
	Subnets   []netip.Prefix `json:"subnets"`
	PublicIPs []netip.Addr   `json:"public_ips"`
}

// PublicOf returns the underlay address of the peer's i-th subnet: the one of the
// subnet's family, as in leases.
func (p Peer) PublicOf(i int) netip.Addr {
	for _, a := range p.PublicIPs {
		if a.Is4() == p.Subnets[i].Addr().Is4() {
			return a
		}
	}
	return netip.Addr{}
}

// Rejection is a lease that was ignored, and why.
type Rejection struct {
	Key    string `json:"key"`
	Reason string `json:"reason"`
}

// SetDrops sets Drops, the most frequent first, and Reasons from the count of each
// reason.
func (d *Datapath) SetDrops(byReason map[string]uint64) {
	d.Reasons, d.Drops = slices.Sorted(maps.Keys(byReason)), nil
	for _, r := range d.Reasons {
		if n := byReason[r]; n > 0 {
			d.Drops = append(d.Drops, Drop{Reason: r, Packets: n})
		}
	}
	slices.SortStableFunc(d.Drops, func(a, b Drop) int { return cmp.Compare(b.Packets, a.Packets) })
}
