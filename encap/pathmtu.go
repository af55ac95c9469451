package encap

import (
	"encoding/binary"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Path MTU discovery. If outer packets set DF, or are IPv6, a router before a
// narrower link answers with an ICMP error instead of fragmenting. The loop
// stores the peer's path MTU for a while and answers longer packets from pods
// with its own ICMP error:
//
//	router ── ICMP too big ── socket's error queue ── Peer.path
//	pod ◄── TUN ── ICMP too big, from the peer's VTEP address ── packet that is longer
//
// Anyone can forge an ICMP error. It is accepted if it quotes the tunnel header
// and an inner packet from this node's pods to the peer's. Some routers quote only
// 8 bytes after the outer IP header (RFC 792): for VXLAN the UDP header, whose
// ports the kernel used to find the socket; for IPIP the start of the inner IPv4
// header, with its length. Such a hint is accepted only if a packet longer than
// its MTU was sent to that peer, at a limited rate, and for a shorter time.
//
// Pods may send packets of the minimum MTU whatever they are told (IPv6: 1280
// bytes), which may exceed the path MTU. The outer packet is then fragmented
// (RFC 2473, section 7.1), through a separate socket.

const (
	// pathMTULife is how long a peer's path MTU is valid, as in the kernel
	// (net.ipv4.route.mtu_expires).
	pathMTULife = 10 * time.Minute
	// The minimum MTUs that pods are told: every host must accept IPv4 packets of
	// 576 bytes (RFC 791), every link must carry IPv6 packets of 1280 (RFC 8200).
	leastMTU4, leastMTU6 = 576, 1280
	// hintLife is how long the MTU of a hint is valid: an ICMP error that quoted
	// too little to verify.
	hintLife = 2 * time.Minute
	// hintPause is the minimum interval between hints; others are ignored.
	hintPause = 100 * time.Millisecond
	// tooBigPause is the minimum interval between ICMP errors sent to pods.
	tooBigPause = time.Millisecond
)

// PathMTU is what ICMP errors said of the path to a peer. Sizes are of inner
// packets, in bytes.
type PathMTU struct {
	MTU          int        // what pods are told
	Fits         int        // the longest packet that passes unfragmented
	By           netip.Addr // sender of the ICMP error; invalid if not known
	Since, Until time.Time  // validity
}

// PathMTU returns what is known of the path to the peer, and false if nothing is.
func (p *Peer) PathMTU() (PathMTU, bool) {
	k := p.path.Load()
	if k == nil {
		return PathMTU{}, false
	}
	if time.Now().After(k.Until) {
		p.path.CompareAndSwap(k, nil)
		return PathMTU{}, false
	}
	return *k, true
}

// limit is the MTU that pods are told for the peer, or 0 if nothing is known.
func (p *Peer) limit() int {
	k, _ := p.PathMTU()
	return k.MTU
}

// fits is the longest inner packet that reaches the peer unfragmented, or 0 if
// nothing is known.
func (p *Peer) fits() int {
	k, _ := p.PathMTU()
	return k.Fits
}

// fragments reports whether packets to the peer leave by the fragmenting socket:
// its path takes less than pods can be told.
func (e *egress) fragments(peer *Peer) bool {
	if peer.path.Load() == nil || e.fragmenter[peer.family()].Socket.FD() < 0 {
		return false
	}
	k, ok := peer.PathMTU()
	return ok && k.Fits < k.MTU
}

// inheritPaths copies path MTUs and suspended mechanisms from the old table, for
// peers whose underlay address is unchanged.
func (t *Table) inheritPaths(old *Table) {
	for prefix, p := range t.peers {
		before := old.peers[prefix]
		if before == nil || before.Underlay != p.Underlay {
			continue
		}
		p.path.Store(before.path.Load())
		p.longest.Store(before.longest.Load())
		for m := range p.refused {
			p.refused[m].Store(before.refused[m].Load())
		}
	}
}

// errorQueue reads ICMP errors from the sockets' error queues (IP_RECVERR).
type errorQueue struct {
	*common
	hinted  time.Time // when the last hint was handled
	quote   [576]byte
	control [256]byte
	name    [unix.SizeofSockaddrInet6]byte
}

// drain reads all errors of a socket.
func (q *errorQueue) drain(fd uintptr) {
	for {
		iov := iovecOf(q.quote[:])
		h := unix.Msghdr{
			Name: &q.name[0], Namelen: uint32(len(q.name)), Iov: &iov, Iovlen: 1,
			Control: &q.control[0],
		}
		h.SetControllen(len(q.control))
		n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&h)), unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			// If the queue had no room, the error is still pending on the socket, which
			// would stay ready: clear it.
			_, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
			return
		}
		to, ok := address(q.name[:h.Namelen])
		if mtu, by := tooBig(q.control[:h.Controllen]); ok && mtu > 0 {
			q.narrower(to, by, q.quote[:n], mtu)
		}
	}
}

// tooBig returns the outer MTU that an ICMP packet too big states, and its
// sender; 0 for any other error.
func tooBig(control []byte) (mtu int, by netip.Addr) {
	const originICMP, originICMP6 = 2, 3 // linux/errqueue.h
	for len(control) >= unix.SizeofCmsghdr {
		n := controlLen(control)
		if n < unix.SizeofCmsghdr || n > len(control) {
			return 0, by
		}
		level, kind := binary.NativeEndian.Uint32(control[controlWord:]), binary.NativeEndian.Uint32(control[controlWord+4:])
		e := control[unix.SizeofCmsghdr:n]
		ours := level == unix.SOL_IP && kind == unix.IP_RECVERR || level == unix.SOL_IPV6 && kind == unix.IPV6_RECVERR
		if ours && len(e) >= 16 && (e[4] == originICMP || e[4] == originICMP6) &&
			unix.Errno(binary.NativeEndian.Uint32(e)) == unix.EMSGSIZE {
			by, _ = address(e[16:]) // SO_EE_OFFENDER
			return int(binary.NativeEndian.Uint32(e[8:])), by
		}
		control = control[min(controlNext(n), len(control)):]
	}
	return 0, by
}

// narrower lowers the path MTU of the peer at to if the quote, which begins with
// the tunnel header, is of a packet that this node sent there. mtu is of outer
// packets; by is the error's sender.
func (q *errorQueue) narrower(to, by netip.Addr, quote []byte, mtu int) {
	table := q.table.Load()
	var p packet
	lead := 0
	if q.format == FormatVXLAN {
		lead = VXLANHeaderLen
	}
	if len(quote) < lead+20 {
		q.hint(table, to, by, quote, mtu)
		return
	}
	if !p.parseQuoted(quote[lead:]) {
		return
	}
	inner := quote[lead:]
	peer := table.lookup(p.destination(inner))
	if peer == nil || peer.Underlay.Addr() != to || !table.isLocal(p.source(inner)) || string(quote[:lead]) != string(peer.header) {
		return
	}
	peer.narrow(mtu-q.cost(to), by, pathMTULife)
}

// cost is the tunnel's overhead in bytes, for an underlay address.
func (q *errorQueue) cost(to netip.Addr) int {
	if q.format == FormatVXLAN {
		return VXLANCost(to.Is4())
	}
	return IPIPCost
}

// narrow stores n as the longest inner packet that passes, unless a valid value
// is as low.
func (p *Peer) narrow(n int, by netip.Addr, life time.Duration) {
	least := leastMTU6
	if p.Subnet.Addr().Is4() {
		least = leastMTU4
	}
	n = max(n, leastFits)
	if known := p.fits(); known != 0 && n >= known {
		return
	}
	now := time.Now()
	p.path.Store(&PathMTU{MTU: max(n, least), Fits: n, By: by, Since: now, Until: now.Add(life)})
}

// leastFits is the lowest PathMTU.Fits that is accepted: the IPv4 minimum less 70
// bytes, the overhead of VXLAN over IPv6.
const leastFits = 576 - 70

// hint is narrower for a quote that is too short to verify.
func (q *errorQueue) hint(table *Table, to, by netip.Addr, quote []byte, mtu int) {
	now := time.Now()
	if now.Sub(q.hinted) < hintPause {
		return
	}
	q.hinted = now
	fits := mtu - q.cost(to)
	if !to.Is4() && mtu < leastMTU6 {
		return // no IPv6 link has a lower MTU (RFC 8200, section 5)
	}
	for _, peer := range table.outer[to] {
		longest := int(peer.longest.Load())
		if fits <= 0 || longest <= fits {
			continue // nothing longer was sent
		}
		switch q.format {
		case FormatVXLAN:
			if n := min(len(quote), len(peer.header)); string(quote[:n]) != string(peer.header[:n]) {
				continue
			}
		case FormatIPIP:
			if len(quote) < 8 || quote[0]>>4 != 4 {
				continue
			}
			if n := int(binary.BigEndian.Uint16(quote[2:])); n <= fits || n > longest {
				continue
			}
		}
		peer.narrow(fits, by, hintLife)
	}
}

// parseQuoted is parse for a truncated packet; it sets only is4.
func (p *packet) parseQuoted(b []byte) bool {
	*p = packet{}
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		p.is4 = true
		return true
	case len(b) >= 40 && b[0]>>4 == 6:
		return true
	}
	return false
}

// tooLong handles a frame whose packets, of n bytes, exceed the peer's path MTU:
// it fragments or drops it. It returns false if the caller shall send the frame.
func (e *egress) tooLong(peer *Peer, b []byte, p *packet, n int) bool {
	if longest := &peer.longest; uint32(n) > longest.Load() {
		longest.Store(uint32(n)) // a concurrent larger value may be lost; the next packet restores it
	}
	limit := peer.limit()
	if limit == 0 || n <= limit || e.format == FormatVXLAN && !e.dontFragment {
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
	_, _ = write(e.device, f)
	e.tally.syscalls++
}
