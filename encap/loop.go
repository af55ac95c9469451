package encap

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Conn is an open file that the runtime can wait for: *os.File for the device,
// *net.UDPConn for the underlay.
type Conn interface {
	syscall.Conn
	SetDeadline(t time.Time) error
}

// Underlay is the socket of one underlay address family, and what a datagram
// must bear to be meant for this node.
type Underlay struct {
	Socket Conn   // UDP, bound to this node's address and the VXLAN port
	VNI    uint32 // 24 bits
	MAC    [6]byte
}

// Offload says which of the kernel's batching mechanisms the loop uses. The
// loop itself turns one off when the kernel refuses it.
type Offload struct {
	GSO atomic.Bool // send many datagrams in one call (UDP_SEGMENT)
	GRO atomic.Bool // write many packets of a flow to the device as one frame
	USO atomic.Bool // the same for UDP, which the device must know (Linux 6.2)

	// SuperFrame sends large frames whole to peers with a next hop. Whoever
	// watches the uplink turns it on and off; there must be a Super device.
	SuperFrame atomic.Bool
}

// Options is what a Loop is made of. All fields are required unless they say
// otherwise; the loop borrows the descriptors until Run has returned.
type Options struct {
	Device Conn // a TUN device with IFF_VNET_HDR and a header of 10 bytes
	// Super is a TAP device with IFF_VNET_HDR, a header of 24 bytes and
	// TUN_F_UDP_TUNNEL_GSO, of which every frame is redirected to the uplink.
	// It is never read. May be nil.
	Super   Conn
	MTU     int // of the device, bytes
	IPv4    Underlay
	IPv6    Underlay // either may have no socket, where the family is not used
	Offload *Offload
	Egress  *Counters
	Ingress *Counters
}

// Loop carries packets between one device and the underlay.
type Loop struct {
	options Options
	table   atomic.Pointer[Table]
}

// NewLoop returns a loop with an empty table: it drops everything until
// SetTable.
func NewLoop(o Options) *Loop {
	l := &Loop{options: o}
	l.table.Store(NewTable(nil, nil))
	return l
}

// SetTable makes the loop use t from the next packet on. It may be called at
// any time.
func (l *Loop) SetTable(t *Table) { l.table.Store(t) }

// Table returns the table in use.
func (l *Loop) Table() *Table { return l.table.Load() }

// Run carries packets until ctx ends (nil) or a descriptor fails. Packets that
// the kernel still holds then stay in it.
func (l *Loop) Run(ctx context.Context) error {
	device, err := l.options.Device.SyscallConn()
	if err != nil {
		return fmt.Errorf("the tunnel device: %w", err)
	}
	conns := []Conn{l.options.Device}
	var sockets [2]syscall.RawConn
	for i, u := range []Underlay{l.options.IPv4, l.options.IPv6} {
		if u.Socket == nil {
			continue
		}
		conns = append(conns, u.Socket)
		if sockets[i], err = u.Socket.SyscallConn(); err != nil {
			return fmt.Errorf("the underlay socket: %w", err)
		}
	}

	ctx, cancel := context.WithCancelCause(ctx)
	var running sync.WaitGroup
	running.Go(func() {
		<-ctx.Done()
		setDeadlines(conns, time.Unix(1, 0)) // wakes every direction that waits
	})
	defer setDeadlines(conns, time.Time{})
	start := func(run func() error) {
		running.Go(func() {
			err := run()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = nil
			}
			cancel(err)
		})
	}
	out := newEgress(&l.table, sockets, l.options.Offload, l.options.Egress)
	if l.options.Super != nil {
		super, err := l.options.Super.SyscallConn()
		if err == nil {
			err = super.Control(func(fd uintptr) { out.super = fd })
		}
		if err != nil {
			cancel(fmt.Errorf("the device for super-frames: %w", err))
		}
	}
	start(func() error { return out.run(device) })
	for i, u := range []Underlay{l.options.IPv4, l.options.IPv6} {
		if sockets[i] == nil {
			continue
		}
		in, err := l.newIngress(device, u)
		if err != nil {
			cancel(err)
			break
		}
		start(func() error { return in.run(sockets[i]) })
	}
	running.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

func (l *Loop) newIngress(device syscall.RawConn, u Underlay) (*ingress, error) {
	var fd uintptr
	if err := device.Control(func(d uintptr) { fd = d }); err != nil {
		return nil, fmt.Errorf("the tunnel device: %w", err)
	}
	return newIngress(&l.table, fd, u, l.options.MTU, l.options.Offload, l.options.Ingress), nil
}

func setDeadlines(conns []Conn, t time.Time) {
	for _, c := range conns {
		// A closed descriptor has woken its reader already.
		_ = c.SetDeadline(t)
	}
}

// PeerTo returns the VXLAN peer that leases subnet: its datagrams go to
// underlay with the given VNI and Ethernet addresses.
func PeerTo(subnet netip.Prefix, underlay netip.AddrPort, vni uint32, destination, source [6]byte) *Peer {
	h := VXLAN{VNI: vni, Destination: destination, Source: source, EtherType: etherTypeIPv4}
	if !subnet.Addr().Is4() {
		h.EtherType = etherTypeIPv6
	}
	header := make([]byte, VXLANHeaderLen)
	h.Put(header)
	return NewPeer(subnet, underlay, header)
}
