package api

import (
	"net/netip"
	"time"
)

// Peers is a daemon's knowledge of the paths to its peers.
type Peers struct {
	Node string    `json:"node"`
	At   time.Time `json:"at"`
	// MTU is the pods' MTU, in bytes.
	MTU int `json:"mtu"`
	// Peers has one entry for each subnet of each peer, by name and subnet.
	Peers []PeerState `json:"peers"`
}

// The states of a peer.
const (
	PeerActive  = "active"  // packets came from it recently: of pods, or its own echo requests
	PeerIdle    = "idle"    // it answers echo requests
	PeerSilent  = "silent"  // it did not answer echo requests, and no other packet came
	PeerUnknown = "unknown" // no echo request was sent yet
)

// The ways to a peer.
const (
	WayUserspace = "userspace"
	WayKernel    = "kernel"
	WayFastPath  = "fast path"
	WayDirect    = "direct route" // no tunnel
	WayNone      = "none"         // packets to its subnet are not carried
)

// HeardWithin is how often the daemon looks for packets of peers.
const HeardWithin = 5 * time.Second

// PeerState is the state of the path to one subnet of a peer.
type PeerState struct {
	Node     string       `json:"node,omitempty"`
	Backend  string       `json:"backend"`
	Subnet   netip.Prefix `json:"subnet"`
	PublicIP netip.Addr   `json:"public_ip,omitzero"`
	Way      string       `json:"way"`
	State    string       `json:"state"`
	// Problem says why it is silent, or what does not pass.
	Problem string `json:"problem,omitempty"`
	// RTTSeconds is the last round-trip time of an echo request through the
	// tunnel; 0 if none was answered.
	RTTSeconds float64 `json:"rtt_seconds,omitempty"`
	// PathMTU is the largest packet of a pod that was seen to pass, in bytes; 0 if not
	// measured yet.
	PathMTU int `json:"path_mtu,omitempty"`
	// Heard is when the last packet came from it, or up to HeardWithin later.
	Heard time.Time `json:"heard,omitzero"`
	Asked time.Time `json:"asked,omitzero"` // when the last echo request was sent
	// Unanswered is when the first of the echo requests was sent that it has not answered;
	// zero if it answered the last one.
	Unanswered time.Time `json:"unanswered,omitzero"`
	// Sent, Received and Drops count since the datapath was opened; nil where the
	// datapath cannot tell.
	Sent     *PeerCount `json:"sent,omitempty"`
	Received *PeerCount `json:"received,omitempty"`
	Drops    *uint64    `json:"drops,omitempty"`
}

// PeerCount counts one direction: packets as on the wire, bytes of inner packets.
type PeerCount struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Probes are the results of the echo requests to peers.
type Probes struct {
	Sent, Lost uint64
	// Seconds are the round-trip times of the answered ones.
	Seconds Histogram
}

// Histogram counts observations in buckets. Counts[i] are those of at most
// Bounds[i] that no earlier bucket has; the last one has the rest.
type Histogram struct {
	Bounds []float64
	Counts []uint64
	Sum    float64
}

// NewHistogram returns an empty histogram.
func NewHistogram(bounds ...float64) Histogram {
	return Histogram{Bounds: bounds, Counts: make([]uint64, len(bounds)+1)}
}

// Observe counts v.
func (h *Histogram) Observe(v float64) {
	i := 0
	for i < len(h.Bounds) && v > h.Bounds[i] {
		i++
	}
	h.Counts[i]++
	h.Sum += v
}

// Clone returns a copy.
func (h Histogram) Clone() Histogram {
	h.Counts = append([]uint64(nil), h.Counts...)
	return h
}
