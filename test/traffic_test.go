package test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"culvert/internal/lab"
)

// pings sends echo requests from pod to pod at an interval, and counts replies.
type pings struct {
	cancel  context.CancelFunc
	running sync.WaitGroup
	mu      sync.Mutex
	missing map[uint64]time.Time // when the requests without a reply were sent
	sent    uint64
	paused  bool
	every   time.Duration
	slowest time.Duration // longest round-trip time
}

const pingEvery = 10 * time.Millisecond

// startPings sends 100 requests per second until stop is called or the test ends.
func startPings(t testing.TB, from, to *lab.Pod) *pings {
	t.Helper()
	return startPingsEvery(t, from, to, pingEvery)
}

func startPingsEvery(t testing.TB, from, to *lab.Pod, every time.Duration) *pings {
	t.Helper()
	network, protocol := "ip4:icmp", 1
	var request, reply icmp.Type = ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply
	source, dest := from.Addrs[0], to.Addrs[0]
	if dest.Is6() {
		network, protocol, request, reply = "ip6:ipv6-icmp", 58, ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	conn, err := from.ListenPacket(t.Context(), network, source.String())
	if err != nil {
		t.Fatal(err)
	}
	roomy(conn)
	ctx, cancel := context.WithCancel(context.Background())
	p := &pings{cancel: cancel, missing: map[uint64]time.Time{}, every: every}
	id := os.Getpid() & 0xffff
	p.running.Go(func() {
		defer conn.Close()
		tick := time.NewTicker(every)
		defer tick.Stop()
		for ctx.Err() == nil {
			if n, ok := p.next(); ok {
				m := icmp.Message{Type: request, Body: &icmp.Echo{ID: id, Seq: int(n & 0xffff), Data: binary.BigEndian.AppendUint64(nil, n)}}
				if text, err := m.Marshal(nil); err == nil {
					_, _ = conn.WriteTo(text, &net.IPAddr{IP: dest.AsSlice()}) // an error counts as a loss
				}
			}
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
		for end := time.Now().Add(3 * time.Second); p.waiting() && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		}
	})
	p.running.Go(func() {
		b := make([]byte, 1500)
		for {
			k, _, err := conn.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			m, err := icmp.ParseMessage(protocol, b[:max(k, 0)])
			if err != nil || m.Type != reply {
				continue
			}
			if e, ok := m.Body.(*icmp.Echo); ok && e.ID == id && len(e.Data) == 8 {
				p.mu.Lock()
				n := binary.BigEndian.Uint64(e.Data)
				if at, ok := p.missing[n]; ok {
					p.slowest = max(p.slowest, time.Since(at))
				}
				delete(p.missing, n)
				p.mu.Unlock()
			}
		}
	})
	t.Cleanup(func() { p.cancel(); p.running.Wait() })
	return p
}

// roomy gives a socket a receive buffer of 16 MB, or what the kernel allows: a reader that has to wait
// for a CPU must not lose what has arrived.
func roomy(c net.PacketConn) {
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		const size = 16 << 20
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, size) != nil {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, size)
		}
	})
}

// next counts another request, unless the pings pause.
func (p *pings) next() (n uint64, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.paused {
		return 0, false
	}
	p.sent++
	p.missing[p.sent] = time.Now()
	return p.sent, true
}

// pause stops sending until resume, and reports whether all requests were answered within
// 10 s: then none is on its way.
func (p *pings) pause() (answered bool) {
	p.mu.Lock()
	p.paused = true
	p.mu.Unlock()
	for end := time.Now().Add(10 * time.Second); p.waiting() && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	return !p.waiting()
}

func (p *pings) resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused = false
}

// waiting reports whether a request has no reply yet.
func (p *pings) waiting() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.missing) > 0
}

// stop stops sending and returns how many requests were sent and how many had no reply.
func (p *pings) stop() (sent, lost int) {
	p.cancel()
	p.running.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return int(p.sent), len(p.missing)
}

// gap returns the longest time of consecutive lost requests. Call it after stop.
func (p *pings) gap() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	longest := time.Duration(0)
	for n, at := range p.missing {
		if _, before := p.missing[n-1]; before {
			continue
		}
		last := at
		for next, ok := p.missing[n]; ok; next, ok = p.missing[n] {
			last = next
			n++
		}
		longest = max(longest, last.Sub(at)+p.every)
	}
	return longest
}

// sentSoFar counts those that were sent.
func (p *pings) sentSoFar() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return int(p.sent)
}

// answered counts those that had a reply.
func (p *pings) answered() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return int(p.sent) - len(p.missing)
}

// lostSoFar counts the requests without a reply that were sent more than a second ago.
func (p *pings) lostSoFar() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, at := range p.missing {
		if time.Since(at) > time.Second {
			n++
		}
	}
	return n
}

// flow is a TCP connection from pod to pod on which a counter makes round trips, at most 100
// per second, until stop is called or the test ends.
type flow struct {
	cancel  context.CancelFunc
	running sync.WaitGroup
	every   time.Duration // at least, from one round trip to the next

	timeout time.Duration // how long it waits for a round trip

	mu      sync.Mutex
	turns   uint64
	longest time.Duration // of one round trip
	err     error
}

func startFlow(t testing.TB, from, to *lab.Pod) *flow {
	t.Helper()
	return startFlowTo(t, from, to, to.Addrs[0])
}

// startFlowTo starts a flow that addresses the other pod as at, which the host translates.
func startFlowTo(t testing.TB, from, to *lab.Pod, at netip.Addr) *flow {
	t.Helper()
	return startFlowOf(t, from, to, at, pingEvery, 30*time.Second)
}

func startFlowEvery(t testing.TB, from, to *lab.Pod, every, timeout time.Duration) *flow {
	t.Helper()
	return startFlowOf(t, from, to, to.Addrs[0], every, timeout)
}

func startFlowOf(t testing.TB, from, to *lab.Pod, at netip.Addr, every, timeout time.Duration) *flow {
	t.Helper()
	l, err := to.Listen(t.Context(), "tcp", netip.AddrPortFrom(to.Addrs[0], 0).String())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f := &flow{cancel: cancel, every: every, timeout: timeout}
	f.running.Go(func() { // echoes
		defer l.Close()
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(c, c)
	})
	dialing, done := context.WithTimeout(t.Context(), 10*time.Second)
	c, err := from.DialWith(dialing, net.Dialer{LocalAddr: &net.TCPAddr{IP: from.Addrs[0].AsSlice()}}, "tcp",
		netip.AddrPortFrom(at, l.Addr().(*net.TCPAddr).AddrPort().Port()).String())
	done()
	if err != nil {
		t.Fatalf("opening a flow: %v", err)
	}
	f.running.Go(func() {
		defer c.Close()
		err := f.turn(ctx, c)
		f.mu.Lock()
		defer f.mu.Unlock()
		f.err = err
	})
	t.Cleanup(func() { cancel(); f.running.Wait() })
	return f
}

func (f *flow) turn(ctx context.Context, c net.Conn) error {
	buf := make([]byte, 1000)
	for n := uint64(1); ctx.Err() == nil; n++ {
		began := time.Now()
		binary.BigEndian.PutUint64(buf, n)
		if err := c.SetDeadline(began.Add(f.timeout)); err != nil {
			return err
		}
		if _, err := c.Write(buf); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			return err
		}
		if got := binary.BigEndian.Uint64(buf); got != n {
			return fmt.Errorf("the counter %d came back instead of %d", got, n)
		}
		f.mu.Lock()
		f.turns, f.longest = n, max(f.longest, time.Since(began))
		f.mu.Unlock()
		time.Sleep(f.every)
	}
	return nil
}

// state returns what stop returns, without stopping.
func (f *flow) state() (turns uint64, longest time.Duration, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.turns, f.longest, f.err
}

// stop closes the connection and returns the number of round trips, the longest of them,
// and the error if the connection broke.
func (f *flow) stop() (turns uint64, longest time.Duration, err error) {
	f.cancel()
	f.running.Wait()
	return f.state()
}
