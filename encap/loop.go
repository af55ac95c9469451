package encap

import (
	"context"
	"errors"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
)

// Descriptor is an open file that does not block, and that the runtime's poller
// does not watch: the loop waits for it by itself, and would the poller watch
// it too, every packet would wake a thread more. The zero Descriptor is none.
type Descriptor struct{ above int }

// NewDescriptor returns the Descriptor of fd.
func NewDescriptor(fd int) Descriptor { return Descriptor{fd + 1} }

// FD returns the number, or -1 if there is none.
func (d Descriptor) FD() int { return d.above - 1 }

// Format is a wire format.
type Format uint8

// The wire formats.
const (
	FormatVXLAN Format = iota // RFC 7348
	FormatIPIP                // RFC 2003: IPv4 in IPv4 alone
)

// Underlay is the sockets of one underlay address family, and what a datagram
// must bear to be meant for this node. The zero Underlay is a family that is
// not used.
type Underlay struct {
	// Receive is a socket for each thread. For VXLAN they are UDP sockets bound
	// to this node's address and the VXLAN port, for IPIP packet sockets with
	// PACKET_VNET_HDR, which give every IPv4 packet of protocol 4, and before it
	// the link's own header, of LinkHeader bytes.
	Receive    []Descriptor
	LinkHeader int
	// Send are the sockets to send from, a flow always from the same one, at
	// most 16: for VXLAN UDP sockets of different source ports, for IPIP one raw
	// socket.
	Send []Source
	// Fragment is a UDP socket to send from whose datagrams are fragmented, where
	// those of Send bear DF, for peers whose path is narrower than the least that
	// pods can be told. May be none.
	Fragment Source

	VNI uint32 // 24 bits
	MAC [6]byte
}

// Source is a socket to send from, and its UDP port, if it has one.
type Source struct {
	Socket Descriptor
	Port   uint16
}

// Offload says which of the kernel's batching mechanisms the loop uses. The
// loop itself does without one for a while with a peer for which the kernel
// refuses it.
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
	Format Format
	// Devices are the queues of one TUN device with IFF_VNET_HDR and a header of
	// 10 bytes. Each of Threads goroutines serves every Threads-th of them in turn,
	// so that what waits in one does not wait for all of another; with 0 each has
	// its own.
	Devices []Descriptor
	Threads int
	// Moves counts the flows that the kernel has begun to put into the second queue
	// of their thread, instead of the first one; it counts before it does so. What the
	// first one holds of a flow is then sent before what the second one does. Nil
	// where flows do not move.
	Moves *atomic.Uint64
	// Super is a TAP device with IFF_VNET_HDR and a header of 24 bytes, of which
	// every frame is redirected to the uplink: for VXLAN with
	// TUN_F_UDP_TUNNEL_GSO, for IPIP by a program that tells the kernel of the
	// outer header. It is never read. May be none.
	Super Descriptor
	MTU   int // of the device, bytes
	IPv4  Underlay
	IPv6  Underlay
	// CopyDSCP has the outer header bear the inner one's DSCP (RFC 2983, the
	// uniform model, outwards alone); else it is 0.
	CopyDSCP bool
	// NoBusyPoll has threads sleep as soon as there is nothing to carry.
	NoBusyPoll bool
	// DontFragment says that the sockets set DF, so that large frames must, too.
	DontFragment bool
	Offload      *Offload
	Egress       *Counters
	Ingress      *Counters
}

// Loop carries packets between one device and the underlay.
type Loop struct {
	options Options
	common
}

// common is what all directions of a loop look at.
type common struct {
	table    atomic.Pointer[Table]
	offload  *Offload
	format   Format
	stopping atomic.Bool // the context has ended
}

// NewLoop returns a loop with an empty table: it drops everything until
// SetTable.
func NewLoop(o Options) *Loop {
	l := &Loop{options: o, common: common{offload: o.Offload, format: o.Format}}
	l.table.Store(NewTable(nil, nil))
	return l
}

// SetTable makes the loop use t from the next packet on. It may be called at
// any time.
func (l *Loop) SetTable(t *Table) {
	old := l.table.Load()
	t.inheritPaths(old)
	t.count(l.options.threads(), old)
	l.table.Store(t)
}

// Table returns the table in use.
func (l *Loop) Table() *Table { return l.table.Load() }

// Run carries packets until ctx ends (nil) or a descriptor fails. Packets that
// the kernel still holds then stay in it.
func (l *Loop) Run(ctx context.Context) error {
	var queues []*queue
	defer func() {
		for _, q := range queues {
			q.close()
		}
	}()
	for i := range l.options.threads() {
		q, err := l.open(i)
		if err != nil {
			return err
		}
		queues = append(queues, q)
	}
	defer reserveProcessors(len(queues))()
	l.stopping.Store(false)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var running sync.WaitGroup
	running.Go(func() {
		<-ctx.Done()
		l.stopping.Store(true)
		for _, q := range queues {
			q.wake()
		}
	})
	for _, q := range queues {
		running.Go(func() { cancel(q.serve()) })
	}
	running.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

func (o *Options) threads() int {
	if o.Threads > 0 {
		return o.Threads
	}
	return len(o.Devices)
}

// open puts the parts of the i-th thread together.
func (l *Loop) open(i int) (*queue, error) {
	o := l.options
	device := uintptr(o.Devices[i].FD())
	var in []*ingress
	for _, u := range []Underlay{o.IPv4, o.IPv6} {
		if len(u.Receive) > 0 {
			g := newIngress(&l.common, device, u.Receive[i], u, o.MTU, o.Ingress)
			g.share.thread = i
			in = append(in, g)
		}
	}
	out := newEgress(&l.common, [2][]Source{o.IPv4.Send, o.IPv6.Send}, o.Egress)
	out.fragmenter = [2]Source{o.IPv4.Fragment, o.IPv6.Fragment}
	out.share.thread = i
	out.super = uintptr(o.Super.FD())
	out.device = device
	if o.Moves != nil && o.threads() < len(o.Devices) {
		out.moves, out.moved = o.Moves, o.Moves.Load()
	}
	out.dontFragment = o.DontFragment
	if o.CopyDSCP {
		out.classes = 0xff
	}
	var devices []uintptr
	for k := i; k < len(o.Devices); k += o.threads() {
		devices = append(devices, uintptr(o.Devices[k].FD()))
	}
	q, err := newQueue(&l.common, devices, out, in)
	if err != nil {
		return nil, err
	}
	if !o.NoBusyPoll {
		q.patience.looking = looking
	}
	if i == 0 {
		q.watchErrors(o)
	}
	return q, nil
}

// reserveProcessors adds n to those that the runtime may use at once, for
// goroutines that keep one while they wait, and returns what takes them away
// again.
func reserveProcessors(n int) (undo func()) {
	processors.Lock()
	defer processors.Unlock()
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + n)
	return func() {
		processors.Lock()
		defer processors.Unlock()
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) - n)
	}
}

// processors keeps loops from changing GOMAXPROCS at once.
var processors sync.Mutex

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
