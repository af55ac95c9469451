package encap

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The loop's system calls do not block, so they are raw: the Go scheduler's
// bookkeeping would cost more than a small packet. Waiting is in queue.go.

func read(fd uintptr, b []byte) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

func write(fd uintptr, b []byte) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

func writev(fd uintptr, iovs []unix.Iovec) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(unsafe.SliceData(iovs))), uintptr(len(iovs)))
	return errno
}

func iovecOf(b []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return v
}

// iovecs returns the slices of a message.
func iovecs(h *unix.Msghdr) []unix.Iovec { return unsafe.Slice(h.Iov, h.Iovlen) }

// mmsghdr is struct mmsghdr (sendmmsg(2)), which x/sys/unix lacks.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

func sendmmsg(fd uintptr, msgs []mmsghdr) (int, unix.Errno) {
	n, _, err := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&msgs[0])), uintptr(len(msgs)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), err
}
