package encap

import "net/netip"

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

// Len returns how many peers the table has.
func (t *Table) Len() int { return len(t.peers) }

// Peers returns the table's peers, in no order.
func (t *Table) Peers() []*Peer {
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

// count allocates a lane per thread for every peer. A peer of the old table with
// the same underlay address keeps its lanes.
func (t *Table) count(threads int, old *Table) {
	fresh := make([]lane, 0)
	for prefix, p := range t.peers {
		before := old.peers[prefix]
		switch {
		case before == p: // the same Peer in both tables
			continue
		case before != nil && before.Underlay == p.Underlay:
			p.lanes = before.lanes
			continue
		}
		if len(fresh) < threads { // in small blocks: one remaining peer keeps its whole block alive
			fresh = make([]lane, max(threads, lanesAtOnce/threads*threads))
		}
		p.lanes, fresh = fresh[:threads:threads], fresh[threads:]
	}
}

// inheritPaths copies path MTUs and suspended mechanisms from the old table, for
// peers whose underlay address is unchanged.
func (t *Table) inheritPaths(old *Table) {
	for prefix, p := range t.peers {
		before := old.peers[prefix]
		if before == nil || before.Underlay != p.Underlay {
			continue
		}
		p.path.Store(before.path.Load())
		p.longest.Store(before.longest.Load())
		for m := range p.suspended {
			p.suspended[m].Store(before.suspended[m].Load())
		}
	}
}

// Suspended returns, by mechanism, for how many peers it is suspended.
func (t *Table) Suspended() (gso, superFrame, gro, uso int) {
	var n [mechanisms]int
	for _, p := range t.peers {
		for m := range mechanisms {
			if !p.allows(m) {
				n[m]++
			}
		}
	}
	return n[mechanismGSO], n[mechanismSuper], n[mechanismGRO], n[mechanismUSO]
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
