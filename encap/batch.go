package encap

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What one UDP datagram, and one UDP_SEGMENT call, can hold.
const (
	maxDatagram = 65507 // bytes of UDP payload over IPv4; IPv6 has a few more
	maxSegments = 64    // UDP_MAX_SEGMENTS (linux/udp.h) before Linux 6.9
)

// mmsghdr is struct mmsghdr (sendmmsg(2)), which x/sys/unix lacks.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
	_   [4]byte
}

// sendBatch gathers packets into as few datagram calls as the kernel allows:
// packets of one size to one peer form a run, which UDP_SEGMENT sends as one
// message; the last packet of a run may be shorter. All runs of a batch leave
// in one sendmmsg.
//
// Packets of a flow keep their order, since a flow always leaves by the same
// socket, and of a peer and a socket only the newest run grows. Other runs may
// overtake each other.
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

// piece is one slice of a datagram, and the run that it belongs to.
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
	closed   bool  // a short datagram ended it
}

// socketID is one of the sockets that a batch may leave by: the underlay
// family above, and the number of the source port in it.
type socketID uint8

const (
	mostSources      = 16
	fragmentSocket   = mostSources // the number of the one whose datagrams are fragmented
	socketsPerFamily = mostSources + 1
)

// controlSpace holds a UDP_SEGMENT and an IP_TOS or IPV6_TCLASS message.
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

// full says that another packet, or another frame of segments, might not fit.
func (b *sendBatch) full() bool {
	return len(b.pieces) >= batchPieces-2*maxSegments || len(b.runs) >= batchRuns-2
}

// addPacket adds one whole datagram (headers stamped) of which the last
// payload bytes are the inner packet. With gso false it gets a message of its
// own.
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

// newRun begins a run of datagrams of the given size and returns its index.
func (b *sendBatch) newRun(peer *Peer, socket socketID, tos uint8, size int) int {
	b.runs = append(b.runs, run{peer: peer, socket: socket, tos: tos, size: size})
	return len(b.runs) - 1
}

// addSegment adds a datagram in two parts, its headers and its payload, to the
// run of a segmented frame. The caller keeps to the run's size and limits.
func (b *sendBatch) addSegment(i int, head, data []byte) {
	r := &b.runs[i]
	r.closed = true // nothing else joins a frame's run
	r.segments++
	r.pieces += 2
	r.bytes += len(head) + len(data)
	r.payload += len(head) + len(data) - len(r.peer.header)
	b.pieces = append(b.pieces, piece{head, int32(i)}, piece{data, int32(i)})
}

// bySocket puts the runs of each socket together, in their order.
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

// layOut writes the messages for sendmmsg, one per run, those of a socket
// together, and returns how many.
func (b *sendBatch) layOut() int {
	b.bySocket()
	// Pieces of a run may lie apart: give each run its stretch of the vector.
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
		iov.Len = uint64(len(p.data))
		at[p.run]++
	}
	return len(b.runs)
}

// header writes the message header of a run: where to, from which slices, cut
// up how, and with which traffic class.
func (b *sendBatch) header(h *unix.Msghdr, r *run, iovs []unix.Iovec, slot int) {
	h.Name = &r.peer.name[0]
	h.Namelen = r.peer.nameLen
	h.Iov = &iovs[0]
	h.Iovlen = uint64(len(iovs))
	h.Control = nil
	h.Controllen = 0
	control := b.control[slot*controlSpace : slot*controlSpace : (slot+1)*controlSpace]
	if r.segments > 1 {
		control = appendControl(control, unix.SOL_UDP, unix.UDP_SEGMENT, 2)
		binary.NativeEndian.PutUint16(control[len(control)-8:], uint16(r.size))
	}
	if r.tos != 0 {
		level, kind := int32(unix.IPPROTO_IP), int32(unix.IP_TOS)
		if r.peer.nameLen == unix.SizeofSockaddrInet6 {
			level, kind = unix.IPPROTO_IPV6, unix.IPV6_TCLASS
		}
		control = appendControl(control, level, kind, 4)
		binary.NativeEndian.PutUint32(control[len(control)-8:], uint32(r.tos))
	}
	if len(control) > 0 {
		h.Control = &control[0]
		h.Controllen = uint64(len(control))
	}
}

// appendControl appends a control message with n zero bytes of data (at most
// 8, padded to 8) and returns the longer slice; the data are its last 8 bytes.
func appendControl(b []byte, level, kind int32, n int) []byte {
	at := len(b)
	b = b[:at+unix.SizeofCmsghdr+8]
	binary.NativeEndian.PutUint64(b[at:], uint64(unix.SizeofCmsghdr+n))
	binary.NativeEndian.PutUint32(b[at+8:], uint32(level))
	binary.NativeEndian.PutUint32(b[at+12:], uint32(kind))
	binary.NativeEndian.PutUint64(b[at+16:], 0)
	return b
}

// mayCut says whether a message that was refused may be sent datagram by
// datagram.
func (b *sendBatch) mayCut(i int, errno unix.Errno) bool {
	return b.runs[i].segments > 1 && (errno == unix.EIO || errno == unix.EINVAL || errno == unix.EMSGSIZE)
}

// reset forgets what was sent.
func (b *sendBatch) reset() {
	b.pieces = b.pieces[:0]
	b.runs = b.runs[:0]
}

func sendmmsg(fd uintptr, msgs []mmsghdr) (int, unix.Errno) {
	n, _, err := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&msgs[0])), uintptr(len(msgs)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), err
}

// recvBatch is the buffers of recvmmsg: each may be filled by one datagram, or
// by many of one flow and one size that the kernel has joined (UDP_GRO).
type recvBatch struct {
	msgs    []mmsghdr
	iovs    []unix.Iovec
	names   []byte
	control []byte
	buffers [][]byte
}

// datagrams is one message of a recvBatch.
type datagrams struct {
	data    []byte // valid until the next receive
	source  []byte // sockaddr as the kernel wrote it
	segment int    // bytes of each datagram but the last; 0 if the kernel joined none
	ecn     uint8
	cut     bool // the buffer was too short
}

// recvHeadroom keeps the buffers apart. Nothing is written there: the virtio
// header of what goes to the device is written over the tunnel's own header.
const (
	recvHeadroom     = 32
	recvBufferLen    = recvHeadroom + vnetHeaderLen + ethernetHeaderLen + 1<<16
	recvNameLen      = unix.SizeofSockaddrInet6
	recvControlSpace = 64
)

func newRecvBatch(messages int) *recvBatch {
	b := &recvBatch{
		msgs:    make([]mmsghdr, messages),
		iovs:    make([]unix.Iovec, messages),
		names:   make([]byte, messages*recvNameLen),
		control: make([]byte, messages*recvControlSpace),
		buffers: make([][]byte, messages),
	}
	slab := make([]byte, messages*recvBufferLen)
	for i := range b.msgs {
		b.buffers[i] = slab[i*recvBufferLen+recvHeadroom : (i+1)*recvBufferLen : (i+1)*recvBufferLen]
		b.iovs[i].Base = unsafe.SliceData(b.buffers[i])
		b.iovs[i].Len = uint64(len(b.buffers[i]))
		h := &b.msgs[i].hdr
		h.Name = &b.names[i*recvNameLen]
		h.Iov = &b.iovs[i]
		h.Iovlen = 1
		h.Control = &b.control[i*recvControlSpace]
	}
	return b
}

// receive fills up to n messages and returns how many.
func (b *recvBatch) receive(fd uintptr, n int) (int, unix.Errno) {
	for i := range b.msgs[:n] {
		b.msgs[i].hdr.Namelen = recvNameLen
		b.msgs[i].hdr.Controllen = recvControlSpace
	}
	got, _, err := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&b.msgs[0])), uintptr(n), unix.MSG_DONTWAIT, 0, 0)
	if err != 0 {
		return 0, err
	}
	return int(got), 0
}

// message returns the i-th message of the last receive.
func (b *recvBatch) message(i int) datagrams {
	m := &b.msgs[i]
	d := datagrams{
		data:   b.buffers[i][:m.n],
		source: b.names[i*recvNameLen : i*recvNameLen+int(m.hdr.Namelen)],
		cut:    m.hdr.Flags&unix.MSG_TRUNC != 0,
	}
	control := b.control[i*recvControlSpace : i*recvControlSpace+int(m.hdr.Controllen)]
	for len(control) >= unix.SizeofCmsghdr+1 {
		n := int(binary.NativeEndian.Uint64(control))
		if n < unix.SizeofCmsghdr+1 || n > len(control) {
			break
		}
		level := binary.NativeEndian.Uint32(control[8:])
		kind := binary.NativeEndian.Uint32(control[12:])
		value := control[unix.SizeofCmsghdr:n]
		switch {
		case level == unix.SOL_UDP && kind == unix.UDP_GRO && len(value) >= 4:
			d.segment = int(binary.NativeEndian.Uint32(value))
		case level == unix.IPPROTO_IP && kind == unix.IP_TOS:
			d.ecn = value[0] & 3
		case level == unix.IPPROTO_IPV6 && kind == unix.IPV6_TCLASS:
			d.ecn = value[0] & 3
		}
		next := (n + 7) &^ 7
		if next > len(control) {
			break
		}
		control = control[next:]
	}
	return d
}
