package encap

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// ingress is the receiving direction, from one underlay socket to the device.
// Only one goroutine uses it.
type ingress struct {
	*common
	device   device   // queue to write to
	spread   []device // queues to choose device from; empty if there is only one
	socket   socket
	linkLen  int  // bytes of link-layer header before each packet of a packet socket
	self     VTEP // what the format's header of packets for this node has
	mtu      int  // of the device
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

func newIngress(c *common, to device, from socket, batch *recvBatch, u Underlay, mtu int, counters *Counters) *ingress {
	g := &ingress{
		common:   c,
		device:   to,
		socket:   from,
		linkLen:  u.LinkHeader,
		self:     u.Self,
		mtu:      mtu,
		counters: counters,
		share:    share{direction: receiving},
		batch:    batch,
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
		if m := g.batch.message(i); g.udp {
			g.udpMessage(table, m)
		} else {
			g.rawMessage(table, m)
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

// check checks a packet received from the outer address: the tunnel header at the start
// of d, then the inner packet, whose parse overwrites p. It must be for this node, and its
// inner source must belong to the sender.
func (g *ingress) check(table *Table, d []byte, p *packet, outer netip.Addr) Reason {
	etherType, r := g.format.Check(d, &g.self)
	if r != Accepted {
		return r
	}
	b := d[g.header:]
	if !p.parse(b) || !p.headerIsRight(b) {
		return IngressMalformed
	}
	peer := g.route.lookup(table, p.source(b))
	if peer == nil || peer.Underlay.Addr() != outer {
		return IngressSource
	}
	if !table.isLocal(p.destination(b)) {
		return IngressDestination
	}
	note(&peer.heard)
	if p.is4 != (etherType == etherTypeIPv4) {
		return IngressMalformed
	}
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
				f.peer.suspend(mechanismUSO)
			} else {
				f.peer.suspend(mechanismGRO)
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
		errno := g.device.write(iovs)
		g.tally.syscalls++
		if errno == unix.EINTR {
			continue
		}
		g.tally.frames++
		return errno
	}
}
