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

// Kind is what the far end does with what comes.
type Kind string

// The kinds of far ends.
const (
	Sink   Kind = "sink"   // receives TCP streams
	Source Kind = "source" // sends on TCP streams that the near end opens
	Drain  Kind = "drain"  // receives UDP datagrams
	Echo   Kind = "echo"   // answers each byte on a TCP connection
	Accept Kind = "accept" // answers one byte on each of many TCP connections
)

// Spec asks a far end for a session.
type Spec struct {
	Kind Kind       `json:"kind"`
	At   netip.Addr `json:"at"`             // where it listens
	Near int        `json:"near,omitempty"` // how many dial an Accept at once; 1 if zero
}

// Reading is what a receiver has got, up to a moment of its own clock.
type Reading struct {
	Nanoseconds int64  `json:"ns"` // of the receiver's monotonic clock
	Bytes       uint64 `json:"bytes"`
	Packets     uint64 `json:"packets"`
	First       int64  `json:"first"` // when the first datagram came, by the same clock
	// Streams are the bytes of each stream that a Sink has accepted, in that order.
	Streams []uint64 `json:"streams,omitempty"`
}

// Since returns bytes and packets per second from an earlier reading on.
func (r Reading) Since(earlier Reading) (bytes, packets float64) {
	d := float64(r.Nanoseconds-earlier.Nanoseconds) / 1e9
	if d <= 0 {
		return 0, 0
	}
	return float64(r.Bytes-earlier.Bytes) / d, float64(r.Packets-earlier.Packets) / d
}

var epoch = time.Now()

func now() int64 { return time.Since(epoch).Nanoseconds() }

// End is an end that listens: Local, or Remote.
type End interface {
	// Open makes a session; the caller closes it.
	Open(ctx context.Context, s Spec) (Session, error)
}

// Session is one listening socket and what came of it.
type Session interface {
	// Addr is where to dial.
	Addr() netip.AddrPort
	// Reading returns what has arrived; the error, if anything went wrong.
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
	own   []*atomic.Uint64 // of each stream of a Sink: its bytes
}

// counter is what receiving threads add to.
type counter struct {
	bytes, packets atomic.Uint64
	first          atomic.Int64
}

func (c *counter) reading() Reading {
	return Reading{Nanoseconds: now(), Bytes: c.bytes.Load(), Packets: c.packets.Load(), First: c.first.Load()}
}

// Open makes a session.
func (l Local) Open(_ context.Context, spec Spec) (Session, error) {
	s := &session{spec: spec}
	var err error
	switch spec.Kind {
	case Sink, Source, Echo, Accept:
		err = s.listen(l.Place)
	case Drain:
		err = s.drain(l.Place)
	default:
		return nil, fmt.Errorf("%q is no kind of session", spec.Kind)
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

// Close ends the session and waits for its threads.
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
		// Congestion control and options are inherited by what is accepted.
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
		if err := errors.Join(c.timeouts(nap), c.noDelay()); err != nil {
			c.close()
			return err
		}
		if s.spec.Kind == Accept {
			// One after the other, on this thread: a near end waits for each.
			if n, e := c.receiveOne(one); n == 1 && e == 0 && c.sendOne(one) == 0 {
				s.packets.Add(1)
				_, _ = c.receiveOne(one) // until the near end closes
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
			_ = unix.SetsockoptInt(u.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, UDPBuffer) // as much as one may
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

// gatherFor is how long the receiver of datagrams sleeps when it has them all.
const gatherFor = 50 * time.Microsecond

// gather takes the datagrams that are there, then sleeps. Were it to wait in the
// call, a sender would have to wake it for nearly each one, and on the
// processor that sends: 240,000 per second were the limit instead of 290,000.
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

// receiveStream reads until the other side closes or stop is set. The stream's
// own share is added to own, if it is not nil.
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

// sendStream writes until the other side closes or stop is set.
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

// echo answers each byte.
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
