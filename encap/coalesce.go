package encap

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// coalescer joins up to 64 packets of a flow into one frame, so that the device
// and everything up to the pod's socket handles one packet instead of many. It
// follows the kernel's GRO rules (tcp_gro_receive, udp_gro_receive):
// segmentation restores the same packets.
//
// The order within a flow is kept; flows may overtake each other.
//
// Packets are borrowed until the frames are written.
type coalescer struct {
	offload *Offload
	peer    *Peer // sender of the packets being added; may be nil
	frames  []frame
	count   int
	iovs    []unix.Iovec
}

// frame is one write to the device: a virtio header and a packet, followed by
// the payload of the packets that joined it.
type frame struct {
	flow     flow
	peer     *Peer  // the sender
	head     []byte // virtio header (filled by finish) and first packet
	p        packet
	data     [][]byte // payload of the joined packets
	length   int      // of the packet, joined payload included
	size     int      // payload bytes of each segment but the last
	segments int      // packets on the wire
	nextSeq  uint32   // TCP: of the packet that may join
	nextID   uint16   // IPv4: of the packet that may join, if IDs increase
	fixedID  bool     // IPv4 with DF: all IDs are equal
	partial  bool     // the transport checksum is left to the device
	closed   bool     // no more packets may join
	gso      uint8    // virtio GSO type
}

// flow is a 5-tuple, packed into words for fast comparison.
type flow struct {
	addresses [4]uint64
	ports     uint32
	proto     uint8
	is4       bool
}

func newCoalescer(offload *Offload, frames int) *coalescer {
	c := &coalescer{
		offload: offload,
		frames:  make([]frame, frames),
		iovs:    make([]unix.Iovec, maxJoined),
	}
	for i := range c.frames {
		c.frames[i].data = make([][]byte, 0, maxJoined)
	}
	return c
}

const (
	// maxJoined is how many packets one frame may hold. It is UDP_SEGMENT's limit,
	// since a receiver may take a UDP frame unsegmented (UDP_GRO).
	maxJoined = 64
	// maxFrameLen is the longest IPv4 packet.
	maxFrameLen = 1<<16 - 1
)

func (c *coalescer) full() bool { return c.count == len(c.frames) }

// checksum is what is known of an added packet's transport checksum.
type checksum uint8

const (
	checksumUnknown  checksum = iota // not verified
	checksumVerified                 // the kernel verified it, or an outer one that covers it
)

// joins reports whether packets from the peer may be coalesced, joinsUDP whether
// UDP packets may.
func (c *coalescer) joins() bool { return c.offload.GRO.Load() && c.peer.allows(mechanismGRO) }

func (c *coalescer) joinsUDP() bool { return c.offload.USO.Load() && c.peer.allows(mechanismUSO) }

// add adds a packet: the last p.length bytes of lead, preceded by at least
// vnetHeaderLen bytes that may be overwritten. p is its parse. The caller checks
// full first.
func (c *coalescer) add(lead []byte, p *packet, state checksum) {
	head := lead[len(lead)-p.length-vnetHeaderLen:]
	b := head[vnetHeaderLen:]
	if !p.transport || !c.joins() {
		c.alone(head, p, p.transport && isPartial(b, p))
		return
	}
	f := flowOf(b, p)
	last := c.newest(&f)
	if last != nil && last.join(b, p, state) {
		return
	}
	partial := isPartial(b, p)
	n := c.begin(head, p, partial)
	n.flow = f
	n.open(b, p, state, p.proto != protoUDP || c.joinsUDP())
}

// alone adds a packet that no other may join.
func (c *coalescer) alone(head []byte, p *packet, partial bool) {
	f := c.begin(head, p, partial)
	f.flow = flow{}
	f.closed = true
}

func (c *coalescer) begin(head []byte, p *packet, partial bool) *frame {
	f := &c.frames[c.count]
	c.count++
	*f = frame{peer: c.peer, head: head, p: *p, data: f.data[:0], length: p.length, segments: 1, partial: partial}
	return f
}

// super adds a super-frame, which a kernel peer sent unsegmented. The device
// segments it into packets of size payload bytes.
func (c *coalescer) super(lead []byte, p *packet, size int) {
	head := lead[len(lead)-p.length-vnetHeaderLen:]
	f := c.begin(head, p, true)
	f.flow = flowOf(head[vnetHeaderLen:], p)
	f.closed = true
	f.size = size
	f.segments = segmentsOf(p.length-p.headLen, size)
	f.gso = p.gsoType()
}

// newest returns the flow's most recent frame, or nil.
func (c *coalescer) newest(f *flow) *frame {
	for i := c.count - 1; i >= 0; i-- {
		if c.frames[i].flow == *f {
			return &c.frames[i]
		}
	}
	return nil
}

func flowOf(b []byte, p *packet) flow {
	f := flow{proto: p.proto, is4: p.is4, ports: binary.NativeEndian.Uint32(b[p.ipLen:])}
	if p.is4 {
		f.addresses[0] = binary.NativeEndian.Uint64(b[12:])
		return f
	}
	for i := range f.addresses {
		f.addresses[i] = binary.NativeEndian.Uint64(b[8+8*i:])
	}
	return f
}

// open decides whether other packets may join this one, the first of its frame.
// may says whether packets of its protocol may be coalesced at all.
func (f *frame) open(b []byte, p *packet, state checksum, may bool) {
	f.size = p.length - p.headLen
	f.closed = true
	if !may || f.size == 0 || p.is4 && p.ipLen != 20 {
		return
	}
	switch p.proto {
	case protoTCP:
		if flags := b[p.ipLen+13]; flags != tcpACK {
			return // PSH and FIN end a frame; SYN, RST and URG are never joined
		}
		f.nextSeq = binary.BigEndian.Uint32(b[p.ipLen+4:]) + uint32(f.size)
	case protoUDP:
		if !udpJoinable(b, p) {
			return
		}
	}
	if !f.partial && state == checksumUnknown && !verify(b, p) {
		return // bad checksum: pass it on unchanged, the receiver drops it
	}
	if p.is4 {
		f.nextID = binary.BigEndian.Uint16(b[4:]) + 1
	}
	f.closed = false
}

// udpJoinable reports whether the datagram has a checksum and a UDP length that
// matches the packet's.
func udpJoinable(b []byte, p *packet) bool {
	return loadChecksum(b[p.ipLen+6:]) != 0 && int(binary.BigEndian.Uint16(b[p.ipLen+4:])) == p.length-p.ipLen
}

// join adds the packet's payload to the frame if it continues it.
func (f *frame) join(b []byte, p *packet, state checksum) bool {
	size := p.length - p.headLen
	if f.closed || p.headLen != f.p.headLen || size == 0 || size > f.size ||
		f.segments == maxJoined || f.length+size > maxFrameLen {
		return false
	}
	first := f.head[vnetHeaderLen:]
	if !f.sameNetworkHeader(first, b, p) {
		return false
	}
	flags := uint8(0)
	switch p.proto {
	case protoTCP:
		flags = b[p.ipLen+13]
		if flags&^(tcpFIN|tcpPSH) != tcpACK || binary.BigEndian.Uint32(b[p.ipLen+4:]) != f.nextSeq ||
			!sameTCPHeader(first[p.ipLen:p.headLen], b[p.ipLen:p.headLen]) {
			return false
		}
	case protoUDP:
		if !udpJoinable(b, p) {
			return false
		}
	}
	if state == checksumUnknown && !isPartial(b, p) && !verify(b, p) {
		return false
	}
	if p.is4 && f.segments == 1 {
		f.fixedID = binary.BigEndian.Uint16(b[4:]) != f.nextID
	}
	f.data = append(f.data, b[p.headLen:p.length])
	f.length += size
	f.segments++
	f.nextSeq += uint32(size)
	f.nextID++
	if flags&(tcpFIN|tcpPSH) != 0 {
		first[p.ipLen+13] |= flags
	}
	f.closed = size < f.size || flags&(tcpFIN|tcpPSH) != 0
	return true
}

// sameNetworkHeader reports whether the IP headers differ only in length,
// identification and checksum. The identification must increase by one per
// packet, as segmentation would set it, or, with DF, stay the same (RFC 6864
// gives it no meaning then).
func (f *frame) sameNetworkHeader(first, b []byte, p *packet) bool {
	if !p.is4 {
		// Traffic class, flow label, and hop limit.
		return binary.NativeEndian.Uint32(first) == binary.NativeEndian.Uint32(b) && first[7] == b[7]
	}
	if p.ipLen != 20 || first[1] != b[1] || first[6] != b[6] || first[8] != b[8] {
		return false
	}
	id := binary.BigEndian.Uint16(b[4:])
	counts := id == f.nextID
	dontFragment := b[6]&0x40 != 0
	fixed := dontFragment && id == binary.BigEndian.Uint16(first[4:])
	if f.segments == 1 {
		return counts || fixed
	}
	if f.fixedID {
		return fixed
	}
	return counts
}

// sameTCPHeader reports whether acknowledgement, AE flag (RFC 9768), window, urgent pointer
// and options are equal.
func sameTCPHeader(a, b []byte) bool {
	return binary.NativeEndian.Uint32(a[8:]) == binary.NativeEndian.Uint32(b[8:]) && a[12] == b[12] &&
		binary.NativeEndian.Uint16(a[14:]) == binary.NativeEndian.Uint16(b[14:]) &&
		binary.NativeEndian.Uint16(a[18:]) == binary.NativeEndian.Uint16(b[18:]) &&
		string(a[20:]) == string(b[20:])
}

// isPartial reports whether the transport checksum holds only the pseudo-header's
// sum (CHECKSUM_PARTIAL): a kernel peer on the same machine, or behind a virtual
// NIC, leaves the rest to the device that puts the packet on a wire. If a complete
// checksum looks so by chance, completing it gives the same value again.
func isPartial(b []byte, p *packet) bool {
	return loadChecksum(b[p.checkOffset():]) == fold(add16(p.pseudo(b), uint16(p.length-p.ipLen)))
}

// verify reports whether the transport checksum is correct.
func verify(b []byte, p *packet) bool {
	if p.proto == protoUDP && loadChecksum(b[p.ipLen+6:]) == 0 {
		return true // no checksum
	}
	return fold(sum(b[p.ipLen:p.length], add16(p.pseudo(b), uint16(p.length-p.ipLen)))) == 0xffff
}

// finish updates the headers of a joined frame and writes the virtio header.
func (f *frame) finish() {
	var v vnetHeader
	b := f.head[vnetHeaderLen:]
	at := f.p.checkOffset()
	if f.segments > 1 || f.gso != gsoNone {
		f.p.setLength(b, f.length)
		if f.p.proto == protoUDP {
			binary.BigEndian.PutUint16(b[f.p.ipLen+4:], uint16(f.length-f.p.ipLen))
		}
		f.gso = f.p.gsoType()
		putChecksum(b[at:], fold(add16(f.p.pseudo(b), uint16(f.length-f.p.ipLen))))
		f.partial = true
	}
	if f.partial {
		v.flags = vnetNeedsCsum
		v.csumStart = uint16(f.p.ipLen)
		v.csumOffset = uint16(at - f.p.ipLen)
	}
	if f.gso != gsoNone {
		v.gsoType = f.gso
		v.gsoSize = uint16(f.size)
		v.hdrLen = uint16(f.p.headLen)
	}
	v.put(f.head)
}

// iovec returns the finished frame as the slices of one writev, valid until the
// next call.
func (c *coalescer) iovec(f *frame) []unix.Iovec {
	iovs := c.iovs[:1+len(f.data)]
	iovs[0] = iovecOf(f.head)
	for i, d := range f.data {
		iovs[1+i] = iovecOf(d)
	}
	return iovs
}
