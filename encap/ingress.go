package encap

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// ingress is the receiving direction, from one underlay socket to the device.
// Only one goroutine uses it.
type ingress struct {
	*common
	device   uintptr   // TUN descriptor
	spread   []uintptr // queues to choose device from; empty if there is only one
	socket   uintptr   // underlay socket
	format   Format
	linkLen  int // bytes of link-layer header before each packet
	vni      uint32
	mac      [6]byte // of this node's VTEP
	mtu      int     // of the device
	counters *Counters

	batch *recvBatch
	join  *coalescer
	cut   *segmenter
	// pieces is one writev: an empty virtio header, headers, payload.
	pieces [3]unix.Iovec
	route  route
	tally  tally
	share  share

	asks int // messages that the next receive may fill
	// failed is a fatal device error; drain returns it.
	failed error
}

func newIngress(c *common, device uintptr, socket Descriptor, u Underlay, mtu int, counters *Counters) *ingress {
	g := &ingress{
		common:   c,
		device:   device,
		socket:   uintptr(socket.FD()),
		format:   c.format,
		linkLen:  u.LinkHeader,
		vni:      u.VNI,
		mac:      u.MAC,
		mtu:      mtu,
		counters: counters,
		share:    share{direction: receiving},
		batch:    newRecvBatch(ingressMessages),
		join:     newCoalescer(c.offload, 2*ingressMessages),
		cut:      newSegmenter(),
		asks:     ingressMessages,
	}
	g.pieces[0] = iovecOf(make([]byte, vnetHeaderLen))
	return g
}

// ingressMessages is how many messages one receive may fill: 64 datagrams
// without GRO, up to 4 MB with it.
const ingressMessages = 64

// drain receives one batch from the socket and writes it to the device.
func (g *ingress) drain() error {
	defer g.publish()
	n, errno := g.batch.receive(g.socket, g.asks)
	g.tally.syscalls++
	if errno != 0 {
		switch o := socketReceive.of(errno); o.fault {
		case faultDry, faultAgain, faultPast:
			return nil
		case faultCounted:
			g.tally.drop(o.reason)
			return nil
		default:
			return fmt.Errorf("receiving from the underlay: %w", errno)
		}
	}
	table := g.table.Load()
	before := g.tally.bytes
	for i := range n {
		if m := g.batch.message(i); g.format == FormatIPIP {
			g.ipipMessage(table, m)
		} else {
			g.message(table, m)
		}
	}
	g.asks = asksFor(n, g.tally.bytes-before)
	g.flush()
	return g.failed
}

// asksFor returns how many messages the next receive may fill, judged by the
// last one: if messages are large, only as many as stay in the CPU cache until
// they are written.
func asksFor(messages int, bytes uint64) int {
	const large, cached = 16 << 10, 4
	if messages > 0 && bytes/uint64(messages) >= large {
		return cached
	}
	return ingressMessages
}

// message splits one received message into datagrams.
func (g *ingress) message(table *Table, m datagrams) {
	if m.cut {
		g.tally.drop(IngressTruncated)
		return
	}
	outer, ok := address(m.source)
	if !ok {
		g.tally.drop(IngressStranger)
		return
	}
	// A kernel VXLAN peer's super-frame may arrive as one datagram whose segment
	// size, if any, is the inner one. Do not split it: its inner length equals the
	// message's length.
	segment := m.segment
	if segment == 0 || segment >= len(m.data) || innerLength(m.data) == len(m.data)-VXLANHeaderLen {
		g.datagram(table, m.data, outer, m.ecn, checksumUnknown, segment)
		return
	}
	for data := m.data; len(data) > 0; {
		n := min(segment, len(data))
		// GRO joins only datagrams whose checksums the kernel has verified.
		g.datagram(table, data[:n], outer, m.ecn, checksumVerified, 0)
		data = data[n:]
	}
}

// address returns the address of a sockaddr.
func address(name []byte) (netip.Addr, bool) {
	if len(name) < 2 {
		return netip.Addr{}, false
	}
	switch binary.NativeEndian.Uint16(name) {
	case unix.AF_INET:
		if len(name) >= 8 {
			return netip.AddrFrom4([4]byte(name[4:8])), true
		}
	case unix.AF_INET6:
		if len(name) >= 24 {
			return netip.AddrFrom16([16]byte(name[8:24])).Unmap(), true
		}
	}
	return netip.Addr{}, false
}

// innerLength returns the length that the inner IP header states, or -1.
func innerLength(datagram []byte) int {
	if len(datagram) < VXLANHeaderLen+20 {
		return -1
	}
	b := datagram[VXLANHeaderLen:]
	if b[0]>>4 == 4 {
		return int(binary.BigEndian.Uint16(b[2:]))
	}
	return 40 + int(binary.BigEndian.Uint16(b[4:]))
}

// datagram checks one VXLAN datagram and delivers its inner packet. gsoSize is
// the kernel's segment size of a super-frame, or 0.
func (g *ingress) datagram(table *Table, d []byte, outer netip.Addr, ecn uint8, state checksum, gsoSize int) {
	var p packet
	if r := g.check(table, d, &p, outer); r != Accepted {
		g.dropFrom(table, outer, r)
		return
	}
	lead := d[:VXLANHeaderLen+p.length] // Ethernet padding is trimmed
	if !decapECN(lead[VXLANHeaderLen:], &p, ecn) {
		g.tally.drop(IngressECN)
		return
	}
	g.deliver(lead, &p, state, gsoSize)
}

// dropFrom counts a drop. A packet from an address that is no peer's counts as
// IngressStranger, whatever else is wrong with it.
func (g *ingress) dropFrom(table *Table, outer netip.Addr, r Reason) {
	if !table.isPeer(outer) {
		r = IngressStranger
	}
	g.tally.drop(r)
	if from := table.outer[outer]; len(from) > 0 {
		g.share.drop(from[0], 1)
	}
}

// publish adds the batch's tally and share to the counters.
func (g *ingress) publish() {
	g.tally.publish(g.counters)
	g.share.publish()
}

// deliver passes a checked packet to the coalescer or segmenter. The packet is
// the last p.length bytes of lead. size is the segment size (payload bytes) of
// a super-frame, 0 if unknown or not one.
func (g *ingress) deliver(lead []byte, p *packet, state checksum, size int) {
	if g.join.full() {
		g.flush()
	}
	g.join.peer = g.route.peer
	payload := p.length - p.headLen
	switch {
	case p.transport && size > 0 && payload > size && (p.proto == protoUDP || p.headLen+size <= g.mtu):
		g.superFrame(lead, p, size)
	case p.transport && p.proto == protoTCP && p.length > g.mtu:
		// A super-frame of unknown segment size: cut it as large as the MTU allows.
		g.superFrame(lead, p, g.mtu-p.headLen)
	default:
		g.tally.packets++
		g.tally.bytes += uint64(p.length)
		g.share.add(g.join.peer, 1, p.length)
		g.join.add(lead, p, state)
	}
}

// check parses the datagram's headers, overwrites p with the inner packet's
// parse, and verifies that it is for this node and that its inner source
// belongs to the sender.
func (g *ingress) check(table *Table, d []byte, p *packet, outer netip.Addr) Reason {
	var h VXLAN
	if r := h.Parse(d); r != Accepted {
		return r
	}
	switch {
	case h.VNI != g.vni:
		return IngressVNI
	case h.Destination != g.mac:
		return IngressMAC
	case h.EtherType != etherTypeIPv4 && h.EtherType != etherTypeIPv6:
		return IngressProtocol
	}
	if r := g.checkInner(table, d[VXLANHeaderLen:], p, outer); r != Accepted {
		return r
	}
	if p.is4 != (h.EtherType == etherTypeIPv4) {
		return IngressMalformed
	}
	return Accepted
}

// checkInner is the part of check that concerns the inner packet b.
func (g *ingress) checkInner(table *Table, b []byte, p *packet, outer netip.Addr) Reason {
	if !p.parse(b) || !p.headerIsRight(b) {
		return IngressMalformed
	}
	peer := g.route.lookup(table, p.source(b))
	if peer == nil || peer.Underlay.Addr() != outer {
		return IngressSource
	}
	if !table.isLocal(p.destination(b)) {
		return IngressNotOurs
	}
	note(&peer.heard)
	return Accepted
}

// decapECN combines the outer and inner ECN fields (RFC 6040, figure 4). It
// returns false if the packet must be dropped.
func decapECN(b []byte, p *packet, outer uint8) bool {
	const notECT, ect1, ect0, ce = 0, 1, 2, 3
	switch {
	case outer == ce && p.ecn == notECT:
		return false
	case outer == ce && p.ecn != ce:
		p.setECN(b, ce)
	case outer == ect1 && p.ecn == ect0:
		p.setECN(b, ect1)
	}
	return true
}

// superFrame delivers a super-frame: a packet that a kernel peer sent
// unsegmented. size is the payload bytes per segment. It is cut here if the
// device does not take such frames.
func (g *ingress) superFrame(lead []byte, p *packet, size int) {
	b := lead[len(lead)-p.length:]
	if size <= 0 || !isPartial(b, p) && !verify(b, p) {
		g.tally.drop(IngressMalformed)
		return
	}
	payload := p.length - p.headLen
	n := segmentsOf(payload, size)
	g.tally.packets += uint64(n)
	g.tally.bytes += uint64(payload + n*p.headLen)
	g.share.add(g.join.peer, n, payload+n*p.headLen)
	if g.join.joins() && (p.proto == protoTCP || g.join.joinsUDP()) {
		g.join.super(lead, p, size)
		return
	}
	g.flush() // keep the flow's order
	g.writeCut(b, p, size)
}

// flush writes every frame to the device.
func (g *ingress) flush() {
	for i := range g.join.count {
		f := &g.join.frames[i]
		f.finish()
		g.choose(f.head[vnetHeaderLen:], &f.p)
		errno := g.write(g.join.iovec(f))
		if errno == 0 {
			continue
		}
		if f.gso != gsoNone && deviceWrite.of(errno).fault == faultRefused {
			// Stop coalescing for this peer only. If the device rejects everyone's
			// large frames, each peer's first one shows it.
			if f.gso == gsoUDP {
				f.peer.refuse(refusesUSO)
			} else {
				f.peer.refuse(refusesGRO)
			}
			g.replay(f)
			continue
		}
		g.refused(errno, f.segments, f.length+(f.segments-1)*f.p.headLen)
	}
	g.join.count = 0
}

// refused counts packets that the device rejected, and records a fatal error in
// g.failed.
func (g *ingress) refused(errno unix.Errno, packets, bytes int) {
	o := deviceWrite.of(errno)
	if o.fault == faultGone || o.fault == faultFatal {
		g.failed = fmt.Errorf("writing to the tunnel device: %w", errno)
		o.reason = IngressWrite
	}
	g.lost(o.reason, packets, bytes)
}

// lost moves packets from the carried to the dropped counters.
func (g *ingress) lost(r Reason, packets, bytes int) {
	g.tally.packets -= uint64(packets)
	g.tally.bytes -= uint64(bytes)
	g.tally.dropN(r, packets)
}

// replay writes a rejected frame again as single packets. It copies the frame.
func (g *ingress) replay(f *frame) {
	b := append([]byte(nil), f.head[vnetHeaderLen:]...)
	for _, d := range f.data {
		b = append(b, d...)
	}
	var p packet
	if !p.parse(b) {
		g.lost(IngressWrite, f.segments, f.length+(f.segments-1)*f.p.headLen)
		return
	}
	g.writeCut(b, &p, f.size)
}

// writeCut writes a packet to the device as segments of size payload bytes.
func (g *ingress) writeCut(b []byte, p *packet, size int) {
	g.choose(b, p)
	segments := g.cut.cut(nil, b, p, size)
	if segments == nil {
		payload := p.length - p.headLen
		n := segmentsOf(payload, size)
		g.lost(IngressUncut, n, payload+n*p.headLen)
		return
	}
	for _, s := range segments {
		g.pieces[1] = iovecOf(s.head)
		g.pieces[2] = iovecOf(s.data)
		if errno := g.write(g.pieces[:]); errno != 0 {
			g.refused(errno, 1, len(s.head)+len(s.data))
		}
	}
}

// segmentsOf returns how many segments of size bytes a payload makes.
func segmentsOf(payload, size int) int {
	if size <= 0 {
		return 1
	}
	return max(1, (payload+size-1)/size)
}

// choose selects the device queue for the next write (Options.Spread).
func (g *ingress) choose(b []byte, p *packet) {
	if n := uint32(len(g.spread)); n > 0 {
		g.device = g.spread[p.flowHash(b)%n]
	}
}

// write writes one frame, a virtio header and a packet, to the device.
func (g *ingress) write(iovs []unix.Iovec) unix.Errno {
	for {
		errno := writev(g.device, iovs)
		g.tally.syscalls++
		if errno == unix.EINTR {
			continue
		}
		g.tally.frames++
		return errno
	}
}
