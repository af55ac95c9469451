package encap

import "sync/atomic"

// PeerTraffic is the traffic with one peer. Packets are inner packets, each
// segment counted; bytes are of inner packets; Drops are of both directions, if
// the packet's peer was known.
type PeerTraffic struct {
	SentPackets, SentBytes         uint64
	ReceivedPackets, ReceivedBytes uint64
	Drops                          uint64
}

// lane is one thread's counters for a peer, padded to a cache line. Only that
// thread writes it.
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

// lanesAtOnce lanes fill a 4 KB page.
const lanesAtOnce = 64

// share gathers one direction's counts for the current peer, and publishes them
// when the peer changes or the batch ends. Packets come in runs, so a lane is
// written about once per batch.
type share struct {
	thread, direction     int
	peer                  *Peer
	packets, bytes, drops uint64
}

// add counts carried packets.
func (s *share) add(p *Peer, packets, bytes int) {
	if s.peer != p {
		s.publish()
		s.peer = p
	}
	s.packets += uint64(packets)
	s.bytes += uint64(bytes)
}

// drop counts dropped packets to or from a peer.
func (s *share) drop(p *Peer, n int) {
	s.add(p, 0, 0)
	s.drops += uint64(n)
}

// publish adds the share to the peer's lane and resets it.
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
