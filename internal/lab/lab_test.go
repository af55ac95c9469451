package lab_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"

	"culvert/cni"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// victimEnv makes the test binary a process that creates a lab and waits to be
// killed; with the value "keep" it keeps the lab and exits.
const victimEnv = "CULVERT_LAB_TEST_VICTIM"

func TestMain(m *testing.M) {
	if os.Getenv(victimEnv) != "" {
		victim()
	}
	labtest.Main(m)
}

func victim() {
	l, err := lab.New(lab.Options{Nodes: 2, Keep: os.Getenv(victimEnv) == "keep"})
	if err == nil {
		_, err = l.Nodes[0].Start(lab.Command{Name: "sleeper", Path: "/bin/sleep", Args: []string{"600"}})
	}
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	fmt.Println("lab", l.ID, l.Processes()[0].PID)
	if os.Getenv(victimEnv) == "keep" {
		if err := l.Keep(); err != nil {
			fmt.Println(err)
		}
		os.Exit(0)
	}
	time.Sleep(10 * time.Minute)
}

func bindMounts(t *testing.T, id string) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "/run/netns/"+id) {
			found = append(found, line)
		}
	}
	return strings.Join(found, "")
}

// checkRemoved fails the test if any part of the lab still exists.
func checkRemoved(t *testing.T, id string) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(lab.Root, id)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory of %s still exists: %v", id, err)
	}
	if left, _ := filepath.Glob("/run/netns/" + id + "*"); len(left) > 0 {
		t.Errorf("namespaces still exist: %v", left)
	}
	if left := bindMounts(t, id); left != "" {
		t.Errorf("mounts still exist:\n%s", left)
	}
}

// dead reports whether a process has exited; a zombie counts as dead.
func dead(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(text), ") Z ")
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 500 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("not within 5 s: %s", what)
}

// echo serves TCP and sends back what it receives, until the test ends.
func echo(t *testing.T, ns *lab.Namespace, address string) net.Addr {
	t.Helper()
	l, err := ns.Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return l.Addr()
}

// exchange sends size random bytes to an echo server and checks that the same come
// back. It returns the connection's source address.
func exchange(t *testing.T, from *lab.Namespace, to string, size int) netip.Addr {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, err := from.Dial(ctx, "tcp", to)
	if err != nil {
		t.Fatalf("from %s: %v", from.Name, err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	sent := make([]byte, size)
	_, _ = rand.Read(sent)
	go func() {
		_, _ = c.Write(sent)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatalf("from %s to %s: %v", from.Name, to, err)
	}
	if sha256.Sum256(got) != sha256.Sum256(sent) {
		t.Fatalf("from %s to %s: the %d bytes that came back differ from the %d sent", from.Name, to, len(got), size)
	}
	return netip.MustParseAddrPort(c.LocalAddr().String()).Addr()
}

func TestNodesReachEachOtherAndTheFabric(t *testing.T) {
	for _, o := range []lab.Options{
		{Nodes: 3, MTU: 1400},
		{Nodes: 2, Underlay: lab.Direct, Link: "ens3"},
		{Nodes: 2, Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/28"), netip.MustParsePrefix("2001:db8::/64")}},
	} {
		t.Run(fmt.Sprintf("%s %v", o.Underlay, o.Prefixes), func(t *testing.T) {
			l := labtest.New(t, o)
			last := l.Nodes[len(l.Nodes)-1]
			for i, a := range last.Addrs {
				addr := echo(t, last.Namespace, net.JoinHostPort(a.String(), "0"))
				if from := exchange(t, l.Nodes[0].Namespace, addr.String(), 1<<20); from != l.Nodes[0].Addrs[i] {
					t.Errorf("node 1 sent from %s, not %s", from, l.Nodes[0].Addrs[i])
				}
			}
			for _, a := range l.FabricAddrs {
				addr := echo(t, l.Fabric, net.JoinHostPort(a.String(), "0"))
				for _, n := range l.Nodes {
					exchange(t, n.Namespace, addr.String(), 100)
				}
			}
			if o.MTU != 0 {
				err := last.Do(func() error {
					link, err := netlink.LinkByName(last.Link)
					if err == nil && link.Attrs().MTU != o.MTU {
						err = fmt.Errorf("MTU %d", link.Attrs().MTU)
					}
					return err
				})
				if err != nil {
					t.Errorf("%s of %s: %v", last.Link, last.Name, err)
				}
			}
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			checkRemoved(t, l.ID)
			if err := l.Close(); err != nil {
				t.Errorf("closing again: %v", err)
			}
		})
	}
}

func TestInvalidOptions(t *testing.T) {
	labtest.Need(t)
	for _, o := range []lab.Options{
		{Nodes: -1},
		{Nodes: 3, Underlay: lab.Direct},
		{Underlay: "carrier pigeon"},
		{Nodes: 6, Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/29")}},
		{Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/29"), netip.MustParsePrefix("192.0.3.0/29")}},
		{Link: "a-link-with-a-long-name"},
	} {
		if l, err := lab.New(o); err == nil {
			t.Errorf("New accepted %+v", o)
			_ = l.Close()
		}
	}
}

// TestPodsAcrossHandmadeVXLAN has three nodes with kernel vxlan devices and no
// daemon, and two pods on each, added by the real plugins from subnet.env files that
// the test writes:
//
//	n1 10.42.1.0/24 -- vxlan -- n2 10.42.2.0/24 -- vxlan -- n3 10.42.3.0/24
func TestPodsAcrossHandmadeVXLAN(t *testing.T) {
	for _, outer := range []string{"198.18.0.0/24", "2001:db8::/64"} {
		t.Run(outer, func(t *testing.T) {
			l := labtest.New(t, lab.Options{
				Nodes: 3, Bin: labtest.Bin(t),
				Prefixes: []netip.Prefix{netip.MustParsePrefix(outer)},
			})
			cluster := []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd42::/48")}
			var pods []*lab.Pod
			var tunnels [][]*lab.HandmadeVXLAN
			for k, n := range l.Nodes {
				subnets := []netip.Prefix{
					netip.MustParsePrefix(fmt.Sprintf("10.42.%d.0/24", k+1)),
					netip.MustParsePrefix(fmt.Sprintf("fd42:0:0:%d::/64", k+1)),
				}
				var both []*lab.HandmadeVXLAN
				env := cni.SubnetEnv{Networks: cluster, MTU: 1430, IPMasq: true}
				for _, s := range subnets {
					vni := uint32(1)
					if s.Addr().Is6() {
						vni = 2
					}
					v, err := n.AddHandmadeVXLAN(lab.VXLANOptions{Subnet: s, VNI: vni})
					if err != nil {
						t.Fatal(err)
					}
					both = append(both, v)
					env.Gateways = append(env.Gateways, netip.PrefixFrom(s.Addr().Next(), s.Bits()))
				}
				tunnels = append(tunnels, both)
				if err := cni.WriteSubnetEnv(n.SubnetFile(), env); err != nil {
					t.Fatal(err)
				}
				for _, name := range []string{"p1", "p2"} {
					p, err := n.AddPod(t.Context(), name)
					if err != nil {
						t.Fatal(err)
					}
					if len(p.Addrs) != 2 || !subnets[0].Contains(p.Addr(true)) || !subnets[1].Contains(p.Addr(false)) {
						t.Errorf("pod %s has addresses %v, not from %v", p.ID, p.Addrs, subnets)
					}
					if err := p.Check(t.Context()); err != nil {
						t.Errorf("CHECK of pod %s: %v", p.ID, err)
					}
					pods = append(pods, p)
				}
			}
			for i := range tunnels {
				for j := range tunnels {
					for f := range tunnels[i] {
						if i == j {
							continue
						}
						if err := tunnels[i][f].AddPeer(tunnels[j][f].Self); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			for _, to := range pods {
				for _, a := range to.Addrs {
					addr := echo(t, to.Namespace, net.JoinHostPort(a.String(), "0")).String()
					for _, from := range pods {
						if got := exchange(t, from.Namespace, addr, 1<<20); got != from.Addr(a.Is4()) && from != to {
							t.Errorf("pod %s sent from %s", from.ID, got)
						}
					}
				}
			}
			if err := tunnels[0][0].RemovePeer(tunnels[1][0].Self); err != nil {
				t.Error(err)
			}
			if err := tunnels[0][0].Remove(); err != nil {
				t.Error(err)
			}
			for _, p := range pods {
				if err := p.Delete(t.Context()); err != nil {
					t.Errorf("deleting %s: %v", p.ID, err)
				}
			}
			for _, n := range l.Nodes {
				left, _ := filepath.Glob(filepath.Join(n.StateDir, "culvert", "[^.]*")) // the lock stays
				addrs, _ := filepath.Glob(filepath.Join(n.StateDir, "networks", "culvert", "[1-9f]*"))
				if len(left)+len(addrs) > 0 {
					t.Errorf("after the last DEL on %s: state %v, addresses %v", n.ID, left, addrs)
				}
			}
		})
	}
}

func TestProcesses(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	n := l.Nodes[0]
	sh := func(name, script string) *lab.Process {
		t.Helper()
		p, err := n.Start(lab.Command{Name: name, Path: "/bin/sh", Args: []string{"-c", script}, Env: []string{"GREETING=hello"}})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	const forever = "while :; do sleep 0.05; done"

	polite := sh("polite", "trap 'echo bye; exit 3' TERM; echo $GREETING you; "+forever)
	if got, err := polite.WaitLine(t.Context(), "hello "); err != nil || got != "you" {
		t.Errorf("it printed %q (%v), not \"you\"", got, err)
	}
	if err := polite.Stop(); err != nil {
		t.Error(err)
	}
	var exit *exec.ExitError
	if !errors.As(polite.Err(), &exit) || exit.ExitCode() != 3 || polite.Tail(1) != "bye" {
		t.Errorf("after SIGTERM it exited with %v and last printed %q", polite.Err(), polite.Tail(1))
	}
	if err := polite.Stop(); err != nil {
		t.Errorf("stopping it again: %v", err)
	}

	quick := sh("quick", "echo no such thing")
	if _, err := quick.WaitLine(t.Context(), "ready"); err == nil || !strings.Contains(err.Error(), "no such thing") {
		t.Errorf("waiting for a line that never comes: %v", err)
	}

	crash := sh("crash", forever)
	if err := crash.Kill(); err != nil || !dead(crash.PID) {
		t.Errorf("killing: %v", err)
	}

	// A child that left its parent's session and outlives it has no record: Close
	// finds it by its namespace.
	orphan := sh("orphan", "setsid sleep 600 & echo child $!; wait")
	child, err := orphan.WaitLine(t.Context(), "child ")
	if err != nil {
		t.Fatal(err)
	}
	if err := orphan.Kill(); err != nil {
		t.Error(err)
	}
	var pid int
	if _, err := fmt.Sscan(child, &pid); err != nil || dead(pid) {
		t.Fatalf("child %q of a killed process: %v", child, err)
	}

	running := sh("running", forever)
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if !dead(running.PID) {
		t.Error("a process outlived its lab")
	}
	eventually(t, "the orphan is gone", func() bool { return dead(pid) })
	goleak.VerifyNone(t, goleak.IgnoreCurrent())
}

// start runs the test binary as a victim and returns its lab's ID and the PID of the
// lab's process.
func start(t *testing.T, mode string) (cmd *exec.Cmd, id string, pid int) {
	t.Helper()
	cmd = exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), victimEnv+"="+mode)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if n, err := fmt.Sscanf(line, "lab %s %d", &id, &pid); n != 2 {
		t.Fatalf("the victim printed %q: %v", line, err)
	}
	return cmd, id, pid
}

func TestSweepRemovesLabOfKilledOwner(t *testing.T) {
	labtest.Need(t)
	mine := labtest.New(t, lab.Options{})
	cmd, id, pid := start(t, "kill")

	// While its owner runs, other processes cannot remove a lab.
	if swept, err := lab.Sweep(); err != nil || bytes.Contains([]byte(strings.Join(swept, " ")), []byte(id)) {
		t.Errorf("swept %v, with an owner alive: %v", swept, err)
	}
	if err := lab.Remove(id); !errors.Is(err, lab.ErrInUse) {
		t.Errorf("removing a lab in use: %v", err)
	}

	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	eventually(t, "the kernel killed the lab's process with its owner", func() bool { return dead(pid) })
	if bindMounts(t, id) == "" {
		t.Error("the killed owner left no namespaces: this test has nothing to sweep")
	}
	if _, err := lab.Sweep(); err != nil {
		t.Error(err)
	}
	checkRemoved(t, id)
	if _, err := os.Stat(mine.Dir); err != nil {
		t.Errorf("the lab of a running owner was swept too: %v", err)
	}
}

func TestKeptLabOutlivesItsOwner(t *testing.T) {
	labtest.Need(t)
	cmd, id, pid := start(t, "keep")
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, err := lab.Sweep(); err != nil {
		t.Error(err)
	}
	if dead(pid) {
		t.Error("the process of a kept lab did not outlive its owner")
	}
	if ids, err := lab.List(); err != nil || !strings.Contains(strings.Join(ids, " "), id) {
		t.Errorf("labs %v, without the kept %s: %v", ids, id, err)
	}
	if err := lab.Remove(id); err != nil {
		t.Error(err)
	}
	checkRemoved(t, id)
	eventually(t, "its process is gone", func() bool { return dead(pid) })
	if err := lab.Remove(id); !errors.Is(err, lab.ErrNoLab) {
		t.Errorf("removing it again: %v", err)
	}
}

func TestProbes(t *testing.T) {
	l := labtest.New(t, lab.Options{Nodes: 2, Prefixes: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/24"), netip.MustParsePrefix("2001:db8::/64")}})
	from, to := l.Nodes[0].Namespace, l.Nodes[1].Namespace
	payload := make([]byte, 10<<20)
	_, _ = rand.Read(payload)
	for _, a := range l.Nodes[1].Addrs {
		if rtt, err := from.Ping(t.Context(), netip.Addr{}, a); err != nil || rtt <= 0 || rtt > time.Second {
			t.Errorf("pinging %s: %v, %v", a, rtt, err)
		}
		c, err := to.ServeReflector(t.Context(), netip.AddrPortFrom(a, 7000))
		if err != nil {
			t.Fatal(err)
		}
		own, seen, err := from.AskReflector(t.Context(), netip.AddrPortFrom(a, 7000))
		if err != nil || own != seen {
			t.Errorf("the reflector at %s sees %s as %s: %v", a, own, seen, err)
		}
		_ = c.Close()
		if _, err := lab.Transfer(t.Context(), from, to, a, payload, make([]byte, len(payload))); err != nil {
			t.Error(err)
		}
	}

	// Without a responder the probes fail, within their timeouts.
	nobody := netip.MustParseAddr("198.18.0.77")
	if _, _, err := from.AskReflector(t.Context(), netip.AddrPortFrom(l.Nodes[1].Addrs[0], 7001)); err == nil {
		t.Error("AskReflector succeeded without a reflector")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := from.Ping(ctx, netip.Addr{}, nobody); err == nil || time.Since(start) > 2*time.Second {
		t.Errorf("a cancelled ping took %s: %v", time.Since(start), err)
	}
}

func TestRun(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	if out, err := l.Fabric.Run(t.Context(), "/bin/sh", "-c", "echo yes"); err != nil || string(out) != "yes\n" {
		t.Errorf("it printed %q: %v", out, err)
	}
	if _, err := l.Fabric.Run(t.Context(), "/bin/sh", "-c", "echo no >&2; exit 4"); err == nil || !strings.Contains(err.Error(), "exit status 4: no") {
		t.Errorf("it failed with %v", err)
	}
}

func TestNamesAreRefusedInsideNamespaces(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	if _, err := l.Fabric.Dial(t.Context(), "tcp", "localhost:1"); err == nil || !strings.Contains(err.Error(), "is a name") {
		t.Errorf("dialing a name: %v", err)
	}
}

func TestDoReturnsError(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	if err := l.Fabric.Do(func() error { return errors.New("mine") }); err == nil || err.Error() != "mine" {
		t.Errorf("the function's error came back as %v", err)
	}
}
