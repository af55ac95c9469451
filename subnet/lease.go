package subnet

import (
	"net/netip"
	"time"
)

// Lease assigns one node one subnet per address family and records the node's
// underlay addresses. Routes, peers and firewall rules are derived from leases.
//
// A Lease is a value: it is not modified once published in a Snapshot.
type Lease struct {
	// Node is the stable identity of the owner. It is empty in a lease written
	// by flannel, which stores no identity.
	Node string
	// Backend is the wire format used to reach this node: flannel's BackendType
	// ("vxlan", "ipip", "host-gw", ...).
	Backend string
	// Endpoints holds one entry per address family in use, IPv4 first.
	Endpoints []Endpoint

	// CreateRevision and ModRevision are the store's revisions, for
	// compare-and-swap.
	CreateRevision, ModRevision int64
	// ID is the etcd lease ID; 0 for a reservation, which never expires, and in
	// stores without lease IDs.
	ID int64
	// Expires is when the lease expires unless renewed; zero if unknown.
	Expires time.Time
	// Reserved marks a subnet that an administrator holds; no node uses it.
	Reserved bool
}

// Endpoint is the part of a lease for one address family.
type Endpoint struct {
	// Subnet is the leased prefix with its host bits zero, such as 10.5.72.0/24.
	Subnet netip.Prefix
	// Public is the underlay address that tunnel packets are sent to.
	Public netip.Addr
	// VTEP is set if the wire format is VXLAN.
	VTEP VTEP
}

// VTEP is a VXLAN tunnel endpoint: flannel's BackendData (IPv4) or
// BackendV6Data (IPv6).
type VTEP struct {
	VNI uint32 // 24 bits
	MAC MAC
}

// MAC is an Ethernet address. It is comparable, unlike net.HardwareAddr.
type MAC [6]byte

// Endpoint returns the lease's endpoint of the given address family, and
// whether there is one.
func (l Lease) Endpoint(is4 bool) (Endpoint, bool) {
	for _, e := range l.Endpoints {
		if e.Subnet.Addr().Is4() == is4 {
			return e, true
		}
	}
	return Endpoint{}, false
}
