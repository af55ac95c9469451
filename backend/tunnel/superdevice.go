package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/host"
	"culvert/internal/names"
)

// superDevice is a TAP device to which the loop writes tunnel frames of up to 64 KB. A
// tc filter redirects every frame from its ingress to the uplink, where the kernel or
// the hardware segments it. It is never read and has no address.
type superDevice struct {
	fd     int
	udp    bool          // the frames' outer header is UDP
	marker *ebpf.Program // otherwise: the program that marks and redirects
	to     int           // index of the uplink that marker redirects to
	link   netlink.Link
}

const (
	// linux/if_tun.h, since Linux 6.17; x/sys/unix lacks them.
	tunFUDPTunnelGSO     = 0x80
	tunFUDPTunnelGSOCsum = 0x100
	// superHeaderLen is the length of struct virtio_net_hdr_v1_hash_tunnel.
	superHeaderLen = 24
)

// errNoSuperFrames means that the kernel lacks the offloads.
var errNoSuperFrames = errors.New("the kernel does not offer it (Linux 6.17 does)")

// openSuperDevice claims the predecessor's device or creates it, and sets it up. The
// error wraps errNoSuperFrames if the kernel is too old. udp: the frames' outer header is
// UDP.
func (i *inherited) openSuperDevice(udp bool) (*superDevice, error) {
	d := &superDevice{udp: udp}
	var left bool
	var err error
	if d.fd, left = i.device(names.SuperFrame); !left {
		d.fd, err = makeSuperDevice()
	}
	if err == nil {
		if err = d.prepare(); err != nil {
			err = errors.Join(err, unix.Close(d.fd))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("making the TAP device %s: %w", names.SuperFrame, err)
	}
	return d, nil
}

func makeSuperDevice() (fd int, err error) {
	fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("opening /dev/net/tun: %w", err)
	}
	request, err := unix.NewIfreq(names.SuperFrame)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("TUNSETIFF: %w", err), unix.Close(fd))
	}
	return fd, nil
}

func (d *superDevice) prepare() (err error) {
	if err := unix.IoctlSetPointerInt(d.fd, unix.TUNSETVNETHDRSZ, superHeaderLen); err != nil {
		return fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
	}
	// The loop writes this device's headers in little endian, in which the kernel has the
	// tunnel's fields; the other fields are in the host's order unless it is told.
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		if err := unix.IoctlSetPointerInt(d.fd, unix.TUNSETVNETLE, 1); err != nil {
			return fmt.Errorf("TUNSETVNETLE: %w", err)
		}
	}
	offloads := unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	if d.udp {
		offloads |= unix.TUN_F_USO4 | unix.TUN_F_USO6 | tunFUDPTunnelGSO | tunFUDPTunnelGSOCsum
	}
	if err := unix.IoctlSetInt(d.fd, unix.TUNSETOFFLOAD, offloads); err != nil {
		return errors.Join(errNoSuperFrames, err)
	}
	if d.link, err = netlink.LinkByName(names.SuperFrame); err != nil {
		return err
	}
	// Disable IPv6 addresses and ARP: the kernel's own frames would go to the uplink.
	const none = 1 // IN6_ADDR_GEN_MODE_NONE
	if err := netlink.LinkSetIP6AddrGenMode(d.link, none); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("turning IPv6 addresses off: %w", err)
	}
	if err := netlink.LinkSetARPOff(d.link); err != nil {
		return err
	}
	return netlink.LinkSetUp(d.link)
}

// redirect installs the filter that redirects the device's frames to the uplink, if it
// is not in place.
func (d *superDevice) redirect(uplink int) error {
	parent := uint32(netlink.HANDLE_MIN_INGRESS)
	filters, err := netlink.FilterList(d.link, parent)
	if err == nil && slices.ContainsFunc(filters, func(f netlink.Filter) bool { return d.redirects(f, uplink) }) {
		return nil
	}
	for _, f := range filters {
		if err := netlink.FilterDel(f); err != nil {
			return fmt.Errorf("removing a filter of %s: %w", names.SuperFrame, err)
		}
	}
	index := d.link.Attrs().Index
	if err := host.AddClsact(d.link); err != nil {
		return err
	}
	filter, err := d.filter(uplink, netlink.FilterAttrs{LinkIndex: index, Parent: parent, Priority: 1, Protocol: unix.ETH_P_ALL})
	if err != nil {
		return err
	}
	if err := netlink.FilterAdd(filter); err != nil {
		return fmt.Errorf("redirecting %s to the uplink: %w", names.SuperFrame, err)
	}
	return nil
}

// filter returns the redirecting filter. For UDP it is u32 with mirred, which needs
// no capability for eBPF.
func (d *superDevice) filter(uplink int, at netlink.FilterAttrs) (netlink.Filter, error) {
	if d.udp {
		return &netlink.U32{ // more widely available than matchall
			FilterAttrs: at,
			Sel:         &netlink.TcU32Sel{Flags: netlink.TC_U32_TERMINAL, Nkeys: 1, Keys: []netlink.TcU32Key{{}}},
			Actions:     []netlink.Action{netlink.NewMirredAction(uplink)},
		}, nil
	}
	if d.marker == nil || d.to != uplink {
		marker, err := loadMarker(uplink)
		if err != nil {
			return nil, err
		}
		if d.marker != nil {
			_ = d.marker.Close()
		}
		d.marker, d.to = marker, uplink
	}
	return &netlink.BpfFilter{FilterAttrs: at, Fd: d.marker.FD(), Name: "culvert_ipip", DirectAction: true}, nil
}

func (d *superDevice) redirects(f netlink.Filter, uplink int) bool {
	switch f := f.(type) {
	case *netlink.U32:
		if len(f.Actions) != 1 {
			return false
		}
		a, ok := f.Actions[0].(*netlink.MirredAction)
		return ok && a.Ifindex == uplink && a.MirredAction == netlink.TCA_EGRESS_REDIR
	case *netlink.BpfFilter:
		return d.to == uplink // no other program attaches filters to this device
	}
	return false
}

func (d *superDevice) close() error {
	var err error
	if d.marker != nil {
		err = d.marker.Close()
	}
	return errors.Join(err, unix.Close(d.fd))
}
