package encap

import "sync/atomic"

// PeerTraffic is what has been carried with one peer. Packets are counted as on
// the wire, bytes are of inner packets; drops are those of either direction
// whose peer is known.
type PeerTraffic struct {
	SentPackets, SentBytes         uint64
	ReceivedPackets, ReceivedBytes uint64
	Drops                          uint64
}

// lane is what one thread has carried with a peer, on a cache line of its own:
// one thread writes it, and anyone may read.
type lane struct {
	packets, bytes [2]atomic.Uint64 // by direction
	drops          atomic.Uint64
	_              [24]byte
}

// The directions of a lane.
const (
	sending = iota
	receiving
)

// Traffic sums what the threads have carried with the peer, since it was first in
// a table of the loop with this underlay address. It may be called at any time.
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

// count gives every peer a lane for each thread; a peer that was in the older
// table keeps its own.
func (t *Table) count(threads int, old *Table) {
	fresh := make([]lane, 0)
	for prefix, p := range t.peers {
		before := old.peers[prefix]
		switch {
		case before == p: // of a table that is set again
			continue
		case before != nil && before.Underlay == p.Underlay:
			p.lanes = before.lanes
			continue
		}
		if len(fresh) < threads { // not all at once: a peer that goes would keep the memory of all
			fresh = make([]lane, max(threads, lanesAtOnce/threads*threads))
		}
		p.lanes, fresh = fresh[:threads:threads], fresh[threads:]
	}
}

// lanesAtOnce fill a page.
const lanesAtOnce = 64

// share is what of a batch is one peer's, for one direction of one thread. As
// packets come in runs, the peer's lane is written about once per batch.
type share struct {
	thread, direction     int
	peer                  *Peer
	packets, bytes, drops uint64
}

// add counts packets that were carried with a peer.
func (s *share) add(p *Peer, packets, bytes int) {
	if s.peer != p {
		s.publish()
		s.peer = p
	}
	s.packets += uint64(packets)
	s.bytes += uint64(bytes)
}

// drop counts packets to or from a peer that were dropped.
func (s *share) drop(p *Peer, n int) {
	s.add(p, 0, 0)
	s.drops += uint64(n)
}

// publish adds the share to the peer's lane and begins a new one.
func (s *share) publish() {
	if s.peer != nil && s.thread < len(s.peer.lanes) {
		l := &s.peer.lanes[s.thread]
		if s.packets != 0 {
			l.packets[s.direction].Add(s.packets)
			l.bytes[s.direction].Add(s.bytes)
		}
		if s.drops != 0 {
			l.drops.Add(s.drops)
		}
	}
	s.packets, s.bytes, s.drops = 0, 0, 0
}
