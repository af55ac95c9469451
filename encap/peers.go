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

	// header precedes every inner packet sent to the peer: a VXLAN and an Ethernet
	// header, or nothing for IPIP.
	header []byte
	// sent and heard record traffic since the last call of Passed. They are written
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
	// refused is, by mechanism, until when it is suspended for this peer, in
	// nanoseconds since start; 0 if it is not.
	refused [refusals]atomic.Int64
	// lanes are the traffic counters, one per thread.
	lanes []lane
}

// refusal is a batching mechanism that the kernel supports but may reject for one
// peer's packets: a route with IPsec has no GSO.
type refusal uint8

const (
	refusesGSO refusal = iota
	refusesSuper
	refusesGRO
	refusesUSO
	refusals
)

// refusedFor is how long a rejected mechanism is suspended.
const refusedFor = time.Minute

var start = time.Now() // the origin of Peer.refused, on the monotonic clock

// allows reports whether a mechanism may be used with the peer.
func (p *Peer) allows(m refusal) bool {
	if p == nil {
		return true
	}
	until := p.refused[m].Load()
	if until == 0 {
		return true
	}
	if int64(time.Since(start)) < until {
		return false
	}
	p.refused[m].Store(0)
	return true
}

func (p *Peer) refuse(m refusal) {
	if p != nil {
		p.refused[m].Store(int64(time.Since(start) + refusedFor))
	}
}

// Refused returns, by mechanism, for how many peers it is suspended.
func (t *Table) Refused() (gso, superFrame, gro, uso int) {
	var n [refusals]int
	for _, p := range t.peers {
		for m := range refusals {
			if !p.allows(m) {
				n[m]++
			}
		}
	}
	return n[refusesGSO], n[refusesSuper], n[refusesGRO], n[refusesUSO]
}

// NewPeer returns the peer that leases subnet and is reached at underlay. header
// is copied before every inner packet; the peer retains it.
func NewPeer(subnet netip.Prefix, underlay netip.AddrPort, header []byte) *Peer {
	p := &Peer{Subnet: subnet.Masked(), Underlay: underlay, header: header}
	b := p.name[:]
	binary.BigEndian.PutUint16(b[2:], underlay.Port())
	if underlay.Addr().Is4() {
		binary.NativeEndian.PutUint16(b, unix.AF_INET)
		a := underlay.Addr().As4()
		copy(b[4:], a[:])
		p.nameLen = unix.SizeofSockaddrInet4
		return p
	}
	binary.NativeEndian.PutUint16(b, unix.AF_INET6)
	a := underlay.Addr().As16()
	copy(b[8:], a[:])
	p.nameLen = unix.SizeofSockaddrInet6
	return p
}

// Passed reports whether packets were sent to the peer, and accepted from it,
// since the last call. It is safe for concurrent use.
func (p *Peer) Passed() (sent, heard bool) { return p.sent.Swap(false), p.heard.Swap(false) }

// note sets the mark, and writes only if it is not set.
func note(mark *atomic.Bool) {
	if !mark.Load() {
		mark.Store(true)
	}
}

// Table holds all peers and this node's own subnets, of both address families.
// Lookups need no lock: the loop loads it through an atomic pointer, and SetTable
// replaces it whole.
type Table struct {
	local []netip.Prefix
	peers map[netip.Prefix]*Peer
	// bits4 and bits6 are the distinct prefix lengths of the peers' subnets,
	// longest first; nearly every cluster has one.
	bits4, bits6 []int
	outer        map[netip.Addr][]*Peer
}

// NewTable returns the table of a node that leases the local prefixes. If two
// peers have the same subnet, the first is used.
func NewTable(local []netip.Prefix, peers []*Peer) *Table {
	t := &Table{
		local: local,
		peers: make(map[netip.Prefix]*Peer, len(peers)),
		outer: make(map[netip.Addr][]*Peer, len(peers)),
	}
	var seen4, seen6 [129]bool
	for _, p := range peers {
		if _, ok := t.peers[p.Subnet]; ok {
			continue
		}
		t.peers[p.Subnet] = p
		t.outer[p.Underlay.Addr()] = append(t.outer[p.Underlay.Addr()], p)
		if p.Subnet.Addr().Is4() {
			seen4[p.Subnet.Bits()] = true
		} else {
			seen6[p.Subnet.Bits()] = true
		}
	}
	for bits := 128; bits >= 0; bits-- {
		if seen4[bits] {
			t.bits4 = append(t.bits4, bits)
		}
		if seen6[bits] {
			t.bits6 = append(t.bits6, bits)
		}
	}
	return t
}

// Peers returns how many peers the table has.
func (t *Table) Peers() int { return len(t.peers) }

// All returns the table's peers, in no order.
func (t *Table) All() []*Peer {
	all := make([]*Peer, 0, len(t.peers))
	for _, p := range t.peers {
		all = append(all, p)
	}
	return all
}

// lookup returns the peer whose subnet contains the inner address, or nil.
func (t *Table) lookup(a netip.Addr) *Peer {
	bits := t.bits6
	if a.Is4() {
		bits = t.bits4
	}
	for _, n := range bits {
		prefix, err := a.Prefix(n)
		if err != nil {
			return nil
		}
		if p := t.peers[prefix]; p != nil {
			return p
		}
	}
	return nil
}

// isLocal reports whether the inner address is in one of this node's subnets.
func (t *Table) isLocal(a netip.Addr) bool {
	for _, p := range t.local {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// isPeer reports whether any peer has the underlay address.
func (t *Table) isPeer(outer netip.Addr) bool {
	_, ok := t.outer[outer]
	return ok
}

// route caches one direction's last lookup: packets come in runs, so most
// lookups do not reach the table.
type route struct {
	table *Table
	inner netip.Addr
	peer  *Peer
}

func (r *route) lookup(t *Table, inner netip.Addr) *Peer {
	if r.table != t || r.inner != inner {
		*r = route{table: t, inner: inner, peer: t.lookup(inner)}
	}
	return r.peer
}
