package encap

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"

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
	// name is Underlay as the kernel takes it.
	name    [unix.SizeofSockaddrInet6]byte
	nameLen uint32
	// super is the way of super-frames, nil while there is none.
	super atomic.Pointer[superPath]
	// path is what the network said of the way there; nil if nothing.
	path atomic.Pointer[PathMTU]
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

// Table is every peer, and this node's own subnets, of all address families.
// It is immutable: the loop follows an atomic pointer to the current one.
type Table struct {
	local []netip.Prefix
	peers map[netip.Prefix]*Peer
	// bits are the distinct prefix lengths among peers, longest first, by
	// family; in nearly every cluster there is one.
	bits4, bits6 []int
	outer        map[netip.Addr]struct{}
}

// NewTable returns the table of a node that leases the local prefixes. Of two
// peers with one subnet the first stands.
func NewTable(local []netip.Prefix, peers []*Peer) *Table {
	t := &Table{
		local: local,
		peers: make(map[netip.Prefix]*Peer, len(peers)),
		outer: make(map[netip.Addr]struct{}, len(peers)),
	}
	var seen4, seen6 [129]bool
	for _, p := range peers {
		if _, ok := t.peers[p.Subnet]; ok {
			continue
		}
		t.peers[p.Subnet] = p
		t.outer[p.Underlay.Addr()] = struct{}{}
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
