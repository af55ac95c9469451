package encap

import (
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The operating system is behind two seams, device and socket, and a function that
// waits for them (queue.wait). Tests put fakes in their place (fakeos_test.go). One
// interface call per system call costs nothing that can be measured.
//
// The system calls do not block, so they are raw: the Go scheduler's bookkeeping would
// cost more than a small packet.

// device is a queue of the TUN device, or the Super device.
type device interface {
	// read reads one frame into b, which has room for the largest.
	read(b []byte) (int, unix.Errno)
	// write writes one frame, in pieces.
	write(frame []unix.Iovec) unix.Errno
	fd() int
}

// socket is a socket of the underlay.
type socket interface {
	// send sends messages, as sendmmsg(2), and returns how many. If it sent none, the
	// errno is of the first message or of an earlier packet.
	send(msgs []mmsghdr) (int, unix.Errno)
	// receive fills messages, as recvmmsg(2), and returns how many.
	receive(msgs []mmsghdr) (int, unix.Errno)
	// receiveError fills h from the error queue and returns the length of the quote.
	receiveError(h *unix.Msghdr) (int, unix.Errno)
	// clearError clears the socket's pending error.
	clearError()
	fd() int
}

// tun is a real device: its descriptor.
type tun int

func (t tun) fd() int { return int(t) }

func (t tun) read(b []byte) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(t), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

func (t tun) write(frame []unix.Iovec) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(t), uintptr(unsafe.Pointer(unsafe.SliceData(frame))), uintptr(len(frame)))
	return errno
}

// inet is a real socket: its descriptor.
type inet int

func (s inet) fd() int { return int(s) }

func (s inet) send(msgs []mmsghdr) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(s), uintptr(unsafe.Pointer(&msgs[0])), uintptr(len(msgs)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

func (s inet) receive(msgs []mmsghdr) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(s), uintptr(unsafe.Pointer(&msgs[0])), uintptr(len(msgs)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

func (s inet) receiveError(h *unix.Msghdr) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(s), uintptr(unsafe.Pointer(h)), unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	return int(n), errno
}

func (s inet) clearError() { _, _ = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_ERROR) }

// socketOf returns the socket of a descriptor; nil if there is none.
func socketOf(d Descriptor) socket {
	if d.FD() < 0 {
		return nil
	}
	return inet(d.FD())
}

// mmsghdr is struct mmsghdr (sendmmsg(2)), which x/sys/unix lacks.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

func iovecOf(b []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return v
}

// iovecs returns the slices of a message.
func iovecs(h *unix.Msghdr) []unix.Iovec { return unsafe.Slice(h.Iov, h.Iovlen) }

// wait blocks until a descriptor is ready, and returns false after atMost. Up to rawBlock
// it is a raw system call: after the wake-up the goroutine runs at once on its thread,
// without the Go scheduler. It keeps its P meanwhile, so Loop.Run reserves one more per
// queue. With atMost forever it releases its P.
//
// The runtime, such as the garbage collector, preempts by a signal, which
// interrupts the call: wait then yields (Gosched) and returns true with no events
// set.
func wait(polls []unix.PollFd, atMost time.Duration) (ready bool) {
	if atMost == forever {
		if _, err := unix.Ppoll(polls, nil, nil); err != nil {
			clearEvents(polls)
		}
		return true
	}
	timeout := unix.NsecToTimespec(int64(atMost))
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&polls[0])), uintptr(len(polls)), uintptr(unsafe.Pointer(&timeout)), 0, 0, 0)
	if errno != 0 {
		clearEvents(polls)
		runtime.Gosched()
		return true
	}
	return n > 0
}

func clearEvents(polls []unix.PollFd) {
	for i := range polls {
		polls[i].Revents = 0
	}
}

// eventfd is an eventfd(2), used as a wake-up.
type eventfd int

func newEventfd() (eventfd, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("eventfd: %w", err)
	}
	return eventfd(fd), nil
}

var eventOne = [8]byte{1} // not 0 in either byte order

func (e eventfd) signal() { _, _ = unix.Write(int(e), eventOne[:]) }

func (e eventfd) close() { _ = unix.Close(int(e)) }
