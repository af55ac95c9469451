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

// Place is a network namespace in which sockets are opened: *lab.Namespace or Here.
type Place interface {
	// Do calls fn on a thread in the namespace.
	Do(fn func() error) error
}

// Here is the network namespace of this process.
type Here struct{}

// Do calls fn.
func (Here) Do(fn func() error) error { return fn() }

// Congestion is the congestion control of all TCP sockets. It must not pace, since
// then the pacing would be measured instead of the datapath.
const Congestion = "cubic"

const (
	// chunk is the size of one read or write of a TCP stream, in bytes: iperf3's.
	chunk = 128 << 10
	// UDPBuffer is the receive buffer of UDP sockets, in bytes: enough for what
	// arrives while the receiver waits for a processor.
	UDPBuffer = 4 << 20
	// stopInterval is how long a call blocks before its thread checks whether to stop.
	stopInterval = 100 * time.Millisecond
)

// socket is a blocking socket that one thread uses.
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
	if err := s.timeouts(stopInterval); err == nil {
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

// cubic sets the congestion control and reads it back, since results with another one
// would not be comparable.
func (s *socket) cubic() error {
	if err := unix.SetsockoptString(s.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, Congestion); err != nil {
		return fmt.Errorf("setting the congestion control to %s (`modprobe tcp_%s`?): %w", Congestion, Congestion, err)
	}
	got, err := unix.GetsockoptString(s.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	if err == nil && got != Congestion {
		err = fmt.Errorf("the congestion control is %s instead of %s", got, Congestion)
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

// connect connects within atMost.
func (s *socket) connect(to netip.AddrPort, atMost time.Duration) error {
	if err := s.timeouts(atMost); err != nil {
		return err
	}
	err := unix.Connect(s.fd, sockaddr(to))
	if errors.Is(err, unix.EINTR) {
		err = s.connected(atMost) // interrupted by a signal of the Go runtime
	}
	if errors.Is(err, unix.EINPROGRESS) || errors.Is(err, unix.EAGAIN) {
		err = unix.ETIMEDOUT
	}
	if err != nil {
		return fmt.Errorf("connecting to %s: %w", to, err)
	}
	return s.timeouts(stopInterval)
}

// connected waits for the result of a connect that was interrupted.
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

// sendOne and receiveOne transfer one byte, and retry after EINTR.
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

// shutdown wakes up the threads that are blocked on the socket.
func (s *socket) shutdown() { _ = unix.Shutdown(s.fd, unix.SHUT_RDWR) }

func (s *socket) close() { _ = unix.Close(s.fd) }

// again reports whether an error is transient: a timeout, a signal or a full queue.
func again(e unix.Errno) bool { return e == unix.EAGAIN || e == unix.EINTR || e == unix.ENOBUFS }

// send and receive tell the Go scheduler that they may block. rawSend and rawReceive
// do not, which saves a few microseconds per call; they are used to measure latency.
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

// receiveNow is rawReceive without blocking.
func (s *socket) receiveNow(b []byte) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(s.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), e
}

// preciseSleep sets this thread's timer slack to 1 us, so that sleeps do not end up to
// 50 us late. The returned function restores the default.
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

// threads runs loops, each locked to an operating system thread.
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

// startNear and startFar pin the two ends of latency measurements to different
// processors, as if they were on different machines. Otherwise the scheduler runs both
// on one processor in some rounds and on two in others, and the results differ by a
// factor of four.
func (t *threads) startNear(loop func() error) { t.start(pinned(false, loop)) }
func (t *threads) startFar(loop func() error)  { t.start(pinned(true, loop)) }

// pinned returns loop pinned to the first or the last processor that this process may
// use.
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

// err returns the errors of the loops so far.
func (t *threads) err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return errors.Join(t.errs...)
}
