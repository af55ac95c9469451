package encap

import (
	"encoding/binary"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A test node is a real loop on real descriptors. Only the TUN device is a fake: a
// pair of datagram sockets. The loop holds one end, the test plays the kernel on
// the other.
//
//	test ── socketpair ── loop ── UDP on 127.0.0.x ── loop ── socketpair ── test

type testNode struct {
	options Options
	loop    *Loop
	kernel  *os.File // the kernel's end of the device
	subnet  netip.Prefix
	at      netip.AddrPort
	mac     [6]byte
}

const testVNI = 1

func newTestNode(t testing.TB, addr, subnet string, last byte) *testNode {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range pair {
		for _, option := range []int{unix.SO_SNDBUF, unix.SO_RCVBUF} {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, 4<<20); err != nil {
				t.Fatal(err)
			}
		}
	}
	n := &testNode{kernel: os.NewFile(uintptr(pair[1]), "kernel"), subnet: netip.MustParsePrefix(subnet), mac: [6]byte{2, 0, 0, 0, 0, last}}
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = unix.Close(pair[0]), unix.Close(socket)
		n.kernel.Close()
	})
	here := netip.MustParseAddr(addr)
	if err := unix.Bind(socket, &unix.SockaddrInet4{Addr: here.As4()}); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(socket)
	if err != nil {
		t.Fatal(err)
	}
	n.at = netip.AddrPortFrom(here, uint16(name.(*unix.SockaddrInet4).Port))
	// Room for bursts: without UDP_SEGMENT each datagram takes a buffer of its own.
	if err := unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
		t.Fatal(err)
	}
	for _, o := range []struct{ level, name int }{{unix.SOL_UDP, unix.UDP_GRO}, {unix.SOL_IP, unix.IP_RECVTOS}} {
		if err := unix.SetsockoptInt(socket, o.level, o.name, 1); err != nil {
			t.Fatal(err)
		}
	}
	n.options = Options{
		Format: VXLAN, Devices: []Descriptor{NewDescriptor(pair[0])}, MTU: 1450,
		IPv4: Underlay{
			Receive: []Descriptor{NewDescriptor(socket)}, Send: []Source{{Socket: NewDescriptor(socket), Port: n.at.Port()}},
			Self: VTEP{testVNI, n.mac},
		},
		Offload: allOn(), Egress: &Counters{}, Ingress: &Counters{},
	}
	// qemu-user passes the value of UDP_SEGMENT on in the emulated processor's byte order.
	if os.Getenv("CULVERT_QEMU_USER") != "" && binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		n.options.Offload.GSO.Store(false)
	}
	n.loop = NewLoop(n.options)
	return n
}

func allOn() *Offload {
	o := &Offload{}
	for _, b := range []*atomic.Bool{&o.GSO, &o.GRO, &o.USO} {
		b.Store(true)
	}
	return o
}

// sockaddr4 returns a sockaddr as the kernel writes it, in the host's byte order.
func sockaddr4(a, b, c, d byte) []byte {
	return append(binary.NativeEndian.AppendUint16(nil, unix.AF_INET), 0, 0, a, b, c, d)
}

// meet makes two nodes peers of each other.
func meet(a, b *testNode) {
	for _, n := range []struct{ self, other *testNode }{{a, b}, {b, a}} {
		peer := vxlanPeer(n.other.subnet, n.other.at, testVNI, n.other.mac, n.self.mac)
		n.self.loop.SetTable(NewTable([]netip.Prefix{n.self.subnet}, []*Peer{peer}))
	}
}

// send writes a frame to the loop, as the kernel does.
func (n *testNode) send(t testing.TB, v vnetHeader, packet []byte) {
	t.Helper()
	frame := make([]byte, vnetHeaderLen, vnetHeaderLen+len(packet))
	v.put(frame)
	if _, err := n.kernel.Write(append(frame, packet...)); err != nil {
		t.Fatal(err)
	}
}

// receive returns the next frame that the loop wrote to the device.
func (n *testNode) receive(t testing.TB) (vnetHeader, []byte) {
	t.Helper()
	if err := n.kernel.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, maxFrame)
	k, err := n.kernel.Read(b)
	if err != nil {
		t.Fatalf("no frame came: %v; drops out %v in %v", err, dropsOf(n.options.Egress), dropsOf(n.options.Ingress))
	}
	var v vnetHeader
	v.parse(b[:k])
	return v, b[vnetHeaderLen:k]
}

func dropsOf(c *Counters) map[string]uint64 {
	m := make(map[string]uint64)
	for _, r := range Reasons() {
		if n := c.Drops[r].Load(); n != 0 {
			m[r.String()] = n
		}
	}
	return m
}

// commonOf returns the shared state of a loop with all offloads and an empty table.
func commonOf(f Format) *common {
	c := &common{}
	c.init(f, allOn())
	return c
}

// vxlanPeer returns a VXLAN peer; packets to it have the given Ethernet addresses.
func vxlanPeer(subnet netip.Prefix, underlay netip.AddrPort, vni uint32, destination, source [6]byte) *Peer {
	return NewPeer(PeerOptions{Format: VXLAN, Subnet: subnet, Underlay: underlay, VTEP: VTEP{vni, destination}, Self: VTEP{vni, source}})
}

func ipipPeer(subnet netip.Prefix, underlay netip.Addr) *Peer {
	return NewPeer(PeerOptions{Format: IPIP, Subnet: subnet, Underlay: netip.AddrPortFrom(underlay, 0)})
}

// vxlanHeader is a VXLAN header as a test wants it.
type vxlanHeader struct {
	VNI                 uint32
	Destination, Source [6]byte
	EtherType           uint16
}

func (h *vxlanHeader) Put(b []byte) {
	VXLAN.Put(b, VTEP{h.VNI, h.Source}, VTEP{MAC: h.Destination}, h.EtherType)
}

func testRecvBatch() *recvBatch { return newRecvBatch(make([]byte, recvSlabLen)) }
