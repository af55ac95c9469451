package encap

import (
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// egress is the sending direction, from the device to the underlay. Only one
// goroutine uses it.
type egress struct {
	*common
	sources [2][]source // by underlay family, IPv4 first; empty if unused
	// fragmenter are the sockets without DF (Underlay.Fragment), by family.
	fragmenter [2]source
	classes    uint8  // mask of the traffic class bits copied to the outer header
	super      device // the Super device, or nil
	device     device // the first queue, if flows move from it
	counters   *Counters

	moves   *atomic.Uint64 // see Options
	moved   uint64         // value of moves at the last drain of the first queue
	sharing bool           // several queues have packets
	held    []byte         // a frame of another queue that waits for that drain

	dontFragment bool // set DF on super-frames

	slab  []byte
	used  int // bytes of the slab that hold packets of the batch
	batch *sendBatch
	cut   *segmenter
	route route
	tally tally
	share share
	// failed is a fatal socket error; drain returns it.
	failed error

	superID   uint16 // IPv4 identification of the next super-frame's first segment
	superSent uint64

	toldTooBig time.Time // when the last ICMP error was sent
	scratch    []byte    // for fragments and ICMP errors
	frame      [1]unix.Iovec
}

// source is a Source with its socket; the zero source is none.
type source struct {
	socket socket
	port   uint16
}

func sourceOf(s Source) source { return source{socketOf(s.Socket), s.Port} }

func sourcesOf(all []Source) []source {
	var sources []source
	for _, s := range all {
		sources = append(sources, sourceOf(s))
	}
	return sources
}

const (
	// frameHeadroom is left in the slab before each frame, so that the tunnel
	// header can be written in place; the virtio header gives 10 more bytes.
	frameHeadroom = maxHeaderLen - vnetHeaderLen
	// slabStart is where the first frame's headroom begins. It is as long as a
	// super-frame needs; later super-frames may overwrite what was already sent.
	slabStart = (superHeadroom + 63) &^ 63
	maxFrame  = vnetHeaderLen + 1<<16
	// egressSlab holds a batch of small frames, packed densely to stay in the
	// cache, and one more frame of the largest size.
	egressSlab = slabStart + 4*maxFrame
)

func newEgress(c *common, sources [2][]source, counters *Counters) *egress {
	return &egress{
		common:   c,
		sources:  sources,
		classes:  ecnBits,
		counters: counters,
		share:    share{direction: sending},
		slab:     make([]byte, egressSlab),
		batch:    newSendBatch(),
		cut:      newSegmenter(),
		used:     slabStart,
		scratch:  make([]byte, 0, maxFrame),
		held:     make([]byte, 0, maxFrame),
	}
}

// A turn: how much drain reads before the other direction and the other queues of the
// device run. It is one large frame: a request waits for no more than one. Queues that wait
// for each other share the thread's time about equally, so a frame then counts as
// frameCost bytes more: what its system calls take.
const (
	turnFrames = 64
	turnBytes  = 48 << 10
	frameCost  = 2 << 10
)

// drain reads and sends at most one turn's frames.
func (e *egress) drain(from device) error {
	_, err := e.turn(from)
	return err
}

// turn is drain. dry reports that the device has no more, and all of it is sent.
func (e *egress) turn(from device) (dry bool, err error) {
	dry, err = e.read(from)
	e.flush()
	return dry, errors.Join(err, e.failed)
}

// read adds at most one turn's frames to the batch, flushing as it fills. dry
// reports that the device has no more.
func (e *egress) read(from device) (dry bool, err error) {
	others := e.moves != nil && from != e.device // flows move here from e.device
	for frames, bytes := 0, 0; frames < turnFrames && bytes < turnBytes; {
		at := e.used + frameHeadroom
		n, errno := from.read(e.slab[at : at+maxFrame])
		e.tally.syscalls++
		if errno != 0 {
			switch deviceRead.of(errno).fault {
			case faultDry:
				return true, nil
			case faultAgain:
				continue
			default:
				return false, fmt.Errorf("reading the tunnel device: %w", errno)
			}
		}
		if others {
			if moves := e.moves.Load(); moves != e.moved {
				if at, err = e.letOthersFirst(at, n); err != nil {
					return false, err
				}
				e.moved = moves
			}
		}
		if big := e.add(at, n); big || e.batch.full() || e.used+frameHeadroom+maxFrame > len(e.slab) {
			e.flush()
		}
		frames++
		bytes += n
		if e.sharing {
			bytes += frameCost
		}
	}
	return false, nil
}

// mostTurns bounds how long the first queue is drained before a frame of
// another one is sent. The queue's length (500 packets by default) bounds what it
// held when the flow moved.
const mostTurns = 512

// letOthersFirst drains the first queue before the frame of n bytes at
// slab[at:], whose flow may have moved from there. It returns the frame's new
// offset in the slab.
func (e *egress) letOthersFirst(at, n int) (int, error) {
	e.held = append(e.held[:0], e.slab[at:at+n]...)
	for range mostTurns {
		e.flush()
		if dry, err := e.read(e.device); err != nil {
			return 0, err
		} else if dry {
			break
		}
	}
	e.flush()
	at = e.used + frameHeadroom
	copy(e.slab[at:], e.held)
	return at, nil
}

// add adds the frame of n bytes at slab[at:], a virtio header and a packet, to
// the batch. big reports a GSO frame; the caller flushes at once, while the
// frame is in the cache.
func (e *egress) add(at, n int) (big bool) {
	frame := e.slab[at : at+n]
	if n < vnetHeaderLen {
		e.tally.drop(EgressMalformed)
		return false
	}
	var v vnetHeader
	v.parse(frame)
	b := frame[vnetHeaderLen:]
	var p packet
	if !p.parse(b) {
		e.tally.drop(EgressMalformed)
		return false
	}
	b = b[:p.length]
	table := e.table.Load()
	if !table.isLocal(p.source(b)) {
		reason := EgressSource
		if isLinkLocal(p.source(b), p.destination(b)) {
			reason = EgressLinkLocal
		}
		e.tally.drop(reason)
		return false
	}
	peer := e.route.lookup(table, p.destination(b))
	if peer == nil {
		e.tally.drop(EgressNoPeer)
		return false
	}
	e.tally.frames++
	note(&peer.sent)
	if kind := v.gsoType &^ gsoECN; kind != gsoNone {
		if !e.tooLong(peer, b, &p, p.headLen+int(v.gsoSize)) {
			e.addFrame(peer, at+vnetHeaderLen, &p, kind, int(v.gsoSize))
		}
		return true
	}
	if v.flags&vnetNeedsCsum != 0 &&
		!completeChecksum(b, int(v.csumStart), int(v.csumOffset), p.proto == protoUDP) {
		e.tally.drop(EgressMalformed)
		return false
	}
	if e.tooLong(peer, b, &p, p.length) {
		return false
	}
	// The tunnel header goes right before the packet, over the virtio header.
	start := at + vnetHeaderLen - len(peer.header)
	datagram := e.slab[start : start+len(peer.header)+len(b)]
	copy(datagram, peer.header)
	e.batch.addPacket(peer, e.socket(peer, b, &p), p.class&e.classes, datagram, len(b), e.gso(peer))
	e.used = (at + n + 63) &^ 63
	return false
}

// isLinkLocal reports whether a packet is link-local multicast that the kernel
// sends on every link: router solicitations, multicast listener reports.
func isLinkLocal(source, destination netip.Addr) bool {
	return destination.IsLinkLocalMulticast() && (source.IsUnspecified() || source.IsLinkLocalUnicast())
}

// addFrame sends the GSO frame at slab[at:] whole, as a super-frame, or cuts it
// and adds its segments to the batch.
func (e *egress) addFrame(peer *Peer, at int, p *packet, kind uint8, size int) {
	if !p.transport || size == 0 || (kind == gsoUDP) != (p.proto == protoUDP) {
		e.tally.drop(EgressMalformed)
		return
	}
	if e.offload.SuperFrame.Load() && peer.allows(mechanismSuper) {
		// Flush first: it keeps the order, and the headers overwrite the slab.
		e.flush()
		if e.superFrame(peer, at, p, kind, size) {
			return
		}
	}
	b := e.slab[at : at+p.length]
	segments := e.cut.cut(peer.header, b, p, size)
	if segments == nil {
		e.tally.drop(EgressMalformed)
		return
	}
	length := len(peer.header) + p.headLen + size
	perRun := 1
	if e.gso(peer) {
		perRun = max(1, min(maxSegments, maxDatagram/length))
	}
	socket := e.socket(peer, b, p)
	run := 0
	for i, s := range segments {
		if i%perRun == 0 {
			if e.batch.full() {
				// flush is safe: the frame stays in the slab.
				e.flush()
			}
			run = e.batch.newRun(peer, socket, p.class&e.classes, length)
		}
		e.batch.addSegment(run, s.head, s.data)
	}
}

// gso reports whether one message may hold several packets to the peer
// (UDP_SEGMENT). Raw sockets do not segment, and packets that need fragmentation
// are sent one by one.
func (e *egress) gso(peer *Peer) bool {
	return e.udp && e.offload.GSO.Load() && peer.allows(mechanismGSO) && !e.fragments(peer)
}

// socket selects the source port by the packet's flow hash (RFC 7348, section
// 5), so that ECMP on the underlay and RSS on the receiver spread flows but do
// not reorder them.
func (e *egress) socket(peer *Peer, b []byte, p *packet) socketID {
	family := peer.family()
	id := socketID(family * socketsPerFamily)
	if e.fragments(peer) {
		return id + fragmentSocket
	}
	if n := len(e.sources[family]); n > 1 {
		id += socketID(p.flowHash(b) % uint32(n))
	}
	return id
}

// flush sends the batch.
func (e *egress) flush() {
	defer e.publish()
	if len(e.batch.runs) == 0 {
		return
	}
	n := e.batch.layOut()
	for i := 0; i < n; {
		socket := e.batch.runs[i].socket
		end := i + 1
		for end < n && e.batch.runs[end].socket == socket {
			end++
		}
		e.send(socket, i, end)
		i = end
	}
	e.batch.reset()
	e.used = slabStart
}

// publish adds the batch's tally and share to the counters.
func (e *egress) publish() {
	e.tally.publish(e.counters)
	e.share.publish()
}

// send sends the messages [from, end) through one socket. If the socket buffer is
// full, the rest is dropped, as on a full link.
func (e *egress) send(id socketID, from, end int) {
	to := e.source(id).socket
	if to == nil {
		for _, r := range e.batch.runs[from:end] {
			e.tally.dropN(EgressUnreachable, r.segments) // unused family
			e.share.drop(r.peer, r.segments)
		}
		return
	}
	again := false
	for from < end {
		n, errno := to.send(e.batch.msgs[from:end])
		e.tally.syscalls++
		if errno != 0 {
			if errno == unix.EINTR {
				continue
			}
			if !again && !e.batch.mayCut(from, errno) {
				again = true // the error may be from an ICMP message about an earlier packet
				continue
			}
			e.refused(to, from, errno)
			again = false
			from++
			continue
		}
		for _, r := range e.batch.runs[from : from+n] {
			e.tally.packets += uint64(r.segments)
			e.tally.bytes += uint64(r.payload)
			e.share.add(r.peer, r.segments, r.payload)
		}
		again = false
		from += n
	}
}

// source returns the socket with the ID, or none.
func (e *egress) source(id socketID) source {
	family, number := id/socketsPerFamily, int(id%socketsPerFamily)
	switch {
	case number == fragmentSocket:
		return e.fragmenter[family]
	case number < len(e.sources[family]):
		return e.sources[family][number]
	}
	return source{}
}

// refused handles a message that the kernel rejected. A run that could not be
// segmented is sent again one datagram at a time. EIO means that the link cannot
// checksum (Linux before 6.11) or that IPsec covers the route: GSO is suspended
// for this peer. EINVAL or EMSGSIZE mean that the run's datagrams exceed the
// route's MTU; sent singly and without DF, they are fragmented.
func (e *egress) refused(to socket, i int, errno unix.Errno) {
	r := &e.batch.runs[i]
	if e.batch.mayCut(i, errno) {
		if errno == unix.EIO {
			r.peer.suspend(mechanismGSO)
		}
		e.sendSingly(to, i)
		return
	}
	e.lost(r.peer, errno, r.segments)
}

// lost counts packets that the kernel did not send, and records a fatal error
// in e.failed.
func (e *egress) lost(p *Peer, errno unix.Errno, n int) {
	o := socketSend.of(errno)
	if o.fault != faultCounted {
		e.failed = fmt.Errorf("sending to the underlay: %w", errno)
		o.reason = EgressSend
	}
	e.tally.dropN(o.reason, n)
	e.share.drop(p, n)
}

// sendSingly sends the datagrams of a run one by one.
func (e *egress) sendSingly(to socket, i int) {
	r := e.batch.runs[i]
	whole := e.batch.msgs[i].hdr
	per := r.pieces / r.segments
	one := run{peer: r.peer, tos: r.tos, segments: 1}
	for n := range r.segments {
		iovs := iovecs(&whole)[n*per : (n+1)*per]
		e.batch.header(&e.batch.msgs[i].hdr, &one, iovs, i)
		sent, errno := to.send(e.batch.msgs[i : i+1])
		e.tally.syscalls++
		if sent != 1 {
			e.lost(r.peer, errno, 1)
			continue
		}
		bytes := -len(r.peer.header)
		for _, iov := range iovs {
			bytes += int(iov.Len)
		}
		e.tally.packets++
		e.tally.bytes += uint64(bytes)
		e.share.add(r.peer, 1, bytes)
	}
}
