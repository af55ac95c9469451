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
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/ipv4"

	"culvert/internal/api"
	"culvert/internal/lab"
)

// TestManyPeers has a node probe many peers, all of which answer:
//
//	n1: culvert ── 198.19.0.0/16 ── n2: answers echo requests in VXLAN, for every address
//
// A few unless CULVERT_PEERS says how many; then it measures, for docs/scale.md, how
// long `culvert status` and `culvert peers` take, and, with 1,000 at most, what a
// daemon uses that probes nobody, and one that does.
func TestManyPeers(t *testing.T) {
	count, measure := 16, false
	if text := os.Getenv("CULVERT_PEERS"); text != "" {
		var err error
		if count, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
		measure = true
	}
	for _, datapath := range []string{"kernel", "userspace"} {
		t.Run(datapath, func(t *testing.T) { manyPeers(t, datapath, count, measure) })
	}
}

func manyPeers(t *testing.T, datapath string, count int, measure bool) {
	c := newCluster(t, 2)
	c.datapath = datapath
	c.setConfig(`{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`)
	n1, n2 := c.Nodes[0], c.Nodes[1]
	c.addPeers(count)
	answerAll(t, n1, n2)

	const watch = time.Minute
	share := func(flags ...string) float64 {
		p := c.start(n1, flags...)
		c.waitReady(n1, count)
		if !measure {
			awaitIdle(t, n1, count)
			return 0
		}
		time.Sleep(15 * time.Second)
		before := runTime(t, p.PID)
		time.Sleep(watch)
		used := 100 * float64(runTime(t, p.PID)-before) / float64(watch)
		if slices.Contains(flags, "--probe-peers=false") {
			if err := p.Stop(); err != nil {
				t.Fatal(err)
			}
		}
		return used
	}
	if !measure {
		share()
		return
	}
	if count <= 1000 {
		without := share("--probe-peers=false")
		with := share()
		t.Logf("%s: a daemon with %d peers uses %.3f %% of a core, without probes %.3f %%: probing costs %.3f %%", datapath, count, with, without, with-without)
	} else { // it would take minutes to ask all
		c.start(n1)
		c.waitReady(n1, count)
	}
	for _, args := range [][]string{{"status"}, {"status", "-o", "json"}, {"peers"}, {"peers", "-o", "json"}} {
		var took []time.Duration
		for range 11 {
			began := time.Now()
			if out, err := n1.Run(t.Context(), filepath.Join(c.bin, "culvert"), append(args, "--run-dir", n1.RunDir)...); err != nil {
				t.Fatalf("%s\n%v", out, err)
			}
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		t.Logf("%s: culvert %s with %d peers: median %v, most %v", datapath, strings.Join(args, " "), count, took[5].Round(time.Millisecond), took[10].Round(time.Millisecond))
	}
}

// awaitIdle waits until every peer has answered: 32 requests go every 10 s.
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

// answerAll has n2 be every address of 198.19.0.0/16, and answer each echo request
// that comes in VXLAN as a peer's tunnel device does.
func answerAll(t *testing.T, n1, n2 *lab.Node) {
	t.Helper()
	const network = "198.19.0.0/16"
	_, to, err := net.ParseCIDR(network)
	if err != nil {
		t.Fatal(err)
	}
	if err := n1.Do(func() error {
		return netlink.RouteAdd(&netlink.Route{Dst: to, Gw: n2.Addrs[0].AsSlice()})
	}); err != nil {
		t.Fatal(err)
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
			_, _ = conn.WriteTo(b[:n], &ipv4.ControlMessage{Src: from4}, &net.UDPAddr{IP: from, Port: 8472})
		}
	}()
}

// readRequest makes of the next datagram its answer; 0 if it is no echo request.
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
