package test

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/lab"
	"culvert/subnet"
)

// TestDifferential gives the same random packets to the userspace datapath and to the
// kernel's, right ones and damaged ones, in both directions and both families, and compares
// what comes out, byte by byte. docs/security.md lists the differences that are meant.
//
//	lab 1:  n2: raw sockets ══ n1: userspace ── pod
//	lab 2:  n2: raw sockets ══ n1: kernel    ── pod
//
// Both labs have the same addresses. CULVERT_DIFFERENTIAL is the number of packets in each
// direction; the default is 3,000. CULVERT_SEED repeats a run.
func TestDifferential(t *testing.T) {
	packets := times(t, "CULVERT_DIFFERENTIAL", 3000)
	seed := uint64(times(t, "CULVERT_SEED", int(time.Now().UnixNano())))
	t.Logf("CULVERT_SEED=%d", seed)
	var sides [2]*side
	for i, d := range datapaths {
		sides[i] = newSide(t, d)
	}
	for i := range 2 {
		if a, b := sides[0].addrs[i], sides[1].addrs[i]; a != b {
			t.Fatalf("the pods have the addresses %s and %s", a, b)
		}
	}
	// The kernel queues packets per processor, and keeps their order only on one.
	runtime.LockOSThread()
	var one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	for cpu, left := 0, one.Count(); left > 1; cpu++ {
		if one.IsSet(cpu) {
			one.Clear(cpu)
			left--
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	for _, direction := range []string{"ingress", "egress"} {
		r := rand.New(rand.NewPCG(seed, uint64(len(direction))))
		d := &differential{T: t, sides: sides, maker: packetMaker{r: r, pod: sides[0].addrs}, ingress: direction == "ingress", met: make(map[string]*meeting)}
		for d.sent < packets && d.different < 10 {
			d.round()
		}
		d.report(direction)
	}
}

// side is one lab.
type side struct {
	*cluster
	datapath string
	node     *lab.Node // n1
	pod      *lab.Pod
	subnets  []netip.Prefix
	addrs    [2]netip.Addr // the pod's, IPv4 first
	peer     *sender       // n2
	fromPod  podSender
	inPod    *capture
	onWire   *capture // at n2
}

func newSide(t *testing.T, datapath string) *side {
	t.Helper()
	s := &side{cluster: newClusterOf(t, lab.Options{Nodes: 2, Prefixes: dualUnderlay}), datapath: datapath}
	if _, err := s.SetProfile(lab.Plain); err != nil {
		t.Fatal(err)
	}
	s.setConfig(dual)
	s.node = s.Nodes[0]
	l := subnet.Lease{Backend: "vxlan"}
	for i, is4 := range []bool{true, false} {
		l.Endpoints = append(l.Endpoints, subnet.Endpoint{
			Subnet: leaseOf(1, is4), Public: s.Nodes[1].Addrs[i],
			VTEP: subnet.VTEP{VNI: 1, MAC: subnet.MAC{2, 0, 0, 0, byte(i), 2}},
		})
	}
	value, err := l.Value()
	if err != nil {
		t.Fatal(err)
	}
	s.put("/coreos.com/network/subnets/"+l.Key(), string(value))
	s.start(s.node, "--datapath", datapath, "--fast-path", "off")
	s.subnets = s.waitReady(s.node, 1).Lease.Subnets
	if s.pod, err = s.node.AddPod(t.Context(), "p1"); err != nil {
		t.Fatal(err)
	}
	s.addrs = [2]netip.Addr{s.pod.Addr(true), s.pod.Addr(false)}
	s.peer = newSender(t, s.Nodes[1])
	// Listen on the tunnel's port, or the kernel answers that it is closed.
	sink, err := s.Nodes[1].ListenPacket(t.Context(), "udp", ":8472")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sink.Close() })
	s.silence()
	// No packet may wait for, or be lost by, the resolution of an address.
	for i := range 2 {
		s.neighbour(s.node.Namespace, "cni0", s.addrs[i], s.pod.Namespace, "eth0")
		s.neighbour(s.node.Namespace, s.node.Link, s.Nodes[1].Addrs[i], s.Nodes[1].Namespace, s.Nodes[1].Link)
		s.neighbour(s.Nodes[1].Namespace, s.Nodes[1].Link, s.node.Addrs[i], s.node.Namespace, s.node.Link)
	}
	s.fromPod = s.newPodSender()
	s.inPod = newCapture(t, s.pod.Namespace, "eth0", arrivedInPod)
	s.onWire = newCapture(t, s.Nodes[1].Namespace, s.Nodes[1].Link, func(b []byte) (string, bool) { return s.tunnelled(b) })
	return s
}

// silence keeps the pod from answering, and has the kernel cut large packets and complete
// checksums before the pod and the underlay.
func (s *side) silence() {
	s.t.Helper()
	if err := s.pod.Do(func() error {
		routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
		for _, r := range routes {
			if r.Gw != nil {
				err = errors.Join(err, netlink.RouteDel(&r))
			}
		}
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	if err := s.node.Do(func() error {
		e, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer e.Close()
		if err := e.Change(s.node.Link, map[string]bool{"tx-checksum-ip-generic": false}); err != nil {
			return err
		}
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			if l.Type() == "veth" && l.Attrs().MasterIndex != 0 {
				return e.Change(l.Attrs().Name, map[string]bool{
					"tx-checksum-ip-generic": false, "tx-generic-segmentation": false, "tx-tcp-segmentation": false, "tx-tcp6-segmentation": false, "tx-udp-segmentation": false,
				})
			}
		}
		return errors.New("the pod has no link")
	}); err != nil {
		s.t.Fatal(err)
	}
}

// link returns an interface's MAC and index.
func (s *side) link(n *lab.Namespace, name string) (mac net.HardwareAddr, index int) {
	s.t.Helper()
	if err := n.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err == nil {
			mac, index = l.Attrs().HardwareAddr, l.Attrs().Index
		}
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	return mac, index
}

// neighbour gives a namespace a permanent neighbour: another's interface.
func (s *side) neighbour(n *lab.Namespace, link string, addr netip.Addr, of *lab.Namespace, ofLink string) {
	s.t.Helper()
	mac, _ := s.link(of, ofLink)
	_, index := s.link(n, link)
	if err := n.Do(func() error {
		return netlink.NeighSet(&netlink.Neigh{LinkIndex: index, State: netlink.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: mac})
	}); err != nil {
		s.t.Fatal(err)
	}
}

// podSender sends frames from the pod's interface.
type podSender struct {
	fd   int
	to   unix.SockaddrLinklayer
	macs [12]byte // destination and source
}

func (s *side) newPodSender() (p podSender) {
	s.t.Helper()
	bridge, _ := s.link(s.node.Namespace, "cni0")
	own, index := s.link(s.pod.Namespace, "eth0")
	copy(p.macs[:], bridge)
	copy(p.macs[6:], own)
	p.to = unix.SockaddrLinklayer{Ifindex: index}
	if err := s.pod.Do(func() (err error) {
		p.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.SetsockoptInt(p.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1)
		}
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { unix.Close(p.fd) })
	return p
}

// send sends a packet. A frame is cut into packets of so many bytes of payload if segment is
// not 0.
func (p *podSender) send(b []byte, segment int) error {
	frame := make([]byte, 10, 10+14+len(b)) // a virtio header (virtio_net_hdr)
	ethertype := uint16(unix.ETH_P_IP)
	if b[0]>>4 == 6 {
		ethertype = unix.ETH_P_IPV6
	}
	if segment > 0 {
		head := 20
		frame[1] = 1 // VIRTIO_NET_HDR_GSO_TCPV4
		if ethertype == unix.ETH_P_IPV6 {
			head, frame[1] = 40, 4
		}
		frame[0] = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
		binary.NativeEndian.PutUint16(frame[2:], uint16(14+head+int(b[head+12]>>4)*4))
		binary.NativeEndian.PutUint16(frame[4:], uint16(segment))
		binary.NativeEndian.PutUint16(frame[6:], uint16(14+head))
		binary.NativeEndian.PutUint16(frame[8:], 16)
	}
	frame = append(frame, p.macs[:]...)
	frame = binary.BigEndian.AppendUint16(frame, ethertype)
	err := unix.Sendto(p.fd, append(frame, b...), 0, &p.to)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.ENOBUFS) {
		return nil // of both sides
	}
	return err
}

// capture counts the packets that arrive at an interface.
type capture struct {
	mu    sync.Mutex
	seen  map[string]int
	ended map[string]bool // by the mark of a packet that was sent last
}

// endMark starts the payload of a packet that follows others.
const endMark = "differential-end-"

// newCapture counts by key, which returns what is compared of a packet.
func newCapture(t *testing.T, where *lab.Namespace, link string, key func([]byte) (string, bool)) *capture {
	t.Helper()
	c := &capture{seen: make(map[string]int), ended: make(map[string]bool)}
	var fd int
	if err := where.Do(func() (err error) {
		index, err := interfaceIndex(link)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		const all = unix.ETH_P_ALL
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100000}),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all>>8 | all&0xff<<8, Ifindex: index}),
		)
	}); err != nil {
		t.Fatal(err)
	}
	receive(t, fd, 1<<17, func(b []byte, from unix.Sockaddr) {
		if p := from.(*unix.SockaddrLinklayer).Protocol; p != unix.ETH_P_IP>>8|unix.ETH_P_IP&0xff<<8 && p != unix.ETH_P_IPV6>>8|unix.ETH_P_IPV6&0xff<<8 {
			return // ARP
		}
		k, ok := key(b)
		if !ok {
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if m := markIn(b); m != "" {
			c.ended[m] = true
		} else {
			c.seen[k]++
		}
	})
	return c
}

// markIn returns the mark that ends a packet, if any.
func markIn(b []byte) string {
	const length = len(endMark) + 10
	if len(b) < length || string(b[len(b)-length:len(b)-10]) != endMark {
		return ""
	}
	return string(b[len(b)-length:])
}

func (c *capture) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.seen)
	clear(c.ended)
}

func (c *capture) hasEnded(mark string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended[mark]
}

func (c *capture) all() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.seen)
}

// arrivedInPod leaves out what the node itself sends to the pod, such as neighbour
// solicitations.
func arrivedInPod(b []byte) (string, bool) {
	if from, to := addressesIn(b); from.IsLinkLocalUnicast() || to.IsMulticast() {
		return "", false
	}
	return string(withoutFragmentID(b)), true
}

// withoutFragmentID clears the identification of an IPv6 fragment. Connection tracking puts
// fragments together and cuts the packet again, with another identification.
func withoutFragmentID(b []byte) []byte {
	if len(b) >= 48 && b[0]>>4 == 6 && b[6] == unix.IPPROTO_FRAGMENT {
		b = slices.Clone(b)
		clear(b[44:48])
	}
	return b
}

// addressesIn returns the addresses of a packet, which may be damaged.
func addressesIn(b []byte) (from, to netip.Addr) {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	case len(b) >= 40 && b[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	}
	return from, to
}

// tunnelled returns what a tunnel packet consists of, without what the sender may choose:
// the outer identification, UDP source port and checksums.
func (s *side) tunnelled(b []byte) (string, bool) {
	p, ok := parseIP(b)
	if !ok || p.protocol != unix.IPPROTO_UDP || len(p.payload) < 8+22 || binary.BigEndian.Uint16(p.payload[2:]) != 8472 {
		return "", false
	}
	inner := p.payload[8+22:]
	if from, _ := addressesIn(inner); s.isOwn(from) {
		return "", false
	}
	outer := []byte{b[0] >> 4, b[1]}
	if p.from.Is4() {
		outer = append(outer, b[6]&0xe0, b[8])
	} else {
		outer[1] = b[0]<<4 | b[1]>>4
		outer = append(outer, 0, b[7])
	}
	if outer[1]&3 == 3 {
		outer[1]-- // of an inner CE the kernel makes ECT(0) (RFC 3168), userspace CE (RFC 6040)
	}
	return string(outer) + p.from.String() + p.to.String() + string(p.payload[8:8+22]) + string(withoutFragmentID(inner)), true
}

// isOwn reports whether the daemon itself sends from an address, to probe peers: the first of
// its subnet.
func (s *side) isOwn(from netip.Addr) bool {
	return slices.ContainsFunc(s.subnets, func(p netip.Prefix) bool { return p.Addr() == from })
}

// given is a random packet.
type given struct {
	is4     bool   // the outer family
	tos     byte   // of the outer header
	b       []byte // VXLAN header and frame on the way in, IP packet on the way out
	segment int    // on the way out: of a frame that is to be cut
}

// meeting counts what came of the packets of one kind.
type meeting struct{ sent, userspace, kernel int }

type differential struct {
	*testing.T
	sides   [2]*side
	maker   packetMaker
	ingress bool
	sent    int
	arrived int // on both sides alike
	marks   int

	different int // packets with a difference that is not meant
	batches   int
	once      int                 // batches that differed, and did not when sent again
	met       map[string]*meeting // where a difference is meant, by reason
	aside     map[string][]given
}

// perRound is the number of packets that are sent before what arrived is compared: few enough
// that no queue overflows.
const perRound = 100

// round sends packets and compares. Those for which a difference is meant are sent apart.
func (d *differential) round() {
	var batch []given
	for len(batch) < perRound {
		for _, g := range d.maker.some(d.ingress) {
			reason := d.meantDifference(g.b)
			if reason == "" {
				batch = append(batch, g)
				continue
			}
			if d.aside == nil {
				d.aside = make(map[string][]given)
			}
			d.aside[reason] = append(d.aside[reason], g)
		}
	}
	got := d.play(batch)
	d.sent += len(batch)
	d.batches++
	if !maps.Equal(got[0], got[1]) {
		d.explain(batch, got)
		return
	}
	d.arrived += count(got[0])
	for reason, all := range d.aside {
		if len(all) < perRound/2 {
			continue
		}
		got := d.play(all)
		m := d.met[reason]
		if m == nil {
			m = &meeting{}
			d.met[reason] = m
		}
		m.sent, m.userspace, m.kernel = m.sent+len(all), m.userspace+count(got[0]), m.kernel+count(got[1])
		d.sent += len(all)
		delete(d.aside, reason)
	}
}

func count(all map[string]int) (sum int) {
	for _, n := range all {
		sum += n
	}
	return sum
}

// play sends packets on both sides and returns what arrived on each, when both have had the
// packet that follows, and are equal or had time to become so.
func (d *differential) play(batch []given) (got [2]map[string]int) {
	d.Helper()
	d.marks++
	mark := fmt.Sprintf("%s%010d", endMark, d.marks)
	ends := [2]*capture{d.sides[0].onWire, d.sides[1].onWire}
	if d.ingress {
		ends = [2]*capture{d.sides[0].inPod, d.sides[1].inPod}
	}
	last := d.maker.last(d.ingress, mark)
	for i, s := range d.sides {
		ends[i].reset()
		for _, g := range append(batch[:len(batch):len(batch)], last) {
			if err := s.send(d.ingress, g); err != nil {
				d.Fatalf("%s: sending %x: %v", s.datapath, g.b, err)
			}
		}
	}
	for i, s := range d.sides {
		end := time.Now().Add(10 * time.Second)
		for ; !ends[i].hasEnded(mark); time.Sleep(50 * time.Microsecond) {
			if time.Now().After(end) {
				d.Fatalf("%s: the packet that follows did not arrive", s.datapath)
			}
		}
	}
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(time.Millisecond) {
		got = [2]map[string]int{ends[0].all(), ends[1].all()}
		if maps.Equal(got[0], got[1]) || time.Now().After(end) {
			return got
		}
	}
}

func (s *side) send(ingress bool, g given) error {
	if !ingress {
		return s.fromPod.send(g.b, g.segment)
	}
	i := map[bool]int{true: 0, false: 1}[g.is4]
	from, to := s.Nodes[1].Addrs[i], s.node.Addrs[i]
	whole := ipPacket(from, to, unix.IPPROTO_UDP, udpDatagram(from, to, 50000, 8472, g.b))
	if g.is4 {
		whole[1] = g.tos
		sumHeader(whole, 0)
	} else {
		whole[0] |= g.tos >> 4
		whole[1] = g.tos << 4
	}
	return s.peer.send(g.is4, to, [][]byte{whole})
}

// explain names the packets of a batch whose results differed: one by one, or else all.
func (d *differential) explain(batch []given, first [2]map[string]int) {
	d.Helper()
	found := 0
	for _, g := range batch {
		got := d.play([]given{g})
		if maps.Equal(got[0], got[1]) {
			continue
		}
		if found++; found > 3 {
			continue
		}
		text := ""
		for i, s := range d.sides {
			text += "\n" + s.datapath + ":"
			for k := range got[i] {
				text += fmt.Sprintf("\n  %d bytes, %s", len(k), short(k))
			}
		}
		d.Errorf("a packet, outer TOS %#x, segment %d, %d bytes, %s, becomes%s", g.tos, g.segment, len(g.b), short(string(g.b)), text)
	}
	if found > 0 {
		d.different += found
		d.Errorf("%d of %d packets differ", found, len(batch))
		return
	}
	again := d.play(batch)
	if maps.Equal(again[0], again[1]) {
		// A packet was lost on the way: a queue overflows if the machine is busy.
		d.logDifference("once, and not again", first)
		if d.once++; d.once > 1+d.batches/100 {
			d.different++
			d.Errorf("%d of %d batches differed, and did not when sent again", d.once, d.batches)
		}
		return
	}
	d.logDifference("together with others", again)
	d.different++
	d.Errorf("%d packets differ together, and none alone", len(batch))
}

func (d *differential) logDifference(how string, got [2]map[string]int) {
	d.Helper()
	for i, s := range d.sides {
		for k, n := range got[i] {
			if m := got[1-i][k]; m != n {
				d.Logf("%s: %s has %d times, the other %d times, %d bytes, %s", how, s.datapath, n, m, len(k), short(k))
			}
		}
	}
}

// short returns the start of a packet.
func short(b string) string { return hex.EncodeToString([]byte(b[:min(len(b), 160)])) }

func (d *differential) report(direction string) {
	d.Logf("| %s | %d sent | %d arrived on both sides alike | %d of %d batches had to be sent again |", direction, d.sent, d.arrived, d.once, d.batches)
	for reason, m := range d.met {
		d.Logf("| %s | %d sent | %d arrived by userspace, %d by the kernel |", reason, m.sent, m.userspace, m.kernel)
	}
	if d.Failed() || d.once > 0 || !d.ingress {
		return
	}
	// What did not arrive was counted. The loop adds to its counters after it has written.
	eventually(d, "every packet is counted", func() error {
		s, err := d.sides[0].status(d.sides[0].node)
		if err != nil {
			return err
		}
		counted := s.Datapath.Ingress.Packets
		for _, x := range s.Datapath.Drops {
			if strings.HasPrefix(x.Reason, "ingress-") {
				counted += x.Packets
			}
		}
		if want := uint64(d.sent + d.marks); counted != want {
			return fmt.Errorf("%d of %d are: %+v", counted, want, s.Datapath.Drops)
		}
		return nil
	})
}

// meantDifference returns the documented reason why the datapaths may treat a packet
// differently: a line of the table in docs/security.md. For most packets it is empty.
func (d *differential) meantDifference(b []byte) string {
	if !d.ingress {
		if from, _ := addressesIn(b); from.IsValid() && !slices.ContainsFunc(d.sides[0].subnets, func(p netip.Prefix) bool { return p.Contains(from) }) {
			return "another source"
		}
		return ""
	}
	if len(b) >= 8 && b[0]&8 != 0 && (b[0] != 8 || b[1]|b[2]|b[3]|b[7] != 0) {
		return "reserved bits"
	}
	// The kernel drops these when it forwards them, but not if connection tracking has put
	// fragments together.
	if len(b) >= 22 && b[8]&1 != 0 {
		return "group MAC"
	}
	if len(b) >= 22 && checksumIsPartial(b[22:]) {
		return "partial checksum"
	}
	return ""
}

// checksumIsPartial reports whether a TCP or UDP checksum is the sum of the pseudo-header only, as
// a kernel leaves it that counts on a device to complete it. Of damaged packets one in 65,536 is so.
func checksumIsPartial(b []byte) bool {
	from, to := addressesIn(b)
	if !from.IsValid() {
		return false
	}
	at, protocol, length := 40, b[6], int(binary.BigEndian.Uint16(b[4:]))
	if from.Is4() {
		at = int(b[0]&15) * 4
		protocol, length = b[9], int(binary.BigEndian.Uint16(b[2:]))-at
	}
	field := map[byte]int{unix.IPPROTO_TCP: 16, unix.IPPROTO_UDP: 6}[protocol]
	if field == 0 || length < 0 || len(b) < at+field+2 {
		return false
	}
	pseudo := append(from.AsSlice(), to.AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(length))
	return binary.BigEndian.Uint16(b[at+field:]) == onesSum(append(pseudo, 0, 0, 0, protocol))
}

// packetMaker makes random packets, most of which are right or nearly so.
type packetMaker struct {
	r   *rand.Rand
	pod [2]netip.Addr
	id  uint16 // of the last fragments
}

// last makes the packet that follows others.
func (m *packetMaker) last(ingress bool, mark string) given {
	from, to := inside(leaseOf(1, true)), m.pod[0]
	if !ingress {
		from, to = to, from
	}
	b := ipPacket(from, to, unix.IPPROTO_UDP, udpDatagram(from, to, 40000, 9, []byte(mark)))
	return given{is4: true, b: m.wrap(ingress, true, b)}
}

// wrap puts the tunnel's header before a packet that goes in.
func (*packetMaker) wrap(ingress, is4 bool, b []byte) []byte {
	if !ingress {
		return b
	}
	mac := subnet.DeriveMAC("n1", 1, !is4)
	frame := append([]byte{8, 0, 0, 0, 0, 0, 1, 0}, mac[:]...)
	frame = append(frame, 2, 0, 0, 0, 0, 9)
	if is4 {
		return append(append(frame, 0x08, 0x00), b...)
	}
	return append(append(frame, 0x86, 0xdd), b...)
}

// some makes a packet, or several of one flow.
func (m *packetMaker) some(ingress bool) (all []given) {
	is4 := m.r.IntN(2) == 0
	i := map[bool]int{true: 0, false: 1}[is4]
	peer, pod := inside(leaseOf(1, is4)), m.pod[i]
	if m.r.IntN(20) == 0 {
		peer = m.address(is4)
	}
	if m.r.IntN(20) == 0 {
		pod = m.address(is4)
	}
	from, to := peer, pod
	if !ingress {
		from, to = pod, peer
	}
	tos := byte(0)
	if m.r.IntN(4) == 0 {
		tos = byte(m.r.Uint32())
	}
	var packets [][]byte
	segment := 0
	switch m.r.IntN(6) {
	case 0, 1:
		packets = m.tcp(from, to)
		if !ingress && m.r.IntN(3) == 0 {
			packets, segment = m.frame(from, to)
		}
	case 2, 3:
		size := m.r.IntN(1300)
		for range 1 + m.r.IntN(8) {
			packets = append(packets, ipPacket(from, to, unix.IPPROTO_UDP, udpDatagram(from, to, uint16(1000+m.r.IntN(3)), 9, m.payload(size))))
		}
	case 4:
		packets = append(packets, ipPacket(from, to, byte(m.r.Uint32()), m.payload(m.r.IntN(200))))
	case 5:
		packets = fragmentsOf(from, to, unix.IPPROTO_UDP, udpDatagram(from, to, 1000, 9, m.payload(24+m.r.IntN(100))))
		m.id++
		for _, b := range packets {
			if is4 {
				binary.BigEndian.PutUint16(b[4:], m.id)
			} else {
				binary.BigEndian.PutUint32(b[44:], uint32(m.id))
			}
		}
	}
	damaged := m.r.IntN(2) == 0
	for k, b := range packets {
		if is4 {
			if segment == 0 && binary.BigEndian.Uint16(b[4:]) == 0 {
				binary.BigEndian.PutUint16(b[4:], uint16(k+7))
			}
			b[1] |= tos
			sumHeader(b, 0)
		} else {
			b[0] |= tos >> 4
			b[1] |= tos << 4
		}
		g := given{is4: is4, tos: []byte{0, 0, 0, 1, 2, 3}[m.r.IntN(6)], b: m.wrap(ingress, is4, b), segment: segment}
		if damaged && segment == 0 && m.r.IntN(len(packets)) == 0 {
			g.b = m.damage(g.b, ingress, is4)
		}
		all = append(all, g)
	}
	return all
}

func (m *packetMaker) payload(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)
	}
	if n >= 8 {
		binary.BigEndian.PutUint64(b, m.r.Uint64()) // no two are equal
	}
	return b
}

// tcp makes segments that follow each other.
func (m *packetMaker) tcp(from, to netip.Addr) (all [][]byte) {
	seq, size := m.r.Uint32(), 1+m.r.IntN(1300)
	n := 1 + m.r.IntN(8)
	for k := range n {
		h := tcpHeader(seq)
		if m.r.IntN(8) == 0 {
			h[13] |= 1 << m.r.IntN(8)
		}
		if k == n-1 {
			h[13] |= 8 // PSH
			size = 1 + m.r.IntN(size)
		}
		all = append(all, ipPacket(from, to, unix.IPPROTO_TCP, tcpSum(from, to, append(h, m.payload(size)...))))
		seq += uint32(size)
	}
	return all
}

// frame makes a packet that the sender's interface may cut.
func (m *packetMaker) frame(from, to netip.Addr) (all [][]byte, segment int) {
	segment = 200 + m.r.IntN(1000)
	h := tcpHeader(m.r.Uint32())
	h[13] |= []byte{0, 8, 1}[m.r.IntN(3)]
	b := ipPacket(from, to, unix.IPPROTO_TCP, append(h, m.payload(segment+1+m.r.IntN(20*segment))...))
	// The checksum of the pseudo-header, for the interface to complete.
	at, pseudo := map[bool]int{true: 20, false: 40}[from.Is4()], append(from.AsSlice(), to.AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(b)-at))
	binary.BigEndian.PutUint16(b[at+16:], onesSum(append(pseudo, 0, 0, 0, unix.IPPROTO_TCP)))
	return [][]byte{b}, segment
}

func tcpHeader(seq uint32) []byte {
	h := make([]byte, 20, 1500)
	binary.BigEndian.PutUint16(h, 2000)
	binary.BigEndian.PutUint16(h[2:], 9)
	binary.BigEndian.PutUint32(h[4:], seq)
	h[12], h[13], h[14] = 0x50, 0x10, 9
	return h
}

func tcpSum(from, to netip.Addr, b []byte) []byte {
	pseudo := append(from.AsSlice(), to.AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(b)))
	pseudo = append(pseudo, 0, 0, 0, unix.IPPROTO_TCP)
	binary.BigEndian.PutUint16(b[16:], ^onesSum(append(pseudo, b...)))
	return b
}

// address returns an address that may have a meaning of its own.
func (m *packetMaker) address(is4 bool) netip.Addr {
	all := []string{"127.0.0.1", "169.254.1.1", "224.0.0.1", "0.0.0.0", "255.255.255.255", "240.0.0.1", "192.0.2.1", "10.5.255.255", "198.18.0.1"}
	if !is4 {
		all = []string{"::1", "fe80::1", "ff02::1", "::", "::ffff:10.5.1.1", "2001:db8::1", "fd00:5:0:ffff::1", "fd00:198:18::1"}
	}
	if k := m.r.IntN(len(all) + 2); k < len(all) {
		return netip.MustParseAddr(all[k])
	}
	i := map[bool]int{true: 0, false: 1}[is4]
	b := m.pod[i].AsSlice() // another of the node's addresses
	b[len(b)-1] = byte(m.r.IntN(256))
	a, _ := netip.AddrFromSlice(b)
	return a
}

// damage changes a packet, most often in its headers.
func (m *packetMaker) damage(b []byte, ingress, is4 bool) []byte {
	for range 1 + m.r.IntN(3) {
		if len(b) == 0 {
			break
		}
		i := m.r.IntN(min(len(b), 90))
		switch m.r.IntN(8) {
		case 0, 1, 2:
			b[i] ^= 1 << m.r.IntN(8)
		case 3:
			b[i] = byte(m.r.Uint32())
		case 4:
			b = b[:m.r.IntN(len(b))]
		case 5:
			b = append(b, m.payload(m.r.IntN(30))...) // padding
		case 6: // a length field that lies
			if i+2 <= len(b) {
				binary.BigEndian.PutUint16(b[i:], uint16([]int{0, 1, 8, 19, 20, 40, len(b), len(b) - i, 0xffff}[m.r.IntN(9)]+m.r.IntN(3)-1))
			}
		case 7: // the TTL
			at := map[bool]int{true: 8, false: 7}[is4]
			if ingress {
				at += 22
			}
			if at < len(b) {
				b[at] = byte(m.r.IntN(3))
			}
		}
	}
	at := 0
	if ingress {
		at = 22
	}
	if is4 && len(b) >= at+20 && m.r.IntN(4) > 0 {
		sumHeader(b, at)
	}
	if !ingress && len(b) == 0 {
		return []byte{0x45}
	}
	return b
}
