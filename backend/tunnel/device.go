package tunnel

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"culvert/encap"
)

// device is a TUN device with a virtio header before every frame.
type device struct {
	fd  int
	uso bool // the kernel takes and gives UDP frames to be cut (Linux 6.2)
}

// openDevice makes a TUN device through wireguard's package, which asks for
// the virtio header and TCP offload. That package's own Read and Write cut and
// copy, so only the descriptor is kept of it.
func openDevice(name string, mtu int, log *slog.Logger) (*device, error) {
	t, err := tun.CreateTUN(name, mtu)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("/dev/net/tun is missing (`modprobe tun`, or pass the device into the container): %w", err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("making a TUN device needs root, or CAP_NET_ADMIN: %w", err)
	case errors.Is(err, unix.EBUSY):
		return nil, fmt.Errorf("the device %s is in use: is another culvert running here?: %w", name, err)
	case err != nil:
		return nil, fmt.Errorf("making the TUN device %s: %w", name, err)
	}
	go func() {
		for range t.Events() { // the package insists on telling, until it is closed
		}
	}()
	d := &device{}
	d.fd, err = detach(t.File())
	// The rest of it only listens for changes of the link.
	if err := errors.Join(err, ignoreClosed(t.Close())); err != nil {
		return nil, fmt.Errorf("taking over the TUN device %s: %w", name, err)
	}
	if err := errors.Join(d.offloads(name), d.persist()); err != nil {
		return nil, err
	}
	log.Debug("device opened", "device", name, "uso", d.uso)
	return d, nil
}

// offloads asks for what the loop can do. It closes the device on error.
func (d *device) offloads(name string) error {
	const tcp = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	d.uso = setOffload(d.fd, tcp|unix.TUN_F_USO4|unix.TUN_F_USO6) == nil
	if d.uso {
		return nil
	}
	if err := setOffload(d.fd, tcp); err != nil {
		return errors.Join(fmt.Errorf("setting the offloads of %s: %w", name, err), d.close())
	}
	return nil
}

func setOffload(fd, flags int) error { return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, flags) }

func (d *device) close() error { return unix.Close(d.fd) }

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

func ignoreClosed(err error) error {
	if errors.Is(err, fs.ErrClosed) {
		return nil
	}
	return err
}

// gsoMaxSegments is the most that the loop cuts a frame into. A frame that asks
// for more, of tiny segments, is cut by the kernel before it reaches the
// device. The kernel's limit in bytes stays at its 64 KB: were it lower, what a
// pod sends through its own 64 KB interface would be cut in full on its way
// here, instead of leaving in two messages of one call.
const gsoMaxSegments = encap.MaxFrameSegments
