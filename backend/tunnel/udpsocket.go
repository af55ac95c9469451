package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"culvert/internal/remedy"
)

// socketBuffer is the requested buffer size in bytes per direction, 6.7 ms of a
// 10 Gbit/s link. The kernel doubles it and counts its own overhead against it.
const socketBuffer = 8 << 20

// udpSocket is the purpose of a UDP socket of the tunnel.
type udpSocket struct {
	at     netip.AddrPort // port 0: chosen by the kernel
	shared bool           // several sockets share the port, by flow (SO_REUSEPORT)
	df     bool           // set DF
	// sends: the socket receives nothing. fragments: its datagrams may be fragmented,
	// over IPv6 to the minimum MTU.
	sends, fragments bool
}

// open opens the socket, and returns its descriptor and port.
func (s udpSocket) open() (fd int, port uint16, err error) {
	at := s.at
	network := "udp4"
	if at.Addr().Is6() {
		network = "udp6"
	}
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var failure error
		err := raw.Control(func(d uintptr) {
			if s.shared {
				failure = unix.SetsockoptInt(int(d), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
			}
			failure = errors.Join(failure, s.setOptions(int(d)))
		})
		return errors.Join(err, failure)
	}}
	c, err := lc.ListenPacket(context.Background(), network, at.String())
	if errors.Is(err, unix.EADDRINUSE) {
		return -1, 0, remedy.Errorf("stop the program that `ss -lunp` names, or a kernel vxlan device (`ip -d link show type vxlan`), as flanneld leaves", "UDP port %d is taken: %w", at.Port(), err)
	}
	if err != nil {
		return -1, 0, fmt.Errorf("opening the tunnel's socket: %w", err)
	}
	port = c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	fd, err = detach(c.(*net.UDPConn))
	return fd, port, err
}

// setOptions configures the socket: large buffers, GRO on receipt (UDP_GRO, Linux
// 5.0), the outer traffic class as a control message, and path MTU discovery.
//
// Without df, as with the kernel's vxlan device, the outer packet may be fragmented:
// IPv4 by routers, IPv6 by this kernel, which learns the path MTU. The loop reads the
// IPv6 errors too, for its super-frames, which bypass the kernel's fragmentation. With
// df the loop learns the path MTU from the socket's error queue; the kernel's own path
// MTU, which anyone can forge, is ignored (PMTUDISC_PROBE).
func (s udpSocket) setOptions(fd int) error {
	is4, df := s.at.Addr().Is4(), s.df
	if err := setBuffers(fd); err != nil {
		return fmt.Errorf("setting the socket's buffers: %w", err)
	}
	if s.sends {
		if err := receiveNothing(fd); err != nil {
			return err
		}
	} else {
		// Optional: without GRO each datagram is received alone, which is only slower.
		_ = unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1)
	}
	level, class, discover, errs := unix.SOL_IP, unix.IP_RECVTOS, unix.IP_MTU_DISCOVER, unix.IP_RECVERR
	if !is4 {
		level, class, discover, errs = unix.SOL_IPV6, unix.IPV6_RECVTCLASS, unix.IPV6_MTU_DISCOVER, unix.IPV6_RECVERR
	}
	how, tell := unix.IP_PMTUDISC_DONT, 0 // IPv6 uses the same values
	if df && !s.fragments {
		how = unix.IP_PMTUDISC_PROBE
	}
	if df || !is4 {
		tell = 1
	}
	for _, o := range []struct {
		what        string
		name, value int
	}{{"the report of the traffic class", class, 1}, {"path MTU discovery", discover, how}, {"the report of errors", errs, tell}} {
		if err := unix.SetsockoptInt(fd, level, o.name, o.value); err != nil {
			return fmt.Errorf("setting %s: %w", o.what, err)
		}
	}
	if s.fragments && !is4 {
		// IPv4 routers fragment further if needed; IPv6 routers do not.
		if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_MTU, 1280); err != nil {
			return fmt.Errorf("setting the length of fragments: %w", err)
		}
	}
	return nil
}

// receiveNothing makes a send-only socket drop all input. Nobody reads it, so a sender
// that finds its port could otherwise pin a buffer's worth of memory. ICMP errors still
// reach the error queue, which needs a small buffer.
func receiveNothing(fd int) error {
	if err := attachFilter(fd, []bpf.Instruction{bpf.RetConstant{Val: 0}}); err != nil {
		return err
	}
	const room = 64 << 10
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, room); err != nil {
		return fmt.Errorf("SO_RCVBUF: %w", err)
	}
	return nil
}

func setBuffers(fd int) error {
	for option, force := range map[int]int{unix.SO_RCVBUF: unix.SO_RCVBUFFORCE, unix.SO_SNDBUF: unix.SO_SNDBUFFORCE} {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, socketBuffer) == nil {
			continue // with CAP_NET_ADMIN, beyond net.core.{r,w}mem_max
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, socketBuffer); err != nil {
			return err
		}
	}
	return nil
}
