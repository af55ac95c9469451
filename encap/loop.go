package encap

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Descriptor is a non-blocking file descriptor that the Go runtime's poller does
// not watch: the loop polls it itself, and a second watcher would wake another
// thread for every packet. The zero Descriptor is none.
type Descriptor struct{ above int }

// NewDescriptor returns the Descriptor for fd.
func NewDescriptor(fd int) Descriptor { return Descriptor{fd + 1} }

// FD returns the number, or -1 if there is none.
func (d Descriptor) FD() int { return d.above - 1 }

// Underlay is the sockets of one underlay address family, and how this node is
// identified in packets for it. The zero Underlay is an unused family.
type Underlay struct {
	// Receive has one socket per thread. If the format's packets are UDP datagrams they
	// are UDP sockets bound to this node's address and the format's port; otherwise packet
	// sockets with PACKET_VNET_HDR that receive IPv4 packets of the format's protocol,
	// each preceded by the link-layer header of LinkHeader bytes.
	Receive    []Descriptor
	LinkHeader int
	// Send are the sockets to send from, at most 16; a flow always uses the same
	// one: UDP sockets with different source ports, or one raw socket.
	Send []Source
	// Fragment is a UDP socket whose datagrams may be fragmented, if those of Send
	// set DF. It serves peers whose path MTU is below the minimum that pods can be
	// told. May be none.
	Fragment Source

	Self VTEP
}

// Source is a socket to send from, and its UDP port, if it has one.
type Source struct {
	Socket Descriptor
	Port   uint16
}

// Offload enables the kernel's batching mechanisms for the whole loop. If the
// kernel rejects one for a peer, the loop suspends it for that peer for a while.
type Offload struct {
	GSO atomic.Bool // send many datagrams in one call (UDP_SEGMENT)
	GRO atomic.Bool // write many packets of a flow to the device as one frame
	USO atomic.Bool // the same for UDP, if the device supports it (Linux 6.2)

	// SuperFrame sends large frames whole to peers with a next hop. It requires a
	// Super device. The uplink's watcher sets it; the loop clears it if the device
	// fails.
	SuperFrame atomic.Bool
}

// Options configures a Loop. Fields are required unless they say otherwise. The
// loop borrows the descriptors until Run returns.
type Options struct {
	Format Format
	// Devices are the queues of one TUN device with IFF_VNET_HDR and a 10-byte
	// header. Each of Threads goroutines serves every Threads-th queue, a bounded
	// turn at a time, so that a busy queue does not starve another. With 0 each
	// queue has its own goroutine.
	Devices []Descriptor
	Threads int
	// Steering is shared with the program that moves flows from a thread's first queue to
	// another and back. The first queue is served before each turn of another. Nil if
	// flows do not move: all queues are equal then.
	Steering *Steering
	// Spread writes each flow's packets to one of its thread's queues, selected by the
	// flow hash. Without a steering program, the kernel puts a flow into the queue to
	// which its other direction's packets were written.
	Spread bool
	// Super is a TAP device with IFF_VNET_HDR and a 24-byte header whose frames
	// are redirected to the uplink: for UDP with TUN_F_UDP_TUNNEL_GSO, otherwise by a
	// program that tells the kernel about the outer header. It is never read. May be
	// none.
	Super Descriptor
	MTU   int // of the device, bytes
	IPv4  Underlay
	IPv6  Underlay
	// CopyDSCP copies the inner DSCP to the outer header (RFC 2983, the uniform
	// model, on encapsulation only); otherwise the outer DSCP is 0.
	CopyDSCP bool
	// NoBusyPoll disables adaptive busy polling.
	NoBusyPoll bool
	// DontFragment says that the UDP sockets set DF; super-frames then set it too. Raw
	// sockets always do.
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

// common is the state that both directions of all threads share.
type common struct {
	table    atomic.Pointer[Table]
	offload  *Offload
	format   Format
	udp      bool        // the format's packets are UDP datagrams
	header   int         // the format's HeaderLen
	stopping atomic.Bool // Run is ending
}

func (c *common) init(f Format, o *Offload) {
	c.format, c.offload, c.udp, c.header = f, o, overUDP(f), f.HeaderLen()
	c.table.Store(NewTable(nil, nil))
}

// NewLoop returns a loop with an empty table: it drops everything until
// SetTable.
func NewLoop(o Options) *Loop {
	l := &Loop{options: o}
	l.init(o.Format, o.Offload)
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

// Run carries packets until ctx ends (it returns nil) or a descriptor fails.
// Packets still queued in the kernel stay there.
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

// open builds the i-th thread's queue.
func (l *Loop) open(i int) (*queue, error) {
	o := l.options
	var devices []device
	for k := i; k < len(o.Devices); k += o.threads() {
		devices = append(devices, tun(o.Devices[k].FD()))
	}
	slab, err := unix.Mmap(-1, 0, recvSlabLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("allocating receive buffers: %w", err)
	}
	batch := newRecvBatch(slab)
	var in []*ingress
	for _, u := range []Underlay{o.IPv4, o.IPv6} {
		if len(u.Receive) > 0 {
			g := newIngress(&l.common, devices[0], inet(u.Receive[i].FD()), batch, u, o.MTU, o.Ingress)
			g.share.thread = i
			if o.Spread {
				g.spread = devices
			}
			in = append(in, g)
		}
	}
	out := newEgress(&l.common, [2][]source{sourcesOf(o.IPv4.Send), sourcesOf(o.IPv6.Send)}, o.Egress)
	out.fragmenter = [2]source{sourceOf(o.IPv4.Fragment), sourceOf(o.IPv6.Fragment)}
	out.share.thread = i
	if o.Super.FD() >= 0 {
		out.super = tun(o.Super.FD())
	}
	out.device = devices[0]
	steered := o.Steering != nil && o.threads() < len(o.Devices)
	if steered {
		// Flows may have moved before: the first queue is drained first.
		out.moves, out.moved = &o.Steering.Moves, o.Steering.Moves.Load()-1
	}
	out.dontFragment = o.DontFragment || !l.udp
	if o.CopyDSCP {
		out.classes = 0xff
	}
	var quiet []socket // of all threads, the first watches the send-only sockets
	if i == 0 {
		quiet = sendOnly(o)
	}
	q, err := newQueue(&l.common, devices, out, in, quiet)
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(slab))
	}
	q.slab = slab
	if steered {
		for k := range devices {
			if at := i + k*o.threads(); at < SteeredQueues {
				q.turns = append(q.turns, &o.Steering.Turns[at])
			}
		}
	}
	if !o.NoBusyPoll {
		q.poller.limit = pollTime
	}
	return q, nil
}

// reserveProcessors raises GOMAXPROCS by n, since each queue's goroutine keeps
// its P while it waits in a raw system call. undo lowers it again.
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

// processors serializes changes of GOMAXPROCS by several loops.
var processors sync.Mutex
