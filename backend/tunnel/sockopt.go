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
)

// socketBuffer is asked for in each direction: 4 ms of a 10 Gbit/s link. The
// kernel counts its own overhead, and doubles what is asked.
const socketBuffer = 8 << 20

// udpSocket is what a UDP socket of the tunnel is for.
type udpSocket struct {
	at     netip.AddrPort // the port 0 is one of the kernel's choice
	shared bool           // the port is spread over its sockets by flow, by the kernel
	df     bool           // datagrams bear DF
	// sends says that the socket receives nothing, and fragments that its datagrams
	// are fragmented to the least that every path takes.
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
		return -1, 0, fmt.Errorf("UDP port %d is taken: `ss -lunp` names the program; is a kernel vxlan device up (`ip -d link show type vxlan`), or flanneld running?: %w", at.Port(), err)
	}
	if err != nil {
		return -1, 0, fmt.Errorf("opening the tunnel's socket: %w", err)
	}
	port = c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	fd, err = detach(c.(*net.UDPConn))
	return fd, port, err
}

// setOptions prepares the socket: large buffers, datagrams of one flow
// joined when received (UDP_GRO, Linux 5.0), and the outer traffic class told.
//
// Without df, as with the kernel's vxlan device, the outer packet may be
// fragmented where the path is narrower than the link: IPv4 by routers, IPv6 by
// the kernel here, which remembers what they say, and the loop hears it too, for
// its super-frames, which the kernel does not see. With df the loop follows what
// the network says of the path, from the socket's error queue; the kernel's own
// memory of it, which believes anybody, is left out (PMTUDISC_PROBE).
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
		// Without it every datagram comes alone, which is slower and right.
		_ = unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1)
	}
	level, class, discover, errs := unix.SOL_IP, unix.IP_RECVTOS, unix.IP_MTU_DISCOVER, unix.IP_RECVERR
	if !is4 {
		level, class, discover, errs = unix.SOL_IPV6, unix.IPV6_RECVTCLASS, unix.IPV6_MTU_DISCOVER, unix.IPV6_RECVERR
	}
	how, tell := unix.IP_PMTUDISC_DONT, 0 // the same values for IPv6
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
		// Over IPv4 routers fragment further; over IPv6 nobody does.
		if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_MTU, 1280); err != nil {
			return fmt.Errorf("setting the length of fragments: %w", err)
		}
	}
	return nil
}

// receiveNothing has a socket that only sends take nothing in: whoever finds its
// port could pin as much memory as its buffer holds, since nobody reads it. What
// the network says of packets sent still reaches the error queue, for which there
// is room.
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
			continue // beyond what the system allows others (CAP_NET_ADMIN)
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, socketBuffer); err != nil {
			return err
		}
	}
	return nil
}
