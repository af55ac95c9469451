package encap

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The fakes of the operating system (os.go): a device and sockets in memory, which need
// no privileges and fail when the test says so.
//
//	fakeDevice.in ── loop ── fakeSocket.sent
//	fakeSocket.arriving ── loop ── fakeDevice.out

// fakeDevice is a device queue. The frames of in are read, those of out were written.
type fakeDevice struct {
	in, out [][]byte
	// readErrors and writeErrors answer the next calls; 0 lets a call succeed.
	readErrors, writeErrors []unix.Errno
}

func (d *fakeDevice) fd() int { return 100 }

func (d *fakeDevice) read(b []byte) (int, unix.Errno) {
	if errno := next(&d.readErrors); errno != 0 {
		return 0, errno
	}
	if len(d.in) == 0 {
		return 0, unix.EAGAIN
	}
	n := copy(b, d.in[0])
	d.in = d.in[1:]
	return n, 0
}

func (d *fakeDevice) write(frame []unix.Iovec) unix.Errno {
	if errno := next(&d.writeErrors); errno != 0 {
		return errno
	}
	d.out = append(d.out, gather(frame))
	return 0
}

// queue adds a packet to read, with its virtio header.
func (d *fakeDevice) queue(v vnetHeader, packet []byte) {
	frame := make([]byte, vnetHeaderLen, vnetHeaderLen+len(packet))
	v.put(frame)
	d.in = append(d.in, append(frame, packet...))
}

// packets returns the packets that were written, cut as the kernel cuts frames.
func (d *fakeDevice) packets(t *testing.T) [][]byte {
	t.Helper()
	var all [][]byte
	for _, frame := range d.out {
		var v vnetHeader
		v.parse(frame)
		all = append(all, cutAsDevice(t, v, frame[vnetHeaderLen:])...)
	}
	return all
}

// fakeSocket is a socket of the underlay.
type fakeSocket struct {
	number   int
	sent     []message
	calls    int // of send
	atOnce   int // messages that one send takes; 0: all
	arriving []arrival
	icmp     []icmpError
	cleared  int // calls of clearError
	// sendErrors and receiveErrors answer the next calls; 0 lets a call succeed.
	sendErrors, receiveErrors []unix.Errno
}

// message is one message that was sent.
type message struct {
	to      netip.Addr
	data    []byte
	segment int // UDP_SEGMENT; 0 if not set
	tos     uint8
}

// arrival is one message to receive. A segment or class of 0 has no control message.
type arrival struct {
	from    netip.Addr
	data    []byte
	segment int // UDP_GRO
	class   uint8
	flags   int32
}

// icmpError is an entry of the error queue.
type icmpError struct {
	to, by netip.Addr
	mtu    int
	errno  unix.Errno
	quote  []byte
}

func (s *fakeSocket) fd() int { return 200 + s.number }

func (s *fakeSocket) send(msgs []mmsghdr) (int, unix.Errno) {
	s.calls++
	if errno := next(&s.sendErrors); errno != 0 {
		return -1, errno
	}
	if s.atOnce > 0 {
		msgs = msgs[:min(len(msgs), s.atOnce)]
	}
	for i := range msgs {
		h := &msgs[i].hdr
		m := message{data: gather(iovecs(h))}
		m.to, _ = address(unsafe.Slice(h.Name, h.Namelen))
		for c := unsafe.Slice(h.Control, h.Controllen); len(c) > 0; c = c[controlNext(controlLen(c)):] {
			switch binary.NativeEndian.Uint32(c[controlWord+4:]) {
			case unix.UDP_SEGMENT:
				m.segment = int(binary.NativeEndian.Uint16(c[unix.SizeofCmsghdr:]))
			case unix.IP_TOS, unix.IPV6_TCLASS:
				m.tos = uint8(binary.NativeEndian.Uint32(c[unix.SizeofCmsghdr:]))
			}
		}
		s.sent = append(s.sent, m)
	}
	return len(msgs), 0
}

func (s *fakeSocket) receive(msgs []mmsghdr) (int, unix.Errno) {
	if errno := next(&s.receiveErrors); errno != 0 {
		return 0, errno
	}
	if len(s.arriving) == 0 {
		return 0, unix.EAGAIN
	}
	n := min(len(msgs), len(s.arriving))
	for i, a := range s.arriving[:n] {
		h := &msgs[i].hdr
		h.Namelen = uint32(copy(unsafe.Slice(h.Name, h.Namelen), sockaddr(a.from)))
		control := make([]byte, 0, recvControlSpace)
		if a.segment != 0 {
			control = appendControl(control, unix.SOL_UDP, unix.UDP_GRO, 4)
			binary.NativeEndian.PutUint32(control[len(control)-controlWord:], uint32(a.segment))
		}
		if a.class != 0 {
			control = appendControl(control, unix.IPPROTO_IP, unix.IP_TOS, 1)
			control[len(control)-controlWord] = a.class
		}
		h.SetControllen(copy(unsafe.Slice(h.Control, h.Controllen), control))
		h.Flags = a.flags
		iov := iovecs(h)[0]
		msgs[i].n = uint32(copy(unsafe.Slice(iov.Base, iov.Len), a.data))
	}
	s.arriving = s.arriving[n:]
	return n, 0
}

func (s *fakeSocket) receiveError(h *unix.Msghdr) (int, unix.Errno) {
	if len(s.icmp) == 0 {
		return 0, unix.EAGAIN
	}
	e := s.icmp[0]
	s.icmp = s.icmp[1:]
	h.Namelen = uint32(copy(unsafe.Slice(h.Name, h.Namelen), sockaddr(e.to)))
	// struct sock_extended_err, then the sender's address.
	body := make([]byte, 16, 64)
	binary.NativeEndian.PutUint32(body, uint32(e.errno))
	body[4] = 2 // SO_EE_ORIGIN_ICMP
	binary.NativeEndian.PutUint32(body[8:], uint32(e.mtu))
	body = append(body, sockaddr(e.by)...)
	control := make([]byte, unix.SizeofCmsghdr)
	putControlLen(control, len(control)+len(body))
	binary.NativeEndian.PutUint32(control[controlWord:], unix.SOL_IP)
	binary.NativeEndian.PutUint32(control[controlWord+4:], unix.IP_RECVERR)
	h.SetControllen(copy(unsafe.Slice(h.Control, h.Controllen), append(control, body...)))
	iov := iovecs(h)[0]
	return copy(unsafe.Slice(iov.Base, iov.Len), e.quote), 0
}

func (s *fakeSocket) clearError() { s.cleared++ }

// next takes the next answer from a list; 0 if it is empty.
func next(answers *[]unix.Errno) unix.Errno {
	if len(*answers) == 0 {
		return 0
	}
	errno := (*answers)[0]
	*answers = (*answers)[1:]
	return errno
}

// gather copies the slices of a message.
func gather(iovs []unix.Iovec) []byte {
	var b []byte
	for _, iov := range iovs {
		b = append(b, unsafe.Slice(iov.Base, iov.Len)...)
	}
	return b
}

func sockaddr(a netip.Addr) []byte {
	if !a.IsValid() {
		return nil
	}
	p := vxlanPeer(netip.PrefixFrom(here4, 24), netip.AddrPortFrom(a, 1), 0, [6]byte{}, [6]byte{})
	return p.name[:p.nameLen]
}

// fakeWait simulates the kernel's part in waiting. Each step says which descriptors
// become ready after how long; a wait that is shorter returns without any. After the last
// step the loop is stopped.
type fakeWait struct {
	q     *queue
	steps []step
	// calls are the limits of all waits.
	calls []time.Duration
}

type step struct {
	after time.Duration
	ready []int // descriptors
	errs  []int // descriptors with POLLERR
	do    func()
}

func (w *fakeWait) wait(polls []unix.PollFd, atMost time.Duration) bool {
	w.calls = append(w.calls, atMost)
	clearEvents(polls)
	if len(w.steps) == 0 {
		w.q.stopping.Store(true)
		return true
	}
	s := &w.steps[0]
	if atMost != forever && s.after > atMost {
		time.Sleep(atMost)
		s.after -= atMost
		return false
	}
	time.Sleep(s.after)
	if s.do != nil {
		s.do()
	}
	for i := range polls {
		if slices.Contains(s.ready, int(polls[i].Fd)) {
			polls[i].Revents |= unix.POLLIN
		}
		if slices.Contains(s.errs, int(polls[i].Fd)) {
			polls[i].Revents |= unix.POLLERR
		}
	}
	w.steps = w.steps[1:]
	return true
}

// fakeNode is both directions of a node on fakes. It leases here4's subnet; its peer
// leases there4's. Packets to receive come from the peer.
type fakeNode struct {
	*common
	device   *fakeDevice
	socket   *fakeSocket
	peer     *Peer
	out      *egress
	in       *ingress
	counters Counters // of both directions
	vtep     VTEP
}

var peerAddr = netip.MustParseAddr("192.0.2.2")

func newFakeNode(f Format) *fakeNode {
	n := &fakeNode{common: commonOf(f), device: &fakeDevice{}, socket: &fakeSocket{}, vtep: VTEP{testVNI, [6]byte{2, 1}}}
	n.peer = NewPeer(PeerOptions{
		Format: f, Subnet: netip.PrefixFrom(there4, 24), Underlay: netip.AddrPortFrom(peerAddr, 8472),
		VTEP: VTEP{testVNI, [6]byte{2, 2}}, Self: n.vtep,
	})
	n.setPeers(n.peer)
	n.out = newEgress(n.common, [2][]source{{{socket: n.socket, port: 8472}}}, &n.counters)
	n.out.device = n.device
	n.out.dontFragment = !n.udp
	n.in = newIngress(n.common, n.device, n.socket, testRecvBatch(), Underlay{Self: n.vtep, LinkHeader: 14}, 1450, &n.counters)
	return n
}

func (n *fakeNode) setPeers(peers ...*Peer) {
	t := NewTable([]netip.Prefix{netip.PrefixFrom(here4, 24).Masked(), netip.MustParsePrefix("fd00:5:1::/64")}, peers)
	t.count(1, n.table.Load())
	n.table.Store(t)
}

// from returns a datagram with a packet of the peer's.
func (n *fakeNode) from(packet []byte) []byte {
	b := make([]byte, n.header, n.header+len(packet))
	n.format.Put(b, VTEP{testVNI, [6]byte{2, 2}}, n.vtep, etherTypeOf(packet[0]>>4 == 4))
	return append(b, packet...)
}

// reply is a spec with its addresses exchanged.
func (s spec) reply() spec {
	s.source, s.destination = s.destination, s.source
	return s
}

// gsoHeader is the virtio header of a TCP or UDP frame with segments of size bytes of
// payload; of a single packet if size is 0.
func (s spec) vnet(size int) vnetHeader {
	v := vnetHeader{flags: vnetNeedsCsum, csumStart: 20, csumOffset: 16}
	if !s.is4() {
		v.csumStart = 40
	}
	if s.proto == protoUDP {
		v.csumOffset = 6
	}
	if size > 0 {
		v.gsoSize, v.gsoType = uint16(size), gsoTCP4
		switch {
		case s.proto == protoUDP:
			v.gsoType = gsoUDP
		case !s.is4():
			v.gsoType = gsoTCP6
		}
	}
	return v
}
