package test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	clientv3 "go.etcd.io/etcd/client/v3"

	"culvert/internal/api"
	"culvert/internal/lab"
)

// TestChaosForms kills, stops and cuts off daemons in clusters over IPv6 and of format IPIP, as
// other tests do over IPv4 and VXLAN.
func TestChaosForms(t *testing.T) {
	for _, form := range []struct {
		name, config string
		underlay     lab.Options
		datapaths    []string
	}{
		{
			"vxlan over IPv6", `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}`,
			lab.Options{Nodes: 2, Prefixes: dualUnderlay[1:]},
			datapaths,
		},
		{"ipip", `{"Network":"10.5.0.0/16","Backend":{"Type":"ipip"}}`, lab.Options{Nodes: 2}, []string{"userspace"}},
	} {
		for _, d := range form.datapaths {
			t.Run(form.name+"/"+d, func(t *testing.T) {
				t.Parallel() // it mostly waits
				c := newClusterOf(t, form.underlay)
				c.datapath = d
				c.setConfig(form.config)
				daemon := c.startAll()[0]
				pods := c.pods()
				ping(t, pods[0], pods[1])
				n := c.Nodes[0]
				first := c.waitReady(n, 1)
				stream, flow := startPings(t, pods[0], pods[1]), startFlow(t, pods[1], pods[0])

				if err := daemon.Signal(syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Second)
				if err := daemon.Signal(syscall.SIGCONT); err != nil {
					t.Fatal(err)
				}
				for range 10 {
					flushNeighbours(t, n)
					flushNeighbours(t, c.Nodes[1])
					time.Sleep(50 * time.Millisecond)
				}
				c.stopEtcd()
				time.Sleep(time.Second)
				c.continueEtcd()
				sentBefore := stream.sentSoFar()
				eventually(t, "more pings", func() error {
					if stream.sentSoFar() < sentBefore+20 {
						return errors.New("not yet")
					}
					return nil
				})
				if d == "userspace" { // without a daemon packets are lost
					if sent, lost := stream.stop(); lost > 0 {
						t.Errorf("%d of %d pings lost", lost, sent)
					}
				}
				for i := range 4 {
					if err := daemon.Kill(); err != nil {
						t.Fatal(err)
					}
					daemon = c.start(n)
					if i%2 == 0 {
						c.waitReady(n, 1)
					} else {
						time.Sleep(rand.N(300 * time.Millisecond))
					}
				}
				after := c.waitReady(n, 1)
				if after.Lease.Subnets[0] != first.Lease.Subnets[0] {
					t.Errorf("the node had the subnet %v and has %v", first.Lease.Subnets, after.Lease.Subnets)
				}
				ping(t, pods[0], pods[1])
				if d == "kernel" {
					if sent, lost := stream.stop(); lost > 0 {
						t.Errorf("%d of %d pings lost", lost, sent)
					}
				}
				if turns, _, err := flow.stop(); err != nil || turns == 0 {
					t.Errorf("the flow broke after %d round trips: %v", turns, err)
				}
			})
		}
	}
}

// TestChaosNoBuffers limits the underlay's link to 10 Mbit/s with a short queue, and sends more
// than that: what does not fit is counted, by the daemon or by the queue, and once the limit is
// gone nothing is lost. The kernel then refuses packets with ENOBUFS, as it does for lack of
// memory for sockets.
func TestChaosNoBuffers(t *testing.T) {
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			c := newCluster(t, 2)
			c.datapath = d
			c.setConfig(config)
			flags := []string{}
			if d == "userspace" {
				// Sockets that read the error queue are told that a packet was dropped. Others are
				// not, nor is the kernel's device: tc -s qdisc counts it.
				flags = append(flags, "--df")
			}
			c.startAll(flags...)
			pods := c.pods()
			ping(t, pods[0], pods[1])
			n := c.Nodes[0]
			before := c.waitReady(n, 1)
			var queue *netlink.Tbf
			refused := func() (count uint64) {
				if err := n.Do(func() error {
					all, err := netlink.QdiscList(nil)
					for _, q := range all {
						if q.Type() == "tbf" && q.Attrs().Statistics != nil && q.Attrs().Statistics.Queue != nil {
							count = uint64(q.Attrs().Statistics.Queue.Drops)
						}
					}
					return err
				}); err != nil {
					t.Fatal(err)
				}
				return count
			}
			if err := n.Do(func() error {
				l, err := netlink.LinkByName(n.Link)
				if err != nil {
					return err
				}
				const rate = 10e6 / 8
				queue = &netlink.Tbf{
					QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
					Rate:       rate, Limit: 20000, Buffer: uint32(netlink.Xmittime(rate, 20000)),
				}
				return netlink.QdiscAdd(queue)
			}); err != nil {
				t.Fatal(err)
			}
			from, to := pods[0], pods[1]
			sink, err := to.ListenPacket(t.Context(), "udp", fmt.Sprintf("%s:0", to.Addrs[0]))
			if err != nil {
				t.Fatal(err)
			}
			defer sink.Close()
			source, err := from.ListenPacket(t.Context(), "udp", fmt.Sprintf("%s:0", from.Addrs[0]))
			if err != nil {
				t.Fatal(err)
			}
			defer source.Close()
			const packets = 20000
			for range packets {
				_, _ = source.WriteTo(make([]byte, 1300), sink.LocalAddr())
			}
			eventually(t, "the queue is full", func() error {
				if refused() == 0 {
					return errors.New("it has refused nothing")
				}
				return nil
			})
			during := c.wait(n, "answers", func(api.Status) bool { return true })
			counted := drops(during, "egress-no-buffers") - drops(before, "egress-no-buffers")
			t.Logf("%d packets; the queue counts %d drops, and the daemon %d of egress-no-buffers", packets, refused(), counted)
			if d == "userspace" && counted == 0 {
				t.Errorf("the daemon counted %v", during.Datapath.Drops)
			}
			if err := n.Do(func() error { return netlink.QdiscDel(queue) }); err != nil {
				t.Fatal(err)
			}
			after := c.waitReady(n, 1)
			ping(t, from, to)
			transfer(t, from.Namespace, to.Namespace, from.Addrs[0], to.Addrs[0], 5<<20)
			end := c.waitReady(n, 1)
			if a, b := drops(after, "egress-no-buffers"), drops(end, "egress-no-buffers"); b > a && d == "userspace" {
				t.Errorf("%d packets were dropped after the limit was gone", b-a)
			}
		})
	}
}

// TestChaosDay plays the changes of leases of a day within minutes, while pods talk and leases of
// seconds are renewed: nodes join, leave, move to another address, and take over another's
// subnet. CULVERT_DAY is the number of changes; the default is 60, and 1,440 make one a minute.
func TestChaosDay(t *testing.T) {
	changes := times(t, "CULVERT_DAY", 60)
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			t.Parallel() // it mostly waits
			f := startChaos(t, func(*cluster) {}, "--datapath", d, "--lease-ttl", "5s")
			n := f.Nodes[0]
			client := f.client()
			objects := kernelObjects(t, n)
			owners := make(map[int]string) // the lease of each subnet, as it is in etcd
			key := func(i int) string { return fmt.Sprintf("/coreos.com/network/subnets/10.5.%d.0-24", 230+i) }
			ours := f.waitReady(n, 1).Lease.Subnets[0].String()
			for change := range changes {
				i := rand.IntN(20)
				if strings.HasPrefix(ours, fmt.Sprintf("10.5.%d.", 230+i)) || slices.ContainsFunc(f.pods, func(p *lab.Pod) bool { return p.Addrs[0].As4()[2] == byte(230+i) }) {
					continue
				}
				if owners[i] != "" && rand.IntN(2) == 0 {
					if _, err := client.Delete(t.Context(), key(i)); err != nil {
						t.Fatal(err)
					}
					delete(owners, i)
				} else {
					// A new node, or the same at another address.
					at := fmt.Sprintf("192.0.2.%d", 1+change%250)
					value := fmt.Sprintf(`{"PublicIP":"%s","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:%02x:%02x"},"NodeID":"day-%d"}`, at, change/256%256, change%256, rand.IntN(1000))
					if _, err := client.Put(t.Context(), key(i), value, clientv3.WithPrevKV()); err != nil {
						t.Fatal(err)
					}
					owners[i] = at
				}
				if change%10 != 9 {
					continue
				}
				f.wait(n, "has the peers that are in etcd", func(s api.Status) bool {
					if !s.Ready {
						return false
					}
					known := make(map[string]string)
					for _, p := range s.Peers {
						known[p.Subnets[0].Addr().String()] = p.PublicIPs[0].String()
					}
					for i, at := range owners {
						if known[fmt.Sprintf("10.5.%d.0", 230+i)] != at {
							return false
						}
					}
					return len(s.Peers) == len(owners)+1
				})
			}
			for i := range owners {
				if _, err := client.Delete(t.Context(), key(i)); err != nil {
					t.Fatal(err)
				}
			}
			f.waitReady(n, 1)
			eventually(t, "the kernel's objects are as before", func() error {
				if now := kernelObjects(t, n); now != objects {
					return fmt.Errorf("%d, and %d before", now, objects)
				}
				if sent := f.stream.sentSoFar(); sent < 100 {
					return fmt.Errorf("only %d pings", sent)
				}
				return nil
			})
			f.end(t)
		})
	}
}
