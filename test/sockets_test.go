package test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
)

// udpSockets returns the UDP sockets of a node's namespace: the bytes in the receive queue
// by local port.
func udpSockets(t *testing.T, n *lab.Node) map[int]int {
	t.Helper()
	all := make(map[int]int)
	if err := n.Do(func() error {
		for _, file := range []string{"udp", "udp6"} {
			f, err := os.Open("/proc/thread-self/net/" + file)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			defer f.Close()
			lines := bufio.NewScanner(f)
			lines.Scan()
			for lines.Scan() {
				w := strings.Fields(lines.Text())
				_, port, _ := strings.Cut(w[1], ":")
				_, waits, _ := strings.Cut(w[4], ":")
				p, err1 := strconv.ParseInt(port, 16, 32)
				q, err2 := strconv.ParseInt(waits, 16, 32)
				if err := errors.Join(err1, err2); err != nil {
					return err
				}
				all[int(p)] = int(q)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// TestP2SendSocketsReceiveNothing floods the ports of the sockets that only send: their filter
// keeps the receive queues empty, and with --df, when the daemon polls these sockets for
// errors, it does not busy-loop.
func TestP2SendSocketsReceiveNothing(t *testing.T) {
	c := newClusterOf(t, lab.Options{Nodes: 2, Prefixes: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/24"), netip.MustParsePrefix("fd00:18::/64")}})
	c.setConfig(dualConfig)
	c.start(c.Nodes[1])
	for _, flags := range [][]string{{"--source-ports", "4"}, {"--source-ports", "4", "--df"}} {
		t.Run(strings.Join(flags, " "), func(t *testing.T) {
			n := c.Nodes[0]
			before := udpSockets(t, n)
			p := c.start(n, flags...)
			defer stop(t, p)
			c.waitReady(n, 1)
			var ports []int
			for port := range udpSockets(t, n) {
				if _, there := before[port]; !there && port != 8472 {
					ports = append(ports, port)
				}
			}
			if len(ports) < 6 {
				t.Fatalf("only %d sockets that send: %v", len(ports), ports)
			}
			for i := range 2 {
				from, err := c.Nodes[1].ListenPacket(t.Context(), "udp", netip.AddrPortFrom(c.Nodes[1].Addrs[i], 0).String())
				if err != nil {
					t.Fatal(err)
				}
				defer from.Close()
				for range 500 {
					for _, port := range ports {
						_, _ = from.WriteTo(make([]byte, 1400), net.UDPAddrFromAddrPort(netip.AddrPortFrom(n.Addrs[i], uint16(port))))
					}
				}
			}
			waiting := udpSockets(t, n)
			for _, port := range ports {
				if waiting[port] > 0 {
					t.Errorf("%d bytes are in the receive queue of port %d", waiting[port], port)
				}
			}
			used := processorTime(t, p.PID)
			time.Sleep(500 * time.Millisecond)
			if used = processorTime(t, p.PID) - used; used > 250*time.Millisecond {
				t.Errorf("the daemon used %v of CPU time in half a second", used)
			}
		})
	}
}

// setLink sets a node's link up or down.
func setLink(t *testing.T, n *lab.Node, up bool) {
	t.Helper()
	if err := n.Do(func() error {
		l, err := netlink.LinkByName(n.Link)
		if err != nil {
			return err
		}
		if up {
			return netlink.LinkSetUp(l)
		}
		return netlink.LinkSetDown(l)
	}); err != nil {
		t.Fatal(err)
	}
}

// TestP4LinkFlaps sets the underlay's link down and up: packets pass again at once, and the
// datapath is not reopened.
func TestP4LinkFlaps(t *testing.T) {
	for _, format := range []string{"vxlan", "ipip"} {
		t.Run(format, func(t *testing.T) {
			c := newClusterOf(t, lab.Options{Nodes: 2, Underlay: lab.Direct})
			c.setConfig(`{"Network":"10.5.0.0/16","Backend":{"Type":"` + format + `"}}`)
			daemons := c.startAll("--iface", c.Nodes[0].Link)
			a, b := c.Nodes[0], c.Nodes[1]
			pod, err := a.AddPod(t.Context(), "p1")
			if err != nil {
				t.Fatal(err)
			}
			to := c.waitReady(b, 1).Lease.Subnets[0].Addr()
			ping := func() error {
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				defer cancel()
				_, err := pod.Ping(ctx, pod.Addr(true), to)
				return err
			}
			eventually(t, "the first ping", ping)
			for range 3 {
				setLink(t, a, false)
				_ = ping() // a packet sent meanwhile is lost
				setLink(t, a, true)
				up := time.Now()
				eventually(t, "a ping after the flap", ping)
				t.Logf("packets passed %v after the flap", time.Since(up))
			}
			for i, d := range daemons {
				if log := d.Tail(200); strings.Contains(log, "broken") {
					t.Errorf("%s reopened its datapath:\n%s", c.Nodes[i].ID, log)
				}
			}
		})
	}
}

// TestP5ShortQuotes is TestPathMTU with a router that quotes only the outer IP header and 8
// bytes (RFC 792), with IPIP and with VXLAN and --df; and with IPIP's fast path, which then
// leaves long packets to the loop, one that quotes the packet: a shorter quote counts for the
// loop only if it sent that packet itself.
func TestP5ShortQuotes(t *testing.T) {
	for _, name := range []string{"vxlan", "ipip", "ipip fast"} {
		t.Run(name, func(t *testing.T) {
			format, _, fast := strings.Cut(name, " ")
			c := newClusterOf(t, lab.Options{Nodes: 2, Underlay: lab.Direct})
			c.setConfig(`{"Network":"10.5.0.0/16","Backend":{"Type":"` + format + `"}}`)
			c.startAll("--iface", c.Nodes[0].Link, "--df", "--no-super-frame", "--fast-path="+map[bool]string{true: "on", false: "off"}[fast])
			a, b := c.Nodes[0], c.Nodes[1]
			pod, err := a.AddPod(t.Context(), "p1")
			if err != nil {
				t.Fatal(err)
			}
			there := c.waitReady(b, 1).Lease.Subnets[0].Addr()
			server, client := udpPair(t, pod.Namespace, b.Namespace, pod.Addr(true), there)
			raw, err := client.(*net.UDPConn).SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			if err := raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
			}); err != nil {
				t.Fatal(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			wire := sniff(t, b)
			const long, narrow = 1300, 1200
			send := func() error { _, err := client.WriteTo(pattern(long), server.LocalAddr()); return err }
			if err := send(); err != nil {
				t.Fatal(err)
			}
			outer := wire.next(t, func(p ip) bool { return p.from == a.Addrs[0] && len(p.payload) > long })
			quote := append(append([]byte{}, outer.header...), outer.payload[:8]...)
			if fast {
				if c.fastPath(a).Egress.Packets == 0 {
					t.Error("the fast path sent nothing")
				}
				quote = append(append([]byte{}, outer.header...), outer.payload...)
			}
			if err := b.Do(func() error {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				return unix.Sendto(fd, families[0].icmp(narrow, quote), 0, &unix.SockaddrInet4{Addr: a.Addrs[0].As4()})
			}); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the pod gets the error", func() error {
				if err := send(); !errors.Is(err, unix.EMSGSIZE) {
					return fmt.Errorf("sending %d bytes: %w", long, err)
				}
				return nil
			})
			cost := map[string]int{"vxlan": 50, "ipip": 20}[format]
			s := c.wait(a, "reports the narrow path", func(s api.Status) bool { return len(s.Datapath.NarrowPaths) == 1 })
			if p := s.Datapath.NarrowPaths[0]; p.MTU != narrow-cost || p.By != b.Addrs[0] || time.Until(p.Until) > 3*time.Minute && !fast {
				t.Errorf("the narrow path in the status is %+v", p)
			}
			transfer(t, pod.Namespace, b.Namespace, pod.Addr(true), there, 1<<20)
		})
	}
}

// TestP6FragmentsOutside narrows an IPv6 path so much that a pod's packet of 1280 bytes does
// not fit with the tunnel's headers. Even with --df the outer packets are then fragmented
// (RFC 2473, section 7.1).
func TestP6FragmentsOutside(t *testing.T) {
	o := newOracle(t)
	n := o.Nodes[0]
	o.start(n, "--iface", n.Link, "--df", "--source-ports", "2")
	o.waitReady(n, 1)
	f := families[1]
	f.narrow = 1300
	here, there := o.pod.Addr(false), o.there[1]
	server, client := udpPair(t, o.pod.Namespace, o.kernel.Namespace, here, there)
	wire := sniff(t, o.kernel)
	const size = 1280 - 48
	if _, err := client.WriteTo(pattern(size), server.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	outer := wire.next(t, func(p ip) bool {
		return p.from == n.Addrs[1] && p.protocol == unix.IPPROTO_UDP && len(p.payload) > size
	})
	o.tooBig(t, f, outer, -1)
	if s := o.wait(n, "reports the narrow path", func(s api.Status) bool { return len(s.Datapath.NarrowPaths) == 1 }); s.Datapath.NarrowPaths[0].MTU != 1280 {
		t.Errorf("the narrow path is %+v, want the MTU 1280", s.Datapath.NarrowPaths[0])
	}
	wire = sniff(t, o.kernel)
	if _, err := client.WriteTo(pattern(size), server.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	const header = 8 // RFC 8200, section 4.5
	first := wire.next(t, func(p ip) bool { return p.protocol == unix.IPPROTO_FRAGMENT })
	if first.payload[0] != unix.IPPROTO_UDP || binary.BigEndian.Uint16(first.payload[header+2:]) != 8472 || len(first.header)+len(first.payload) > 1280 {
		t.Errorf("the first fragment is %x", first.payload[:40])
	}
	got := make([]byte, 2000)
	if err := server.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		k, _, err := server.ReadFrom(got)
		if err != nil || string(got[:k]) != string(pattern(size)) {
			t.Fatalf("%d bytes of the datagram arrived: %v", k, err)
		}
	}
	// TCP transfers over such a path arrive unchanged.
	transfer(t, o.pod.Namespace, o.kernel.Namespace, here, there, 1<<20)
	transfer(t, o.kernel.Namespace, o.pod.Namespace, there, here, 1<<20)
	if d := dropped(o.wait(n, "has a status", func(api.Status) bool { return true })); len(d) > 0 && d[0].Reason != "egress-too-big" {
		t.Errorf("dropped %v", d)
	}
	long := func(p ip) bool {
		return p.from == n.Addrs[1] && len(p.header)+len(p.payload) > 1300 && p.protocol == unix.IPPROTO_UDP
	}
	b := make([]byte, 1<<16)
	for {
		k, _, err := unix.Recvfrom(wire.fd, b, 0)
		if err != nil {
			break
		}
		if p, ok := parseIP(b[:k]); ok && long(p) {
			t.Fatalf("a packet of %d bytes was sent after the path MTU was known", k)
		}
	}
}
