package test

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"reflect"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/lab"
)

// TestIPIP sends traffic between two userspace nodes with IPIP, over every underlay profile.
// make test-vm tests against the kernel's ipip device, which many kernels lack.
func TestIPIP(t *testing.T) {
	c, pods := ipipPods(t)
	profiles := lab.Profiles()
	if testing.Short() {
		profiles = profiles[1:2]
	}
	before := c.drops() // a node that does not know its peer yet may have dropped its first packets
	a, b := pods[0].Addr(true), pods[1].Addr(true)
	for _, profile := range profiles {
		t.Run(string(profile), func(t *testing.T) {
			if _, err := c.SetProfile(profile); err != nil {
				t.Fatal(err)
			}
			transfer(t, pods[0].Namespace, pods[1].Namespace, a, b, 20<<20)
			transfer(t, pods[1].Namespace, pods[0].Namespace, b, a, 20<<20)
			datagrams(t, pods[0].Namespace, pods[1].Namespace, a, b)
			extremes(t, pods[0].Namespace, pods[1].Namespace, a, b)
			bursts(t, pods[1].Namespace, pods[0].Namespace, b, a)
		})
	}
	if after := c.drops(); !reflect.DeepEqual(after, before) {
		t.Errorf("the nodes dropped %v, and before the traffic %v", after, before)
	}
	for _, n := range c.Nodes {
		s, err := c.status(n)
		if err != nil {
			t.Fatal(err)
		}
		if s.Datapath.MTU != 1480 {
			t.Errorf("the pods' MTU is %d", s.Datapath.MTU)
		}
	}
}

func ipipPods(t *testing.T) (*cluster, []*lab.Pod) {
	t.Helper()
	c := newClusterOf(t, lab.Options{Nodes: 2, Underlay: lab.Direct, InOrder: true})
	c.setConfig(`{"Network":"10.5.0.0/16","Backend":{"Type":"ipip"}}`)
	c.start(c.Nodes[0], "--iface", c.Nodes[0].Link)
	c.start(c.Nodes[1], "--iface", c.Nodes[1].Link, "--queues", "3")
	var pods []*lab.Pod
	for _, n := range c.Nodes {
		c.waitReady(n, 1)
		pod, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, pod)
	}
	return c, pods
}

// TestChecksumsOnTheWire captures the packets of a node whose uplink has no checksum offload:
// all checksums, of outer and inner headers, are correct.
func TestChecksumsOnTheWire(t *testing.T) {
	t.Run("vxlan", func(t *testing.T) {
		o := newOracle(t)
		o.start(o.Nodes[0], "--iface", o.Nodes[0].Link)
		o.waitReady(o.Nodes[0], 1)
		withoutOffloads(t, o.Lab)
		inOrderBesideSniffer(t, o.kernel)
		wire := sniff(t, o.kernel)
		o.exchange(t, 1<<20)
		wire.check(t)
	})
	t.Run("fast path", func(t *testing.T) {
		o := newOracle(t)
		n := o.Nodes[0]
		o.start(n, "--iface", n.Link, "--datapath", "kernel", "--fast-path", "on")
		o.waitReady(n, 1)
		withoutOffloads(t, o.Lab)
		inOrderBesideSniffer(t, o.kernel)
		wire := sniff(t, o.kernel)
		before := o.fastPath(n)
		o.exchange(t, 1<<20)
		wire.check(t)
		if after := o.fastPath(n); after.Egress.Packets-before.Egress.Packets < 500 {
			t.Errorf("the fast path sent %d packets", after.Egress.Packets-before.Egress.Packets)
		}
	})
	t.Run("ipip", func(t *testing.T) {
		c, pods := ipipPods(t)
		withoutOffloads(t, c.Lab)
		wire := sniff(t, c.Nodes[1])
		a, b := pods[0].Addr(true), pods[1].Addr(true)
		transfer(t, pods[0].Namespace, pods[1].Namespace, a, b, 1<<20)
		bursts(t, pods[0].Namespace, pods[1].Namespace, a, b)
		wire.check(t)
	})
}

func withoutOffloads(t *testing.T, l *lab.Lab) {
	t.Helper()
	if _, err := l.SetProfile(lab.Bare); err != nil {
		t.Fatal(err)
	}
	for _, n := range l.Nodes {
		setFeatures(t, n, map[string]bool{"tx-checksum-ip-generic": false}, n.Link)
	}
}

// inOrderBesideSniffer turns off the GRO of a node's vxlan devices. With GRO a packet of which a
// packet socket holds a clone goes another way than others (gro_cells_receive in
// net/core/gro_cells.c), and may be overtaken.
func inOrderBesideSniffer(t *testing.T, n *lab.Node) {
	t.Helper()
	var devices []string
	err := n.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if l.Type() == "vxlan" {
				devices = append(devices, l.Attrs().Name)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	setFeatures(t, n, map[string]bool{"rx-gro": false}, devices...)
}

// sniffer captures the packets on a node's underlay link.
type sniffer struct{ fd int }

func sniff(t *testing.T, n *lab.Node) *sniffer {
	t.Helper()
	s := &sniffer{}
	err := n.Do(func() (err error) {
		const all = unix.ETH_P_ALL
		s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
			return err
		}
		link, err := interfaceIndex(n.Link)
		if err != nil {
			return err
		}
		return unix.Bind(s.fd, &unix.SockaddrLinklayer{Protocol: all>>8 | all&0xff<<8, Ifindex: link})
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(s.fd) })
	return s
}

// check verifies the checksums of the captured packets that the link received.
func (s *sniffer) check(t *testing.T) {
	t.Helper()
	b := make([]byte, 1<<16)
	outer, inner := 0, 0
	for {
		n, from, err := unix.Recvfrom(s.fd, b, 0)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if from.(*unix.SockaddrLinklayer).Pkttype != unix.PACKET_HOST {
			continue
		}
		p, ok := parseIP(b[:n])
		if !ok {
			continue
		}
		outer++
		if why := p.wrong(); why != "" {
			t.Fatalf("outer packet %d: %s", outer, why)
		}
		var in []byte
		switch {
		case p.protocol == unix.IPPROTO_IPIP:
			in = p.payload
		case p.protocol == unix.IPPROTO_UDP && binary.BigEndian.Uint16(p.payload[2:]) == 8472:
			in = p.payload[8+22:]
		default:
			continue
		}
		q, ok := parseIP(in)
		if !ok {
			t.Fatalf("inner packet %d is not an IP packet", inner)
		}
		inner++
		if why := q.wrong(); why != "" {
			t.Fatalf("inner packet %d: %s", inner, why)
		}
	}
	t.Logf("%d packets, %d of them tunnelled", outer, inner)
	if inner < 500 {
		t.Errorf("only %d packets were tunnelled", inner)
	}
}

// ip is a parsed IP packet.
type ip struct {
	header, payload []byte
	protocol        int
	from, to        netip.Addr
	fragment        bool
}

func parseIP(b []byte) (p ip, ok bool) {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		n := int(b[0]&15) * 4
		p = ip{header: b[:n], payload: b[n:binary.BigEndian.Uint16(b[2:])], protocol: int(b[9])}
		p.from, p.to = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		p.fragment = binary.BigEndian.Uint16(b[6:])&0x3fff != 0
	case len(b) >= 40 && b[0]>>4 == 6:
		p = ip{header: b[:40], payload: b[40 : 40+binary.BigEndian.Uint16(b[4:])], protocol: int(b[6])}
		p.from, p.to = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	default:
		return p, false
	}
	return p, true
}

// wrong names the first wrong checksum of the packet, or returns "".
func (p ip) wrong() string {
	if p.from.Is4() && onesSum(p.header) != 0xffff {
		return "IPv4 header checksum"
	}
	if p.fragment || p.protocol != unix.IPPROTO_TCP && p.protocol != unix.IPPROTO_UDP {
		return ""
	}
	if p.protocol == unix.IPPROTO_UDP && binary.BigEndian.Uint16(p.payload[6:]) == 0 && p.from.Is4() {
		return ""
	}
	covered := append(p.from.AsSlice(), p.to.AsSlice()...)
	covered = binary.BigEndian.AppendUint32(covered, uint32(len(p.payload)))
	covered = append(covered, 0, 0, 0, byte(p.protocol))
	if onesSum(append(covered, p.payload...)) != 0xffff {
		return "transport checksum of " + p.from.String() + " to " + p.to.String()
	}
	return ""
}

// onesSum is the one's complement sum of RFC 1071, not inverted.
func onesSum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		word := uint32(b[i]) << 8
		if i+1 < len(b) {
			word |= uint32(b[i+1])
		}
		sum += word
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

func interfaceIndex(name string) (int, error) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return 0, err
	}
	return link.Index, nil
}

// next waits for a received packet that meets a condition.
func (s *sniffer) next(t *testing.T, is func(ip) bool) (found ip) {
	t.Helper()
	b := make([]byte, 1<<16)
	eventually(t, "the expected packet arrives", func() error {
		for {
			n, from, err := unix.Recvfrom(s.fd, b, 0)
			if err != nil {
				return err
			}
			p, ok := parseIP(b[:n])
			if ok && from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_HOST && is(p) {
				found = p
				return nil
			}
		}
	})
	return found
}
