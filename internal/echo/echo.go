// Package echo sends ICMP echo requests (RFC 792, RFC 4443) and measures the
// round-trip time, the loss and the path MTU to an address. It does not know about
// leases or tunnels, and keeps no state between measurements.
package echo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// MinSize returns the minimum size of a request, in bytes of the IP packet: the
// headers and 8 bytes of payload.
func MinSize(is4 bool) int {
	if is4 {
		return 20 + 8 + payloadMin
	}
	return 40 + 8 + payloadMin
}

const payloadMin = 8

var (
	// ErrTimeout means that no reply arrived in time.
	ErrTimeout = errors.New("no reply")
	// ErrTooBig means that the packet exceeds the MTU of this host's route.
	ErrTooBig = errors.New("larger than the MTU of this host's route")
)

// Refused is an ICMP error returned by a host or router on the path.
type Refused struct {
	By     netip.Addr
	Reason string
	MTU    int // next-hop MTU if the packet was too big; else 0
}

func (e Refused) Error() string { return fmt.Sprintf("%s reports: %s", e.By, e.Reason) }

// Pinger sends requests from one address. Its methods are safe for concurrent
// use, so that one socket can serve many destinations.
type Pinger struct {
	conn net.PacketConn
	is4  bool
	id   uint16

	mu      sync.Mutex
	seq     uint16
	waiting map[uint16]waiter
	done    chan struct{} // closed when read returns
}

type waiter struct {
	to     netip.Addr
	answer chan<- answer
}

type answer struct {
	at  time.Time
	err error
}

// Open opens a raw ICMP socket (CAP_NET_RAW) bound to the address, which may be
// unspecified. Requests have DF set and ignore the path MTU that the kernel has
// cached (IP_PMTUDISC_PROBE), so that the actual path is measured.
func Open(from netip.Addr) (*Pinger, error) {
	network := "ip4:icmp"
	if from.Is6() {
		network = "ip6:ipv6-icmp"
	}
	c, err := net.ListenPacket(network, from.String())
	if err != nil {
		return nil, fmt.Errorf("opening an ICMP socket on %s: %w", from, err)
	}
	p := &Pinger{
		conn: c, is4: from.Is4(), id: uint16(os.Getpid()) ^ uint16(time.Now().UnixNano()>>10),
		waiting: make(map[uint16]waiter), done: make(chan struct{}),
	}
	if err := p.probeMTU(); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("setting DF on the ICMP socket: %w", err)
	}
	go p.read()
	return p, nil
}

func (p *Pinger) probeMTU() error {
	raw, err := p.conn.(*net.IPConn).SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		if p.is4 {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
		} else {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
		}
	})
	return errors.Join(err, failed)
}

// Close closes the socket; pending requests return net.ErrClosed.
func (p *Pinger) Close() error {
	err := p.conn.Close()
	<-p.done
	return err
}

// Ping sends one request as an IP packet of size bytes and waits for a reply, an
// ICMP error (Refused) or the end of ctx (ErrTimeout if its deadline passed).
func (p *Pinger) Ping(ctx context.Context, to netip.Addr, size int) (time.Duration, error) {
	if to.Is4() != p.is4 {
		return 0, fmt.Errorf("%s is not of the socket's address family", to)
	}
	size = max(size, MinSize(p.is4))
	answers := make(chan answer, 1)
	p.mu.Lock()
	p.seq++
	seq := p.seq
	p.waiting[seq] = waiter{to, answers}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.waiting, seq)
		p.mu.Unlock()
	}()

	var kind icmp.Type = ipv4.ICMPTypeEcho
	if !p.is4 {
		kind = ipv6.ICMPTypeEchoRequest
	}
	body := &icmp.Echo{ID: int(p.id), Seq: int(seq), Data: make([]byte, size-MinSize(p.is4)+payloadMin)}
	m, err := (&icmp.Message{Type: kind, Body: body}).Marshal(nil)
	if err != nil {
		return 0, err
	}
	sent := time.Now()
	if _, err := p.conn.WriteTo(m, &net.IPAddr{IP: to.AsSlice()}); errors.Is(err, unix.EMSGSIZE) {
		return 0, ErrTooBig
	} else if err != nil {
		return 0, err
	}
	select {
	case a := <-answers:
		return a.at.Sub(sent), a.err
	case <-p.done:
		return 0, net.ErrClosed
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return 0, ErrTimeout
		}
		return 0, ctx.Err()
	}
}

// PathMTU returns the size in bytes of the largest IP packet between low and high
// that gets a reply, 0 if not even low does. A size is too big if two requests,
// each limited by timeout, get no reply.
func (p *Pinger) PathMTU(ctx context.Context, to netip.Addr, low, high int, timeout time.Duration) (int, error) {
	passes := func(size int) (bool, error) {
		for range 2 {
			each, cancel := context.WithTimeout(ctx, timeout)
			_, err := p.Ping(each, to, size)
			cancel()
			var refused Refused
			switch {
			case err == nil:
				return true, nil
			case ctx.Err() != nil:
				return false, ctx.Err()
			case errors.Is(err, ErrTooBig), errors.As(err, &refused) && refused.MTU != 0:
				return false, nil
			case errors.Is(err, ErrTimeout), errors.As(err, &refused):
			default:
				return false, err
			}
		}
		return false, nil
	}
	if ok, err := passes(high); ok || err != nil {
		return high, err
	}
	if ok, err := passes(low); !ok || err != nil {
		return 0, err
	}
	for low+1 < high {
		middle := (low + high) / 2
		ok, err := passes(middle)
		if err != nil {
			return 0, err
		}
		if ok {
			low = middle
		} else {
			high = middle
		}
	}
	return low, nil
}

// Summary is the result of a series of requests.
type Summary struct {
	Sent     int             `json:"sent"`
	Answered int             `json:"answered"`
	Times    []time.Duration `json:"-"` // round-trip times, sorted
	// Err is the error of the last failed request; nil if none failed.
	Err error `json:"-"`
}

// Median returns the median round-trip time, 0 without a reply.
func (s Summary) Median() time.Duration {
	if len(s.Times) == 0 {
		return 0
	}
	return s.Times[len(s.Times)/2]
}

// Series sends count requests, one after the other and at least interval apart,
// each limited by timeout. Its error is that of ctx.
func (p *Pinger) Series(ctx context.Context, to netip.Addr, count, size int, interval, timeout time.Duration) (Summary, error) {
	var s Summary
	for i := range count {
		next := time.Now().Add(interval)
		each, cancel := context.WithTimeout(ctx, timeout)
		took, err := p.Ping(each, to, size)
		cancel()
		if ctx.Err() != nil {
			break
		}
		s.Sent++
		if err == nil {
			s.Answered++
			s.Times = append(s.Times, took)
		} else {
			s.Err = err
		}
		if i+1 < count {
			select {
			case <-ctx.Done():
			case <-time.After(time.Until(next)):
			}
		}
	}
	slices.Sort(s.Times)
	return s, ctx.Err()
}

// read dispatches replies to the waiting requests until the socket is closed.
func (p *Pinger) read() {
	defer close(p.done)
	b := make([]byte, 1<<16)
	for {
		n, from, err := p.conn.ReadFrom(b)
		at := time.Now()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // such as a pending ICMP error, which also arrives as a packet
		}
		sender, _ := netip.AddrFromSlice(from.(*net.IPAddr).IP)
		p.deliver(sender.Unmap(), b[:n], at)
	}
}

func (p *Pinger) deliver(from netip.Addr, packet []byte, at time.Time) {
	protocol := 58
	if p.is4 {
		protocol = 1
	}
	m, err := icmp.ParseMessage(protocol, packet)
	if err != nil {
		return
	}
	if e, ok := m.Body.(*icmp.Echo); ok && (m.Type == ipv4.ICMPTypeEchoReply || m.Type == ipv6.ICMPTypeEchoReply) {
		p.answer(uint16(e.ID), uint16(e.Seq), from, answer{at: at})
		return
	}
	refused := Refused{By: from}
	var quote []byte
	switch body := m.Body.(type) {
	case *icmp.DstUnreach:
		quote, refused.Reason = body.Data, unreachable(m.Type, m.Code)
		if m.Type == ipv4.ICMPTypeDestinationUnreachable && m.Code == 4 { // fragmentation needed; the ICMP header has the MTU (RFC 1191)
			refused.MTU = max(1, int(packet[6])<<8|int(packet[7]))
			refused.Reason = fmt.Sprintf("packets of more than %d bytes do not pass", refused.MTU)
		}
	case *icmp.PacketTooBig:
		quote, refused.MTU = body.Data, max(1, body.MTU)
		refused.Reason = fmt.Sprintf("packets of more than %d bytes do not pass", refused.MTU)
	case *icmp.TimeExceeded:
		quote, refused.Reason = body.Data, "time to live exceeded, possibly a routing loop"
	default:
		return
	}
	if id, seq, to, ok := quoted(quote, p.is4); ok {
		p.answer(id, seq, to, answer{at, refused})
	}
}

// answer delivers a to the request with this ID, sequence number and destination.
func (p *Pinger) answer(id, seq uint16, to netip.Addr, a answer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w, ok := p.waiting[seq]; ok && id == p.id && w.to == to {
		delete(p.waiting, seq)
		w.answer <- a
	}
}

// quoted parses the packet quoted in an ICMP error: the IP header and at least 8
// bytes after it (RFC 792).
func quoted(b []byte, is4 bool) (id, seq uint16, to netip.Addr, ok bool) {
	if is4 {
		if len(b) < 20 || int(b[0]&15)*4 < 20 || len(b) < int(b[0]&15)*4+8 || b[9] != unix.IPPROTO_ICMP {
			return 0, 0, to, false
		}
		to = netip.AddrFrom4([4]byte(b[16:20]))
		b = b[int(b[0]&15)*4:]
	} else {
		if len(b) < 48 || b[6] != unix.IPPROTO_ICMPV6 {
			return 0, 0, to, false
		}
		to = netip.AddrFrom16([16]byte(b[24:40]))
		b = b[40:]
	}
	return uint16(b[4])<<8 | uint16(b[5]), uint16(b[6])<<8 | uint16(b[7]), to, true
}

// unreachable describes a code of Destination Unreachable.
func unreachable(t icmp.Type, code int) string {
	words := map[int]string{
		0: "network unreachable", 1: "host unreachable", 2: "protocol unreachable", 3: "port unreachable",
		9: "network prohibited", 10: "host prohibited", 13: "prohibited by a firewall",
	}
	if t == ipv6.ICMPTypeDestinationUnreachable {
		words = map[int]string{
			0: "no route", 1: "prohibited by a firewall", 2: "beyond the scope of the source", 3: "address unreachable",
			4: "port unreachable", 5: "source refused by policy", 6: "route rejected",
		}
	}
	if w, ok := words[code]; ok {
		return w
	}
	return fmt.Sprintf("unreachable (code %d)", code)
}
