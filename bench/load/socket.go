package load

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Place is where sockets are opened: *lab.Namespace, or Here.
type Place interface {
	// Do calls the function on a thread that is in the place.
	Do(fn func() error) error
}

// Here is the network namespace of this process.
type Here struct{}

// Do calls fn.
func (Here) Do(fn func() error) error { return fn() }

// Congestion is the congestion control of every TCP socket: one that does not
// pace, so that the datapath is measured and not the pacing.
const Congestion = "cubic"

const (
	// chunk is how much one read or write of a TCP stream moves: as iperf3's.
	chunk = 128 << 10
	// UDPBuffer is the receive buffer of UDP sockets, in bytes: enough for
	// what arrives while the receiver waits for a core.
	UDPBuffer = 4 << 20
	// nap is how long a blocked call sleeps before it looks whether to stop.
	nap = 100 * time.Millisecond
)

// socket is a blocking socket with a thread of its own.
type socket struct {
	fd int
}

func open(p Place, kind int, addr netip.Addr, prepare func(s *socket) error) (*socket, error) {
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	s := &socket{fd: -1}
	err := p.Do(func() (err error) {
		s.fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return nil, err
	}
	if err := s.timeouts(nap); err == nil {
		err = prepare(s)
		if err == nil {
			return s, nil
		}
		s.close()
		return nil, err
	} else {
		s.close()
		return nil, err
	}
}

func (s *socket) timeouts(d time.Duration) error {
	tv := unix.NsecToTimeval(d.Nanoseconds())
	return errors.Join(
		os.NewSyscallError("setsockopt SO_RCVTIMEO", unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)),
		os.NewSyscallError("setsockopt SO_SNDTIMEO", unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)))
}

// cubic sets the congestion control and reads it back: a benchmark in which it
// were another one would say nothing.
func (s *socket) cubic() error {
	if err := unix.SetsockoptString(s.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, Congestion); err != nil {
		return fmt.Errorf("setting the congestion control to %s (`modprobe tcp_%s`?): %w", Congestion, Congestion, err)
	}
	got, err := unix.GetsockoptString(s.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	if err == nil && got != Congestion {
		err = fmt.Errorf("the congestion control is %s and not %s", got, Congestion)
	}
	return err
}

func (s *socket) noDelay() error {
	return os.NewSyscallError("setsockopt TCP_NODELAY", unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
}

func (s *socket) bind(a netip.AddrPort) error {
	return os.NewSyscallError("bind "+a.String(), unix.Bind(s.fd, sockaddr(a)))
}

func (s *socket) local() (netip.AddrPort, error) {
	sa, err := unix.Getsockname(s.fd)
	if err != nil {
		return netip.AddrPort{}, os.NewSyscallError("getsockname", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), nil
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)), nil
	}
	return netip.AddrPort{}, fmt.Errorf("a socket of family %T", sa)
}

// connect waits for the connection no longer than it takes.
func (s *socket) connect(to netip.AddrPort, atMost time.Duration) error {
	if err := s.timeouts(atMost); err != nil {
		return err
	}
	err := unix.Connect(s.fd, sockaddr(to))
	if errors.Is(err, unix.EINTR) {
		err = s.connected(atMost) // the runtime's signals interrupt
	}
	if errors.Is(err, unix.EINPROGRESS) || errors.Is(err, unix.EAGAIN) {
		err = unix.ETIMEDOUT
	}
	if err != nil {
		return fmt.Errorf("connecting to %s: %w", to, err)
	}
	return s.timeouts(nap)
}

// connected waits for the end of a connect that was interrupted.
func (s *socket) connected(atMost time.Duration) error {
	for deadline := time.Now().Add(atMost); ; {
		fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(fds, int(max(time.Until(deadline), 0).Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return unix.ETIMEDOUT
		default:
			code, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
			if err == nil && code != 0 {
				err = unix.Errno(code)
			}
			return err
		}
	}
}

// sendOne and receiveOne move one byte, whatever interrupts.
func (s *socket) sendOne(b []byte) unix.Errno {
	for {
		if _, e := s.send(b[:1]); e != unix.EINTR {
			return e
		}
	}
}

func (s *socket) receiveOne(b []byte) (int, unix.Errno) {
	for {
		if n, e := s.receive(b[:1]); e != unix.EINTR {
			return n, e
		}
	}
}

// shutdown wakes the threads that are in a call on the socket.
func (s *socket) shutdown() { _ = unix.Shutdown(s.fd, unix.SHUT_RDWR) }

func (s *socket) close() { _ = unix.Close(s.fd) }

// again says whether a call only ran into its time limit or a signal.
func again(e unix.Errno) bool { return e == unix.EAGAIN || e == unix.EINTR || e == unix.ENOBUFS }

// send and receive let the scheduler give the processor to others while they
// block; their raw twins do not, which saves a few microseconds per call and is
// what latency is measured with.
func (s *socket) send(b []byte) (int, unix.Errno) {
	n, _, e := unix.Syscall6(unix.SYS_SENDTO, uintptr(s.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
	return int(n), e
}

func (s *socket) receive(b []byte) (int, unix.Errno) {
	n, _, e := unix.Syscall6(unix.SYS_RECVFROM, uintptr(s.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0, 0, 0)
	return int(n), e
}

func (s *socket) rawSend(b []byte) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(s.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
	return int(n), e
}

func (s *socket) rawReceive(b []byte) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(s.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0, 0, 0)
	return int(n), e
}

// receiveNow does not wait.
func (s *socket) receiveNow(b []byte) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(s.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), e
}

// preciseSleep has the kernel wake this thread when it asked to be woken, and
// not up to 50 us later; the returned function undoes it.
func preciseSleep() (undo func()) {
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1000, 0, 0, 0)
	return func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) } // the default
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// threads are loops that each have an operating system thread.
type threads struct {
	wg   sync.WaitGroup
	mu   sync.Mutex
	errs []error
}

func (t *threads) start(loop func() error) {
	t.wg.Go(func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := loop(); err != nil {
			t.mu.Lock()
			t.errs = append(t.errs, err)
			t.mu.Unlock()
		}
	})
}

// The ends of what latency is measured with stay on processors of their own,
// as they would on machines of their own. Else the scheduler puts both on one in
// one round and on two in the next, and the rounds differ by four times.
func (t *threads) startNear(loop func() error) { t.start(pinned(false, loop)) }
func (t *threads) startFar(loop func() error)  { t.start(pinned(true, loop)) }

// pinned keeps the loop's thread on the first or the last processor that this
// process may use.
func pinned(last bool, loop func() error) func() error {
	return func() error {
		var may, one unix.CPUSet
		if err := unix.SchedGetaffinity(0, &may); err != nil {
			return os.NewSyscallError("sched_getaffinity", err)
		}
		chosen := -1
		for cpu := range len(may) * 64 {
			if may.IsSet(cpu) && (chosen < 0 || last) {
				chosen = cpu
			}
		}
		one.Set(chosen)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return os.NewSyscallError("sched_setaffinity", err)
		}
		defer func() { _ = unix.SchedSetaffinity(0, &may) }()
		return loop()
	}
}

// err is what the loops that ended in error said, up to now.
func (t *threads) err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return errors.Join(t.errs...)
}
