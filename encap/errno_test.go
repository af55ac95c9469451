package encap

import (
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestErrnoTables states independently of the tables how the loop handles each
// errno that it is known to meet.
func TestErrnoTables(t *testing.T) {
	for _, c := range []struct {
		name  string
		table outcomes
		want  map[fault][]unix.Errno
	}{
		{"device read", deviceRead, map[fault][]unix.Errno{
			faultDry:   {unix.EAGAIN, unix.ENOMEM},
			faultAgain: {unix.EINTR},
			faultGone:  {unix.EBADFD, unix.EIO, unix.ENODEV, unix.Errno(4095)},
			faultFatal: {unix.EBADF, unix.EFAULT, unix.EINVAL},
		}},
		{"device write", deviceWrite, map[fault][]unix.Errno{
			faultAgain:   {unix.EINTR},
			faultCounted: {unix.EAGAIN, unix.ENOMEM, unix.ENOBUFS, unix.EIO, unix.EMSGSIZE, unix.Errno(4095)},
			faultRefused: {unix.EINVAL},
			faultGone:    {unix.EBADFD},
			faultFatal:   {unix.EBADF, unix.EFAULT},
		}},
		{"receive", socketReceive, map[fault][]unix.Errno{
			faultDry: {unix.EAGAIN, unix.EINTR, unix.ENOMEM},
			faultPast: {
				unix.ENETDOWN, unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EMSGSIZE, unix.ENOPROTOOPT,
				unix.EPROTO, unix.EACCES, unix.EHOSTDOWN, unix.ENONET, unix.EOPNOTSUPP,
			},
			faultCounted: {unix.EINVAL},
			faultGone:    {unix.ENODEV, unix.ENXIO, unix.Errno(4095)},
			faultFatal:   {unix.EBADF, unix.EFAULT},
		}},
		{"send", socketSend, map[fault][]unix.Errno{
			faultAgain: {unix.EINTR},
			faultCounted: {
				unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM, unix.EMSGSIZE, unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENETDOWN,
				unix.EPERM, unix.EACCES, unix.EINVAL, unix.EIO, unix.ECONNREFUSED, unix.EADDRNOTAVAIL, unix.Errno(4095),
			},
			faultFatal: {unix.EBADF, unix.ENOTSOCK, unix.EFAULT},
		}},
		{"super-frame", superWrite, map[fault][]unix.Errno{
			faultAgain:   {unix.EINTR},
			faultPast:    {unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM},
			faultRefused: {unix.EINVAL, unix.EMSGSIZE},
			faultGone:    {unix.EIO, unix.EBADFD, unix.Errno(4095)},
		}},
	} {
		for want, all := range c.want {
			for _, errno := range all {
				if got := c.table.of(errno); got.fault != want || want == faultCounted && got.reason == Accepted {
					t.Errorf("%s: %v is %+v, want the fault %d", c.name, errno, got, want)
				}
			}
		}
	}
	for _, c := range []struct {
		name  string
		table outcomes
		want  map[unix.Errno]Reason
	}{
		{"send", socketSend, map[unix.Errno]Reason{
			unix.ENOBUFS: EgressNoBuffers, unix.EAGAIN: EgressFull, unix.EMSGSIZE: EgressTooBig, unix.ENETUNREACH: EgressUnreachable,
			unix.EPERM: EgressDenied, unix.EINVAL: EgressSend, unix.Errno(4095): EgressSend,
		}},
		{"device write", deviceWrite, map[unix.Errno]Reason{
			unix.EIO: IngressDown, unix.ENOBUFS: IngressNoBuffers, unix.ENOMEM: IngressNoBuffers, unix.EAGAIN: IngressWrite,
			unix.EINVAL: IngressWrite, unix.Errno(4095): IngressWrite,
		}},
		{"receive", socketReceive, map[unix.Errno]Reason{unix.EINVAL: IngressUncut}},
	} {
		for errno, want := range c.want {
			if got := c.table.of(errno).reason; got != want {
				t.Errorf("%s: a packet lost to %v counts as %s, want %s", c.name, errno, got, want)
			}
		}
	}
}

// TestP8UnsegmentableFrameIsCounted delivers a frame with more segments than the
// segmenter cuts, while the device accepts no GSO frames.
func TestP8UnsegmentableFrameIsCounted(t *testing.T) {
	a, b := pairOfNodes(t)
	b.options.Offload.GRO.Store(false)
	in, _ := ingressOf(t, b)
	s := tcpSpec(MaxFrameSegments*16 + 1)
	packet := s.partial()
	h := vxlanHeader{VNI: testVNI, Destination: b.mac, Source: a.mac, EtherType: etherTypeIPv4}
	d := make([]byte, VXLANHeaderLen)
	h.Put(d)
	in.datagram(b.loop.Table(), append(d, packet...), netip.MustParseAddr("127.0.0.1"), 0, checksumUnknown, 16)
	in.flush()
	if got := in.tally.drops[IngressUncut]; got != MaxFrameSegments+1 || in.tally.packets != 0 || in.tally.bytes != 0 {
		t.Errorf("%d packets lost, %d carried, of %d bytes", got, in.tally.packets, in.tally.bytes)
	}
}

// ingressOf returns the directions of a node whose loop does not run.
func ingressOf(t *testing.T, n *testNode) (*ingress, *egress) {
	t.Helper()
	q, err := n.loop.open(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.close)
	return q.in[0], q.out
}

// TestP9OffloadSuspendedForOnePeer has the kernel reject GSO for one of two peers: the
// other keeps it, and the first gets it back after suspendFor.
func TestP9OffloadSuspendedForOnePeer(t *testing.T) {
	a, b := pairOfNodes(t)
	a.options.Offload.GSO.Store(true)
	other := vxlanPeer(netip.MustParsePrefix("10.5.9.0/24"), b.at, testVNI, b.mac, a.mac)
	_, out := ingressOf(t, a)
	all := a.loop.Table().Peers()
	a.loop.SetTable(NewTable([]netip.Prefix{a.subnet}, append(all, other)))
	refused := all[0]
	out.batch.newRun(refused, 0, 0, 100)
	out.batch.addSegment(0, make([]byte, 50), make([]byte, 50))
	out.batch.addSegment(0, make([]byte, 50), make([]byte, 50))
	out.batch.layOut()
	out.refused(inet(a.options.IPv4.Send[0].Socket.FD()), 0, unix.EIO)
	if out.tally.packets != 2 {
		t.Errorf("%d packets were sent another way, drops %v", out.tally.packets, out.tally.drops)
	}
	if out.gso(refused) || !out.gso(other) || !out.offload.GSO.Load() {
		t.Error("it is not suspended for that peer only")
	}
	if gso, super, gro, uso := a.loop.Table().Suspended(); gso != 1 || super+gro+uso != 0 {
		t.Errorf("refused: %d, %d, %d, %d", gso, super, gro, uso)
	}
	// A new table inherits the mechanism.
	again := vxlanPeer(refused.Subnet, refused.Underlay, testVNI, b.mac, a.mac)
	a.loop.SetTable(NewTable([]netip.Prefix{a.subnet}, []*Peer{again}))
	if again.allows(mechanismGSO) {
		t.Error("a new table forgets it")
	}
	again.suspended[mechanismGSO].Store(int64(time.Since(start)))
	if !again.allows(mechanismGSO) {
		t.Error("it is not tried again")
	}
}

// TestP5ShortQuotes gives the loop ICMP errors that quote 8 bytes after the outer IP
// header (RFC 792): those that are plausible lower the path MTU.
func TestP5ShortQuotes(t *testing.T) {
	by := netip.MustParseAddr("192.0.2.254")
	node4, node6 := netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")
	vxlan4 := func() *Peer {
		return vxlanPeer(netip.MustParsePrefix("10.5.2.0/24"), netip.AddrPortFrom(node4, 8472), 1, [6]byte{2, 1}, [6]byte{2, 2})
	}
	vxlan6 := func() *Peer {
		return vxlanPeer(netip.MustParsePrefix("fd00:5:0:2::/64"), netip.AddrPortFrom(node6, 8472), 1, [6]byte{2, 1}, [6]byte{2, 2})
	}
	ipip := func() *Peer { return ipipPeer(netip.MustParsePrefix("10.5.2.0/24"), node4) }
	inner := func(length int) []byte { return []byte{0x45, 0, byte(length >> 8), byte(length), 1, 2, 0x40, 0} }
	vni := vxlan4().header[:8]
	for _, c := range []struct {
		name    string
		format  Format
		peer    *Peer
		to      netip.Addr
		longest int
		quote   []byte
		mtu     int
		told    int // the MTU that pods are told; 0 if the hint is ignored
		fits    int
	}{
		{"a UDP header", VXLAN, vxlan4(), node4, 1450, nil, 1400, 1350, 1350},
		{"with our VXLAN header", VXLAN, vxlan4(), node4, 1450, vni, 1400, 1350, 1350},
		{"with another VNI", VXLAN, vxlan4(), node4, 1450, []byte{8, 0, 0, 0, 0, 0, 9, 0}, 1400, 0, 0},
		{"no packet of that length was sent", VXLAN, vxlan4(), node4, 1350, nil, 1400, 0, 0},
		{"from an address that is no peer's", VXLAN, vxlan4(), netip.MustParseAddr("192.0.2.9"), 1450, nil, 1400, 0, 0},
		{"absurdly narrow", VXLAN, vxlan4(), node4, 1450, nil, 68, leastMTU4, leastFits},
		{"narrower than a VXLAN header", VXLAN, vxlan4(), node4, 1450, nil, 40, 0, 0},
		{"IPv6", VXLAN, vxlan6(), node6, 1430, nil, 1400, 1330, 1330},
		{"IPv6, less than pods can be told", VXLAN, vxlan6(), node6, 1430, nil, 1300, 1280, 1230},
		{"IPv6, below IPv6's minimum MTU", VXLAN, vxlan6(), node6, 1430, nil, 1279, 0, 0},
		{"an inner header", IPIP, ipip(), node4, 1480, inner(1480), 1400, 1380, 1380},
		{"an inner packet that fits", IPIP, ipip(), node4, 1480, inner(1380), 1400, 0, 0},
		{"an inner packet that was not sent", IPIP, ipip(), node4, 1480, inner(1500), 1400, 0, 0},
		{"not an inner header", IPIP, ipip(), node4, 1480, make([]byte, 8), 1400, 0, 0},
		{"no inner header", IPIP, ipip(), node4, 1480, nil, 1400, 0, 0},
	} {
		c.peer.longest.Store(uint32(c.longest))
		q := errorQueue{common: commonOf(c.format)}
		q.table.Store(NewTable(nil, []*Peer{c.peer}))
		q.narrower(c.to, by, c.quote, c.mtu)
		k, ok := c.peer.PathMTU()
		if ok != (c.told != 0) || k.MTU != c.told || k.Fits != c.fits {
			t.Errorf("%s: %+v, want %d and %d", c.name, k, c.told, c.fits)
		}
		if ok && time.Until(k.Until) > hintLife {
			t.Errorf("%s: believed until %v", c.name, k.Until)
		}
		// A second hint within hintPause is ignored.
		before := c.peer.path.Load()
		q.narrower(c.to, by, c.quote, c.mtu-100)
		if c.peer.path.Load() != before {
			t.Errorf("%s: one that follows at once is believed", c.name)
		}
	}
}
