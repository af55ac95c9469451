package test

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/api"
)

// TestP7LostLeaseKeepsPodsInside gives a node's subnet to another node while a pod sends to
// the cluster network: at no moment does a packet leave by the default route.
func TestP7LostLeaseKeepsPodsInside(t *testing.T) {
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			c := newCluster(t, 1)
			c.setConfig(config)
			n := c.Nodes[0]
			c.start(n, "--datapath", d)
			before := c.waitReady(n, 0)
			pod, err := n.AddPod(t.Context(), "p1")
			if err != nil {
				t.Fatal(err)
			}
			out, err := pod.ListenPacket(t.Context(), "udp", netip.AddrPortFrom(pod.Addr(true), 0).String())
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			wire := sniff(t, n)
			defer wire.clear(t, netip.MustParsePrefix("10.5.0.0/16"))
			there := netip.AddrPortFrom(netip.MustParseAddr("10.5.99.9"), 9)
			stop := make(chan struct{})
			sent := make(chan int)
			go func() {
				n := 0
				for {
					select {
					case <-stop:
						sent <- n
						return
					default:
					}
					to := net.UDPAddrFromAddrPort(there)
					if _, err := out.WriteTo([]byte("inside"), to); err == nil {
						n++
					}
					time.Sleep(200 * time.Microsecond)
				}
			}()
			c.put(c.leaseKey(before), thief)
			c.wait(n, "is fenced", func(s api.Status) bool { return s.Fenced != nil })
			eventually(t, "only the unreachable route is left", func() error { return cleanKernel(n, before.Lease.Subnets[0]) })
			time.Sleep(50 * time.Millisecond)
			close(stop)
			if k := <-sent; k < 100 {
				t.Errorf("only %d packets were sent", k)
			}
		})
	}
}

// clear fails the test if the sniffer has seen a packet on the link, in either direction,
// with a destination in the cluster network, that is one that was not encapsulated.
func (s *sniffer) clear(t *testing.T, network netip.Prefix) {
	t.Helper()
	b := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(s.fd, b, 0)
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if p, ok := parseIP(b[:n]); ok && network.Contains(p.to) {
			t.Errorf("a packet from %s to %s was on the underlay without encapsulation", p.from, p.to)
			return
		}
	}
}
