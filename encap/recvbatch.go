package encap

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// recvBatch holds the buffers of recvmmsg. Each takes one datagram, or many of
// one flow and size that the kernel has joined (UDP_GRO).
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
	cut     bool // truncated: the buffer was too short
}

// recvHeadroom separates the buffers. It stays unused: the virtio header for the
// device is written over the tunnel header.
const (
	recvHeadroom     = 32
	recvBufferLen    = recvHeadroom + vnetHeaderLen + ethernetHeaderLen + 1<<16
	recvNameLen      = unix.SizeofSockaddrInet6
	recvControlSpace = 64
)

// recvSlabLen is the bytes of buffers of a recvBatch.
const recvSlabLen = ingressMessages * recvBufferLen

// newRecvBatch returns a batch of ingressMessages messages with buffers in slab, of
// recvSlabLen bytes.
func newRecvBatch(slab []byte) *recvBatch {
	const messages = ingressMessages
	b := &recvBatch{
		msgs:    make([]mmsghdr, messages),
		iovs:    make([]unix.Iovec, messages),
		names:   make([]byte, messages*recvNameLen),
		control: make([]byte, messages*recvControlSpace),
		buffers: make([][]byte, messages),
	}
	for i := range b.msgs {
		b.buffers[i] = slab[i*recvBufferLen+recvHeadroom : (i+1)*recvBufferLen : (i+1)*recvBufferLen]
		b.iovs[i].Base = unsafe.SliceData(b.buffers[i])
		b.iovs[i].SetLen(len(b.buffers[i]))
		h := &b.msgs[i].hdr
		h.Name = &b.names[i*recvNameLen]
		h.Iov = &b.iovs[i]
		h.Iovlen = 1
		h.Control = &b.control[i*recvControlSpace]
	}
	return b
}

// receive fills up to n messages and returns how many.
func (b *recvBatch) receive(from socket, n int) (int, unix.Errno) {
	for i := range b.msgs[:n] {
		b.msgs[i].hdr.Namelen = recvNameLen
		b.msgs[i].hdr.Controllen = recvControlSpace
	}
	return from.receive(b.msgs[:n])
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
		n := controlLen(control)
		if n < unix.SizeofCmsghdr+1 || n > len(control) {
			break
		}
		level := binary.NativeEndian.Uint32(control[controlWord:])
		kind := binary.NativeEndian.Uint32(control[controlWord+4:])
		value := control[unix.SizeofCmsghdr:n]
		switch {
		case level == unix.SOL_UDP && kind == unix.UDP_GRO && len(value) >= 4:
			d.segment = int(binary.NativeEndian.Uint32(value))
		case level == unix.IPPROTO_IP && kind == unix.IP_TOS:
			d.ecn = value[0] & 3
		case level == unix.IPPROTO_IPV6 && kind == unix.IPV6_TCLASS:
			d.ecn = value[0] & 3
		}
		next := controlNext(n)
		if next > len(control) {
			break
		}
		control = control[next:]
	}
	return d
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
