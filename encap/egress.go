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
	offload  *Offload
	counters *Counters

	slab     []byte
	used     int // bytes of the slab that hold packets of the batch
	batch    *sendBatch
	cut      *segmenter
	route    route
	tally    tally
	patience patience

	from, to int                // the messages that are being sent
	sendRest func(uintptr) bool // trySend, bound once: a method value allocates
}

const (
	// frameHeadroom is left in the slab before each frame, so that the outer
	// headers can be written in place; the virtio header gives 10 bytes more.
	frameHeadroom = VXLANHeaderLen - vnetHeaderLen
	maxFrame      = vnetHeaderLen + 1<<16
	// egressSlab has room for one more whole frame behind a batch of small
	// ones, which lie densely, to stay in the cache.
	egressSlab = 4 * maxFrame
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
		big := e.add(e.slab[at:at+n], e.slab[e.used:at+n])
		if big || e.batch.full() || e.used+frameHeadroom+maxFrame > len(e.slab) {
			if err := e.flush(); err != nil {
				return err
			}
		}
	}
}

// add puts one frame into the batch: a virtio header and a packet, and with
// the headroom before them. It says whether the frame was a large one, which
// is sent at once, while it is in the cache.
func (e *egress) add(frame, withHeadroom []byte) (big bool) {
	if len(frame) < vnetHeaderLen {
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
		return e.addFrame(peer, b, &p, kind, int(v.gsoSize))
	}
	if v.flags&vnetNeedsCsum != 0 &&
		!completeChecksum(b, int(v.csumStart), int(v.csumOffset), p.proto == protoUDP) {
		e.tally.drop(EgressMalformed)
		return false
	}
	// The outer headers go right before the packet, over the virtio header.
	start := len(withHeadroom) - len(frame) + vnetHeaderLen - len(peer.header)
	datagram := withHeadroom[start : start+len(peer.header)+len(b)]
	copy(datagram, peer.header)
	e.batch.addPacket(peer, p.ecn, datagram, len(b), e.offload.GSO.Load())
	e.used += (len(withHeadroom) + 63) &^ 63
	return false
}

// addFrame cuts a frame up and puts its segments into the batch.
func (e *egress) addFrame(peer *Peer, b []byte, p *packet, kind uint8, size int) bool {
	if !p.transport || (kind == gsoUDP) != (p.proto == protoUDP) {
		e.tally.drop(EgressMalformed)
		return false
	}
	segments := e.cut.cut(peer.header, b, p, size)
	if segments == nil {
		e.tally.drop(EgressMalformed)
		return false
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
				if err := e.flush(); err != nil {
					return true
				}
			}
			run = e.batch.newRun(peer, p.ecn, length)
		}
		e.batch.addSegment(run, s.head, s.data)
	}
	return true
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
	e.used = 0
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
