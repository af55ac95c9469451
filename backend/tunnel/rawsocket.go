package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"culvert/encap"
)

// listenRaw opens the sockets of a format with an IP protocol of its own: a raw socket
// to send from this node's underlay address, and per thread a packet socket to receive
// on the underlay interface.
func (t *Tunnel) listenRaw(local netip.Addr) (side encap.Underlay, err error) {
	proto := t.format.Protocol()
	link, err := net.InterfaceByIndex(t.options.Node.Underlay.Index)
	if err != nil {
		return side, fmt.Errorf("looking up %s: %w", t.options.Node.Underlay.Name, err)
	}
	if len(link.HardwareAddr) == 6 {
		side.LinkHeader = 14 // Ethernet; links without addresses have no header
	}
	raw, ok := t.inherited.socket(unix.SOCK_RAW, netip.AddrPortFrom(local, 0))
	if !ok {
		if raw, err = openRaw(proto, local); err != nil {
			return side, err
		}
	}
	t.sockets = append(t.sockets, raw)
	side.Send = []encap.Source{{Socket: encap.NewDescriptor(raw)}}
	for range t.device.threads {
		// With several threads a predecessor's socket may be in a fanout group of another
		// size: claim it only with one thread, which uses no group.
		packets, ok := -1, false
		if t.device.threads == 1 {
			packets, ok = t.inherited.packets(link.Index)
		}
		if ok { // our address may have changed
			if err := onlyTunnel(packets, proto, local); err != nil {
				return side, errors.Join(err, unix.Close(packets))
			}
		}
		if !ok {
			if packets, err = openPackets(link.Index, proto, local); err != nil {
				return side, fmt.Errorf("opening a packet socket: %w", err)
			}
		}
		t.sockets = append(t.sockets, packets)
		side.Receive = append(side.Receive, encap.NewDescriptor(packets))
		if t.device.threads == 1 {
			break
		}
		// Spread by the flow hash, which includes the inner packet (skb_get_hash).
		group := link.Index&0xffff | unix.PACKET_FANOUT_HASH<<16
		if err := unix.SetsockoptInt(packets, unix.SOL_PACKET, unix.PACKET_FANOUT, group); err != nil {
			return side, fmt.Errorf("PACKET_FANOUT: %w", err)
		}
	}
	return side, nil
}

// openRaw opens the send socket.
func openRaw(proto uint8, local netip.Addr) (int, error) {
	raw, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(proto))
	if errors.Is(err, unix.EPERM) {
		return -1, fmt.Errorf("opening a raw socket needs root, or CAP_NET_RAW: %w", err)
	}
	if err != nil {
		return -1, fmt.Errorf("opening a raw socket: %w", err)
	}
	if err := prepareRaw(raw, local); err != nil {
		return -1, errors.Join(fmt.Errorf("preparing the raw socket: %w", err), unix.Close(raw))
	}
	return raw, nil
}

// prepareRaw configures the raw socket. A filter drops what it receives, but the
// socket must exist: without one the kernel answers every packet with protocol
// unreachable.
func prepareRaw(fd int, local netip.Addr) error {
	if err := attachFilter(fd, []bpf.Instruction{bpf.RetConstant{Val: 0}}); err != nil {
		return err
	}
	if err := setBuffers(fd); err != nil {
		return err
	}
	// Set DF, as the kernel's ipip device does.
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE); err != nil {
		return fmt.Errorf("IP_MTU_DISCOVER: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_RECVERR, 1); err != nil {
		return fmt.Errorf("IP_RECVERR: %w", err)
	}
	return unix.Bind(fd, &unix.SockaddrInet4{Addr: local.As4()})
}

// openPackets opens a packet socket for the tunnel's packets that arrive on a link for an
// address. The kernel forwards those for other addresses.
func openPackets(link int, proto uint8, local netip.Addr) (int, error) {
	// Protocol 0: receive nothing until the filter is attached and bind sets it.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	prepare := func() error {
		if err := onlyTunnel(fd, proto, local); err != nil {
			return err
		}
		if err := setBuffers(fd); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			return fmt.Errorf("PACKET_VNET_HDR: %w", err)
		}
		const ip = unix.ETH_P_IP
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: ip>>8 | ip&0xff<<8, Ifindex: link})
	}
	if err := prepare(); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// onlyTunnel makes a packet socket accept only packets of the protocol that arrive for an
// address: not those that this host sends, nor those for other hosts or addresses.
func onlyTunnel(fd int, proto uint8, local netip.Addr) error {
	const protocol, destination = 0xfff00000 + 9, 0xfff00000 + 16 // SKF_NET_OFF, and where the IPv4 header has them
	a := local.As4()
	return attachFilter(fd, []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.PACKET_HOST, SkipTrue: 5},
		bpf.LoadAbsolute{Off: protocol, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(proto), SkipTrue: 3},
		bpf.LoadAbsolute{Off: destination, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(a[:]), SkipTrue: 1},
		bpf.RetConstant{Val: 1 << 17},
		bpf.RetConstant{Val: 0},
	})
}

func attachFilter(fd int, program []bpf.Instruction) error {
	raw, err := bpf.Assemble(program)
	if err != nil {
		return err
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	if err != nil {
		return fmt.Errorf("SO_ATTACH_FILTER: %w", err)
	}
	return nil
}
