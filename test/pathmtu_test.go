package test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
)

// family describes the packet-too-big errors and the sizes of one IP version.
type family struct {
	name            string
	index           int // among a node's addresses
	outer, inner    int // bytes that the tunnel adds, and bytes of a pod's IP and UDP headers
	narrow          int // MTU of the narrow link, in bytes of an outer packet
	source          int // offset of a byte of the inner source's prefix
	level, discover int
	icmp            func(mtu int, quote []byte) []byte
	socket          [2]int
	to              func(netip.Addr) unix.Sockaddr
}

var families = []family{
	{
		name: "ipv4", index: 0, outer: 50, inner: 28, narrow: 1000, source: 13,
		level: unix.SOL_IP, discover: unix.IP_MTU_DISCOVER,
		icmp: func(mtu int, quote []byte) []byte { // RFC 792, RFC 1191
			b := append([]byte{3, 4, 0, 0, 0, 0, byte(mtu >> 8), byte(mtu)}, quote...)
			binary.BigEndian.PutUint16(b[2:], ^onesSum(b))
			return b
		},
		socket: [2]int{unix.AF_INET, unix.IPPROTO_ICMP},
		to:     func(a netip.Addr) unix.Sockaddr { return &unix.SockaddrInet4{Addr: a.As4()} },
	},
	{
		name: "ipv6", index: 1, outer: 70, inner: 48, narrow: 1360, source: 9,
		level: unix.SOL_IPV6, discover: unix.IPV6_MTU_DISCOVER,
		icmp: func(mtu int, quote []byte) []byte { // RFC 4443; the kernel adds the checksum
			return append([]byte{2, 0, 0, 0, 0, 0, byte(mtu >> 8), byte(mtu)}, quote...)
		},
		socket: [2]int{unix.AF_INET6, unix.IPPROTO_ICMPV6},
		to:     func(a netip.Addr) unix.Sockaddr { return &unix.SockaddrInet6{Addr: a.As16()} },
	},
}

// TestPathMTU answers a node's packets with packet-too-big errors, as a router before a
// narrower link would: the sending pod gets its own ICMP error and sends less. An error with
// a forged quote is ignored.
func TestPathMTU(t *testing.T) {
	o := newOracle(t)
	o.start(o.Nodes[0], "--iface", o.Nodes[0].Link, "--df", "--no-super-frame")
	o.waitReady(o.Nodes[0], 1)
	// With br_netfilter the host reassembles a pod's IPv6 fragments and loses their sizes
	// (docs/backends.md).
	if err := o.Nodes[0].Do(func() error {
		err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-ip6tables", []byte("0"), 0o644)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) { o.pathMTU(t, f) })
	}
}

func (o *oracle) pathMTU(t *testing.T, f family) {
	here, there := o.pod.Addr(f.index == 0), o.there[f.index]
	server, client := udpPair(t, o.pod.Namespace, o.kernel.Namespace, here, there)
	limit := f.narrow - f.outer - f.inner // largest UDP payload of a pod that fits
	long := limit + 70
	send := func(size int) error {
		_, err := client.WriteTo(pattern(size), server.LocalAddr())
		return err
	}
	// discover sets the pod socket's path MTU discovery (IP_MTU_DISCOVER).
	discover := func(how int) {
		t.Helper()
		raw, err := client.(*net.UDPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var failure error
		err = raw.Control(func(fd uintptr) { failure = unix.SetsockoptInt(int(fd), f.level, f.discover, how) })
		if err := errors.Join(err, failure); err != nil {
			t.Fatal(err)
		}
	}
	discover(unix.IP_PMTUDISC_DO) // IPv6 has the same values
	wire := sniff(t, o.kernel)
	if err := send(long); err != nil {
		t.Fatal(err)
	}
	large := func(p ip) bool {
		return p.from == o.Nodes[0].Addrs[f.index] && p.protocol == unix.IPPROTO_UDP && len(p.payload) > long
	}
	outer := wire.next(t, large)

	answer := func(change int) { o.tooBig(t, f, outer, change) }
	vxlan := len(outer.header) + 8 // offset of the VXLAN header in the quote
	for name, change := range map[string]int{"VNI": vxlan + 6, "MAC": vxlan + 10, "inner source": vxlan + 22 + f.source} {
		answer(change)
		for range 2 { // an error would be returned by the second send
			if err := send(long); err != nil {
				t.Errorf("an error with a forged %s in its quote was accepted: %v", name, err)
			}
			wire.next(t, large)
		}
	}
	answer(-1)
	eventually(t, "the pod gets the error", func() error {
		if err := send(long); !errors.Is(err, unix.EMSGSIZE) {
			return fmt.Errorf("sending %d bytes: %w", long, err)
		}
		return nil
	})
	if err := send(limit); err != nil {
		t.Errorf("sending a packet that fits: %v", err)
	}
	wire.next(t, func(p ip) bool { return len(p.header)+len(p.payload) == f.narrow })
	transfer(t, o.pod.Namespace, o.kernel.Namespace, here, there, 1<<20)

	// The status and the metrics show the narrow path.
	s := o.wait(o.Nodes[0], "reports the narrow path", func(s api.Status) bool { return len(s.Datapath.NarrowPaths) == f.index+1 })
	by := o.kernel.Addrs[f.index]
	if p := s.Datapath.NarrowPaths[f.index]; !p.Subnet.Contains(there) || p.PublicIP != by || p.By != by || p.MTU != f.narrow-f.outer || time.Since(p.Since) > time.Minute {
		t.Errorf("the narrow path in the status is %+v", p)
	}
	if _, text := o.get(o.Nodes[0], "/metrics"); !strings.Contains(text, fmt.Sprintf("\nculvert_narrow_paths %d\n", f.index+1)) {
		t.Errorf("the metric culvert_narrow_paths does not count it")
	}

	// Packets that may be fragmented are: IPv4 on the path, IPv6 by the pod.
	how := unix.IP_PMTUDISC_OMIT
	if f.index == 1 {
		how = unix.IPV6_PMTUDISC_WANT
	}
	discover(how)
	marked := long - 1
	got := make([]byte, 2048)
	eventually(t, "the fragments arrive", func() error {
		if err := send(marked); err != nil {
			return err
		}
		if err := server.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			return err
		}
		for n := 0; n != marked; {
			var err error
			if n, _, err = server.ReadFrom(got); err != nil {
				return err
			}
		}
		return nil
	})
	if !bytes.Equal(got[:marked], pattern(marked)) {
		t.Error("the reassembled datagram differs from the one sent")
	}
}

// tooBig answers an outer packet with a packet-too-big error, as a router before a narrower
// link would. If change is not -1, the byte at that offset of the quote is changed.
func (o *oracle) tooBig(t *testing.T, f family, outer ip, change int) {
	t.Helper()
	quote := append(append([]byte{}, outer.header...), outer.payload[:100]...)
	if change >= 0 {
		quote[change] ^= 0xff
	}
	err := o.kernel.Do(func() error {
		fd, err := unix.Socket(f.socket[0], unix.SOCK_RAW|unix.SOCK_CLOEXEC, f.socket[1])
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, f.icmp(f.narrow, quote), 0, f.to(outer.from))
	})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
}

// TestNarrowPathWithoutDF has a narrow path without --df: the outer packets are fragmented,
// and pods get no error.
func TestNarrowPathWithoutDF(t *testing.T) {
	o := newOracle(t)
	if _, err := o.SetProfile(lab.Offload); err != nil {
		t.Fatal(err)
	}
	n := o.Nodes[0]
	o.start(n, "--iface", n.Link)
	o.waitReady(n, 1)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			here, there := o.pod.Addr(f.index == 0), o.there[f.index]
			server, client := udpPair(t, o.pod.Namespace, o.kernel.Namespace, here, there)
			wire := sniff(t, o.kernel)
			if _, err := client.WriteTo(pattern(1300), server.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			outer := wire.next(t, func(p ip) bool {
				return p.from == n.Addrs[f.index] && p.protocol == unix.IPPROTO_UDP && len(p.payload) > 1300
			})
			transfer(t, o.pod.Namespace, o.kernel.Namespace, here, there, 5<<20)
			o.tooBig(t, f, outer, -1)
			before := o.wait(n, "has a status", func(api.Status) bool { return true })
			transfer(t, o.pod.Namespace, o.kernel.Namespace, here, there, 5<<20)
			datagrams(t, o.pod.Namespace, o.kernel.Namespace, here, there)
			after := o.wait(n, "has a status", func(api.Status) bool { return true })
			whole := after.Datapath.Egress.SuperFrames - before.Datapath.Egress.SuperFrames
			t.Logf("%d super-frames before, %d after; %+v", before.Datapath.Egress.SuperFrames, whole, mechanism(after, "super-frame"))
			if len(after.Datapath.NarrowPaths) != f.index || f.index == 1 && whole > 0 {
				t.Errorf("narrow paths %+v, and %d super-frames, which are not fragmented", after.Datapath.NarrowPaths, whole)
			}
			if d := dropped(after); len(d) > 0 {
				t.Errorf("dropped %v", d)
			}
		})
	}
}
