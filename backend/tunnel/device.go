package tunnel

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"syscall"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"culvert/encap"
	"culvert/internal/host"
	"culvert/internal/remedy"
)

// device is a TUN device with a virtio header before every frame.
type device struct {
	queues  []int  // descriptors
	threads int    // that serve the queues
	noMore  string // why there is one thread although more were requested
	sparse  bool   // each thread has several queues, the first for sparse flows: see lanes
	// noSparse is why sparse is false.
	noSparse string
	spread   bool          // the kernel's hash places flows, not our program: see unsteeredQueues
	steering []byte        // the mapped page of encap.Steering, or nil
	program  *ebpf.Program // that selects the queue, until start attaches it; or nil
	uso      bool          // the device supports UDP GSO frames (Linux 6.2)
}

// deviceSize is the desired size of a TUN device: one queue per thread, or with sparse
// several, the first for sparse flows.
type deviceSize struct {
	threads int
	sparse  bool
}

func (s deviceSize) queues() int {
	if s.sparse {
		return s.threads * lanesFor(s.threads).queues()
	}
	return s.threads
}

// openDevice opens a TUN device of a size, creating it if needed. If flows cannot be
// steered, it has one thread.
func openDevice(name string, mtu int, size deviceSize, log *slog.Logger) (*device, error) {
	d := &device{threads: size.threads, sparse: size.sparse}
	var err error
	if d.sparse {
		if err := makeRoom(name, true); err != nil {
			return nil, err
		}
		err = d.openMany(name, size.queues())
		if errors.Is(err, errNotSteered) {
			log.Info("no separate queue for sparse flows", "reason", err)
			err = errors.Join(d.unsteered(err), d.attach(name, unsteeredQueues-len(d.queues)))
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
		err = remedy.Errorf("`modprobe tun`, or pass the device into the container", "/dev/net/tun is missing: %w", err)
	case errors.Is(err, fs.ErrPermission):
		err = remedy.Errorf("run it as root, or with CAP_NET_ADMIN", "making a TUN device: %w", err)
	case errors.Is(err, unix.EBUSY):
		err = remedy.Errorf("stop the other culvert here, or remove the device (`ip link del "+name+"`)", "the device %s is in use: %w", name, err)
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

// makeRoom removes a device that an earlier run left if its multi-queue flag differs
// from the desired one, since it could not be opened.
func makeRoom(name string, many bool) error {
	link, err := netlink.LinkByName(name)
	if left, ok := link.(*netlink.Tuntap); err != nil || !ok || left.Flags&netlink.TUNTAP_MULTI_QUEUE != 0 == many {
		return nil
	}
	// First the fast path's filters, which redirect to the device.
	filters, err := host.Filters()
	for _, f := range filters {
		err = errors.Join(err, host.RemoveFilter(f))
	}
	if err = errors.Join(err, netlink.LinkDel(link)); err != nil {
		return fmt.Errorf("removing the TUN device %s that an earlier run left: %w", name, err)
	}
	return nil
}

// openOne opens the device with one queue through wireguard's package, which requests
// the virtio header. Only the descriptor is kept: the package's Read and Write segment
// and copy.
func (d *device) openOne(name string, mtu int) error {
	t, err := tun.CreateTUN(name, mtu)
	if err != nil {
		return err
	}
	go func() {
		for range t.Events() { // drain: the package blocks otherwise
		}
	}()
	fd, err := detach(t.File())
	if err == nil {
		d.queues = append(d.queues, fd)
	}
	// Ignore the error: the package's link listener may have ended already, which Close
	// reports as an error.
	_ = t.Close()
	return err
}

// errNotSteered means that the steering program could not be loaded or attached.
var errNotSteered = errors.New("flows cannot be steered to queues")

// openMany opens the device with several queues, which wireguard's package does not
// support.
func (d *device) openMany(name string, queues int) error {
	if err := d.attach(name, queues); err != nil {
		return err
	}
	if err := d.steer(); err != nil {
		return err
	}
	if err := d.start(); err != nil {
		return errors.Join(fmt.Errorf("%w: %w", errNotSteered, err), d.unload())
	}
	return nil
}

// unsteeredQueues is the number of queues if no steering program can be loaded. One
// thread serves them in turns, so that a request waits only for the other queues' turns,
// unless its flow shares a queue with a bulk stream.
//
// The kernel puts a flow into the queue to which its replies were written, or by its
// hash if there are none yet. So the loop writes a flow's packets to one queue
// (encap.Options.Spread), and a flow changes its queue once, with the first reply.
const unsteeredQueues = 8

// unsteered makes one thread serve all queues, of which it closes those beyond
// unsteeredQueues.
func (d *device) unsteered(why error) error {
	d.noSparse = fmt.Sprintf("%v; flows share %d queues by their hash", why, unsteeredQueues)
	if d.threads > 1 {
		d.noMore = why.Error()
	}
	d.threads, d.sparse, d.spread = 1, false, true
	// A persistent device keeps the program that an earlier daemon attached.
	errs := []error{unix.IoctlSetPointerInt(d.queues[0], unix.TUNSETSTEERINGEBPF, -1)}
	for len(d.queues) > unsteeredQueues {
		last := len(d.queues) - 1
		errs = append(errs, unix.Close(d.queues[last]))
		d.queues = d.queues[:last]
	}
	return errors.Join(errs...)
}

// attach opens more queues.
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

// steer loads the steering program, which start attaches.
func (d *device) steer() (err error) {
	// An invalid descriptor: the ioctl changes nothing, and says whether the kernel has it.
	const invalid = -2
	if err := unix.IoctlSetPointerInt(d.queues[0], unix.TUNSETSTEERINGEBPF, invalid); !errors.Is(err, unix.EBADF) {
		return fmt.Errorf("%w: TUNSETSTEERINGEBPF: %w", errNotSteered, err)
	}
	if d.program, d.steering, err = steer(d.threads, d.sparse); err != nil {
		return fmt.Errorf("%w: %w", errNotSteered, err)
	}
	return nil
}

// start attaches the steering program, if that was not done yet. A successor calls it when
// the predecessor has stopped, whose loop does not see this program's page.
func (d *device) start() error {
	if d.program == nil {
		return nil
	}
	err := unix.IoctlSetPointerInt(d.queues[0], unix.TUNSETSTEERINGEBPF, d.program.FD())
	if err != nil {
		err = fmt.Errorf("TUNSETSTEERINGEBPF: %w", err)
	}
	err = errors.Join(err, d.program.Close()) // the device keeps it
	d.program = nil
	return err
}

// steered returns what the loop shares with the program that steers flows, or nil.
func (d *device) steered() *encap.Steering {
	if d.steering == nil {
		return nil
	}
	return (*encap.Steering)(unsafe.Pointer(&d.steering[0]))
}

// offloads enables the offloads that the loop supports, USO only if the kernel does.
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
	return unix.IoctlSetInt(d.queues[0], unix.TUNSETOFFLOAD, flags) // applies to all queues
}

func (d *device) close() error {
	var errs []error
	for _, fd := range d.queues {
		errs = append(errs, unix.Close(fd))
	}
	return errors.Join(append(errs, d.unload())...)
}

// unload undoes steer, without detaching the program.
func (d *device) unload() error {
	var errs []error
	if d.program != nil {
		errs = append(errs, d.program.Close())
	}
	if d.steering != nil {
		errs = append(errs, unix.Munmap(d.steering))
	}
	d.program, d.steering = nil, nil
	return errors.Join(errs...)
}

// detach returns a duplicate of c's descriptor, which the Go runtime's poller does not
// watch, and closes c. The caller closes the descriptor.
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

// gsoMaxSegments is the device's gso_max_segs, the maximum that the loop cuts a frame
// into: the kernel segments frames with more before they reach the device. gso_max_size
// stays at 64 KB: with a lower limit the kernel would segment a pod's 64 KB frame
// entirely, while the loop sends it in two messages of one call.
const gsoMaxSegments = encap.MaxFrameSegments
