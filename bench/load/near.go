package load

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// connectTime is how long a connection may take.
const connectTime = 3 * time.Second

// dial opens a TCP connection from a place.
func dial(p Place, to netip.AddrPort) (*socket, error) {
	return open(p, unix.SOCK_STREAM, to.Addr(), func(s *socket) error {
		if err := errors.Join(s.cubic(), s.noDelay()); err != nil {
			return err
		}
		return s.connect(to, connectTime)
	})
}

// Streams are TCP streams that run until they are closed.
type Streams struct {
	conns   []*socket
	stop    atomic.Bool
	threads threads
	counter // of what came back, with Reverse
}

// StartStreams opens n streams to a session: to a Sink it sends, from a Source
// it receives.
func StartStreams(p Place, to netip.AddrPort, n int, reverse bool) (*Streams, error) {
	s := &Streams{}
	for range n {
		c, err := dial(p, to)
		if err != nil {
			_ = s.Close()
			return nil, err
		}
		s.conns = append(s.conns, c)
	}
	for _, c := range s.conns {
		if reverse {
			s.threads.start(func() error { return receiveStream(c, &s.stop, &s.counter, nil) })
		} else {
			s.threads.start(func() error { return sendStream(c, &s.stop) })
		}
	}
	return s, nil
}

// Reading returns what has arrived here.
func (s *Streams) Reading() (Reading, error) { return s.reading(), s.threads.err() }

// Close ends the streams and waits for their threads.
func (s *Streams) Close() error {
	s.stop.Store(true)
	for _, c := range s.conns {
		c.shutdown()
	}
	s.threads.wg.Wait()
	for _, c := range s.conns {
		c.close()
	}
	return s.threads.err()
}

// Datagrams is a stream of UDP datagrams that runs until it is closed.
type Datagrams struct {
	socket  *socket
	stop    atomic.Bool
	threads threads
	sent    atomic.Uint64
}

// StartDatagrams sends datagrams of size bytes of payload, at perSecond of them
// or, if that is zero, as fast as it can.
func StartDatagrams(p Place, to netip.AddrPort, size int, perSecond float64) (*Datagrams, error) {
	d := &Datagrams{}
	var err error
	d.socket, err = open(p, unix.SOCK_DGRAM, to.Addr(), func(s *socket) error { return s.connect(to, connectTime) })
	if err != nil {
		return nil, err
	}
	d.threads.start(func() error {
		if perSecond > 0 {
			return d.paced(make([]byte, size), perSecond)
		}
		return d.flood(make([]byte, size))
	})
	return d, nil
}

func (d *Datagrams) flood(buf []byte) error {
	for !d.stop.Load() {
		if err := d.one(buf); err != nil {
			return err
		}
	}
	return nil
}

// pace is how often a paced sender wakes and sends what is due.
const pace = 100 * time.Microsecond

func (d *Datagrams) paced(buf []byte, perSecond float64) error {
	defer preciseSleep()()
	start, sent := time.Now(), uint64(0)
	sleep := unix.NsecToTimespec(pace.Nanoseconds())
	for !d.stop.Load() {
		due := uint64(time.Since(start).Seconds() * perSecond)
		// What a lost time slice left undone is made up for slowly, as it would
		// be by many independent senders, and not in one flood.
		for burst := max(2*uint64(perSecond*pace.Seconds()), 8); sent < due && burst > 0; burst-- {
			if err := d.one(buf); err != nil {
				return err
			}
			sent++
		}
		_ = unix.Nanosleep(&sleep, nil)
	}
	return nil
}

func (d *Datagrams) one(buf []byte) error {
	_, e := d.socket.rawSend(buf)
	switch {
	case e == 0:
		d.sent.Add(1)
	case again(e) || e == unix.ECONNREFUSED || e == unix.EHOSTUNREACH || d.stop.Load():
	default:
		return os.NewSyscallError("send", e)
	}
	return nil
}

// Sent is how many datagrams have left.
func (d *Datagrams) Sent() uint64 { return d.sent.Load() }

// Close ends the stream and waits for its thread.
func (d *Datagrams) Close() error {
	d.stop.Store(true)
	d.threads.wg.Wait()
	d.socket.close()
	return d.threads.err()
}

// Requests sends one byte to an Echo and waits for it, again and again, for the
// warm-up and then for the duration, and returns how long each took in the
// latter, sorted.
func Requests(ctx context.Context, p Place, to netip.AddrPort, warmup, duration time.Duration) ([]time.Duration, error) {
	s, err := dial(p, to)
	if err != nil {
		return nil, err
	}
	const atMost = 1 << 17 // per second: none is as fast
	took := make([]time.Duration, 0, int(duration.Seconds()*atMost)+1)
	var stop atomic.Bool
	defer context.AfterFunc(ctx, func() { stop.Store(true); s.shutdown() })()
	var t threads
	t.startNear(func() error {
		buf := make([]byte, 1)
		begin := time.Now().Add(warmup)
		end := begin.Add(duration)
		for !stop.Load() {
			start := time.Now()
			// One answer is waited for, however long: one that came late in the
			// warm-up may have taken all of the time.
			if start.After(end) && len(took) > 0 || len(took) == cap(took) {
				return nil
			}
			for {
				_, e := s.rawSend(buf)
				if e == 0 {
					break
				}
				if !again(e) || stop.Load() {
					return os.NewSyscallError("send", e)
				}
			}
			for {
				n, e := s.rawReceive(buf)
				if e == 0 && n == 1 {
					break
				}
				if !again(e) {
					return os.NewSyscallError("recv", e)
				}
				if stop.Load() || time.Since(start) > connectTime {
					return fmt.Errorf("no answer within %s", time.Since(start).Round(time.Millisecond))
				}
			}
			if start.After(begin) {
				took = append(took, time.Since(start))
			}
		}
		return nil
	})
	t.wg.Wait()
	s.shutdown()
	s.close()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err := t.err(); err != nil {
		return nil, err
	}
	if len(took) == 0 {
		return nil, errors.New("no request was answered")
	}
	slices.Sort(took)
	return took, nil
}

// Quantile returns the value below which the share q of the sorted values is.
func Quantile(sorted []time.Duration, q float64) time.Duration {
	i := int(q * float64(len(sorted)))
	return sorted[min(i, len(sorted)-1)]
}

// Connections opens a connection to an Accept, sends a byte, gets one, closes,
// again and again, one after the other, and returns how many it made per
// second. It closes by a reset, so that neither end runs out of ports.
func Connections(ctx context.Context, p Place, to netip.AddrPort, warmup, duration time.Duration) (float64, error) {
	var perSecond float64
	var t threads
	loop := func() error {
		buf := make([]byte, 1)
		for end := time.Now().Add(warmup); time.Now().Before(end) && ctx.Err() == nil; {
			if err := connection(to, buf); err != nil {
				return err
			}
		}
		start, made := time.Now(), 0
		for time.Since(start) < duration && ctx.Err() == nil {
			if err := connection(to, buf); err != nil {
				return err
			}
			made++
		}
		perSecond = float64(made) / time.Since(start).Seconds()
		return ctx.Err()
	}
	// The place is entered once for all of them, not for each.
	t.start(func() error { return p.Do(pinned(false, loop)) })
	t.wg.Wait()
	return perSecond, t.err()
}

func connection(to netip.AddrPort, buf []byte) error {
	s, err := dial(Here{}, to)
	if err != nil {
		return err
	}
	defer s.close()
	if err := os.NewSyscallError("setsockopt SO_LINGER",
		unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})); err != nil {
		return err
	}
	if err := s.timeouts(connectTime); err != nil {
		return err
	}
	if e := s.sendOne(buf); e != 0 {
		return os.NewSyscallError("send", e)
	}
	n, e := s.receiveOne(buf)
	if e != 0 {
		return os.NewSyscallError("recv", e)
	}
	if n != 1 {
		return errors.New("a connection was closed before it was answered")
	}
	return nil
}

// Reach sends datagrams until one has arrived, or ctx ends.
func Reach(ctx context.Context, p Place, far End, at netip.Addr) error {
	session, err := far.Open(ctx, Spec{Kind: Drain, At: at})
	if err != nil {
		return err
	}
	defer func() { _ = session.Close() }()
	s, err := open(p, unix.SOCK_DGRAM, at, func(s *socket) error { return s.connect(session.Addr(), connectTime) })
	if err != nil {
		return err
	}
	defer s.close()
	for {
		_, _ = s.send([]byte("culvert bench")) // refused or lost: the next may pass
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
		r, err := session.Reading()
		if err != nil || r.Packets > 0 {
			return err
		}
	}
}
