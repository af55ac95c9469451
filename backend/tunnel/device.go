package tunnel

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"culvert/encap"
)

// device is a TUN device with a virtio header before every frame.
type device struct {
	queues  []int  // a descriptor for each
	threads int    // that serve them
	noMore  string // why there is only one where more were asked for
	sparse  bool   // each thread has two, one of them for sparse flows
	// noSparse is why not.
	noSparse string
	spread   bool   // flows have places by the kernel's own hash: see unsteeredQueues
	moves    []byte // a page: see steer; nil if there are none
	uso      bool   // the kernel takes and gives UDP frames to be cut (Linux 6.2)
}

// deviceSize is what a TUN device is to have: a thread for each queue, or for each
// pair of queues where sparse flows get one of their own.
type deviceSize struct {
	threads int
	sparse  bool
}

// openDevice makes a TUN device of a size, or of a smaller one if flows cannot be
// steered.
func openDevice(name string, mtu int, size deviceSize, log *slog.Logger) (*device, error) {
	d := &device{threads: size.threads, sparse: size.sparse}
	var err error
	if d.sparse {
		if err := makeRoom(name, true); err != nil {
			return nil, err
		}
		err = d.openMany(name, 2*d.threads)
		if errors.Is(err, errNotSteered) {
			log.Info("sparse flows have no queue of their own", "reason", err)
			d.unsteered(err)
			err = d.attach(name, max(0, unsteeredQueues-len(d.queues)))
		}
	}
	if len(d.queues) == 0 && err == nil {
		if err := makeRoom(name, d.threads > 1); err != nil {
			return nil, err
		}
	}
	if len(d.queues) == 0 && d.threads > 1 && err == nil {
		err = d.openMany(name, d.threads)
		if errors.Is(err, errNotSteered) {
			log.Warn("the tunnel device has one queue", "reason", err)
			d.noMore = err.Error()
			err = d.close()
			d.queues, d.threads = nil, 1
			if err == nil {
				err = makeRoom(name, false)
			}
		}
	}
	if len(d.queues) == 0 && d.threads == 1 && err == nil {
		err = d.openOne(name, mtu)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = fmt.Errorf("/dev/net/tun is missing (`modprobe tun`, or pass the device into the container): %w", err)
	case errors.Is(err, fs.ErrPermission):
		err = fmt.Errorf("making a TUN device needs root, or CAP_NET_ADMIN: %w", err)
	case errors.Is(err, unix.EBUSY):
		err = fmt.Errorf("the device %s is in use: is another culvert running here?: %w", name, err)
	case err != nil:
		err = fmt.Errorf("making the TUN device %s: %w", name, err)
	}
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	if err := errors.Join(d.offloads(name), d.persist()); err != nil {
		return nil, errors.Join(err, d.close())
	}
	log.Debug("device opened", "device", name, "queues", len(d.queues), "uso", d.uso)
	return d, nil
}

// makeRoom removes a device that an earlier run left, if it cannot be opened
// with one queue or with several, as is wanted now.
func makeRoom(name string, many bool) error {
	link, err := netlink.LinkByName(name)
	if left, ok := link.(*netlink.Tuntap); err != nil || !ok || left.Flags&netlink.TUNTAP_MULTI_QUEUE != 0 == many {
		return nil
	}
	if err := netlink.LinkDel(link); err != nil {
		return fmt.Errorf("removing the TUN device %s that an earlier run left: %w", name, err)
	}
	return nil
}

// openOne makes the device through wireguard's package, which asks for the
// virtio header. That package's own Read and Write cut and copy, so only the
// descriptor is kept of it.
func (d *device) openOne(name string, mtu int) error {
	t, err := tun.CreateTUN(name, mtu)
	if err != nil {
		return err
	}
	go func() {
		for range t.Events() { // the package insists on telling, until it is closed
		}
	}()
	fd, err := detach(t.File())
	if err == nil {
		d.queues = append(d.queues, fd)
	}
	// The rest of it only listens for changes of the link, and may have ended by
	// itself, which Close would call an error.
	_ = t.Close()
	return err
}

// errNotSteered says that flows would not stay on their queues.
var errNotSteered = errors.New("flows cannot be steered to queues")

// openMany makes the device with several queues, which that package does not
// know.
func (d *device) openMany(name string, queues int) error {
	if err := d.attach(name, queues); err != nil {
		return err
	}
	return d.steer()
}

// unsteeredQueues is how many queues there are where no program may steer flows to
// them. One thread serves them in turns, so that a request waits for what one turn
// sends, unless its flow and a bulk stream share a queue.
//
// The kernel puts a flow into the queue that its answers were written to, or, before
// there are any, by its hash. So the loop writes a flow's to one queue
// (encap.Options.Spread), and a flow changes its queue once, with the first answer.
const unsteeredQueues = 8

// unsteered has one thread serve all queues.
func (d *device) unsteered(why error) {
	d.noSparse = fmt.Sprintf("%v; flows share %d queues by their hash", why, max(unsteeredQueues, len(d.queues)))
	if d.threads > 1 {
		d.noMore = why.Error()
	}
	d.threads, d.sparse, d.spread = 1, false, true
}

// attach opens further queues.
func (d *device) attach(name string, queues int) error {
	for range queues {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		d.queues = append(d.queues, fd)
		request, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
			return fmt.Errorf("TUNSETIFF: %w", err)
		}
	}
	return nil
}

// steer has the kernel choose queues by flow.
func (d *device) steer() (err error) {
	if d.moves, err = steer(d.queues[0], d.threads, d.sparse); err != nil {
		return fmt.Errorf("%w: %w", errNotSteered, err)
	}
	return nil
}

// counted is what moves counts, for encap.Options.
func (d *device) counted() *atomic.Uint64 {
	if d.moves == nil {
		return nil
	}
	return (*atomic.Uint64)(unsafe.Pointer(&d.moves[0]))
}

// offloads asks for what the loop can do.
func (d *device) offloads(name string) error {
	const tcp = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	d.uso = d.setOffload(tcp|unix.TUN_F_USO4|unix.TUN_F_USO6) == nil
	if d.uso {
		return nil
	}
	if err := d.setOffload(tcp); err != nil {
		return fmt.Errorf("setting the offloads of %s: %w", name, err)
	}
	return nil
}

func (d *device) setOffload(flags int) error {
	return unix.IoctlSetInt(d.queues[0], unix.TUNSETOFFLOAD, flags) // of all queues
}

func (d *device) close() error {
	var errs []error
	for _, fd := range d.queues {
		errs = append(errs, unix.Close(fd))
	}
	if d.moves != nil {
		errs = append(errs, unix.Munmap(d.moves))
		d.moves = nil
	}
	return errors.Join(errs...)
}

// detach returns a descriptor of what c has open, which the runtime's poller
// does not watch, and closes c. The caller closes the descriptor.
func detach(c interface {
	syscall.Conn
	io.Closer
},
) (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, errors.Join(err, c.Close())
	}
	var failure error
	err = raw.Control(func(d uintptr) { fd, failure = unix.FcntlInt(d, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(err, failure, c.Close()); err != nil {
		return -1, err
	}
	return fd, nil
}

// gsoMaxSegments is the most that the loop cuts a frame into. A frame that asks
// for more, of tiny segments, is cut by the kernel before it reaches the
// device. The kernel's limit in bytes stays at its 64 KB: were it lower, what a
// pod sends through its own 64 KB interface would be cut in full on its way
// here, instead of leaving in two messages of one call.
const gsoMaxSegments = encap.MaxFrameSegments
