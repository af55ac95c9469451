package test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/subnet"
)

// TestChaosRogueRouter has a pod advertise itself as an IPv6 router: neither
// another pod nor the node accepts it. The pods' namespaces accept
// advertisements by default, as a container's do.
func TestChaosRogueRouter(t *testing.T) {
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			c := newClusterOf(t, lab.Options{Nodes: 2, Prefixes: dualUnderlay})
			c.setConfig(dual)
			c.startAll("--datapath", d)
			n := c.Nodes[0]
			var pods []*lab.Pod
			for _, id := range []string{"rogue", "victim"} {
				p, err := n.AddPodIn(t.Context(), id, func(ns *lab.Namespace) error {
					return ns.SetSysctl("net/ipv6/conf/default/accept_ra", "1")
				})
				if err != nil {
					t.Fatal(err)
				}
				pods = append(pods, p)
			}
			rogue, victim := pods[0], pods[1]
			for _, ns := range []*lab.Namespace{rogue.Namespace, victim.Namespace} { // only the interface's setting changes, not the default
				if v, err := ns.Sysctl("net/ipv6/conf/default/accept_ra"); err != nil || v != "1" {
					t.Errorf("the namespace's default is %q (%v)", v, err)
				}
			}
			before := [][]string{ipv6State(t, n.Namespace), ipv6State(t, victim.Namespace)}
			if err := rogue.Do(func() error { return advertise("eth0", 20) }); err != nil {
				t.Fatal(err)
			}
			// Packets that follow the advertisements have arrived.
			if _, err := rogue.Ping(t.Context(), rogue.Addr(false), victim.Addr(false)); err != nil {
				t.Fatal(err)
			}
			if _, err := rogue.Ping(t.Context(), rogue.Addr(false), gatewayOf(rogue)); err != nil {
				t.Fatal(err)
			}
			for i, ns := range []*lab.Namespace{n.Namespace, victim.Namespace} {
				if after := ipv6State(t, ns); !slices.Equal(before[i], after) {
					t.Errorf("%s believes it: %v, and before %v", ns.Name, after, before[i])
				}
			}
		})
	}
}

func gatewayOf(p *lab.Pod) netip.Addr {
	b := p.Addr(false).As16()
	clear(b[8:])
	b[15] = 1
	return netip.AddrFrom16(b)
}

// ipv6State returns what an advertisement may change: default routes, and
// addresses that are not link-local.
func ipv6State(t *testing.T, ns *lab.Namespace) []string {
	t.Helper()
	var all []string
	if err := ns.Do(func() error {
		routes, err := netlink.RouteList(nil, netlink.FAMILY_V6)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Dst == nil || r.Dst.String() == "::/0" || r.Protocol == unix.RTPROT_RA {
				all = append(all, fmt.Sprintf("%s via %s protocol %d", r.Dst, r.Gw, r.Protocol))
			}
		}
		addrs, err := netlink.AddrList(nil, netlink.FAMILY_V6)
		for _, a := range addrs {
			if !a.IP.IsLinkLocalUnicast() {
				all = append(all, a.IPNet.String())
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

// advertise sends router advertisements with a prefix (RFC 4861, 4.2 and
// 4.6.2).
func advertise(link string, times int) error {
	ifi, err := net.InterfaceByName(link)
	if err != nil {
		return err
	}
	var from netip.Addr
	addrs, err := ifi.Addrs()
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsLinkLocalUnicast() {
			from = p.Addr()
		}
	}
	if !from.IsValid() {
		return errors.New("there is no link-local address")
	}
	b := make([]byte, 16+32)
	b[0], b[4] = 134, 64
	binary.BigEndian.PutUint16(b[6:], 1800)
	o := b[16:]
	o[0], o[1], o[2], o[3] = 3, 4, 64, 0xc0 // on-link and autonomous
	binary.BigEndian.PutUint32(o[4:], 86400)
	binary.BigEndian.PutUint32(o[8:], 14400)
	prefix := netip.MustParseAddr("2001:db8:bad::").As16()
	copy(o[16:], prefix[:])
	to := netip.MustParseAddr("ff02::1")
	pseudo := append(from.AsSlice(), to.AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(b)))
	pseudo = append(pseudo, 0, 0, 0, unix.IPPROTO_ICMPV6)
	binary.BigEndian.PutUint16(b[2:], ^onesSum(append(pseudo, b...)))
	packet := ipPacket(from, to, unix.IPPROTO_ICMPV6, b)
	packet[7] = 255
	frame := append([]byte{0x33, 0x33, 0, 0, 0, 1}, ifi.HardwareAddr...)
	frame = append(append(frame, 0x86, 0xdd), packet...)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for range times {
		if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: ifi.Index}); err != nil {
			return err
		}
	}
	return nil
}

// TestChaosLoop makes each of two nodes believe that the other has a subnet: a
// packet for it crosses the tunnel once, whatever its TTL, and is counted.
func TestChaosLoop(t *testing.T) {
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			c := newCluster(t, 2)
			phantom := netip.MustParsePrefix("10.5.99.0/24")
			prefixes := []string{"/one", "/two"}
			for i, n := range c.Nodes {
				c.culvert("config", "set", config, "--etcd-endpoints", c.endpoint, "--etcd-prefix", prefixes[i])
				c.start(n, "--etcd-prefix", prefixes[i], "--datapath", d, "--probe-peers=false") // a probe would be dropped and counted, too
			}
			for _, n := range c.Nodes {
				c.waitReady(n, 0)
			}
			// A second lease with the same public address would be set aside.
			for i := range c.Nodes {
				other := c.Nodes[1-i]
				l := subnet.Lease{Backend: "vxlan", Endpoints: []subnet.Endpoint{{
					Subnet: phantom, Public: other.Addrs[0], VTEP: subnet.VTEP{VNI: 1, MAC: subnet.DeriveMAC(other.ID, 1, false)},
				}}}
				value, err := l.Value()
				if err != nil {
					t.Fatal(err)
				}
				c.put(prefixes[i]+"/subnets/"+l.Key(), string(value))
			}
			for _, n := range c.Nodes {
				c.waitReady(n, 1)
			}
			pod, err := c.Nodes[0].AddPod(t.Context(), "p1")
			if err != nil {
				t.Fatal(err)
			}
			wires := []*sniffer{sniff(t, c.Nodes[0]), sniff(t, c.Nodes[1])}
			payload := []byte("round and round")
			from, to := pod.Addr(true), inside(phantom)
			packet := ipPacket(from, to, unix.IPPROTO_UDP, udpDatagram(from, to, 5000, victimPort, payload))
			packet[8] = 255
			sumHeader(packet, 0)
			const rounds = 100 // sendRaw sends three packets per call
			if err := pod.Do(func() error {
				for range rounds {
					if err := sendRaw(to, [][]byte{packet}); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			c.wait(c.Nodes[1], "counts each once", func(s api.Status) bool { return drops(s, "ingress-source") == 3*rounds })
			time.Sleep(100 * time.Millisecond)
			crossed := []int{wires[0].tunnelled(payload), wires[1].tunnelled(payload)}
			t.Logf("%d sent with TTL 255: %d arrived at n1, %d at n2", 3*rounds, crossed[0], crossed[1])
			if crossed[0] != 0 || crossed[1] > 3*rounds { // fewer if the link delivers super-frames
				t.Errorf("%v crossed", crossed)
			}
		})
	}
}

// TestChaosSpoof has a pod send to a pod on another node with a spoofed source:
// an address of a pod on a third node, of the victim, or of no node. Nothing
// arrives, and the sender's or the receiver's node counts it.
func TestChaosSpoof(t *testing.T) {
	const times = 100 // sendRaw sends three packets per call
	for _, end := range fastEnds {
		t.Run(end.name, func(t *testing.T) {
			c := newClusterOf(t, lab.Options{Nodes: 3, Prefixes: dualUnderlay})
			c.setConfig(dual)
			c.startAll(end.flags...)
			var pods []*lab.Pod
			for _, n := range c.Nodes {
				p, err := n.AddPod(t.Context(), "p1")
				if err != nil {
					t.Fatal(err)
				}
				pods = append(pods, p)
			}
			for _, n := range c.Nodes { // disable the kernel's own source check
				for _, dev := range []string{"all", "cni0"} {
					if err := n.SetSysctl("net/ipv4/conf/"+dev+"/rp_filter", "0"); err != nil {
						t.Fatal(err)
					}
				}
			}
			w := newWitness(t, c.Nodes[1], pods[1])
			where, reason := c.Nodes[1], "ingress-source" // the kernel's routes do not check the source
			if end.name == "loop" {
				where, reason = c.Nodes[0], "egress-source"
			}
			for i, is4 := range []bool{true, false} {
				to := pods[1].Addr(is4)
				for name, from := range map[string]netip.Addr{
					"another node's pod": pods[2].Addr(is4), "the victim itself": to, "nobody": inside(leaseOf(5, is4)),
				} {
					mark := w.expect(name)
					before, err := c.status(where)
					if err != nil {
						t.Fatal(err)
					}
					packet := ipPacket(from, to, unix.IPPROTO_UDP, udpDatagram(from, to, 5000, victimPort, mark))
					if err := pods[0].Do(func() error {
						for range times {
							if err := sendRaw(to, [][]byte{packet}); err != nil {
								return err
							}
						}
						return nil
					}); err != nil {
						t.Fatal(err)
					}
					c.wait(where, fmt.Sprintf("counts %s, family %d", name, i), func(s api.Status) bool {
						return drops(s, reason)-drops(before, reason) == 3*times
					})
					if seen := w.count(mark); len(seen) > 0 {
						t.Errorf("%s: seen %v", name, seen)
					}
				}
			}
		})
	}
}

// tunnelled returns the number of tunnel packets received that contain payload.
func (s *sniffer) tunnelled(payload []byte) (n int) {
	b := make([]byte, 1<<16)
	for {
		k, from, err := unix.Recvfrom(s.fd, b, 0)
		if err != nil {
			return n
		}
		p, ok := parseIP(b[:k])
		if ok && from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_HOST && p.protocol == unix.IPPROTO_UDP && binary.BigEndian.Uint16(p.payload[2:]) == 8472 && bytes.Contains(p.payload, payload) {
			n++
		}
	}
}
