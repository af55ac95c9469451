package test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/handover"
	"culvert/internal/lab"
)

// replace starts a daemon with --replace and waits until it has taken over from the running
// one.
func (c *cluster) replace(n *lab.Node, old *lab.Process, flags ...string) (*lab.Process, api.Status) {
	c.t.Helper()
	p := c.start(n, append([]string{"--replace"}, flags...)...)
	select {
	case <-old.Exited():
	case <-p.Exited():
		c.t.Fatalf("the successor exited: %v\n%s", p.Err(), p.Tail(10))
	case <-time.After(30 * time.Second):
		c.t.Fatalf("the old daemon does not exit\n%s\n%s", old.Tail(10), p.Tail(10))
	}
	if err := old.Err(); err != nil {
		c.t.Errorf("the old daemon exited with %v\n%s", err, old.Tail(10))
	}
	return p, c.wait(n, "is ready after the handover", func(s api.Status) bool { return s.Ready && s.Handover != nil })
}

// bulk is a TCP transfer of random bytes that runs until stop, which compares the SHA-256 of
// both ends.
type bulk struct {
	cancel   context.CancelFunc
	ended    sync.WaitGroup
	sent     [32]byte
	received [32]byte
	n        int64
	errs     [2]error
}

func startBulk(t testing.TB, from, to *lab.Pod) *bulk {
	t.Helper()
	l, err := to.Listen(t.Context(), "tcp", netip.AddrPortFrom(to.Addrs[0], 0).String())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	b := &bulk{cancel: cancel}
	b.ended.Go(func() {
		defer l.Close()
		b.errs[0] = func() error {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			defer c.Close()
			sum := sha256.New()
			b.n, err = io.Copy(sum, c)
			sum.Sum(b.received[:0])
			return err
		}()
	})
	c, err := from.Dial(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b.ended.Go(func() {
		defer c.Close()
		b.errs[1] = func() error {
			sum, block, random := sha256.New(), make([]byte, 64<<10), rand.NewChaCha8([32]byte{2})
			for ctx.Err() == nil {
				_, _ = random.Read(block)
				sum.Write(block)
				if err := c.SetWriteDeadline(time.Now().Add(30 * time.Second)); err != nil {
					return err
				}
				if _, err := c.Write(block); err != nil {
					return err
				}
				time.Sleep(time.Millisecond)
			}
			sum.Sum(b.sent[:0])
			return nil
		}()
	})
	t.Cleanup(func() { cancel(); l.Close(); c.Close(); b.ended.Wait() })
	return b
}

func (b *bulk) stop() (int64, error) {
	b.cancel()
	b.ended.Wait()
	if err := errors.Join(b.errs[:]...); err != nil {
		return b.n, err
	}
	if b.sent != b.received {
		return b.n, errors.New("the received bytes differ from the sent ones")
	}
	return b.n, nil
}

// scraper fetches a node's /readyz and /metrics, with a new connection each time as probes
// do, until stop, which returns the failures.
type scraper struct {
	cancel context.CancelFunc
	ended  sync.WaitGroup
	asked  int
	failed []string
}

func startScraper(t testing.TB, n *lab.Node) *scraper {
	ctx, cancel := context.WithCancel(context.Background())
	s := &scraper{cancel: cancel}
	client := &http.Client{Transport: &http.Transport{DialContext: n.Dial, DisableKeepAlives: true}, Timeout: 10 * time.Second}
	s.ended.Go(func() {
		for ctx.Err() == nil {
			for _, path := range []string{"/readyz", "/readyz", "/readyz", "/metrics"} {
				r, err := client.Get("http://127.0.0.1:9472" + path)
				s.asked++
				if err != nil {
					s.failed = append(s.failed, err.Error())
					continue
				}
				text, err := io.ReadAll(r.Body)
				r.Body.Close()
				if err != nil || r.StatusCode != http.StatusOK {
					s.failed = append(s.failed, fmt.Sprint(path, " ", r.Status, " ", string(text[:min(len(text), 200)]), err))
				}
				time.Sleep(2 * time.Millisecond)
			}
		}
	})
	t.Cleanup(func() { cancel(); s.ended.Wait() })
	return s
}

func (s *scraper) stop() (int, []string) {
	s.cancel()
	s.ended.Wait()
	return s.asked, s.failed
}

// TestReplace has daemons take over from one another under pings, transfers and a scraper:
// no packet is lost, the device is not recreated, and no connection to the daemon is refused.
// CULVERT_TEST_PINGS=3000 is the long form.
//
//	pod ── n1: daemon ► daemon ► daemon ── fabric ── n2 ── pod
func TestReplace(t *testing.T) {
	for _, datapath := range datapaths {
		t.Run(datapath, func(t *testing.T) {
			c, daemons, pods := startPair(t, datapath)
			n, p := c.Nodes[0], daemons[0]
			before := c.waitReady(n, 1)
			file, err := os.Stat(before.SubnetFile)
			if err != nil {
				t.Fatal(err)
			}
			pings, there, scraped := startPings(t, pods[0], pods[1]), startBulk(t, pods[0], pods[1]), startScraper(t, n)
			back := startBulk(t, pods[1], pods[0])
			index := linkIndex(t, n, before.Datapath.Device)
			began := time.Now()
			var after api.Status
			for i := range 3 {
				if i > 0 {
					time.Sleep(time.Until(began.Add(time.Duration(i) * pingTrain / 3)))
				}
				old := p
				p, after = c.replace(n, old)
				if after.Handover.PID != old.PID || !after.Handover.Inherited || after.Handover.Why != "" {
					t.Errorf("the handover in the status is %+v", after.Handover)
				}
				if len(after.Datapath.Repairs) != 0 || linkIndex(t, n, after.Datapath.Device) != index {
					t.Errorf("repairs %v, the device has the index %d and had %d", after.Datapath.Repairs, linkIndex(t, n, after.Datapath.Device), index)
				}
			}
			time.Sleep(time.Until(began.Add(pingTrain)))
			sent, lost := pings.stop()
			t.Logf("of %d pings %d lost, slowest reply %s", sent, lost, pings.slowest)
			if lost != 0 {
				t.Errorf("of %d pings %d were lost", sent, lost)
			}
			for _, b := range []*bulk{there, back} {
				n, err := b.stop()
				t.Logf("%d MB arrived", n>>20)
				if err != nil {
					t.Error(err)
				}
			}
			asked, failed := scraped.stop()
			t.Logf("%d probes", asked)
			if len(failed) > 0 {
				t.Errorf("of %d probes %d failed: %v", asked, len(failed), failed[:min(3, len(failed))])
			}
			now, err := os.Stat(after.SubnetFile)
			if err != nil || after.Lease.Subnets[0] != before.Lease.Subnets[0] {
				t.Errorf("the lease is %v and was %v (%v)", after.Lease, before.Lease, err)
			}
			if now != nil && file.ModTime().After(now.ModTime()) {
				t.Error("subnet.env is older than before")
			}
			// The last daemon holds the lock.
			other := c.start(n)
			<-other.Exited()
			if text := other.Tail(5); !strings.Contains(text, fmt.Sprint("pid ", p.PID)) || !strings.Contains(text, "--replace") {
				t.Errorf("another daemon printed: %s", text)
			}
		})
	}
}

// TestReplaceAnother starts successors with another configuration: they report the
// difference and open a new datapath, a TCP connection survives, and few pings are lost.
func TestReplaceAnother(t *testing.T) {
	t.Parallel()
	c, daemons, pods := startPair(t, "")
	n, p := c.Nodes[0], daemons[0]
	flow := startFlow(t, pods[0], pods[1])
	for _, step := range []struct{ datapath, flag, why string }{
		{"kernel", "", "datapath is kernel (was userspace)"},
		{"userspace", "", "datapath is userspace (was kernel)"},
		{"userspace", "--no-multi-queue", "queues"},
	} {
		c.datapath = step.datapath
		flags := []string{"--log-level=info"}
		if step.flag != "" {
			flags = append(flags, step.flag)
		}
		var s api.Status
		there, back := startPings(t, pods[0], pods[1]), startPings(t, pods[1], pods[0])
		p, s = c.replace(n, p, flags...)
		for _, pings := range []*pings{there, back} {
			sent, lost := pings.stop()
			t.Logf("%v: of %d pings %d lost, %v without an answer at the longest", step, sent, lost, pings.gap())
		}
		if s.Handover.Inherited || !strings.Contains(s.Handover.Why, step.why) || s.Datapath.Kind != step.datapath {
			t.Errorf("%v: the status has the handover %+v and the datapath %s", step, s.Handover, s.Datapath.Kind)
		}
		c.goesOn(flow)
	}
	// A successor that cannot start does not affect the running daemon.
	failing := c.start(n, "--replace", "--iface", "none0")
	<-failing.Exited()
	if failing.Err() == nil {
		t.Error("a daemon without an underlay started")
	}
	c.wait(n, "is still ready", func(s api.Status) bool { return s.Ready && s.Handover.PID != 0 })
	c.goesOn(flow)
	select {
	case <-p.Exited():
		t.Errorf("the running daemon exited: %v", p.Tail(5))
	default:
	}
	if _, _, err := flow.stop(); err != nil {
		t.Error(err)
	}
}

// TestReplaceOlder starts a successor beside a daemon of a release without handover, which
// has the socket: the successor says what to do and exits, and changes nothing.
func TestReplaceOlder(t *testing.T) {
	c := newCluster(t, 1)
	c.setConfig(config)
	n := c.Nodes[0]
	if err := os.MkdirAll(n.RunDir, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", api.SocketPath(n.RunDir))
	if err != nil {
		t.Fatal(err)
	}
	older := &http.Server{Handler: http.NewServeMux()}
	go func() { _ = older.Serve(l) }()
	defer older.Close()
	p := c.start(n, "--replace")
	<-p.Exited()
	if log := p.Tail(5); p.Err() == nil || !strings.Contains(log, "its release does not support it. Stop it, then start this one") || !strings.Contains(log, "maxSurge: 0") {
		t.Errorf("the successor exited with %v: %s", p.Err(), log)
	}
	links, err := n.Run(t.Context(), "ip", "-brief", "link")
	if err != nil || strings.Contains(string(links), "culvert") {
		t.Errorf("the successor left a device (%v):\n%s", err, links)
	}
	if _, err := os.Stat(n.SubnetFile()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the successor wrote subnet.env (%v)", err)
	}
}

// TestStandBy has a daemon with --handed-over=wait hand over and wait, as the old pod of an
// update does until the kubelet stops it. If its successor exits first, it takes over again.
func TestStandBy(t *testing.T) {
	c := newCluster(t, 2)
	c.setConfig(config)
	n := c.Nodes[0]
	old := c.startAll("--handed-over=wait")[0]
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the old daemon:\n%s", old.Tail(40))
		}
	})
	pods := c.pods()
	ping(t, pods[0], pods[1])
	probe := func(inContainer bool) error {
		args := []string{filepath.Join(c.bin, "culvert"), "probe"}
		if inContainer {
			args = append([]string{"unshare", "--pid", "--fork", "--mount-proc"}, args...)
		}
		_, err := n.Run(t.Context(), args[0], args[1:]...)
		return err
	}
	if err := probe(false); err != nil {
		t.Errorf("probe of the daemon: %v", err)
	}
	if err := probe(true); err == nil {
		t.Error("the probe succeeds in another PID namespace than the daemon's")
	}
	next := c.start(n, "--replace", "--handed-over=wait")
	c.wait(n, "is ready after the handover", func(s api.Status) bool { return s.Ready && s.Handover != nil && s.Handover.PID == old.PID })
	if err := probe(false); err != nil {
		t.Errorf("probe of the successor: %v", err)
	}
	select {
	case <-old.Exited():
		t.Fatalf("the daemon that handed over exited: %s", old.Tail(5))
	default:
	}
	// The successor crashes, and the old daemon takes over.
	if err := next.Kill(); err != nil {
		t.Fatal(err)
	}
	c.wait(n, "is ready with the old daemon", func(s api.Status) bool { return s.Ready && s.Handover == nil && len(s.Peers) == 1 })
	ping(t, pods[0], pods[1])
	// Another successor takes over, and the old daemon is stopped.
	c.start(n, "--replace")
	c.wait(n, "is ready after the second handover", func(s api.Status) bool { return s.Ready && s.Handover != nil })
	stop(t, old)
	if s := c.waitReady(n, 1); s.Handover == nil {
		t.Error("when the waiting daemon stopped, the node changed")
	}
	ping(t, pods[0], pods[1])
}

// suspend stops a process (SIGSTOP), and returns when none of its threads runs any more.
func suspend(p *lab.Process) error {
	if err := p.Signal(unix.SIGSTOP); err != nil {
		return err
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.PID))
		if err != nil {
			return err
		}
		running := slices.ContainsFunc(threads, func(name string) bool {
			text, err := os.ReadFile(name)
			_, state, _ := strings.Cut(string(text), ") ") // after the program's name
			return err == nil && !strings.HasPrefix(state, "T")
		})
		if len(threads) > 0 && !running {
			return nil
		}
	}
	return fmt.Errorf("process %d still runs 10 s after SIGSTOP", p.PID)
}

// pingTrain is how long TestReplace sends pings, 100 a second.
var pingTrain = pingEvery * time.Duration(pingsFromEnv())

func pingsFromEnv() int {
	if n, err := strconv.Atoi(os.Getenv("CULVERT_TEST_PINGS")); err == nil {
		return n
	}
	return 500
}

// TestReplaceKilled kills one of the two daemons at each message of the handover: the other
// continues, and no packet is lost but those that the killed daemon had read and not sent
// yet. No ping is among those, see kill. The messages pass through the test, which listens on
// the daemon's socket meanwhile:
//
//	successor ── run-dir/culvert.sock (the test) ── run-dir/culvert.sock.real ── running daemon
func TestReplaceKilled(t *testing.T) {
	for _, datapath := range datapaths {
		t.Run(datapath, func(t *testing.T) {
			c, daemons, pods := startPair(t, datapath)
			n, running := c.Nodes[0], daemons[0]
			// If the running daemon is killed before it has sent the descriptors, packets may be
			// lost, as whenever a daemon is killed.
			running = c.killAt(n, running, handover.Hello, "running daemon", false, nil)
			running = c.killAt(n, running, handover.Offer, "running daemon", false, nil)
			pings, there := startPings(t, pods[0], pods[1]), startBulk(t, pods[0], pods[1])
			for _, step := range []handover.Step{handover.Offer, handover.Take, handover.Yours, handover.Running} {
				for _, victim := range []string{"successor", "running daemon"} {
					for _, passed := range []bool{false, true} {
						if step == handover.Running && passed || step == handover.Offer && victim == "running daemon" && !passed {
							continue // nothing follows, or tested above
						}
						running = c.killAt(n, running, step, victim, passed, pings)
					}
				}
			}
			sent, lost := pings.stop()
			t.Logf("of %d pings %d lost, slowest reply %s", sent, lost, pings.slowest)
			if lost != 0 {
				t.Errorf("of %d pings %d were lost", sent, lost)
			}
			if _, err := there.stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// killAt starts a successor and kills one of the two daemons before or, if passed, after a
// message is passed on. It returns the daemon that is left. If the killed daemon may be
// carrying packets, the pings pause, so that it has none of them in its memory.
func (c *cluster) killAt(n *lab.Node, running *lab.Process, at handover.Step, victim string, passed bool, pings *pings) *lab.Process {
	c.t.Helper()
	name := fmt.Sprintf("%s, %s killed, passed %t", at, victim, passed)
	socket := api.SocketPath(n.RunDir)
	real := socket + ".real"
	if err := os.Rename(socket, real); err != nil {
		c.t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		c.t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	var successor *lab.Process
	started, done := make(chan struct{}), make(chan struct{})
	// A successor without the descriptors starts as if no daemon had been running.
	alone := victim == "running daemon" && (at == handover.Hello || at == handover.Offer && !passed)
	// The message before which the pings pause: one while the running daemon carries, or from
	// which on the successor does; none if the victim does not carry.
	var pauseBefore handover.Step
	switch {
	case pings == nil:
	case victim == "successor" && at == handover.Running, victim == "running daemon" && (at == handover.Offer || at == handover.Take):
		pauseBefore = at
	case victim == "successor" && at == handover.Yours && passed:
		pauseBefore = handover.Take // from then on nobody answers
	}
	kill := func() {
		if alone {
			_ = os.Remove(socket)
		}
		p := running
		if victim == "successor" {
			p = successor
		}
		if pauseBefore != "" {
			// What arrives from now on stays in the kernel.
			if err := suspend(p); err != nil {
				c.t.Errorf("%s: %v", name, err)
			}
			pings.resume()
			for before := pings.sentSoFar(); pings.sentSoFar() < before+5; time.Sleep(time.Millisecond) {
			}
		}
		_ = p.Kill() // waits until it is reaped, so that its descriptors are closed
	}
	server := &http.Server{Handler: handover.Handler(func(to *handover.Conn, hello handover.Message) {
		defer close(done)
		defer to.Close()
		<-started
		if at == handover.Hello {
			kill()
			return
		}
		from, offer, err := handover.Ask(c.t.Context(), real, hello)
		if err != nil {
			c.t.Errorf("%s: %v", name, err)
			return
		}
		defer from.Close()
		pass := func(m handover.Message, on *handover.Conn, fds ...int) bool {
			if m.Step == pauseBefore && !pings.pause() {
				c.t.Errorf("%s: before that, pings were lost", name)
			}
			if m.Step == at && !passed {
				kill()
				return false
			}
			_ = on.Send(m, fds...)
			if m.Step == at {
				kill()
				return false
			}
			return true
		}
		fds := from.TakeDescriptors()
		more := pass(offer, to, fds...)
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		if !more {
			return
		}
		ofRunning, ofSuccessor := from.Messages(), to.Messages()
		for {
			var m handover.Message
			var on *handover.Conn
			var ok bool
			select {
			case m, ok = <-ofRunning:
				on = to
			case m, ok = <-ofSuccessor:
				on = from
			}
			if !ok {
				c.t.Errorf("%s: the connection was closed before that", name)
				return
			}
			if !pass(m, on) {
				return
			}
		}
	})}
	go func() { _ = server.Serve(l) }()
	successor = c.start(n, "--replace")
	close(started)
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		c.t.Fatalf("%s: the message was not sent within 30 s\n%s\n%s", name, running.Tail(10), successor.Tail(10))
	}
	_ = server.Close()
	left, gone := successor, running
	if victim == "successor" {
		left, gone = running, successor
	}
	<-gone.Exited()
	if !alone { // otherwise the successor has created its own socket
		if err := os.Rename(real, socket); err != nil {
			c.t.Fatal(err)
		}
	}
	s := c.wait(n, name, func(s api.Status) bool { return s.Ready && len(s.Peers) == 1 })
	select {
	case <-left.Exited():
		c.t.Fatalf("%s: both daemons exited: %v\n%s", name, left.Err(), left.Tail(10))
	default:
	}
	if victim == "running daemon" && !alone && (s.Handover == nil || !s.Handover.Inherited) {
		c.t.Errorf("%s: the handover in the status is %+v", name, s.Handover)
	}
	_ = os.Remove(filepath.Join(n.RunDir, filepath.Base(real)))
	return left
}
