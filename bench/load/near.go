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

// connectTime limits a connect, and the wait for an answer.
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
	counter // of what is received, if reverse
}

// StartStreams opens n streams from each place to a session. They send to a Sink or,
// with reverse, receive from a Source.
func StartStreams(from []Place, to netip.AddrPort, n int, reverse bool) (*Streams, error) {
	s := &Streams{}
	for _, p := range from {
		for range n {
			c, err := dial(p, to)
			if err != nil {
				_ = s.Close()
				return nil, err
			}
			s.conns = append(s.conns, c)
		}
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

// Reading returns what the near ends have received.
func (s *Streams) Reading() (Reading, error) { return s.reading(), s.threads.err() }

// Close closes the streams and waits for their threads.
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

// Datagrams are streams of UDP datagrams that run until they are closed.
type Datagrams struct {
	sockets []*socket
	stop    atomic.Bool
	threads threads
	sent    atomic.Uint64
}

// StartDatagrams sends datagrams with size bytes of payload from each place: in total
// perSecond of them or, if that is zero, as fast as possible.
func StartDatagrams(from []Place, to netip.AddrPort, size int, perSecond float64) (*Datagrams, error) {
	d := &Datagrams{}
	for _, p := range from {
		s, err := open(p, unix.SOCK_DGRAM, to.Addr(), func(s *socket) error { return s.connect(to, connectTime) })
		if err != nil {
			_ = d.Close()
			return nil, err
		}
		d.sockets = append(d.sockets, s)
	}
	for _, s := range d.sockets {
		d.threads.start(func() error {
			if perSecond > 0 {
				return d.paced(s, make([]byte, size), perSecond/float64(len(from)))
			}
			return d.flood(s, make([]byte, size))
		})
	}
	return d, nil
}

func (d *Datagrams) flood(s *socket, buf []byte) error {
	for !d.stop.Load() {
		if err := d.one(s, buf); err != nil {
			return err
		}
	}
	return nil
}

// pace is the interval at which a paced sender wakes up and sends what is due.
const pace = 100 * time.Microsecond

func (d *Datagrams) paced(s *socket, buf []byte, perSecond float64) error {
	defer preciseSleep()()
	start, sent := time.Now(), uint64(0)
	sleep := unix.NsecToTimespec(pace.Nanoseconds())
	for !d.stop.Load() {
		due := uint64(time.Since(start).Seconds() * perSecond)
		// After a lost time slice catch up slowly, as many independent senders would,
		// and not in one burst.
		for burst := max(2*uint64(perSecond*pace.Seconds()), 8); sent < due && burst > 0; burst-- {
			if err := d.one(s, buf); err != nil {
				return err
			}
			sent++
		}
		_ = unix.Nanosleep(&sleep, nil)
	}
	return nil
}

func (d *Datagrams) one(s *socket, buf []byte) error {
	_, e := s.rawSend(buf)
	switch {
	case e == 0:
		d.sent.Add(1)
	case again(e) || e == unix.ECONNREFUSED || e == unix.EHOSTUNREACH || d.stop.Load():
	default:
		return os.NewSyscallError("send", e)
	}
	return nil
}

// Sent returns the number of datagrams sent.
func (d *Datagrams) Sent() uint64 { return d.sent.Load() }

// Close stops the senders and waits for their threads.
func (d *Datagrams) Close() error {
	d.stop.Store(true)
	d.threads.wg.Wait()
	for _, s := range d.sockets {
		s.close()
	}
	return d.threads.err()
}

// Requests sends one byte from each place to an Echo and waits for the answer,
// repeatedly, for the warm-up and then for the duration. It returns the sorted
// round-trip times of the latter.
func Requests(ctx context.Context, from []Place, to netip.AddrPort, warmup, duration time.Duration) ([]time.Duration, error) {
	var all []*requests
	var stop atomic.Bool
	defer func() {
		for _, r := range all {
			r.close()
		}
	}()
	for _, p := range from {
		s, err := dial(p, to)
		if err != nil {
			return nil, err
		}
		const atMost = 1 << 17 // requests per second: more than any datapath reaches
		all = append(all, &requests{socket: s, took: make([]time.Duration, 0, int(duration.Seconds()*atMost)+1)})
	}
	defer context.AfterFunc(ctx, func() {
		stop.Store(true)
		for _, r := range all {
			r.shutdown()
		}
	})()
	var t threads
	for _, r := range all {
		t.startNear(func() error { return r.run(&stop, warmup, duration) })
	}
	t.wg.Wait()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err := t.err(); err != nil {
		return nil, err
	}
	var took []time.Duration
	for _, r := range all {
		if len(r.took) == 0 {
			return nil, errors.New("no request was answered")
		}
		took = append(took, r.took...)
	}
	slices.Sort(took)
	return took, nil
}

// requests is one connection and the round-trip times of its requests.
type requests struct {
	*socket
	took []time.Duration
}

func (r *requests) run(stop *atomic.Bool, warmup, duration time.Duration) error {
	buf := make([]byte, 1)
	begin := time.Now().Add(warmup)
	end := begin.Add(duration)
	for !stop.Load() {
		start := time.Now()
		// Measure at least one request, even if one that began in the warm-up took
		// all of the time.
		if start.After(end) && len(r.took) > 0 || len(r.took) == cap(r.took) {
			return nil
		}
		for {
			_, e := r.rawSend(buf)
			if e == 0 {
				break
			}
			if !again(e) || stop.Load() {
				return os.NewSyscallError("send", e)
			}
		}
		for {
			n, e := r.rawReceive(buf)
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
			r.took = append(r.took, time.Since(start))
		}
	}
	return nil
}

// Quantile returns the q-quantile of the sorted values, with q from 0 to 1.
func Quantile(sorted []time.Duration, q float64) time.Duration {
	i := int(q * float64(len(sorted)))
	return sorted[min(i, len(sorted)-1)]
}

// Connections repeatedly opens a connection from each place to an Accept, sends a
// byte, receives one and closes. It returns the connections per second of all places
// together. It closes with a reset, so that no connection stays in TIME_WAIT and
// neither end runs out of ports.
func Connections(ctx context.Context, from []Place, to netip.AddrPort, warmup, duration time.Duration) (float64, error) {
	perSecond := make([]float64, len(from))
	var t threads
	for i, p := range from {
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
			perSecond[i] = float64(made) / time.Since(start).Seconds()
			return ctx.Err()
		}
		// Enter the place once, not for each connection.
		t.start(func() error { return p.Do(pinned(false, loop)) })
	}
	t.wg.Wait()
	sum := 0.0
	for _, v := range perSecond {
		sum += v
	}
	return sum, t.err()
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
		return errors.New("the far end closed a connection before it answered")
	}
	return nil
}

// Reach sends datagrams until one has arrived at the far end, or ctx ends.
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
		_, _ = s.send([]byte("culvert bench")) // on an error send the next
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
