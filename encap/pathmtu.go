package encap

import (
	"net/netip"
	"time"
)

// Path MTU discovery. If outer packets set DF, or are IPv6, a router before a
// narrower link answers with an ICMP error instead of fragmenting. The loop
// stores the peer's path MTU for a while and answers longer packets from pods
// with its own ICMP error:
//
//	router ── ICMP too big ── socket's error queue ── Peer.path
//	pod ◄── TUN ── ICMP too big, from the peer's VTEP address ── packet that is longer
//
// Anyone can forge an ICMP error. It is accepted if it quotes the tunnel header
// and an inner packet from this node's pods to the peer's. Some routers quote only
// 8 bytes after the outer IP header (RFC 792): for VXLAN the UDP header, whose
// ports the kernel used to find the socket; for IPIP the start of the inner IPv4
// header, with its length. Such a hint is accepted only if a packet longer than
// its MTU was sent to that peer, at a limited rate, and for a shorter time.
//
// Pods may send packets of the minimum MTU whatever they are told (IPv6: 1280
// bytes), which may exceed the path MTU. The outer packet is then fragmented
// (RFC 2473, section 7.1), through a separate socket.

const (
	// pathMTULife is how long a peer's path MTU is valid, as in the kernel
	// (net.ipv4.route.mtu_expires).
	pathMTULife = 10 * time.Minute
	// The minimum MTUs that pods are told: every host must accept IPv4 packets of
	// 576 bytes (RFC 791), every link must carry IPv6 packets of 1280 (RFC 8200).
	leastMTU4, leastMTU6 = 576, 1280
	// hintLife is how long the MTU of a hint is valid: an ICMP error that quoted
	// too little to verify.
	hintLife = 2 * time.Minute
	// hintPause is the minimum interval between hints; others are ignored.
	hintPause = 100 * time.Millisecond
	// tooBigPause is the minimum interval between ICMP errors sent to pods.
	tooBigPause = time.Millisecond
)

// PathMTU is what ICMP errors said of the path to a peer. Sizes are of inner
// packets, in bytes.
type PathMTU struct {
	MTU          int        // what pods are told
	Fits         int        // the longest packet that passes unfragmented
	By           netip.Addr // sender of the ICMP error; invalid if not known
	Since, Until time.Time  // validity
}

// leastFits is the lowest PathMTU.Fits that is accepted: the IPv4 minimum less 70
// bytes, the overhead of VXLAN over IPv6.
const leastFits = 576 - 70
