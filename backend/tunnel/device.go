package tunnel

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"culvert/encap"
)

// device is a TUN device with a virtio header before every frame.
type device struct {
	tun  tun.Device
	file *os.File // the tun's own; its Read and Write are ours alone
	uso  bool     // the kernel takes and gives UDP frames to be cut (Linux 6.2)
}

// openDevice makes a TUN device through wireguard's package, which asks for
// the virtio header and TCP offload. That package's own Read and Write cut and
// copy, so the loop works on the file.
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
	d := &device{tun: t, file: t.File()}
	go func() {
		for range t.Events() { // the package insists on telling
		}
	}()
	raw, err := d.file.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	const tcp = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	d.uso = setOffload(raw, tcp|unix.TUN_F_USO4|unix.TUN_F_USO6) == nil
	if !d.uso {
		if err := setOffload(raw, tcp); err != nil {
			return nil, errors.Join(fmt.Errorf("setting the offloads of %s: %w", name, err), t.Close())
		}
	}
	log.Debug("device opened", "device", name, "uso", d.uso)
	return d, nil
}

func setOffload(raw syscall.RawConn, flags int) error {
	var err error
	if e := raw.Control(func(fd uintptr) { err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, flags) }); e != nil {
		return e
	}
	return err
}

func (d *device) close() error { return d.tun.Close() }

// gsoMaxSegments is the most that the loop cuts a frame into. A frame that asks
// for more, of tiny segments, is cut by the kernel before it reaches the
// device. The kernel's limit in bytes stays at its 64 KB: were it lower, what a
// pod sends through its own 64 KB interface would be cut in full on its way
// here, instead of leaving in two messages of one call.
const gsoMaxSegments = encap.MaxFrameSegments
