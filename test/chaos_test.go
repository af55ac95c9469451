package test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/subnet"
)

// chaos is a cluster for tests that inject faults of the host under traffic. Faults of etcd
// are in faults_test.go, those of the network in hostevents_test.go.
//
//	pod ── n1 ══ tunnel ══ n2 ── pod
type chaos struct {
	*cluster
	daemon *lab.Process // of n1
	pods   []*lab.Pod
	stream *pings
	flow   *flow
}

// times returns a test's number of repetitions: the environment variable's value, or short.
func times(t *testing.T, variable string, short int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return short
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func startChaos(t *testing.T, before func(*cluster), flags ...string) *chaos {
	t.Helper()
	c := newCluster(t, 2)
	c.setConfig(config)
	before(c)
	f := &chaos{cluster: c}
	f.daemon = c.startAll(flags...)[0]
	for _, n := range c.Nodes {
		pod, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		f.pods = append(f.pods, pod)
	}
	ping(t, f.pods[0], f.pods[1])
	f.stream = startPings(t, f.pods[0], f.pods[1])
	f.flow = startFlow(t, f.pods[1], f.pods[0])
	return f
}

// end checks after the faults that no ping was lost, that the flow has not broken and that
// the daemon is running.
func (f *chaos) end(t *testing.T) {
	t.Helper()
	if t.Failed() {
		return
	}
	sent, lost := f.stream.stop()
	turns, longest, err := f.flow.stop()
	t.Logf("%d pings, %d lost; the flow made %d round trips, the longest took %v", sent, lost, turns, longest.Round(time.Millisecond))
	if lost > 0 || sent < 50 {
		t.Errorf("%d of %d pings lost", lost, sent)
	}
	if err != nil || turns == 0 {
		t.Errorf("the flow broke after %d round trips: %v", turns, err)
	}
	select {
	case <-f.daemon.Exited():
		t.Errorf("the daemon exited: %s", f.daemon.Tail(3))
	default:
	}
}

// anotherPeer writes the lease of another peer to etcd.
func (f *chaos) anotherPeer(t *testing.T) {
	t.Helper()
	f.put("/coreos.com/network/subnets/10.5.250.0-24", `{"PublicIP":"192.0.2.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:01:01"},"NodeID":"extra"}`)
}

// TestChaosDisk fills the run directory's file system, then makes it read-only, while the
// node renews its lease: the node stays ready, shows a warning, and writes its files again
// when it can.
func TestChaosDisk(t *testing.T) {
	t.Parallel()
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			var dir string
			f := startChaos(t, func(c *cluster) {
				dir = c.Nodes[0].RunDir
				if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=128k"); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
			}, "--datapath", d, "--lease-ttl", "6s")
			n := f.Nodes[0]
			warns := func(s api.Status) bool {
				return slices.ContainsFunc(s.Warnings, func(w api.Warning) bool { return w.Check == "subnet-file" })
			}
			env := func() string {
				text, err := os.ReadFile(n.SubnetFile())
				if err != nil {
					t.Error(err)
				}
				return string(text)
			}
			for _, fault := range []struct {
				name        string
				begin, stop func() error
			}{
				{"full", func() error {
					for i := 0; ; i++ {
						if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("filler", i)), make([]byte, 4096), 0o600); errors.Is(err, unix.ENOSPC) {
							return nil
						} else if err != nil || i > 1000 {
							return fmt.Errorf("cannot fill the file system: %w", err)
						}
					}
				}, func() error {
					all, err := filepath.Glob(filepath.Join(dir, "filler*"))
					for _, name := range all {
						err = errors.Join(err, os.Remove(name))
					}
					return err
				}},
				{"read-only", func() error { return coverReadOnly(t.TempDir(), dir) }, func() error { return unix.Unmount(dir, unix.MNT_DETACH) }},
			} {
				before := env()
				if err := fault.begin(); err != nil {
					t.Fatalf("%s: %v", fault.name, err)
				}
				s := f.wait(n, fault.name+": shows the warning", warns)
				if got := env(); got != before {
					t.Errorf("%s: subnet.env became %q", fault.name, got)
				}
				f.wait(n, fault.name+": renews its lease", func(now api.Status) bool {
					return now.Ready && now.Lease.Expires.After(s.Lease.Expires)
				})
				if err := fault.stop(); err != nil {
					t.Fatal(err)
				}
				f.wait(n, fault.name+": no longer shows the warning", func(s api.Status) bool { return s.Ready && !warns(s) })
				if got := env(); got == before {
					t.Errorf("%s: subnet.env was not written after the fault", fault.name)
				}
			}
			f.anotherPeer(t)
			f.waitReady(n, 2)
			f.end(t)
		})
	}
}

// coverReadOnly mounts a read-only file system with the same files over a directory. The
// directory's own file system cannot be made read-only while a file is open for writing.
func coverReadOnly(stage, dir string) error {
	if err := unix.Mount("tmpfs", stage, "tmpfs", 0, "size=256k"); err != nil {
		return err
	}
	defer func() { _ = unix.Unmount(stage, unix.MNT_DETACH) }()
	all, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range all {
		from, to := filepath.Join(dir, e.Name()), filepath.Join(stage, e.Name())
		if e.Type().IsRegular() {
			text, err := os.ReadFile(from)
			if err == nil {
				err = os.WriteFile(to, text, 0o600)
			}
			if err != nil {
				return err
			}
			continue
		}
		if err := os.WriteFile(to, nil, 0o600); err != nil {
			return err
		}
		if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil { // the socket
			return err
		}
	}
	if err := unix.Mount("", stage, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return err
	}
	return unix.Mount(stage, dir, "", unix.MS_BIND|unix.MS_REC, "")
}

// TestChaosDescriptors lowers a running daemon's limit of file descriptors so that it cannot
// open any: it keeps forwarding, and follows the leases again once the limit is restored.
func TestChaosDescriptors(t *testing.T) {
	t.Parallel()
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			t.Parallel()
			f := startChaos(t, func(*cluster) {}, "--datapath", d, "--lease-ttl", "6s")
			var before unix.Rlimit
			if err := unix.Prlimit(f.daemon.PID, unix.RLIMIT_NOFILE, nil, &before); err != nil {
				t.Fatal(err)
			}
			// Limit it to the descriptors in use: ppoll(2) fails if it is given more than the limit.
			most := uint64(16)
			for ; ; most++ {
				if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", f.daemon.PID, most)); err != nil {
					break
				}
			}
			none := unix.Rlimit{Cur: most, Max: before.Max}
			if err := unix.Prlimit(f.daemon.PID, unix.RLIMIT_NOFILE, &none, nil); err != nil {
				t.Fatal(err)
			}
			var held []net.Conn // each takes one of the daemon's
			for range 20 {
				if c, err := net.Dial("unix", api.SocketPath(f.Nodes[0].RunDir)); err == nil {
					held = append(held, c)
				}
			}
			if s, err := f.status(f.Nodes[0]); err == nil {
				t.Errorf("the daemon answers without a free descriptor: ready %v", s.Ready)
			}
			f.anotherPeer(t)
			time.Sleep(5 * time.Second) // long enough for a check of the host and a renewal
			if err := unix.Prlimit(f.daemon.PID, unix.RLIMIT_NOFILE, &before, nil); err != nil {
				t.Fatal(err)
			}
			for _, c := range held {
				c.Close()
			}
			f.waitReady(f.Nodes[0], 2)
			f.end(t)
		})
	}
}

// TestChaosStopped suspends the daemon for two seconds (SIGSTOP): the kernel queues the
// packets meanwhile, and none is lost.
func TestChaosStopped(t *testing.T) {
	t.Parallel()
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			t.Parallel()
			f := startChaos(t, func(*cluster) {}, "--datapath", d)
			for range 2 {
				if err := f.daemon.Signal(syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				time.Sleep(2 * time.Second)
				if err := f.daemon.Signal(syscall.SIGCONT); err != nil {
					t.Fatal(err)
				}
				f.waitReady(f.Nodes[0], 1)
			}
			f.anotherPeer(t)
			f.waitReady(f.Nodes[0], 2)
			f.end(t)
		})
	}
}

// TestChaosNeighbour deletes the underlay's neighbours repeatedly: no packet is lost.
func TestChaosNeighbour(t *testing.T) {
	for _, end := range fastEnds {
		t.Run(end.name, func(t *testing.T) {
			f := startChaos(t, func(*cluster) {}, end.flags...)
			for range 30 {
				flushNeighbours(t, f.Nodes[0])
				flushNeighbours(t, f.Nodes[1])
				time.Sleep(50 * time.Millisecond)
			}
			f.end(t)
		})
	}
}

// TestChaosKills kills the daemon repeatedly, at random moments of its start and stop. The
// node keeps its subnet, leaves no other leases in etcd, and with the kernel datapath loses
// no packet. CULVERT_KILLS is the number of kills per datapath; the default is 12.
func TestChaosKills(t *testing.T) {
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			rounds := times(t, "CULVERT_KILLS", 12)
			f := startChaos(t, func(*cluster) {}, "--datapath", d)
			n := f.Nodes[0]
			first := f.waitReady(n, 1)
			if d == "userspace" { // without a daemon packets are queued, and some are lost
				f.stream.stop()
				if _, _, err := f.flow.stop(); err != nil {
					t.Fatal(err)
				}
				f.flow = startFlowEvery(t, f.pods[1], f.pods[0], pingEvery, 4*time.Minute)
			}
			if err := f.daemon.Kill(); err != nil {
				t.Fatal(err)
			}
			last := make(map[string]int) // counts the last log messages
			started := 800 * time.Millisecond
			for i := range rounds {
				began := time.Now()
				p := f.start(n, "--datapath", d)
				if i%2 == 0 { // while it starts
					time.Sleep(rand.N(started))
				} else { // while it stops
					f.waitReady(n, 1)
					started = time.Since(began) * 5 / 4
					if err := p.Signal(syscall.SIGTERM); err != nil {
						t.Fatal(err)
					}
					time.Sleep(rand.N(50 * time.Millisecond))
				}
				killed := time.Now()
				if err := p.Kill(); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(killed); took > time.Second {
					t.Logf("round %d: it took %v to end, %v after its start", i, took, killed.Sub(began))
				}
				_, text, _ := strings.Cut(p.Tail(1), `msg="`)
				text, _, _ = strings.Cut(text, `"`)
				last[text]++
			}
			f.daemon = f.start(n, "--datapath", d)
			after := f.waitReady(n, 1)
			if after.Lease.Subnets[0] != first.Lease.Subnets[0] {
				t.Errorf("the node had the subnets %v and has %v", first.Lease.Subnets, after.Lease.Subnets)
			}
			ping(t, f.pods[0], f.pods[1])
			resp, err := f.client().Get(t.Context(), "/coreos.com/network/subnets/", clientv3.WithPrefix())
			if err != nil || len(resp.Kvs) != 2 {
				t.Errorf("%d leases in etcd (%v)", len(resp.Kvs), err)
			}
			leases, err := f.client().Leases(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("killed %d times; etcd has %d leases; the last words: %v", rounds, len(leases.Leases), last)
			if _, err := n.AddPod(t.Context(), "p2"); err != nil {
				t.Errorf("adding a pod afterwards: %v", err)
			}
			if d == "kernel" {
				f.end(t)
				return
			}
			// Without a daemon nothing is carried. TCP waits up to two minutes before it
			// sends again.
			before, _, _ := f.flow.state()
			for end := time.Now().Add(3 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
				if turns, _, err := f.flow.state(); err != nil || turns > before+1 {
					break
				}
			}
			if turns, longest, err := f.flow.stop(); err != nil || turns <= before+1 {
				t.Errorf("the flow broke after %d round trips, %d of them before the last start: %v", turns, before, err)
			} else {
				t.Logf("the flow made %d round trips, the longest took %v", turns, longest.Round(time.Millisecond))
			}
		})
	}
}

// TestChaosFlood has a peer send small packets as fast as it can, far more than a node can
// process: meanwhile the lease is renewed and the daemon answers, and afterwards everything
// works as before. CULVERT_FLOOD is the duration in seconds; the default is 5.
func TestChaosFlood(t *testing.T) {
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			seconds := times(t, "CULVERT_FLOOD", 5)
			c := newCluster(t, 2)
			c.setConfig(config)
			c.startAll("--datapath", d, "--lease-ttl", "6s")
			var pods []*lab.Pod
			for _, n := range c.Nodes {
				p, err := n.AddPod(t.Context(), "p1")
				if err != nil {
					t.Fatal(err)
				}
				pods = append(pods, p)
			}
			ping(t, pods[0], pods[1])
			before := c.waitReady(c.Nodes[0], 1)
			s := newSender(t, c.Nodes[1])
			from, to := pods[1].Addrs[0], pods[0].Addrs[0]
			frame := vxlanFrame(c.Nodes[0].ID, ipPacket(from, to, unix.IPPROTO_UDP, udpDatagram(from, to, 5000, 9, make([]byte, 18))))
			whole := [][]byte{ipPacket(c.Nodes[1].Addrs[0], c.Nodes[0].Addrs[0], unix.IPPROTO_UDP, udpDatagram(c.Nodes[1].Addrs[0], c.Nodes[0].Addrs[0], 50000, 8472, frame))}
			ctx, stop := context.WithTimeout(t.Context(), time.Duration(seconds)*time.Second)
			defer stop()
			var sent atomic.Int64
			var flooding sync.WaitGroup
			for range 2 {
				flooding.Go(func() {
					for ctx.Err() == nil {
						for range 100 {
							_ = s.send(true, c.Nodes[0].Addrs[0], whole)
						}
						sent.Add(100)
					}
				})
			}
			asked, prompt, slowest := 0, 0, time.Duration(0)
			var during api.Status
			for ctx.Err() == nil {
				began := time.Now()
				s, err := c.status(c.Nodes[0]) // waits for two seconds at the most
				took := time.Since(began)
				if err != nil {
					t.Errorf("no answer during the flood: %v", err)
				} else {
					during = s
				}
				asked++
				if took <= 100*time.Millisecond {
					prompt++
				}
				slowest = max(slowest, took)
				time.Sleep(20 * time.Millisecond)
			}
			flooding.Wait()
			if during.Lease == nil || !during.Lease.Expires.After(before.Lease.Expires) || !during.Ready {
				t.Errorf("the lease was not renewed during the flood: it is %+v, and was %+v", during.Lease, before.Lease)
			}
			over := time.Now()
			ping(t, pods[0], pods[1])
			back := time.Since(over)
			began := time.Now()
			transfer(t, pods[1].Namespace, pods[0].Namespace, from, to, 20<<20)
			t.Logf("%d packets in %d s; %d of %d answers within 100 ms, the slowest %v; a ping passed %v after the flood, 20 MB in %v",
				sent.Load(), seconds, prompt, asked, slowest.Round(time.Millisecond), back.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
		})
	}
}

// vxlanFrame returns an IPv4 packet with the VXLAN and Ethernet headers for a node's VTEP.
func vxlanFrame(node string, packet []byte) []byte {
	mac := subnet.DeriveMAC(node, 1, false)
	b := append([]byte{8, 0, 0, 0, 0, 0, 1, 0}, mac[:]...)
	return append(append(b, 2, 0, 0, 0, 0, 9, 0x08, 0x00), packet...)
}

// TestChaosChurn has hundreds of nodes join and leave while a flow runs: at the end the
// daemon has the same peers, and its descriptors, threads and memory have stopped growing.
// CULVERT_CHURN is the number of nodes in each of three rounds; the default is 500.
func TestChaosChurn(t *testing.T) {
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			peers := times(t, "CULVERT_CHURN", 500)
			f := startChaos(t, func(c *cluster) {
				c.setConfig(`{"Network":"10.5.0.0/16","SubnetLen":29,"SubnetMin":"10.5.0.8","SubnetMax":"10.5.1.0","Backend":{"Type":"vxlan"}}`)
			}, "--datapath", d)
			client := f.client()
			n := f.Nodes[0]
			var after []usage
			for round := range 3 {
				for _, join := range []bool{true, false} {
					for at := 0; at < peers; at += 100 {
						var ops []clientv3.Op
						for i := at; i < min(at+100, peers); i++ {
							key := fmt.Sprintf("/coreos.com/network/subnets/10.5.%d.%d-29", 8+i/32, i%32*8)
							if !join {
								ops = append(ops, clientv3.OpDelete(key))
								continue
							}
							ops = append(ops, clientv3.OpPut(key, fmt.Sprintf(
								`{"PublicIP":"100.64.%d.%d","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:01:%02x:%02x"},"NodeID":"churn-%d-%d"}`,
								i/256, i%256, i/256, i%256, round, i)))
						}
						ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
						if _, err := client.Txn(ctx).Then(ops...).Commit(); err != nil {
							t.Fatal(err)
						}
						cancel()
					}
					want := 1
					if join {
						want += peers
					}
					f.waitLong(n, fmt.Sprintf("%d peers", want), func(s api.Status) bool { return s.Ready && len(s.Peers) == want })
				}
				after = append(after, usageOf(t, f.daemon.PID))
			}
			t.Logf("%d joined and left three times: %+v", peers, after)
			if a, b := after[1], after[2]; b.descriptors > a.descriptors+2 || b.threads > a.threads+4 || b.resident > a.resident+a.resident/4+8<<20 {
				t.Errorf("the daemon's usage grows: %+v", after)
			}
			f.end(t)
		})
	}
}

// waitLong is wait with a longer timeout.
func (c *cluster) waitLong(n *lab.Node, what string, is func(api.Status) bool) {
	c.t.Helper()
	var s api.Status
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		var err error
		if s, err = c.status(n); err == nil && is(s) {
			return
		}
	}
	c.t.Fatalf("%s: not %s: ready %t (%s), %d peers", n.ID, what, s.Ready, s.NotReady, len(s.Peers))
}

// usage is a process's use of resources.
type usage struct {
	descriptors, threads int
	resident, anonymous  int // bytes; anonymous: the part without the program's file (RssAnon)
}

func usageOf(t *testing.T, pid int) (u usage) {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	u.descriptors = len(fds)
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		w := strings.Fields(value)
		switch name {
		case "Threads":
			u.threads, _ = strconv.Atoi(w[0])
		case "VmRSS":
			u.resident, _ = strconv.Atoi(w[0])
			u.resident *= 1024
		case "RssAnon":
			u.anonymous, _ = strconv.Atoi(w[0])
			u.anonymous *= 1024
		}
	}
	return u
}
