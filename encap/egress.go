package encap

import (
	"fmt"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// egress is the sending direction: device to underlay. One goroutine runs it.
type egress struct {
	table    *atomic.Pointer[Table]
	sockets  [2]syscall.RawConn // by underlay family, IPv4 first; nil if unused
	super    uintptr            // descriptor of the device that takes super-frames, if Offload says that there is one
	offload  *Offload
	counters *Counters

	slab     []byte
	used     int // bytes of the slab that hold packets of the batch
	batch    *sendBatch
	cut      *segmenter
	route    route
	tally    tally
	patience patience

	superID   uint16 // IPv4 identification of the next super-frame's first segment
	superSent uint64

	from, to int                // the messages that are being sent
	sendRest func(uintptr) bool // trySend, bound once: a method value allocates
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

func newEgress(table *atomic.Pointer[Table], sockets [2]syscall.RawConn, offload *Offload, counters *Counters) *egress {
	e := &egress{
		table:    table,
		sockets:  sockets,
		offload:  offload,
		counters: counters,
		slab:     make([]byte, egressSlab),
		batch:    newSendBatch(),
		cut:      newSegmenter(),
		used:     slabStart,
	}
	e.sendRest = e.trySend
	return e
}

// run carries packets until the device fails or its read deadline passes.
func (e *egress) run(device syscall.RawConn) error {
	var failure error
	err := device.Read(func(fd uintptr) bool {
		e.patience.woken()
		failure = e.drain(fd)
		e.tally.publish(e.counters)
		e.counters.Waits.Add(1)
		e.patience.sleeps()
		return failure != nil
	})
	if failure != nil {
		return failure
	}
	return err
}

// drain sends what the device holds, and returns when it has been empty for a
// moment.
func (e *egress) drain(device uintptr) error {
	for {
		at := e.used + frameHeadroom
		n, errno := read(device, e.slab[at:at+maxFrame])
		e.tally.syscalls++
		switch errno {
		case 0:
		case unix.EAGAIN:
			if err := e.flush(); err != nil || !e.patience.again() {
				return err
			}
			continue
		case unix.EINTR:
			continue
		default:
			return fmt.Errorf("reading the tunnel device: %w", errno)
		}
		e.patience.fed()
		if big := e.add(at, n); big || e.batch.full() || e.used+frameHeadroom+maxFrame > len(e.slab) {
			if err := e.flush(); err != nil {
				return err
			}
		}
	}
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
		e.tally.drop(EgressSource)
		return false
	}
	peer := e.route.lookup(table, p.destination(b))
	if peer == nil {
		e.tally.drop(EgressNoPeer)
		return false
	}
	e.tally.frames++

	if kind := v.gsoType &^ gsoECN; kind != gsoNone {
		e.addFrame(peer, at+vnetHeaderLen, &p, kind, int(v.gsoSize))
		return true
	}
	if v.flags&vnetNeedsCsum != 0 &&
		!completeChecksum(b, int(v.csumStart), int(v.csumOffset), p.proto == protoUDP) {
		e.tally.drop(EgressMalformed)
		return false
	}
	// The outer headers go right before the packet, over the virtio header.
	start := at + vnetHeaderLen - len(peer.header)
	datagram := e.slab[start : start+len(peer.header)+len(b)]
	copy(datagram, peer.header)
	e.batch.addPacket(peer, p.ecn, datagram, len(b), e.offload.GSO.Load())
	e.used = (at + n + 63) &^ 63
	return false
}

// addFrame sends the frame at slab[at:] whole, or cuts it up and puts its
// segments into the batch.
func (e *egress) addFrame(peer *Peer, at int, p *packet, kind uint8, size int) {
	if !p.transport || size == 0 || (kind == gsoUDP) != (p.proto == protoUDP) {
		e.tally.drop(EgressMalformed)
		return
	}
	if e.offload.SuperFrame.Load() {
		// What came before goes before, and leaves its place in the slab.
		if e.flush() != nil || e.superFrame(peer, e.slab[:at+p.length], p, kind, size) {
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
	if e.offload.GSO.Load() {
		perRun = max(1, min(maxSegments, maxDatagram/length))
	}
	run := 0
	for i, s := range segments {
		if i%perRun == 0 {
			if e.batch.full() {
				// The frame stays in the slab, so what is gathered can leave.
				if e.flush() != nil {
					return
				}
			}
			run = e.batch.newRun(peer, p.ecn, length)
		}
		e.batch.addSegment(run, s.head, s.data)
	}
}

// flush sends the batch. It returns an error only if the socket is closed.
func (e *egress) flush() error {
	if len(e.batch.runs) == 0 {
		return nil
	}
	defer e.clear()
	n := e.batch.layOut()
	// Runs of one underlay family lie together nearly always; a stretch of one
	// family is one call.
	for i := 0; i < n; {
		family := e.batch.runs[i].peer.family()
		end := i + 1
		for end < n && e.batch.runs[end].peer.family() == family {
			end++
		}
		if err := e.send(e.sockets[family], i, end); err != nil {
			return err
		}
		i = end
	}
	return nil
}

func (e *egress) clear() {
	e.batch.reset()
	e.used = slabStart
	e.tally.publish(e.counters)
}

// family is the index of the peer's underlay family: 0 for IPv4, 1 for IPv6.
func (p *Peer) family() int {
	if p.Underlay.Addr().Is4() {
		return 0
	}
	return 1
}

// send sends the messages [from, to) through one socket. A full socket is waited
// for, which lets the device's own queue fill and drop, as a full link would.
func (e *egress) send(socket syscall.RawConn, from, to int) error {
	if socket == nil {
		for _, r := range e.batch.runs[from:to] {
			e.tally.dropN(EgressSend, r.segments)
		}
		return nil
	}
	e.from, e.to = from, to
	return socket.Write(e.sendRest)
}

// trySend sends what is left of [from, to). It returns false if the socket is
// full: it is to be called again when there is room.
func (e *egress) trySend(fd uintptr) bool {
	for e.from < e.to {
		n, errno := sendmmsg(fd, e.batch.msgs[e.from:e.to])
		e.tally.syscalls++
		switch errno {
		case 0:
		case unix.EAGAIN:
			return false
		case unix.EINTR:
			continue
		default:
			e.refused(fd, e.from, errno)
			e.from++
			continue
		}
		for _, r := range e.batch.runs[e.from : e.from+n] {
			e.tally.packets += uint64(r.segments)
			e.tally.bytes += uint64(r.payload)
		}
		e.from += n
	}
	return true
}

// refused deals with a message that the kernel would not send. A run that it
// would not cut up is sent again, one datagram at a time: EIO says that the
// link cannot checksum (Linux before 6.11), which will not change; EINVAL that
// the route's MTU is too small for the run's datagrams.
func (e *egress) refused(fd uintptr, i int, errno unix.Errno) {
	r := &e.batch.runs[i]
	if r.segments > 1 && (errno == unix.EIO || errno == unix.EINVAL) {
		if errno == unix.EIO {
			e.offload.GSO.Store(false)
		}
		e.sendSingly(fd, i)
		return
	}
	reason := EgressSend
	if errno == unix.EMSGSIZE {
		reason = EgressTooBig
	}
	e.tally.dropN(reason, r.segments)
}

// sendSingly sends the datagrams of a run one by one.
func (e *egress) sendSingly(fd uintptr, i int) {
	r := e.batch.runs[i]
	whole := e.batch.msgs[i].hdr
	per := r.pieces / r.segments
	one := run{peer: r.peer, ecn: r.ecn, segments: 1}
	for n := range r.segments {
		iovs := iovecs(&whole)[n*per : (n+1)*per]
		e.batch.header(&e.batch.msgs[i].hdr, &one, iovs, i)
		sent, errno := sendmmsg(fd, e.batch.msgs[i:i+1])
		e.tally.syscalls++
		switch {
		case sent == 1:
			e.tally.packets++
			for _, iov := range iovs {
				e.tally.bytes += iov.Len
			}
			e.tally.bytes -= uint64(len(r.peer.header))
		case errno == unix.EMSGSIZE:
			e.tally.drop(EgressTooBig)
		default:
			e.tally.drop(EgressSend)
		}
	}
}
