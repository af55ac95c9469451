package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketBuffer is asked for in each direction: 4 ms of a 10 Gbit/s link. The
// kernel counts its own overhead, and doubles what is asked.
const socketBuffer = 8 << 20

// listenUDP opens a UDP socket bound to the node's underlay address, or to a
// port of the kernel's choice if that is 0, and returns its descriptor and
// port. A shared port is spread over its sockets by flow, by the kernel.
func listenUDP(at netip.AddrPort, shared bool) (fd int, port uint16, err error) {
	network := "udp4"
	if at.Addr().Is6() {
		network = "udp6"
	}
	lc := net.ListenConfig{Control: func(network, address string, raw syscall.RawConn) error {
		if shared {
			var failure error
			err := raw.Control(func(fd uintptr) { failure = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
			if err := errors.Join(err, failure); err != nil {
				return fmt.Errorf("setting SO_REUSEPORT: %w", err)
			}
		}
		return setSocketOptions(network, address, raw)
	}}
	c, err := lc.ListenPacket(context.Background(), network, at.String())
	if errors.Is(err, unix.EADDRINUSE) {
		return -1, 0, fmt.Errorf("UDP port %d is taken: is a kernel vxlan device up (`ip -d link show type vxlan`), or flanneld running?: %w", at.Port(), err)
	}
	if err != nil {
		return -1, 0, fmt.Errorf("opening the tunnel's socket: %w", err)
	}
	port = c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	fd, err = detach(c.(*net.UDPConn))
	return fd, port, err
}

// setSocketOptions prepares a tunnel socket: large buffers, datagrams of one
// flow joined when received (UDP_GRO, Linux 5.0), and the outer ECN mark told.
func setSocketOptions(network, _ string, raw syscall.RawConn) error {
	var errs []error
	set := func(name string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("setting %s: %w", name, err))
		}
	}
	err := raw.Control(func(d uintptr) {
		fd := int(d)
		set("the socket's buffers", setBuffers(fd))
		// Without it every datagram comes alone, which is slower and right.
		_ = unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1)
		if network == "udp6" {
			set("IPV6_RECVTCLASS", unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVTCLASS, 1))
			set("IPV6_MTU_DISCOVER", unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DONT))
			return
		}
		set("IP_RECVTOS", unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_RECVTOS, 1))
		// As the kernel's vxlan device does, the outer packet may be fragmented
		// where the path is narrower than the link.
		set("IP_MTU_DISCOVER", unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT))
	})
	return errors.Join(append(errs, err)...)
}

func setBuffers(fd int) error {
	for option, force := range map[int]int{unix.SO_RCVBUF: unix.SO_RCVBUFFORCE, unix.SO_SNDBUF: unix.SO_SNDBUFFORCE} {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, socketBuffer) == nil {
			continue // beyond what the system allows others (CAP_NET_ADMIN)
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, socketBuffer); err != nil {
			return err
		}
	}
	return nil
}
