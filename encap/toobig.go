package encap

import (
	"encoding/binary"
	"time"

	"golang.org/x/sys/unix"
)

// fragments reports whether packets to the peer leave by the fragmenting socket:
// its path takes less than pods can be told.
func (e *egress) fragments(peer *Peer) bool {
	if peer.path.Load() == nil || e.fragmenter[peer.family()].socket == nil {
		return false
	}
	k, ok := peer.PathMTU()
	return ok && k.Fits < k.MTU
}

// tooLong handles a frame whose packets, of n bytes, exceed the peer's path MTU:
// it fragments or drops it. It returns false if the caller shall send the frame.
func (e *egress) tooLong(peer *Peer, b []byte, p *packet, n int) bool {
	if longest := &peer.longest; uint32(n) > longest.Load() {
		longest.Store(uint32(n)) // a concurrent larger value may be lost; the next packet restores it
	}
	limit := peer.limit()
	if limit == 0 || n <= limit || !e.dontFragment {
		return false // it fits, or the outer packet may be fragmented
	}
	const dontFragment = 0x40
	if p.is4 && b[6]&dontFragment == 0 && n == p.length {
		e.fragment(peer, b, p, limit)
		return true
	}
	e.tally.drop(EgressTooBig)
	e.share.drop(peer, 1)
	if now := time.Now(); now.Sub(e.toldTooBig) >= tooBigPause {
		e.toldTooBig = now
		e.tellTooBig(peer, b, p, limit)
	}
	return true
}

// fragment sends an inner IPv4 packet without DF as fragments (RFC 791).
func (e *egress) fragment(peer *Peer, b []byte, p *packet, limit int) {
	e.flush()
	step := (limit - p.ipLen) &^ 7
	field := binary.BigEndian.Uint16(b[6:])
	const more = 0x2000
	for at := p.ipLen; at < p.length; at += step {
		end := min(at+step, p.length)
		f := e.scratch[:0]
		f = append(f, peer.header...)
		f = append(f, b[:p.ipLen]...)
		f = append(f, b[at:end]...)
		ip := f[len(peer.header):]
		offset := field + uint16((at-p.ipLen)/8)
		if end < p.length {
			offset |= more
		}
		binary.BigEndian.PutUint16(ip[6:], offset)
		p.setLength(ip, p.ipLen+end-at)
		e.batch.addPacket(peer, e.socket(peer, b, p), p.class&e.classes, f, len(ip), false)
		e.flush()
	}
}

// tellTooBig writes an ICMP packet too big to the device, for the sender of b
// (RFC 792, RFC 4443). Its source is the peer's VTEP address: the kernel would
// drop one of this node's own addresses as martian.
func (e *egress) tellTooBig(peer *Peer, b []byte, p *packet, limit int) {
	from, to := peer.Subnet.Addr(), p.source(b)
	f := e.scratch[:vnetHeaderLen]
	clear(f)
	if p.is4 {
		quote := b[:min(p.length, 576-20-8)]
		f = append(f, make([]byte, 28)...)
		f = append(f, quote...)
		ip := f[vnetHeaderLen:]
		ip[0], ip[8], ip[9] = 4<<4|5, ttl, unix.IPPROTO_ICMP
		a, z := from.As4(), to.As4()
		copy(ip[12:], a[:])
		copy(ip[16:], z[:])
		(&packet{is4: true, ipLen: 20}).setLength(ip, len(ip))
		icmp := ip[20:]
		icmp[0], icmp[1] = 3, 4 // fragmentation needed
		binary.BigEndian.PutUint16(icmp[6:], uint16(limit))
		putChecksum(icmp[2:], ^fold(sum(icmp, 0)))
	} else {
		quote := b[:min(p.length, leastMTU6-40-8)]
		f = append(f, make([]byte, 48)...)
		f = append(f, quote...)
		ip := f[vnetHeaderLen:]
		ip[0], ip[6], ip[7] = 6<<4, unix.IPPROTO_ICMPV6, ttl
		a, z := from.As16(), to.As16()
		copy(ip[8:], a[:])
		copy(ip[24:], z[:])
		binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-40))
		icmp := ip[40:]
		icmp[0] = 2 // packet too big
		binary.BigEndian.PutUint32(icmp[4:], uint32(limit))
		pseudo := (&packet{proto: unix.IPPROTO_ICMPV6}).pseudo(ip)
		putChecksum(icmp[2:], ^fold(sum(icmp, add16(pseudo, uint16(len(icmp))))))
	}
	e.frame[0] = iovecOf(f)
	_ = e.device.write(e.frame[:])
	e.tally.syscalls++
}
