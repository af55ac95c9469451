package encap

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Peer is another node as the loop sees it: one subnet, and how to reach it.
// It is made once, by NewPeer, and never changes, except for what is known of
// the way there.
type Peer struct {
	Subnet   netip.Prefix   // inner addresses that live there
	Underlay netip.AddrPort // where datagrams for it go, and come from (its address alone)

	// header is what stands before every inner packet sent to it: a VXLAN
	// header, or nothing for IPIP.
	header []byte
	// sent and heard say that packets have passed since Passed was asked last. They
	// are written only where they change.
	sent, heard atomic.Bool
	// name is Underlay as the kernel takes it.
	name    [unix.SizeofSockaddrInet6]byte
	nameLen uint32
	// super is the way of super-frames, nil while there is none.
	super atomic.Pointer[superPath]
	// path is what the network said of the way there; nil if nothing.
	path atomic.Pointer[PathMTU]
	// longest is the bytes of the longest inner packet that was sent there.
	longest atomic.Uint32
	// refused is until when the kernel is taken at its word that it does not take
	// a mechanism with this peer, by the mechanism; 0 if it has not refused.
	refused [refusals]atomic.Int64
	// lanes are the threads' counters of what passes.
	lanes []lane
}

// refusal is a batching mechanism that the kernel can refuse for the packets to
// or from a peer, although it has it: IPsec on one route has no GSO.
type refusal uint8

const (
	refusesGSO refusal = iota
	refusesSuper
	refusesGRO
	refusesUSO
	refusals
)

// refusedFor is how long the kernel is taken at its word, before the mechanism is
// tried again.
const refusedFor = time.Minute

var start = time.Now() // of what allows compares, which nobody sets as the wall clock is

// allows says whether a mechanism may be used with the peer.
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

// Refused returns how many peers there are with which the kernel refused each
// mechanism lately.
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

// NewPeer returns the peer that leases subnet and is reached at underlay. The
// header is stamped before every inner packet; the peer keeps it.
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

// Passed says whether anything was sent to the peer, and whether anything of it was
// taken, since it was called last. It may be called at any time.
func (p *Peer) Passed() (sent, heard bool) { return p.sent.Swap(false), p.heard.Swap(false) }

// note sets a mark that says that something has passed.
func note(mark *atomic.Bool) {
	if !mark.Load() {
		mark.Store(true)
	}
}

// Table is every peer, and this node's own subnets, of all address families.
// It is immutable: the loop follows an atomic pointer to the current one.
type Table struct {
	local []netip.Prefix
	peers map[netip.Prefix]*Peer
	// bits are the distinct prefix lengths among peers, longest first, by
	// family; in nearly every cluster there is one.
	bits4, bits6 []int
	outer        map[netip.Addr][]*Peer
}

// NewTable returns the table of a node that leases the local prefixes. Of two
// peers with one subnet the first stands.
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

// isLocal says whether the inner address is in one of this node's subnets.
func (t *Table) isLocal(a netip.Addr) bool {
	for _, p := range t.local {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// isPeer says whether any peer lives at the underlay address.
func (t *Table) isPeer(outer netip.Addr) bool {
	_, ok := t.outer[outer]
	return ok
}

// route remembers the last lookup of one direction, since packets come in
// runs: most of the time the table is not asked at all.
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
