package encap

import (
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// egress is the sending direction: device to underlay. One goroutine runs it.
type egress struct {
	*common
	sources [2][]Source // by underlay family, IPv4 first; empty if unused
	// fragmenter are the sockets whose datagrams are fragmented, by family.
	fragmenter [2]Source
	classes    uint8   // the bits of the inner traffic class that the outer one bears
	super      uintptr // descriptor of the device that takes super-frames, if Offload says that there is one
	device     uintptr // descriptor of the first queue
	counters   *Counters

	moves *atomic.Uint64 // see Options
	moved uint64         // of moves, by when nothing was left in the first queue
	held  []byte         // a frame that others go before

	dontFragment bool // super-frames bear DF

	slab  []byte
	used  int // bytes of the slab that hold packets of the batch
	batch *sendBatch
	cut   *segmenter
	route route
	tally tally
	share share
	// failed is the error of a call that cannot be made again.
	failed error

	superID   uint16 // IPv4 identification of the next super-frame's first segment
	superSent uint64

	toldTooBig time.Time // when the last ICMP error was sent
	scratch    []byte    // for what is made here
}

const (
	// frameHeadroom is left in the slab before each frame, so that the outer
	// headers can be written in place; the virtio header gives 10 bytes more.
	frameHeadroom = VXLANHeaderLen - vnetHeaderLen
	// slabStart is where the first frame's headroom begins. A super-frame needs
	// a longer one, and has it: what lies before it in the slab has been sent.
	slabStart = (superHeadroom + 63) &^ 63
	maxFrame  = vnetHeaderLen + 1<<16
	// egressSlab has room for one more whole frame behind a batch of small
	// ones, which lie densely, to stay in the cache.
	egressSlab = slabStart + 4*maxFrame
)

func newEgress(c *common, sources [2][]Source, counters *Counters) *egress {
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

// What is sent before the other direction has its turn.
const (
	turnFrames = 64
	turnBytes  = 64 << 10
)

// drain sends what the device holds, or as much as is one turn's.
func (e *egress) drain(device uintptr) error {
	_, err := e.read(device)
	e.flush()
	return errors.Join(err, e.failed)
}

// read reads a turn's frames, and says whether there are no more.
func (e *egress) read(device uintptr) (dry bool, err error) {
	for frames, bytes := 0, 0; frames < turnFrames && bytes < turnBytes; {
		at := e.used + frameHeadroom
		n, errno := read(device, e.slab[at:at+maxFrame])
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
		if e.moves != nil && device != e.device {
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
	}
	return false, nil
}

// mostTurns is how many turns the first queue has at the most before a frame of
// the second one: as many as it has places (500 by default), since what it held
// when that frame was put into the other is no more.
const mostTurns = 512

// letOthersFirst sends what the first queue holds before the frame of n bytes at
// slab[at:], of a flow that may have moved, and returns where the frame is then.
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

// add puts the frame of n bytes at slab[at:] into the batch: a virtio header
// and a packet. It says whether the frame was a large one, which is sent at
// once, while it is in the cache.
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
	// The outer headers go right before the packet, over the virtio header.
	start := at + vnetHeaderLen - len(peer.header)
	datagram := e.slab[start : start+len(peer.header)+len(b)]
	copy(datagram, peer.header)
	e.batch.addPacket(peer, e.socket(peer, b, &p), p.class&e.classes, datagram, len(b), e.gso(peer))
	e.used = (at + n + 63) &^ 63
	return false
}

// isLinkLocal says whether a packet is what a kernel says on every link of its
// own accord: a router solicitation, a multicast report.
func isLinkLocal(source, destination netip.Addr) bool {
	return destination.IsLinkLocalMulticast() && (source.IsUnspecified() || source.IsLinkLocalUnicast())
}

// addFrame sends the frame at slab[at:] whole, or cuts it up and puts its
// segments into the batch.
func (e *egress) addFrame(peer *Peer, at int, p *packet, kind uint8, size int) {
	if !p.transport || size == 0 || (kind == gsoUDP) != (p.proto == protoUDP) {
		e.tally.drop(EgressMalformed)
		return
	}
	if e.offload.SuperFrame.Load() && peer.allows(refusesSuper) {
		// What came before goes before, and leaves its place in the slab.
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
				// The frame stays in the slab, so what is gathered can leave.
				e.flush()
			}
			run = e.batch.newRun(peer, socket, p.class&e.classes, length)
		}
		e.batch.addSegment(run, s.head, s.data)
	}
}

// gso says whether many packets to a peer may leave in one message: a raw socket
// cuts up nothing, and what is to be fragmented is sent packet by packet.
func (e *egress) gso(peer *Peer) bool {
	return e.format == FormatVXLAN && e.offload.GSO.Load() && peer.allows(refusesGSO) && !e.fragments(peer)
}

// socket chooses the source port of a packet by its flow (RFC 7348, section 5),
// so that the underlay can spread flows over its paths and the receiver over
// its processors, and none over two.
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

// publish adds what was counted to the counters.
func (e *egress) publish() {
	e.tally.publish(e.counters)
	e.share.publish()
}

// family is the index of the peer's underlay family: 0 for IPv4, 1 for IPv6.
func (p *Peer) family() int {
	if p.Underlay.Addr().Is4() {
		return 0
	}
	return 1
}

// send sends the messages [from, to) through one socket. What a full socket does
// not take is lost, as it would be to a full link.
func (e *egress) send(socket socketID, from, to int) {
	source := e.source(socket)
	if source.Socket.FD() < 0 {
		for _, r := range e.batch.runs[from:to] {
			e.tally.dropN(EgressUnreachable, r.segments) // a family that is not used
			e.share.drop(r.peer, r.segments)
		}
		return
	}
	fd := uintptr(source.Socket.FD())
	again := false
	for from < to {
		n, errno := sendmmsg(fd, e.batch.msgs[from:to])
		e.tally.syscalls++
		if errno != 0 {
			if errno == unix.EINTR {
				continue
			}
			if !again && !e.batch.mayCut(from, errno) {
				again = true // it may be of an ICMP error about something sent earlier
				continue
			}
			e.refused(fd, from, errno)
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

// source is the socket of an ID; the zero Source if there is none.
func (e *egress) source(id socketID) Source {
	family, number := id/socketsPerFamily, int(id%socketsPerFamily)
	switch {
	case number == fragmentSocket:
		return e.fragmenter[family]
	case number < len(e.sources[family]):
		return e.sources[family][number]
	}
	return Source{}
}

// refused deals with a message that the kernel would not send. A run that it
// would not cut up is sent again, one datagram at a time: EIO says that the
// link cannot checksum (Linux before 6.11) or that IPsec covers this peer's route,
// so it is not tried with that peer for a while; EINVAL or EMSGSIZE that the
// route's MTU is too small for the run's datagrams, which are fragmented if they
// come alone and without DF.
func (e *egress) refused(fd uintptr, i int, errno unix.Errno) {
	r := &e.batch.runs[i]
	if e.batch.mayCut(i, errno) {
		if errno == unix.EIO {
			r.peer.refuse(refusesGSO)
		}
		e.sendSingly(fd, i)
		return
	}
	e.lost(r.peer, errno, r.segments)
}

// lost counts packets that the kernel would not send.
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
func (e *egress) sendSingly(fd uintptr, i int) {
	r := e.batch.runs[i]
	whole := e.batch.msgs[i].hdr
	per := r.pieces / r.segments
	one := run{peer: r.peer, tos: r.tos, segments: 1}
	for n := range r.segments {
		iovs := iovecs(&whole)[n*per : (n+1)*per]
		e.batch.header(&e.batch.msgs[i].hdr, &one, iovs, i)
		sent, errno := sendmmsg(fd, e.batch.msgs[i:i+1])
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
