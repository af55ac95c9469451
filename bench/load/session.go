package load

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Kind is what the far end does.
type Kind string

// The kinds of far ends.
const (
	Sink   Kind = "sink"   // receives TCP streams
	Source Kind = "source" // sends on TCP streams that near ends open
	Drain  Kind = "drain"  // receives UDP datagrams
	Echo   Kind = "echo"   // answers each byte on a TCP connection
	Accept Kind = "accept" // answers one byte on each of many TCP connections
)

// Spec describes a session.
type Spec struct {
	Kind Kind       `json:"kind"`
	At   netip.Addr `json:"at"`             // address to listen on
	Near int        `json:"near,omitempty"` // number of near ends that dial an Accept at once; 1 if zero
}

// Reading is what a receiver has received until a moment of its own clock.
type Reading struct {
	Nanoseconds int64  `json:"ns"` // the receiver's monotonic clock
	Bytes       uint64 `json:"bytes"`
	Packets     uint64 `json:"packets"` // datagrams of a Drain, connections of an Accept
	First       int64  `json:"first"`   // when the first datagram arrived, by the same clock
	// Streams are the bytes of each stream of a Sink, in the order of accept.
	Streams []uint64 `json:"streams,omitempty"`
}

// Since returns the bytes and packets per second since an earlier reading.
func (r Reading) Since(earlier Reading) (bytes, packets float64) {
	d := float64(r.Nanoseconds-earlier.Nanoseconds) / 1e9
	if d <= 0 {
		return 0, 0
	}
	return float64(r.Bytes-earlier.Bytes) / d, float64(r.Packets-earlier.Packets) / d
}

var epoch = time.Now()

func now() int64 { return time.Since(epoch).Nanoseconds() }

// End is an end that listens: Local or bench.Remote.
type End interface {
	// Open opens a session. The caller closes it.
	Open(ctx context.Context, s Spec) (Session, error)
}

// Session is a listening socket, the connections accepted on it, and counters.
type Session interface {
	// Addr is the address to dial.
	Addr() netip.AddrPort
	// Reading returns the counters, and the errors of the session's threads so far.
	Reading() (Reading, error)
	Close() error
}

// Local is an end in this process.
type Local struct {
	Place Place
}

// session is a Session of a Local end.
type session struct {
	spec    Spec
	at      netip.AddrPort
	socket  *socket
	stop    atomic.Bool
	threads threads
	counter

	mu    sync.Mutex
	conns []*socket
	own   []*atomic.Uint64 // bytes of each stream of a Sink
}

// counter is the sum over all receiving threads.
type counter struct {
	bytes, packets atomic.Uint64
	first          atomic.Int64
}

func (c *counter) reading() Reading {
	return Reading{Nanoseconds: now(), Bytes: c.bytes.Load(), Packets: c.packets.Load(), First: c.first.Load()}
}

// Open opens a session in the end's place.
func (l Local) Open(_ context.Context, spec Spec) (Session, error) {
	s := &session{spec: spec}
	var err error
	switch spec.Kind {
	case Sink, Source, Echo, Accept:
		err = s.listen(l.Place)
	case Drain:
		err = s.drain(l.Place)
	default:
		return nil, fmt.Errorf("unknown kind of session %q", spec.Kind)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the far end (%s) at %s: %w", spec.Kind, spec.At, err)
	}
	return s, nil
}

func (s *session) Addr() netip.AddrPort { return s.at }

func (s *session) Reading() (Reading, error) {
	r := s.reading()
	s.mu.Lock()
	for _, own := range s.own {
		r.Streams = append(r.Streams, own.Load())
	}
	s.mu.Unlock()
	return r, s.threads.err()
}

// Close closes the session's sockets and waits for its threads.
func (s *session) Close() error {
	s.stop.Store(true)
	s.socket.shutdown()
	s.mu.Lock()
	for _, c := range s.conns {
		c.shutdown()
	}
	s.mu.Unlock()
	s.threads.wg.Wait()
	s.socket.close()
	for _, c := range s.conns {
		c.close()
	}
	return nil
}

func (s *session) listen(p Place) error {
	var err error
	s.socket, err = open(p, unix.SOCK_STREAM, s.spec.At, func(l *socket) error {
		// Accepted sockets inherit the congestion control.
		err := errors.Join(l.cubic(), l.bind(netip.AddrPortFrom(s.spec.At, 0)))
		if err == nil {
			err = os.NewSyscallError("listen", unix.Listen(l.fd, 1024))
		}
		if err == nil {
			s.at, err = l.local()
		}
		return err
	})
	if err != nil {
		return err
	}
	if s.spec.Kind != Accept {
		s.threads.start(s.accept)
		return nil
	}
	for range max(s.spec.Near, 1) {
		s.threads.startFar(s.accept)
	}
	return nil
}

func (s *session) accept() error {
	one := make([]byte, 1)
	for !s.stop.Load() {
		fd, _, err := unix.Accept4(s.socket.fd, unix.SOCK_CLOEXEC)
		if s.stop.Load() {
			if err == nil {
				_ = unix.Close(fd)
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
				continue
			}
			return os.NewSyscallError("accept", err)
		}
		c := &socket{fd: fd}
		if err := errors.Join(c.timeouts(stopInterval), c.noDelay()); err != nil {
			c.close()
			return err
		}
		if s.spec.Kind == Accept {
			// Handle one connection at a time on this thread: the near end opens the
			// next only after this one.
			n, e := c.receiveOne(one)
			for e == unix.EAGAIN && !s.stop.Load() { // a near end without a CPU, or a lost packet
				n, e = c.receiveOne(one)
			}
			if n == 1 && e == 0 && c.sendOne(one) == 0 {
				s.packets.Add(1)
				_, _ = c.receiveOne(one) // wait until the near end closes
			}
			c.close()
			continue
		}
		own := &atomic.Uint64{}
		s.mu.Lock()
		s.conns = append(s.conns, c)
		if s.spec.Kind == Sink {
			s.own = append(s.own, own)
		}
		s.mu.Unlock()
		switch s.spec.Kind {
		case Sink:
			s.threads.start(func() error { return receiveStream(c, &s.stop, &s.counter, own) })
		case Source:
			s.threads.start(func() error { return sendStream(c, &s.stop) })
		case Echo:
			s.threads.startFar(func() error { return echo(c, &s.stop) })
		}
	}
	return nil
}

func (s *session) drain(p Place) error {
	var err error
	s.socket, err = open(p, unix.SOCK_DGRAM, s.spec.At, func(u *socket) error {
		if unix.SetsockoptInt(u.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, UDPBuffer) != nil {
			_ = unix.SetsockoptInt(u.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, UDPBuffer) // the kernel limits it to rmem_max
		}
		err := u.bind(netip.AddrPortFrom(s.spec.At, 0))
		if err == nil {
			s.at, err = u.local()
		}
		return err
	})
	if err != nil {
		return err
	}
	s.threads.start(s.gather)
	return nil
}

// gatherFor is how long the receiver of datagrams sleeps when the socket is empty.
const gatherFor = 50 * time.Microsecond

// gather receives all datagrams in the socket's buffer, then sleeps. If it blocked in
// recv instead, the sending processor would have to wake it up for nearly every
// datagram: the limit was then 240,000 datagrams per second instead of 290,000.
func (s *session) gather() error {
	defer preciseSleep()()
	buf := make([]byte, 64<<10)
	sleep := unix.NsecToTimespec(gatherFor.Nanoseconds())
	for !s.stop.Load() {
		n, e := s.socket.receiveNow(buf)
		switch {
		case e == 0:
			if s.packets.Load() == 0 {
				s.first.Store(now())
			}
			s.bytes.Add(uint64(n))
			s.packets.Add(1)
		case e == unix.EAGAIN:
			_ = unix.Nanosleep(&sleep, nil)
		case again(e) || e == unix.ECONNREFUSED:
		default:
			return os.NewSyscallError("recv", e)
		}
	}
	return nil
}

// receiveStream reads until the other end closes or stop is set. It adds the bytes to
// all and, if own is not nil, to own.
func receiveStream(c *socket, stop *atomic.Bool, all *counter, own *atomic.Uint64) error {
	buf := make([]byte, chunk)
	for !stop.Load() {
		n, e := c.receive(buf)
		switch {
		case e == 0 && n == 0:
			return nil
		case e == 0:
			all.bytes.Add(uint64(n))
			if own != nil {
				own.Add(uint64(n))
			}
		case again(e):
		case e == unix.ECONNRESET || stop.Load():
			return nil
		default:
			return os.NewSyscallError("recv", e)
		}
	}
	return nil
}

// sendStream writes until the other end closes or stop is set.
func sendStream(c *socket, stop *atomic.Bool) error {
	buf := make([]byte, chunk)
	for i := range buf {
		buf[i] = byte(i * 31)
	}
	for !stop.Load() {
		_, e := c.send(buf)
		switch {
		case e == 0 || again(e):
		case e == unix.EPIPE || e == unix.ECONNRESET || stop.Load():
			return nil
		default:
			return os.NewSyscallError("send", e)
		}
	}
	return nil
}

// echo sends each byte back until the other end closes or stop is set.
func echo(c *socket, stop *atomic.Bool) error {
	buf := make([]byte, 1)
	for !stop.Load() {
		n, e := c.rawReceive(buf)
		switch {
		case e == 0 && n == 0:
			return nil
		case e == 0:
			e = unix.EINTR
			for again(e) && !stop.Load() {
				_, e = c.rawSend(buf)
			}
			if e != 0 && !stop.Load() && e != unix.EPIPE && e != unix.ECONNRESET {
				return os.NewSyscallError("send", e)
			}
		case again(e):
		case e == unix.ECONNRESET || stop.Load():
			return nil
		default:
			return os.NewSyscallError("recv", e)
		}
	}
	return nil
}
