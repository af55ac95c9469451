package subnet

import (
	"net/netip"
	"time"
)

// Lease is the fact that everything else follows from: one node owns one
// subnet of each address family in use, and lives at these underlay addresses.
//
// A Lease is a value: once published in a Snapshot it is never changed.
type Lease struct {
	// Node is the stable identity of the owner. It is empty in a lease that
	// flannel wrote, since flannel keeps none.
	Node string
	// Backend is the wire format that reaches this node: flannel's BackendType
	// ("vxlan", "ipip", "host-gw", ...).
	Backend string
	// Endpoints holds one entry per address family in use, IPv4 first.
	Endpoints []Endpoint

	// CreateRevision and ModRevision are the store's, for compare-and-swap.
	CreateRevision, ModRevision int64
	// ID is the store's handle for the lifetime (an etcd lease id); zero for a
	// reservation, which never expires.
	ID int64
	// Expires is when the lifetime ends unless it is renewed; zero if unknown.
	Expires time.Time
	// Reserved says that an administrator holds the subnet: no node lives there.
	Reserved bool
}

// Endpoint is one address family's half of a lease.
type Endpoint struct {
	// Subnet is the leased prefix with its host bits zero, such as 10.5.72.0/24.
	Subnet netip.Prefix
	// Public is the underlay address that tunnel packets are sent to.
	Public netip.Addr
	// VTEP is set where the wire format is VXLAN.
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

// Endpoint returns the half of the lease that has subnets of the given
// family, and whether there is one.
func (l Lease) Endpoint(is4 bool) (Endpoint, bool) {
	for _, e := range l.Endpoints {
		if e.Subnet.Addr().Is4() == is4 {
			return e, true
		}
	}
	return Endpoint{}, false
}
