package backend

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"net/netip"

	"golang.org/x/sys/unix"
)

// EchoSender sends ICMP echo requests through the tunnel to the first address of a
// peer's subnet, which is on the peer's tunnel device. The reply is seen in the
// datapath's receive counters; the sockets filter out everything.
type EchoSender struct {
	v4, v6 int // file descriptors; -1 if not open
	sent   uint16
}

// OpenEchoSender opens the raw sockets in the network namespace of the calling thread.
// If that fails, it logs a warning and Send sends nothing: a peer that receives
// one-way traffic and sends none is then reported as silent.
func OpenEchoSender(log *slog.Logger) *EchoSender {
	a, err := newEchoSender()
	if err != nil {
		log.Warn("cannot probe peers: a peer with one-way traffic may be reported as silent", "error", err)
		return &EchoSender{v4: -1, v6: -1}
	}
	return a
}

func newEchoSender() (*EchoSender, error) {
	a := &EchoSender{v4: -1, v6: -1}
	const flags = unix.SOCK_RAW | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	fd, err := unix.Socket(unix.AF_INET, flags, unix.IPPROTO_ICMP)
	if err != nil {
		return nil, fmt.Errorf("opening a raw ICMP socket: %w", err)
	}
	a.v4 = fd
	const icmpFilter = 1 // ICMP_FILTER (linux/icmp.h): a bit per ICMP type to drop
	err = unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, -1)
	if fd, v6 := unix.Socket(unix.AF_INET6, flags, unix.IPPROTO_ICMPV6); v6 == nil {
		a.v6 = fd
		all := &unix.ICMPv6Filter{}
		for i := range all.Data {
			all.Data[i] = 1<<32 - 1
		}
		if err == nil {
			err = unix.SetsockoptICMPv6Filter(fd, unix.SOL_ICMPV6, unix.ICMPV6_FILTER, all)
		}
	}
	if err != nil {
		a.Close()
		return nil, fmt.Errorf("opening a raw ICMP socket: %w", err)
	}
	return a, nil
}

// Send sends one echo request. Errors are ignored: the caller sends another request
// later.
func (a *EchoSender) Send(subnet netip.Prefix) {
	a.sent++
	to := subnet.Masked().Addr()
	b := make([]byte, 8) // RFC 792, RFC 4443
	binary.BigEndian.PutUint16(b[4:], 67)
	binary.BigEndian.PutUint16(b[6:], a.sent)
	if to.Is4() {
		b[0] = 8
		sum := uint32(b[0])<<8 + 67 + uint32(a.sent)
		sum = sum&0xffff + sum>>16
		binary.BigEndian.PutUint16(b[2:], ^uint16(sum&0xffff+sum>>16))
		if a.v4 >= 0 {
			_ = unix.Sendto(a.v4, b, unix.MSG_DONTWAIT, &unix.SockaddrInet4{Addr: to.As4()})
		}
		return
	}
	b[0] = 128 // the kernel fills in the ICMPv6 checksum
	if a.v6 >= 0 {
		_ = unix.Sendto(a.v6, b, unix.MSG_DONTWAIT, &unix.SockaddrInet6{Addr: to.As16()})
	}
}

// Close closes the sockets.
func (a *EchoSender) Close() {
	for _, fd := range []int{a.v4, a.v6} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}
