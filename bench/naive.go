package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/encap"
	"culvert/internal/api"
	"culvert/subnet"
)

// naive is the simplest VXLAN in userspace: it reads a packet from the TUN device,
// adds the header and sends it. That is two system calls per packet, with one thread
// per direction and no offloads. It is the lower bound in comparisons.
type naive struct {
	name            string
	device, socket  int
	peers           map[netip.Prefix]unix.Sockaddr // by subnet, all of length naiveBits
	wake            netip.Addr                     // an address that is routed to the device
	header          [encap.VXLANHeaderLen]byte
	egress, ingress naiveCounters
	stop            atomic.Bool
}

const naiveBits = 24

type naiveCounters struct{ packets, bytes, syscalls atomic.Uint64 }

func (c *naiveCounters) traffic() api.Traffic {
	return api.Traffic{Packets: c.packets.Load(), Bytes: c.bytes.Load(), Frames: c.packets.Load(), Syscalls: c.syscalls.Load()}
}

func openNaive(p Part) (_ carrier, err error) {
	n := &naive{name: p.device(), device: -1, socket: -1, wake: p.others()[0].subnet.Addr().Next(), peers: map[netip.Prefix]unix.Sockaddr{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if n.device, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("opening /dev/net/tun: %w", err)
	}
	request, err := unix.NewIfreq(p.device())
	if err != nil {
		return nil, err
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(n.device, unix.TUNSETIFF, request); err != nil {
		return nil, fmt.Errorf("creating the TUN device %s: %w", p.device(), err)
	}
	if err := tunDevice(p, 50); err != nil {
		return nil, err
	}
	if n.socket, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	// The receive timeout lets the thread check n.stop.
	tv := unix.NsecToTimeval((200 * time.Millisecond).Nanoseconds())
	if err := unix.SetsockoptTimeval(n.socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	at := func(m member) unix.Sockaddr {
		return &unix.SockaddrInet4{Addr: m.underlay.As4(), Port: int(p.Port)}
	}
	if err := unix.Bind(n.socket, at(p.self())); err != nil {
		return nil, fmt.Errorf("UDP port %d of %s: %w", p.Port, p.self().underlay, err)
	}
	for _, o := range p.others() {
		n.peers[o.subnet] = at(o)
	}

	//  VXLAN (RFC 7348): flag I, VNI 1; then an Ethernet header
	const vni = 1
	self, peer := subnet.DeriveMAC("bench-naive", vni, false), subnet.DeriveMAC("bench-naive-peer", vni, false)
	n.header[0], n.header[6] = 1<<3, vni
	copy(n.header[8:], peer[:])
	copy(n.header[14:], self[:])
	binary.BigEndian.PutUint16(n.header[20:], unix.ETH_P_IP)
	return n, nil
}

// tunDevice configures the part's TUN device; cost is subtracted from the underlay's
// MTU.
func tunDevice(p Part, cost int) error {
	dev, err := netlink.LinkByName(p.device())
	if err != nil {
		return err
	}
	var subnets []netip.Prefix
	for _, o := range p.others() {
		subnets = append(subnets, o.subnet)
	}
	return configureDevice(dev, p.Link, cost, p.self().subnet.Addr(), subnets...)
}

func (n *naive) Run(ctx context.Context) error {
	errs := make(chan error, 2)
	var both sync.WaitGroup
	run := func(loop func() error) {
		both.Go(func() {
			runtime.LockOSThread()
			if err := loop(); err != nil {
				errs <- err
			}
		})
	}
	run(n.out)
	run(n.in)
	var err error
	select {
	case <-ctx.Done():
	case err = <-errs:
	}
	n.stop.Store(true)
	// Send a packet into the device to wake up the thread that reads it.
	if c, e := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); e == nil {
		_ = unix.Sendto(c, []byte{0}, 0, &unix.SockaddrInet4{Addr: n.wake.As4(), Port: 9})
		_ = unix.Close(c)
	}
	both.Wait()
	return err
}

func (n *naive) out() error {
	buf := make([]byte, 2048)
	copy(buf, n.header[:])
	for !n.stop.Load() {
		k, err := unix.Read(n.device, buf[len(n.header):])
		if err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return os.NewSyscallError("reading the device", err)
		}
		n.egress.syscalls.Add(1)
		to := n.peerOf(buf[len(n.header):][:k])
		if to == nil {
			continue
		}
		n.egress.syscalls.Add(1)
		if err := unix.Sendto(n.socket, buf[:len(n.header)+k], 0, to); err == nil {
			n.egress.packets.Add(1)
			n.egress.bytes.Add(uint64(k))
		}
	}
	return nil
}

// peerOf returns the underlay address of the peer with the packet's destination; nil
// if there is none.
func (n *naive) peerOf(packet []byte) unix.Sockaddr {
	const headerLen = 20 // of IPv4
	if len(packet) < headerLen {
		return nil
	}
	subnet, err := netip.AddrFrom4([4]byte(packet[16:20])).Prefix(naiveBits)
	if err != nil {
		return nil
	}
	return n.peers[subnet]
}

func (n *naive) in() error {
	buf := make([]byte, 2048)
	for !n.stop.Load() {
		k, err := unix.Read(n.socket, buf)
		if err != nil {
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNREFUSED) {
				continue
			}
			return os.NewSyscallError("receiving", err)
		}
		if k <= len(n.header) {
			continue
		}
		n.ingress.syscalls.Add(2)
		if _, err := unix.Write(n.device, buf[len(n.header):k]); err == nil {
			n.ingress.packets.Add(1)
			n.ingress.bytes.Add(uint64(k - len(n.header)))
		}
	}
	return nil
}

func (n *naive) Status() api.Datapath {
	return api.Datapath{WireFormat: "vxlan", Kind: "userspace", Device: n.name, Egress: n.egress.traffic(), Ingress: n.ingress.traffic()}
}

func (n *naive) Close() error {
	var errs []error
	for _, fd := range []int{n.socket, n.device} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	return errors.Join(errs...)
}
