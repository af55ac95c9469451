package handover

import (
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Descriptor returns a duplicate of c's file descriptor, which the caller
// closes.
func Descriptor(c syscall.Conn) (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	var failure error
	if err := raw.Control(func(d uintptr) { fd, failure = Duplicate(int(d)) }); err != nil {
		return -1, err
	}
	return fd, failure
}

// Duplicate returns a duplicate of a descriptor.
func Duplicate(fd int) (int, error) { return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0) }

// Listener returns a listener on a listening socket. fd remains the caller's:
// after the listener is closed, the kernel still queues connections on the
// socket.
func Listener(fd int) (net.Listener, error) {
	own, err := Duplicate(fd)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(own), "listener")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("serving on an open socket: %w", err)
	}
	return l, nil
}
