package echo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Sum says who computes the UDP checksum of a datagram.
type Sum int

const (
	// Offloaded leaves it to the outgoing device, as pods' stacks do if the device
	// supports that.
	Offloaded Sum = iota
	// None sends no checksum (RFC 768), which only IPv4 may.
	None
)

// ProbeUDP sends a UDP datagram in an IP packet of size bytes to a port that should be
// closed, and waits for the ICMP error port unreachable. nil means that the datagram
// arrived intact, since a host drops one with a wrong checksum; ErrTimeout that no reply
// came; Refused that another ICMP error came.
func ProbeUDP(ctx context.Context, from, to netip.AddrPort, size int, sum Sum) (time.Duration, error) {
	header := 28
	if !to.Addr().Is4() {
		header = 48
	}
	control := func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) {
			if to.Addr().Is4() {
				failed = errors.Join(
					unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1),
					unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE))
				if sum == None {
					failed = errors.Join(failed, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_NO_CHECK, 1))
				}
				return
			}
			failed = errors.Join(
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1),
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE))
		})
		return errors.Join(err, failed)
	}
	d := net.Dialer{Control: control}
	if from.Addr().IsValid() && !from.Addr().IsUnspecified() {
		d.LocalAddr = net.UDPAddrFromAddrPort(from)
	}
	c, err := d.DialContext(ctx, "udp", to.String())
	if err != nil {
		return 0, fmt.Errorf("opening a UDP socket from %s to %s: %w", from.Addr(), to, err)
	}
	defer c.Close()
	if end, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(end); err != nil {
			return 0, err
		}
	}
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	began := time.Now()
	if _, err := c.Write(make([]byte, max(size-header, 1))); err != nil {
		return 0, outcome(err)
	}
	_, err = c.Read(make([]byte, 1500))
	if errors.Is(err, unix.ECONNREFUSED) {
		return time.Since(began), nil
	}
	return time.Since(began), outcome(err)
}

// outcome converts a socket's error to ProbeUDP's result.
func outcome(err error) error {
	switch {
	case err == nil: // a program listens there, and answered
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ErrTimeout
	case errors.Is(err, unix.EMSGSIZE):
		return ErrTooBig
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.ECONNREFUSED):
		var errno syscall.Errno
		errors.As(err, &errno)
		return fmt.Errorf("refused: %w", errno)
	}
	return err
}
