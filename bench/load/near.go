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

// StartStreams opens n streams from each place to a session: to a Sink they
// send, from a Source they receive.
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

// Datagrams are streams of UDP datagrams that run until they are closed.
type Datagrams struct {
	sockets []*socket
	stop    atomic.Bool
	threads threads
	sent    atomic.Uint64
}

// StartDatagrams sends datagrams of size bytes of payload from each place, at
// perSecond of them in all or, if that is zero, as fast as it can.
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

// pace is how often a paced sender wakes and sends what is due.
const pace = 100 * time.Microsecond

func (d *Datagrams) paced(s *socket, buf []byte, perSecond float64) error {
	defer preciseSleep()()
	start, sent := time.Now(), uint64(0)
	sleep := unix.NsecToTimespec(pace.Nanoseconds())
	for !d.stop.Load() {
		due := uint64(time.Since(start).Seconds() * perSecond)
		// What a lost time slice left undone is made up for slowly, as it would
		// be by many independent senders, and not in one flood.
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

// Sent is how many datagrams have left.
func (d *Datagrams) Sent() uint64 { return d.sent.Load() }

// Close ends the streams and waits for their threads.
func (d *Datagrams) Close() error {
	d.stop.Store(true)
	d.threads.wg.Wait()
	for _, s := range d.sockets {
		s.close()
	}
	return d.threads.err()
}

// Requests sends one byte from each place to an Echo and waits for it, again and
// again, for the warm-up and then for the duration, and returns how long each
// took in the latter, sorted.
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
		const atMost = 1 << 17 // per second: none is as fast
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

// requests are those of one connection, and how long each took.
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
		// One answer is waited for, however long: one that came late in the
		// warm-up may have taken all of the time.
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

// Quantile returns the value below which the share q of the sorted values is.
func Quantile(sorted []time.Duration, q float64) time.Duration {
	i := int(q * float64(len(sorted)))
	return sorted[min(i, len(sorted)-1)]
}

// Connections opens a connection from each place to an Accept, sends a byte,
// gets one, closes, again and again, one after the other, and returns how many
// all of them made per second. It closes by a reset, so that neither end runs
// out of ports.
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
		// The place is entered once for all of them, not for each.
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
