package tunnel

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// A tunnel is handed over by its open descriptors. Until the successor reads them, the
// kernel queues arriving packets: 500 in the device, and the socket buffers. So a
// quick successor loses nothing. A process that is killed loses what it had read and not
// sent yet.
//
//	predecessor ── Descriptors ──┬─ systemd's store ──────┬─ Options.Inherited ── successor
//	                             └─ internal/handover ────┘
//
// The device is persistent, with its addresses and routes: a successor without its
// descriptor opens it by name.

// Descriptors returns the descriptors that a successor needs. The Tunnel still owns
// them.
func (t *Tunnel) Descriptors() []int {
	all := append([]int(nil), t.sockets...)
	if t.device != nil {
		all = append(all, t.device.queues...)
	}
	if t.super != nil {
		all = append(all, t.super.fd)
	}
	return all
}

// inherited holds a predecessor's descriptors that are not claimed yet.
type inherited struct{ fds []int }

// claim removes and returns the first descriptor for which is returns true. The caller
// then owns it.
func (i *inherited) claim(is func(fd int) bool) (fd int, ok bool) {
	for k, fd := range i.fds {
		if is(fd) {
			i.fds = append(i.fds[:k:k], i.fds[k+1:]...)
			return fd, true
		}
	}
	return -1, false
}

// socket claims the socket of a type (SOCK_DGRAM, SOCK_RAW) that is bound to an
// address. The port is ignored for a raw IPv4 socket.
func (i *inherited) socket(kind int, at netip.AddrPort) (fd int, ok bool) {
	return i.claim(func(fd int) bool {
		k, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
		if err != nil || k != kind {
			return false
		}
		name, err := unix.Getsockname(fd)
		if err != nil {
			return false
		}
		switch a := name.(type) {
		case *unix.SockaddrInet4:
			return at.Addr().Is4() && a.Addr == at.Addr().As4() && (kind == unix.SOCK_RAW || a.Port == int(at.Port()))
		case *unix.SockaddrInet6:
			return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port)) == at
		}
		return false
	})
}

// packets claims the packet socket that is bound to a link.
func (i *inherited) packets(link int) (fd int, ok bool) {
	return i.claim(func(fd int) bool {
		name, err := unix.Getsockname(fd)
		a, is := name.(*unix.SockaddrLinklayer)
		return err == nil && is && a.Ifindex == link
	})
}

// device claims the descriptor of the TUN or TAP device with a name. A device that was
// removed meanwhile has no name.
func (i *inherited) device(name string) (fd int, ok bool) {
	return i.claim(func(fd int) bool {
		request, err := unix.NewIfreq("")
		if err != nil {
			return false
		}
		return unix.IoctlIfreq(fd, unix.TUNGETIFF, request) == nil && strings.TrimRight(request.Name(), "\x00") == name
	})
}

// openDevice claims the predecessor's device if its number of queues fits, or opens it
// anew. An earlier version's has two queues for each thread: it gets more.
func (i *inherited) openDevice(name string, mtu int, size deviceSize, log *slog.Logger) (*device, error) {
	d := &device{threads: size.threads, sparse: size.sparse}
	for fd, ok := i.device(name); ok; fd, ok = i.device(name) {
		d.queues = append(d.queues, fd)
	}
	n := len(d.queues)
	hasLanes := size.sparse && (n == size.queues() || n == 2*size.threads)
	isUnsteered := size.sparse && n == unsteeredQueues // the predecessor had no steering program
	if !hasLanes && !isUnsteered && n != size.threads {
		if err := d.close(); err != nil {
			return nil, err
		}
		return openDevice(name, mtu, size, log)
	}
	err := d.offloads(name)
	if hasLanes {
		err = errors.Join(err, d.attach(name, size.queues()-n))
	} else if size.sparse {
		d.sparse, d.noSparse = false, "the device is an earlier version's"
	}
	// The attached program may be another version's: start replaces it.
	switch {
	case err != nil:
	case isUnsteered && !hasLanes:
		err = d.unsteered(errNotSteered)
	case len(d.queues) > 1:
		why := d.steer()
		if why != nil && hasLanes {
			log.Info("no separate queue for sparse flows", "reason", why)
			err = d.unsteered(why)
		} else if why != nil {
			log.Warn("cannot change how flows are steered", "reason", why)
		}
	}
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	log.Info("device taken over", "device", name, "queues", len(d.queues), "uso", d.uso)
	return d, nil
}

// listenUDP claims the predecessor's socket, or opens one.
func (i *inherited) listenUDP(s udpSocket) (fd int, port uint16, err error) {
	fd, ok := i.socket(unix.SOCK_DGRAM, s.at)
	if !ok {
		return s.open()
	}
	value := 0
	if s.shared {
		value = 1
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, value); err != nil {
		return -1, 0, errors.Join(fmt.Errorf("setting SO_REUSEPORT: %w", err), unix.Close(fd))
	}
	if err := s.setOptions(fd); err != nil {
		return -1, 0, errors.Join(err, unix.Close(fd))
	}
	return fd, s.at.Port(), nil
}

// close closes the unclaimed descriptors.
func (i *inherited) close() error {
	var errs []error
	for _, fd := range i.fds {
		errs = append(errs, unix.Close(fd))
	}
	i.fds = nil
	return errors.Join(errs...)
}

// persist makes the device persistent, so that it outlives this process.
func (d *device) persist() error {
	if err := unix.IoctlSetInt(d.queues[0], unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("making the TUN device last: %w", err)
	}
	return nil
}
