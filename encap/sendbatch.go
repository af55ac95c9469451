package encap

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Limits of one UDP datagram and of one UDP_SEGMENT message.
const (
	maxDatagram = 65507 // bytes of UDP payload over IPv4; IPv6 has a few more
	maxSegments = 64    // UDP_MAX_SEGMENTS (linux/udp.h) before Linux 6.9
)

// sendBatch gathers packets into as few system calls as possible. Packets of
// one size to one peer form a run, which UDP_SEGMENT sends as one message; the
// last packet of a run may be shorter. One sendmmsg per socket sends all its
// runs.
//
// The order within a flow is kept: a flow always uses the same socket, and only
// the newest run of a peer and socket grows. Other runs may be reordered.
//
// The packets are borrowed until flush returns.
type sendBatch struct {
	pieces []piece
	runs   []run

	msgs    []mmsghdr
	iovs    []unix.Iovec
	control []byte // controlSpace bytes per message

	sorted []run // runs, by socket
}

// piece is one slice of a datagram, and the index of its run.
type piece struct {
	data []byte
	run  int32
}

type run struct {
	peer     *Peer
	size     int // bytes of each datagram but the last
	bytes    int // of all datagrams
	segments int
	payload  int // inner bytes, for the counters
	pieces   int
	socket   socketID
	tos      uint8 // of the outer header
	closed   bool  // takes no more packets
}

// socketID identifies a send socket: family*socketsPerFamily plus the index of
// the source.
type socketID uint8

const (
	mostSources      = 16
	fragmentSocket   = mostSources // index of Underlay.Fragment
	socketsPerFamily = mostSources + 1
)

// controlSpace fits a UDP_SEGMENT and an IP_TOS or IPV6_TCLASS message.
const controlSpace = 2 * 24

const (
	batchPieces = 4 * maxSegments
	batchRuns   = 2 * maxSegments
)

func newSendBatch() *sendBatch {
	return &sendBatch{
		pieces:  make([]piece, 0, batchPieces),
		runs:    make([]run, 0, batchRuns),
		msgs:    make([]mmsghdr, batchRuns),
		iovs:    make([]unix.Iovec, batchPieces),
		control: make([]byte, batchRuns*controlSpace),
		sorted:  make([]run, 0, batchRuns),
	}
}

// full reports that another packet, or another run of segments, might not fit.
func (b *sendBatch) full() bool {
	return len(b.pieces) >= batchPieces-2*maxSegments || len(b.runs) >= batchRuns-2
}

// addPacket adds one datagram, tunnel header included; its last payload bytes
// are the inner packet. Without gso it gets its own message.
func (b *sendBatch) addPacket(peer *Peer, socket socketID, tos uint8, datagram []byte, payload int, gso bool) {
	i := len(b.runs) - 1
	for i >= 0 && (b.runs[i].peer != peer || b.runs[i].socket != socket) {
		i--
	}
	if !gso || i < 0 || !b.runs[i].takes(len(datagram), tos) {
		i = b.newRun(peer, socket, tos, len(datagram))
	}
	r := &b.runs[i]
	r.closed = len(datagram) < r.size
	r.segments++
	r.pieces++
	r.bytes += len(datagram)
	r.payload += payload
	b.pieces = append(b.pieces, piece{datagram, int32(i)})
}

func (r *run) takes(n int, tos uint8) bool {
	return !r.closed && r.tos == tos && n <= r.size && r.segments < maxSegments && r.bytes+n <= maxDatagram
}

// newRun starts a run of datagrams of the given size and returns its index.
func (b *sendBatch) newRun(peer *Peer, socket socketID, tos uint8, size int) int {
	b.runs = append(b.runs, run{peer: peer, socket: socket, tos: tos, size: size})
	return len(b.runs) - 1
}

// addSegment adds a datagram in two parts, headers and payload, to the run of a
// segmented frame. The caller respects the run's size and limits.
func (b *sendBatch) addSegment(i int, head, data []byte) {
	r := &b.runs[i]
	r.closed = true // no other packet joins a frame's run
	r.segments++
	r.pieces += 2
	r.bytes += len(head) + len(data)
	r.payload += len(head) + len(data) - len(r.peer.header)
	b.pieces = append(b.pieces, piece{head, int32(i)}, piece{data, int32(i)})
}

// bySocket sorts the runs by socket, stably.
func (b *sendBatch) bySocket() {
	var present [2 * socketsPerFamily]bool
	kinds := 0
	for i := range b.runs {
		if s := b.runs[i].socket; !present[s] {
			present[s] = true
			kinds++
		}
	}
	if kinds < 2 {
		return
	}
	var to [batchRuns]int32
	b.sorted = b.sorted[:0]
	for s := range present {
		if !present[s] {
			continue
		}
		for i := range b.runs {
			if int(b.runs[i].socket) == s {
				to[i] = int32(len(b.sorted))
				b.sorted = append(b.sorted, b.runs[i])
			}
		}
	}
	b.runs, b.sorted = b.sorted, b.runs
	for i := range b.pieces {
		b.pieces[i].run = to[b.pieces[i].run]
	}
}

// layOut fills the messages for sendmmsg, one per run, grouped by socket, and
// returns how many.
func (b *sendBatch) layOut() int {
	b.bySocket()
	// A run's pieces may be scattered: give each run its part of the vector.
	next := 0
	var at [batchRuns]int
	for i := range b.runs {
		at[i] = next
		b.header(&b.msgs[i].hdr, &b.runs[i], b.iovs[next:next+b.runs[i].pieces], i)
		next += b.runs[i].pieces
	}
	for _, p := range b.pieces {
		iov := &b.iovs[at[p.run]]
		iov.Base = unsafe.SliceData(p.data)
		iov.SetLen(len(p.data))
		at[p.run]++
	}
	return len(b.runs)
}

// header fills a run's message header: destination, slices, segment size and
// traffic class.
func (b *sendBatch) header(h *unix.Msghdr, r *run, iovs []unix.Iovec, slot int) {
	h.Name = &r.peer.name[0]
	h.Namelen = r.peer.nameLen
	h.Iov = &iovs[0]
	h.SetIovlen(len(iovs))
	h.Control = nil
	h.Controllen = 0
	control := b.control[slot*controlSpace : slot*controlSpace : (slot+1)*controlSpace]
	if r.segments > 1 {
		control = appendControl(control, unix.SOL_UDP, unix.UDP_SEGMENT, 2)
		binary.NativeEndian.PutUint16(control[len(control)-controlWord:], uint16(r.size))
	}
	if r.tos != 0 {
		level, kind := int32(unix.IPPROTO_IP), int32(unix.IP_TOS)
		if r.peer.nameLen == unix.SizeofSockaddrInet6 {
			level, kind = unix.IPPROTO_IPV6, unix.IPV6_TCLASS
		}
		control = appendControl(control, level, kind, 4)
		binary.NativeEndian.PutUint32(control[len(control)-controlWord:], uint32(r.tos))
	}
	if len(control) > 0 {
		h.Control = &control[0]
		h.SetControllen(len(control))
	}
}

// appendControl appends a control message with n zero bytes of data (at most 4). The
// data begin controlWord bytes before the end of the result.
func appendControl(b []byte, level, kind int32, n int) []byte {
	at := len(b)
	b = b[:at+unix.SizeofCmsghdr+controlWord]
	putControlLen(b[at:], unix.SizeofCmsghdr+n)
	binary.NativeEndian.PutUint32(b[at+controlWord:], uint32(level))
	binary.NativeEndian.PutUint32(b[at+controlWord+4:], uint32(kind))
	clear(b[at+unix.SizeofCmsghdr:])
	return b
}

// mayCut reports whether a rejected message can be retried one datagram at a
// time.
func (b *sendBatch) mayCut(i int, errno unix.Errno) bool {
	return b.runs[i].segments > 1 && (errno == unix.EIO || errno == unix.EINVAL || errno == unix.EMSGSIZE)
}

// reset empties the batch.
func (b *sendBatch) reset() {
	b.pieces = b.pieces[:0]
	b.runs = b.runs[:0]
}
