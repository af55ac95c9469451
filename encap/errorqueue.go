package encap

import (
	"encoding/binary"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// errorQueue reads ICMP errors from the sockets' error queues (IP_RECVERR).
type errorQueue struct {
	*common
	hinted  time.Time // when the last hint was handled
	message unix.Msghdr
	iov     unix.Iovec
	quote   [576]byte
	control [256]byte
	name    [unix.SizeofSockaddrInet6]byte
}

// drain reads all errors of a socket.
func (q *errorQueue) drain(from socket) {
	h := &q.message
	for {
		q.iov = iovecOf(q.quote[:])
		*h = unix.Msghdr{
			Name: &q.name[0], Namelen: uint32(len(q.name)), Iov: &q.iov, Iovlen: 1,
			Control: &q.control[0],
		}
		h.SetControllen(len(q.control))
		n, errno := from.receiveError(h)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			// If the queue had no room, the error is still pending on the socket, which
			// would stay ready: clear it.
			from.clearError()
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
	lead := q.header
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
	peer.narrow(mtu-Overhead(q.format, to.Is4()), by, pathMTULife)
}

// hint is narrower for a quote that is too short to verify.
func (q *errorQueue) hint(table *Table, to, by netip.Addr, quote []byte, mtu int) {
	now := time.Now()
	if now.Sub(q.hinted) < hintPause {
		return
	}
	q.hinted = now
	fits := mtu - Overhead(q.format, to.Is4())
	if !to.Is4() && mtu < leastMTU6 {
		return // no IPv6 link has a lower MTU (RFC 8200, section 5)
	}
	for _, peer := range table.outer[to] {
		longest := int(peer.longest.Load())
		if fits <= 0 || longest <= fits {
			continue // nothing longer was sent
		}
		if n := min(len(quote), len(peer.header)); string(quote[:n]) != string(peer.header[:n]) {
			continue
		}
		// The kernel found a UDP socket by the quoted ports. For a raw socket the inner
		// length must tell that the packet was too long.
		if !q.udp && !quotesLonger(quote, len(peer.header), fits, longest) {
			continue
		}
		peer.narrow(fits, by, hintLife)
	}
}

// quotesLonger reports whether a quote of at least 8 bytes (RFC 792) has, after the
// tunnel header, the start of an IPv4 packet longer than fits, but not than longest.
func quotesLonger(quote []byte, header, fits, longest int) bool {
	const end = 4 // of the length in the IPv4 header
	if len(quote) < max(8, header+end) || quote[header]>>4 != 4 {
		return false
	}
	n := int(binary.BigEndian.Uint16(quote[header+2:]))
	return n > fits && n <= longest
}
