package test

import (
	"encoding/binary"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/ipv4"

	"culvert/backend"
	"culvert/internal/api"
	"culvert/internal/lab"
)

// TestManyPeers has a node probe many peers, all of which answer:
//
//	n1: culvert, probes     ─┬─ 198.19.0.0/16 ── n2: answers echo requests in VXLAN, for every address
//	n3: culvert, probes none ┘
//
// A few unless CULVERT_PEERS says how many; then it measures, for docs/scale.md, how
// long `culvert status` and `culvert peers` take, and, with 1,000 at most, what probing
// costs: the processor time of n1's daemon less that of n3's in the same time, with n1's
// bursts of requests 30 times as often as usual, since the difference is else smaller than
// what the two differ by anyway. CULVERT_PEERS_TIME is another time than three times 20 s.
func TestManyPeers(t *testing.T) {
	count, measure, watch := 16, false, 20*time.Second
	if text := os.Getenv("CULVERT_PEERS"); text != "" {
		var err error
		if count, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
		measure = true
	}
	if text := os.Getenv("CULVERT_PEERS_TIME"); text != "" {
		var err error
		if watch, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	for _, datapath := range []string{"kernel", "userspace"} {
		t.Run(datapath, func(t *testing.T) {
			c := newCluster(t, 3)
			c.datapath = datapath
			c.setConfig(`{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`)
			n1, n2, n3 := c.Nodes[0], c.Nodes[1], c.Nodes[2]
			c.addPeers(count)
			answered := answerAll(t, n2, n1, n3)
			flags := []string{}
			if measure && count <= 1000 {
				flags = append(flags, "--probe-interval", (backend.ProbeInterval / probesFaster).String())
			}
			probes := c.start(n1, flags...)
			if !measure {
				c.waitReady(n1, count)
				awaitIdle(t, n1, count)
				return
			}
			asksNone := c.start(n3, "--probe-peers=false")
			c.waitReady(n1, count+1)
			c.waitReady(n3, count+1)
			if count <= 1000 { // it would take minutes to ask all
				costOfProbes(t, answered, probes.PID, asksNone.PID, watch)
			}
			timeCommands(t, n1, filepath.Join(c.bin, "culvert"), count)
		})
	}
}

// probesFaster is how much more often than usual bursts are sent where their cost is measured.
const probesFaster = 30

// costOfProbes logs what probing costs: the median of three periods.
func costOfProbes(t *testing.T, answered *atomic.Uint64, probes, asksNone int, watch time.Duration) {
	t.Helper()
	time.Sleep(15 * time.Second) // after the start
	var costs []float64
	for range 3 {
		before := [2]time.Duration{runTime(t, probes), runTime(t, asksNone)}
		asked := answered.Load()
		time.Sleep(watch)
		with, without := float64(runTime(t, probes)-before[0])/float64(watch), float64(runTime(t, asksNone)-before[1])/float64(watch)
		costs = append(costs, 100*(with-without))
		n := answered.Load() - asked
		t.Logf("with probes %.3f %% of a core, without %.3f %%; %d requests, %v each", 100*with, 100*without, n, time.Duration((with-without)*float64(watch)/float64(n)))
	}
	slices.Sort(costs)
	const f = probesFaster
	t.Logf("probing costs %.4f %% of a core (%.4f to %.4f): a %dth of %.3f %%", costs[1]/f, costs[0]/f, costs[2]/f, f, costs[1])
}

// timeCommands logs how long the reading commands take.
func timeCommands(t *testing.T, n *lab.Node, culvert string, count int) {
	t.Helper()
	for _, args := range [][]string{{"status"}, {"status", "-o", "json"}, {"peers"}, {"peers", "-o", "json"}} {
		var took []time.Duration
		for range 11 {
			began := time.Now()
			if out, err := n.Run(t.Context(), culvert, append(args, "--run-dir", n.RunDir)...); err != nil {
				t.Fatalf("%s\n%v", out, err)
			}
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		t.Logf("culvert %s with %d peers: median %v, most %v", strings.Join(args, " "), count, took[5].Round(time.Millisecond), took[10].Round(time.Millisecond))
	}
}

// awaitIdle waits until every peer has answered: 96 requests go every 30 s.
func awaitIdle(t *testing.T, n *lab.Node, count int) {
	t.Helper()
	idle := 0
	for end := time.Now().Add(time.Minute + time.Duration(count)*400*time.Millisecond); time.Now().Before(end); time.Sleep(time.Second) {
		all, err := api.GetPeers(t.Context(), n.RunDir)
		if err != nil {
			t.Fatal(err)
		}
		idle = 0
		for _, p := range all.Peers {
			if p.State == api.PeerIdle && p.RTTSeconds > 0 && p.PathMTU == all.MTU {
				idle++
			}
		}
		if idle == count {
			return
		}
	}
	all, _ := api.GetPeers(t.Context(), n.RunDir)
	text, _ := json.Marshal(all.Peers[:min(3, len(all.Peers))])
	t.Fatalf("%d of %d peers are idle; such as %s", idle, count, text)
}

// runTime is the processor time of a process's threads that live.
func runTime(t *testing.T, pid int) (sum time.Duration) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "task/*/schedstat"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // the thread has ended
		}
		first, _, _ := strings.Cut(string(text), " ")
		n, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		sum += time.Duration(n)
	}
	return sum
}

// answerAll gives n2 every address of 198.19.0.0/16, and answers each echo request that
// arrives in VXLAN as a peer's tunnel device does. It counts them.
func answerAll(t *testing.T, n2 *lab.Node, askers ...*lab.Node) *atomic.Uint64 {
	t.Helper()
	var answered atomic.Uint64
	const network = "198.19.0.0/16"
	_, to, err := net.ParseCIDR(network)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range askers {
		if err := n.Do(func() error {
			return netlink.RouteAdd(&netlink.Route{Dst: to, Gw: n2.Addrs[0].AsSlice()})
		}); err != nil {
			t.Fatal(err)
		}
	}
	var socket *net.UDPConn
	if err := n2.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{Dst: to, LinkIndex: lo.Attrs().Index, Type: 2, Scope: netlink.SCOPE_HOST, Table: 255}); err != nil {
			return err
		}
		socket, err = net.ListenUDP("udp4", &net.UDPAddr{Port: 8472})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	conn := ipv4.NewPacketConn(socket)
	if err := conn.SetControlMessage(ipv4.FlagDst, true); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		_ = socket.Close()
		<-done
	})
	go func() {
		defer close(done)
		b := make([]byte, 1<<16)
		for {
			n, from, from4, err := readRequest(conn, b)
			if err != nil {
				return
			}
			if n == 0 {
				continue
			}
			answered.Add(1)
			_, _ = conn.WriteTo(b[:n], &ipv4.ControlMessage{Src: from4}, &net.UDPAddr{IP: from, Port: 8472})
		}
	}()
	return &answered
}

// readRequest reads the next datagram and turns it into its answer. n is 0 if it is not
// an echo request.
func readRequest(conn *ipv4.PacketConn, b []byte) (n int, from, to net.IP, err error) {
	n, cm, source, err := conn.ReadFrom(b)
	if err != nil {
		return 0, nil, nil, err
	}
	const vxlan = 8 + 14
	if n < vxlan+28 || b[vxlan] != 0x45 || b[vxlan+9] != 1 || b[vxlan+20] != 8 {
		return 0, nil, nil, nil
	}
	swap := func(at, size int) {
		for i := range size {
			b[at+i], b[at+size+i] = b[at+size+i], b[at+i]
		}
	}
	swap(8, 6)
	swap(vxlan+12, 4)
	b[vxlan+20] = 0
	sum := uint32(binary.BigEndian.Uint16(b[vxlan+22:])) + 8<<8 // RFC 1624
	binary.BigEndian.PutUint16(b[vxlan+22:], uint16(sum+sum>>16))
	return n, source.(*net.UDPAddr).IP, cm.Dst, nil
}
