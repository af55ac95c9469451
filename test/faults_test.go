package test

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// datapaths are the datapaths that the tests of leases run with.
var datapaths = []string{"userspace", "kernel"}

// stopOfEtcd returns how long etcd is unreachable in TestFaultsUnderTraffic: 30 seconds,
// longer than the leases last, or CULVERT_ETCD_AWAY.
func stopOfEtcd(t *testing.T) time.Duration {
	text := os.Getenv("CULVERT_ETCD_AWAY")
	if text == "" {
		return 30 * time.Second
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestFaultsUnderTraffic injects faults into etcd while one pod pings another 100 times a
// second and TCP flows run in both directions. No ping may be lost, no flow may break,
// and after each fault a change in etcd must reach the nodes.
//
//	pod ── n1 ══ tunnel ══ n2 ── pod
//	         \            /
//	       n3, n4, n5: etcd with three members
func TestFaultsUnderTraffic(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes a minute")
	}
	for _, d := range datapaths {
		t.Run(d, func(t *testing.T) {
			t.Parallel() // it mostly waits
			f := startFaults(t, d)
			for _, fault := range []struct {
				name string
				run  func(*testing.T)
			}{
				{"a new leader", f.anotherLeader},
				{"a pause of 5 s", f.pause},
				{"malformed leases", f.garbage},
				{"a dead connection and a compaction", f.deadConnection},
				{"etcd is unreachable", f.away},
				{"restored to an older state", f.restored},
				{"wiped", f.wiped},
			} {
				began := time.Now()
				if !t.Run(fault.name, fault.run) {
					return
				}
				f.check(t, fault.name, time.Since(began))
			}
			f.end(t)
		})
	}
}

// faults is the state of a TestFaultsUnderTraffic.
type faults struct {
	*cluster
	members *members
	client  *clientv3.Client
	nodes   []*lab.Node // with daemons
	daemons []*lab.Process
	subnets []netip.Prefix // of the nodes, which keep them
	pods    []*lab.Pod
	stream  *pings
	flows   []*flow
	news    int
}

func startFaults(t *testing.T, datapath string) *faults {
	labtest.NeedTUN(t)
	l := labtest.New(t, lab.Options{Nodes: 5})
	f := &faults{cluster: &cluster{Lab: l, t: t, bin: labtest.Bin(t)}, members: startMembers(t, l), nodes: l.Nodes[:2]}
	f.endpoint = strings.Join(f.members.urls(), ",")
	f.client = f.members.client()
	f.setConfig(config)
	for _, n := range f.nodes {
		f.daemons = append(f.daemons, f.start(n, "--lease-ttl", "20s", "--datapath", datapath))
	}
	for _, n := range f.nodes {
		s := f.waitReady(n, 1)
		f.subnets = append(f.subnets, s.Lease.Subnets...)
		pod, err := n.AddPod(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		f.pods = append(f.pods, pod)
	}
	ping(t, f.pods[0], f.pods[1])
	f.stream = startPings(t, f.pods[0], f.pods[1])
	f.flows = append(f.flows, startFlow(t, f.pods[0], f.pods[1])) // before any fault
	return f
}

// announce adds a peer to etcd and waits until the nodes have it, and still have all
// earlier ones.
func (f *faults) announce(t *testing.T, within time.Duration) {
	t.Helper()
	key, value := f.nextPeer()
	f.put(t, key, value)
	f.expect(t, within, f.news+1)
}

func (f *faults) nextPeer() (key, value string) {
	f.news++
	return fmt.Sprintf("/coreos.com/network/subnets/10.5.250.%d-30", 4*f.news),
		fmt.Sprintf(`{"PublicIP":"192.0.2.%d","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:01:%02x"},"NodeID":"extra-%d"}`, f.news, f.news, f.news)
}

func (f *faults) put(t *testing.T, key, value string) {
	t.Helper()
	eventually(t, "write to etcd", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, err := f.client.Put(ctx, key, value)
		return err
	})
}

func (f *faults) expect(t *testing.T, within time.Duration, peers int) {
	t.Helper()
	for deadline := time.Now().Add(within); ; time.Sleep(20 * time.Millisecond) {
		ok := true
		var said []string
		for i, n := range f.nodes {
			s, err := f.status(n)
			ok = ok && err == nil && s.Ready && s.Store.Connected && len(s.Peers) == peers && s.Lease != nil && s.Lease.Subnets[0] == f.subnets[i]
			said = append(said, fmt.Sprintf("%s: ready %t (%s), %d peers, store %+v", n.ID, s.Ready, s.NotReady, len(s.Peers), s.Store))
		}
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v the nodes are not connected and ready with %d peers: %s", within, peers, strings.Join(said, "; "))
		}
	}
}

// check checks the pings and flows after a fault.
func (f *faults) check(t *testing.T, after string, took time.Duration) {
	t.Helper()
	if n := f.stream.lostSoFar(); n > 0 {
		t.Errorf("after %q %d pings are lost", after, n)
	}
	for i, fl := range f.flows {
		turns, longest, err := fl.state()
		if err != nil {
			t.Errorf("after %q flow %d broke: %v", after, i, err)
		}
		t.Logf("%-45s %6.1fs: flow %d has %d round trips, longest %v", after, took.Seconds(), i, turns, longest.Round(time.Millisecond))
	}
}

func (f *faults) end(t *testing.T) {
	sent, lost := f.stream.stop()
	t.Logf("%d pings, %d lost", sent, lost)
	if lost > 0 || sent < 1000 {
		t.Errorf("%d of %d pings lost", lost, sent)
	}
	for i, fl := range f.flows {
		if turns, _, err := fl.stop(); err != nil || turns == 0 {
			t.Errorf("flow %d broke after %d round trips: %v", i, turns, err)
		}
	}
	for _, n := range f.nodes {
		if s, err := f.status(n); err != nil || len(s.Datapath.Drops) > 0 {
			t.Errorf("%s dropped %v (%v)", n.ID, s.Datapath.Drops, err)
		}
	}
}

func (f *faults) anotherLeader(t *testing.T) {
	leader := f.members.leader(t.Context(), f.client)
	if leader < 0 {
		t.Fatal("no leader")
	}
	f.members.kill(leader)
	f.announce(t, 30*time.Second)
	f.members.start(leader)
	f.announce(t, 30*time.Second)
}

func (f *faults) pause(t *testing.T) {
	for i := range f.members.procs {
		f.members.signal(i, syscall.SIGSTOP)
	}
	time.Sleep(5 * time.Second)
	for i := range f.members.procs {
		f.members.signal(i, syscall.SIGCONT)
	}
	f.announce(t, 30*time.Second)
}

// garbage writes keys that nodes must not accept as leases.
func (f *faults) garbage(t *testing.T) {
	const dir = "/coreos.com/network/subnets/"
	bad := map[string]string{
		"0.0.0.0-0":     `{"PublicIP":"192.0.2.200","BackendType":"host-gw"}`,
		"10.5.240.0-24": "{",
		"10.5.241.0-24": strings.Repeat("x", 100<<10),
		"10.99.1.0-24":  `{"PublicIP":"192.0.2.201","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:02:01"}}`,
		"10.5.242.0-24": `{"PublicIP":"198.18.0.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:02:02"}}`, // n1's address
		"10.5.243.0-24": `{"PublicIP":"192.0.2.203","BackendType":"wireguard","BackendData":{"PublicKey":"x"}}`,
		strings.Replace(f.subnets[0].String(), "/24", "-25", 1): `{"PublicIP":"192.0.2.204","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:02:04"}}`,
	}
	for key, value := range bad {
		f.put(t, dir+key, value)
	}
	f.announce(t, 30*time.Second)
	for _, n := range f.nodes {
		f.wait(n, "rejects the malformed leases", func(s api.Status) bool { return len(s.Rejected) == len(bad) })
	}
	for key := range bad {
		if _, err := f.client.Delete(t.Context(), dir+key); err != nil {
			t.Error(err)
		}
	}
	for _, n := range f.nodes {
		f.wait(n, "forgets the malformed leases", func(s api.Status) bool { return len(s.Rejected) == 0 })
	}
}

// deadConnection drops all packets of the first node's connections to etcd from now on,
// as a firewall that lost its state would. The node must detect that and reconnect. A
// change that was written meanwhile is compacted.
func (f *faults) deadConnection(t *testing.T) {
	began := time.Now()
	if err := f.nodes[0].Do(func() error { return dropConnections(2379) }); err != nil {
		t.Fatal(err)
	}
	key, value := f.nextPeer()
	f.put(t, key, value)
	resp, err := f.client.Get(t.Context(), "x")
	if err == nil {
		_, err = f.client.Compact(t.Context(), resp.Header.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
	f.expect(t, 45*time.Second, f.news+1)
	t.Logf("up to date %v after the connection died", time.Since(began).Round(100*time.Millisecond))
}

// dropConnections drops the packets of this namespace's established TCP connections to a
// port.
func dropConnections(port int) error {
	text, err := os.ReadFile("/proc/thread-self/net/tcp")
	if err != nil {
		return err
	}
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "dead"})
	chain := c.AddChain(&nftables.Chain{Name: "out", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter})
	in := c.AddChain(&nftables.Chain{Name: "in", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter})
	found := 0
	for _, line := range strings.Split(string(text), "\n") {
		// sl local_address rem_address st ..., see proc(5)
		fields := strings.Fields(line)
		if len(fields) < 4 || !strings.HasSuffix(fields[2], fmt.Sprintf(":%04X", port)) || fields[3] != "01" {
			continue
		}
		_, hex, _ := strings.Cut(fields[1], ":")
		local, err := strconv.ParseUint(hex, 16, 16)
		if err != nil {
			return err
		}
		found++
		for at, ch := range map[uint32]*nftables.Chain{0: chain, 2: in} { // the source port, the destination port
			c.AddRule(&nftables.Rule{Table: table, Chain: ch, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: at, Len: 2},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(uint16(local))},
				&expr.Verdict{Kind: expr.VerdictDrop},
			}})
		}
	}
	if found == 0 {
		return fmt.Errorf("no connection to port %d", port)
	}
	return c.Flush()
}

// away kills all members for longer than the leases last: forwarding continues, also of
// new flows; new pods are refused; /livez succeeds; no daemon busy-loops.
func (f *faults) away(t *testing.T) {
	for i := range f.members.procs {
		f.members.kill(i)
	}
	began := time.Now()
	var before []time.Duration
	for _, d := range f.daemons {
		before = append(before, processorTime(t, d.PID))
	}
	time.Sleep(5 * time.Second)
	f.flows = append(f.flows, startFlow(f.t, f.pods[1], f.pods[0]))
	for i, n := range f.nodes {
		f.wait(n, "reports that etcd is unreachable", func(s api.Status) bool { return !s.Store.Connected && s.Store.Error != "" && len(s.Peers) == f.news+1 })
		eventually(t, "STATUS after the lease expired", func() error {
			if err := cniStatus(t, n); err == nil || !strings.Contains(err.Error(), "expired at") {
				return fmt.Errorf("it returns %w", err)
			}
			return nil
		})
		if code, _ := f.get(n, "/livez"); code != http.StatusOK {
			t.Errorf("/livez of %s: %d", n.ID, code)
		}
		eventually(t, "/readyz after the lease expired", func() error {
			if code, _ := f.get(n, "/readyz"); code != http.StatusServiceUnavailable {
				return fmt.Errorf("it returns %d", code)
			}
			return nil
		})
		if err := f.pods[i].Check(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if left := stopOfEtcd(t) - time.Since(began); left > 0 {
		time.Sleep(left)
	}
	for i, d := range f.daemons {
		used := processorTime(t, d.PID) - before[i]
		share := 100 * used.Seconds() / time.Since(began).Seconds()
		t.Logf("%s used %.1f %% of a CPU meanwhile, including its traffic", f.nodes[i].ID, share)
		if share > 20 { // the aim is 5; a busy loop uses 100
			t.Errorf("%s used %.1f %% of a CPU while etcd was unreachable", f.nodes[i].ID, share)
		}
	}
	// Copy etcd's data, for restored.
	if out, err := exec.CommandContext(t.Context(), "sh", "-c", "cd "+f.Dir+" && for d in etcd-n?; do cp -a $d copy-$d; done").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for i := range f.members.procs {
		f.members.start(i)
	}
	f.announce(t, 45*time.Second)
	for _, n := range f.nodes {
		eventually(t, "STATUS when etcd is back", func() error { return cniStatus(t, n) })
	}
}

// restored restores the copy of etcd's data, so that revisions go back.
func (f *faults) restored(t *testing.T) {
	f.announce(t, 30*time.Second)
	f.replaceData(t, "for d in etcd-n?; do rm -rf $d; cp -a copy-$d $d; done")
	// Nodes keep the peers that the older state lacks for a while.
	f.expect(t, 45*time.Second, f.news+1)
	f.announce(t, 30*time.Second)
}

// wiped deletes etcd's data: the nodes write their leases again and keep running without
// a configuration.
func (f *faults) wiped(t *testing.T) {
	f.replaceData(t, "rm -rf etcd-n?")
	f.expect(t, 45*time.Second, f.news+1)
	for _, n := range f.nodes {
		f.wait(n, "reports that the configuration is missing", func(s api.Status) bool { return strings.Contains(s.Store.ConfigRefused, "missing") && s.Ready })
	}
	eventually(t, "both leases are listed", func() error { return f.listed("leased", 2) })
	f.setConfig(config)
	for _, n := range f.nodes {
		f.wait(n, "accepts the configuration again", func(s api.Status) bool { return s.Store.ConfigRefused == "" })
	}
}

// replaceData stops etcd, runs a shell script on its data and starts it again.
func (f *faults) replaceData(t *testing.T, script string) {
	t.Helper()
	for i := range f.members.procs {
		f.members.kill(i)
	}
	if out, err := exec.CommandContext(t.Context(), "sh", "-c", "cd "+f.Dir+" && "+script).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for i := range f.members.procs {
		f.members.start(i)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, p := range f.members.procs {
		if _, err := p.WaitLine(ctx, "ready "); err != nil {
			t.Fatal(err)
		}
	}
}

// processorTime returns the CPU time of a process: utime and stime, fields 14 and 15 of
// /proc/pid/stat in hundredths of a second (proc(5)).
func processorTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var sum time.Duration
	for _, field := range fields[11:13] {
		ticks, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		sum += time.Duration(ticks) * 10 * time.Millisecond
	}
	return sum
}
