package backend

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/echo"
)

// request is one echo request of a burst, and its result.
type request struct {
	peer     *probed
	to       netip.Addr
	direct   bool
	size     int // of the IP packet; 0 for the minimum
	sent     time.Time
	answered time.Time
	rtt      time.Duration
}

// errLeft is the result of a request that was not sent because its target was removed.
var errLeft = errors.New("the peer has left")

// probeSocket sends bursts of echo requests and waits for the answers in poll(2).
// That is cheaper than the runtime's poller with a timer per request.
type probeSocket struct {
	prober *Prober
	fds    map[socketKind]int
	id     uint16
	seq    uint16
	buffer [1 << 16]byte
}

// socketKind is a socket for one address family and one source address.
type socketKind struct{ is4, direct bool }

func (p *Prober) open() (*probeSocket, error) {
	s := &probeSocket{prober: p, fds: make(map[socketKind]int), id: uint16(os.Getpid()) ^ uint16(time.Now().UnixNano()>>10)}
	// Check the permission only: the source addresses may not exist yet.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return nil, fmt.Errorf("opening a socket for echo requests: %w", err)
	}
	return s, unix.Close(fd)
}

func (s *probeSocket) close() {
	for _, fd := range s.fds {
		_ = unix.Close(fd)
	}
}

// of returns the socket for a kind of target. It is opened once its source address
// exists.
func (s *probeSocket) of(kind socketKind) (fd int, err error) {
	if fd, ok := s.fds[kind]; ok {
		return fd, nil
	}
	const flags = unix.SOCK_RAW | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	from := s.prober.source(kind.is4, kind.direct)
	var errs []error
	if kind.is4 {
		if fd, err = unix.Socket(unix.AF_INET, flags, unix.IPPROTO_ICMP); err != nil {
			return -1, err
		}
		const icmpFilter = 1 // ICMP_FILTER (linux/icmp.h): a bit per ICMP type to drop
		errs = append(errs, unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, ^(1<<0)),
			unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE),
			unix.Bind(fd, &unix.SockaddrInet4{Addr: from.As4()}))
	} else {
		if fd, err = unix.Socket(unix.AF_INET6, flags, unix.IPPROTO_ICMPV6); err != nil {
			return -1, err
		}
		only := &unix.ICMPv6Filter{}
		for i := range only.Data {
			only.Data[i] = 1<<32 - 1
		}
		only.Data[echoReply6>>5] &^= 1 << (echoReply6 & 31)
		errs = append(errs, unix.SetsockoptICMPv6Filter(fd, unix.SOL_ICMPV6, unix.ICMPV6_FILTER, only),
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE),
			unix.Bind(fd, &unix.SockaddrInet6{Addr: from.As16()}))
	}
	if err := errors.Join(errs...); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("preparing a socket for echo requests from %s: %w", from, err)
	}
	s.fds[kind] = fd
	return fd, nil
}

// The types of ICMP messages (RFC 792, RFC 4443).
const (
	echoReply, echoRequest   = 0, 8
	echoReply6, echoRequest6 = 129, 128
)

// measure sends a burst and waits for the answers. It returns an error for each request
// without an answer.
func (s *probeSocket) measure(ctx context.Context, burst []request) []error {
	errs := make([]error, len(burst))
	first := s.seq
	missing := 0
	for i := range burst {
		r := &burst[i]
		s.seq++
		if !s.prober.has(r.peer) {
			errs[i] = errLeft
			continue
		}
		fd, err := s.of(socketKind{r.to.Is4(), r.direct})
		if err == nil {
			r.sent = time.Now()
			err = s.send(fd, r.to, r.size)
		}
		errs[i] = err
		if err == nil {
			errs[i] = echo.ErrTimeout
			missing++
		}
		if i%8 == 7 { // the datapath carries packets that arrive together at a lower cost
			missing -= s.read(burst, errs, first)
		}
	}
	for end := time.Now().Add(probeTimeout); missing > 0 && ctx.Err() == nil; {
		left := time.Until(end)
		if left <= 0 {
			break
		}
		var polls []unix.PollFd
		for _, fd := range s.fds {
			polls = append(polls, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		}
		if n, err := unix.Poll(polls, int(left/time.Millisecond)+1); n == 0 && err == nil {
			break
		}
		missing -= s.read(burst, errs, first)
	}
	return errs
}

func (s *probeSocket) send(fd int, to netip.Addr, size int) error {
	payload := max(8, size-echo.MinSize(to.Is4())+8)
	b := s.buffer[:8+payload]
	clear(b)
	binary.BigEndian.PutUint16(b[4:], s.id)
	binary.BigEndian.PutUint16(b[6:], s.seq)
	if !to.Is4() {
		b[0] = echoRequest6 // the kernel writes the checksum
		return unix.Sendto(fd, b, unix.MSG_DONTWAIT, &unix.SockaddrInet6{Addr: to.As16()})
	}
	b[0] = echoRequest
	sum := uint32(echoRequest)<<8 + uint32(s.id) + uint32(s.seq)
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(b[2:], ^uint16(sum+sum>>16))
	return unix.Sendto(fd, b, unix.MSG_DONTWAIT, &unix.SockaddrInet4{Addr: to.As4()})
}

// read receives the waiting replies, and returns how many requests they answer.
func (s *probeSocket) read(burst []request, errs []error, first uint16) (answers int) {
	for kind, fd := range s.fds {
		for {
			n, from, err := unix.Recvfrom(fd, s.buffer[:], unix.MSG_DONTWAIT)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil { // nothing more, or an ICMP error about a request
				break
			}
			now := time.Now()
			b, reply := s.buffer[:n], byte(echoReply6)
			var sender netip.Addr
			switch a := from.(type) {
			case *unix.SockaddrInet4:
				sender, reply = netip.AddrFrom4(a.Addr), echoReply
				b = b[min(len(b), int(b[0]&15)*4):]
			case *unix.SockaddrInet6:
				sender = netip.AddrFrom16(a.Addr)
			}
			if len(b) < 8 || b[0] != reply || binary.BigEndian.Uint16(b[4:]) != s.id || sender.Is4() != kind.is4 {
				continue
			}
			i := int(binary.BigEndian.Uint16(b[6:]) - first - 1)
			if i >= len(burst) || burst[i].to != sender || !burst[i].answered.IsZero() || burst[i].sent.IsZero() {
				continue
			}
			burst[i].answered, burst[i].rtt = now, now.Sub(burst[i].sent)
			if errs[i] != nil {
				errs[i] = nil
				answers++
			}
		}
	}
	return answers
}
