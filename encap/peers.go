package encap

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Peer is one subnet of another node, and how to reach it. NewPeer makes it.
// Its subnet, address and header never change; the state of the path does.
type Peer struct {
	Subnet   netip.Prefix   // inner addresses of the node's pods
	Underlay netip.AddrPort // destination of its datagrams; they also come from this address

	format Format
	// header precedes every inner packet sent to the peer.
	header []byte
	// sent and heard record traffic since the last call of Activity. They are written
	// only when they change, to keep the cache line shared.
	sent, heard atomic.Bool
	// name is Underlay as a sockaddr.
	name    [unix.SizeofSockaddrInet6]byte
	nameLen uint32
	// super holds the headers of super-frames; nil if there is no next hop.
	super atomic.Pointer[superPath]
	// path is the discovered path MTU; nil if none.
	path atomic.Pointer[PathMTU]
	// longest is the length in bytes of the longest inner packet sent to the peer.
	longest atomic.Uint32
	// suspended is, by mechanism, until when it is suspended for this peer, in
	// nanoseconds since start; 0 if it is not.
	suspended [mechanisms]atomic.Int64
	// lanes are the traffic counters, one per thread.
	lanes []lane
}

// mechanism is a batching mechanism that the kernel supports but may reject for one
// peer's packets: a route with IPsec has no GSO.
type mechanism uint8

const (
	mechanismGSO mechanism = iota
	mechanismSuper
	mechanismGRO
	mechanismUSO
	mechanisms
)

// suspendFor is how long a rejected mechanism is suspended.
const suspendFor = time.Minute

var start = time.Now() // the origin of Peer.suspended, on the monotonic clock

// allows reports whether a mechanism may be used with the peer.
func (p *Peer) allows(m mechanism) bool {
	if p == nil {
		return true
	}
	until := p.suspended[m].Load()
	if until == 0 {
		return true
	}
	if int64(time.Since(start)) < until {
		return false
	}
	p.suspended[m].Store(0)
	return true
}

func (p *Peer) suspend(m mechanism) {
	if p != nil {
		p.suspended[m].Store(int64(time.Since(start) + suspendFor))
	}
}

// PeerOptions are what NewPeer makes a peer of.
type PeerOptions struct {
	Format   Format
	Subnet   netip.Prefix   // that the node leases
	Underlay netip.AddrPort // its address; port 0 if the format has no ports
	VTEP     VTEP           // of the node
	Self     VTEP           // of this node
}

// NewPeer returns a peer, without next hop, and with no traffic counted.
func NewPeer(o PeerOptions) *Peer {
	p := &Peer{Subnet: o.Subnet.Masked(), Underlay: o.Underlay, format: o.Format, header: make([]byte, o.Format.HeaderLen())}
	o.Format.Put(p.header, o.Self, o.VTEP, etherTypeOf(o.Subnet.Addr().Is4()))
	b := p.name[:]
	binary.BigEndian.PutUint16(b[2:], o.Underlay.Port())
	if o.Underlay.Addr().Is4() {
		binary.NativeEndian.PutUint16(b, unix.AF_INET)
		a := o.Underlay.Addr().As4()
		copy(b[4:], a[:])
		p.nameLen = unix.SizeofSockaddrInet4
		return p
	}
	binary.NativeEndian.PutUint16(b, unix.AF_INET6)
	a := o.Underlay.Addr().As16()
	copy(b[8:], a[:])
	p.nameLen = unix.SizeofSockaddrInet6
	return p
}

// Activity reports whether packets were sent to the peer, and accepted from it,
// since the last call. It is safe for concurrent use.
func (p *Peer) Activity() (sent, heard bool) { return p.sent.Swap(false), p.heard.Swap(false) }

// note sets the mark, and writes only if it is not set.
func note(mark *atomic.Bool) {
	if !mark.Load() {
		mark.Store(true)
	}
}

// family is the index of the peer's underlay family: 0 for IPv4, 1 for IPv6.
func (p *Peer) family() int {
	if p.Underlay.Addr().Is4() {
		return 0
	}
	return 1
}

// Traffic returns the traffic with the peer since it was first in a table of the
// loop with this underlay address. It is safe for concurrent use.
func (p *Peer) Traffic() PeerTraffic {
	var t PeerTraffic
	for i := range p.lanes {
		l := &p.lanes[i]
		t.SentPackets += l.packets[sending].Load()
		t.SentBytes += l.bytes[sending].Load()
		t.ReceivedPackets += l.packets[receiving].Load()
		t.ReceivedBytes += l.bytes[receiving].Load()
		t.Drops += l.drops.Load()
	}
	return t
}

// PathMTU returns what is known of the path to the peer, and false if nothing is.
func (p *Peer) PathMTU() (PathMTU, bool) {
	k := p.path.Load()
	if k == nil {
		return PathMTU{}, false
	}
	if time.Now().After(k.Until) {
		p.path.CompareAndSwap(k, nil)
		return PathMTU{}, false
	}
	return *k, true
}

// limit is the MTU that pods are told for the peer, or 0 if nothing is known.
func (p *Peer) limit() int {
	k, _ := p.PathMTU()
	return k.MTU
}

// fits is the longest inner packet that reaches the peer unfragmented, or 0 if
// nothing is known.
func (p *Peer) fits() int {
	k, _ := p.PathMTU()
	return k.Fits
}

// narrow stores n as the longest inner packet that passes, unless a valid value
// is as low.
func (p *Peer) narrow(n int, by netip.Addr, life time.Duration) {
	least := leastMTU6
	if p.Subnet.Addr().Is4() {
		least = leastMTU4
	}
	n = max(n, leastFits)
	if known := p.fits(); known != 0 && n >= known {
		return
	}
	now := time.Now()
	p.path.Store(&PathMTU{MTU: max(n, least), Fits: n, By: by, Since: now, Until: now.Add(life)})
}

// SetNextHop sets the next hop of super-frames to the peer. With nil, frames are
// cut in userspace. It is safe for concurrent use.
func (p *Peer) SetNextHop(n *NextHop) {
	if n == nil || n.Source.Is4() != p.Underlay.Addr().Is4() || !p.format.SuperFrames() {
		p.super.Store(nil)
		return
	}
	p.super.Store(newSuperPath(p, n))
}

// HasNextHop reports whether a next hop for super-frames to the peer is set.
func (p *Peer) HasNextHop() bool { return p.super.Load() != nil }
