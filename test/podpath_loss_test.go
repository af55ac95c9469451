package test

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"culvert/internal/api"
	"culvert/internal/lab"
)

// numbered are datagrams with numbers from one pod to another, which answers none.
type numbered struct {
	sent, received, late atomic.Uint64 // late: after one that was sent later
	quiet                context.CancelFunc
	sender               sync.WaitGroup
}

func startNumbered(t *testing.T, from, to *lab.Pod) *numbered {
	t.Helper()
	server, client := udpPair(t, from.Namespace, to.Namespace, from.Addrs[0], to.Addrs[0])
	roomy(server)
	s := &numbered{}
	ctx, cancel := context.WithCancel(context.Background())
	s.quiet = cancel
	var receiver sync.WaitGroup
	receiver.Go(func() {
		b := make([]byte, 64)
		for last := uint64(0); ; {
			if _, _, err := server.ReadFrom(b); err != nil {
				return
			}
			s.received.Add(1)
			number := binary.BigEndian.Uint64(b)
			if number < last {
				s.late.Add(1)
			}
			last = max(last, number)
		}
	})
	s.sender.Go(func() {
		b := make([]byte, 64)
		for number := uint64(1); ctx.Err() == nil; number++ {
			if number%16 == 0 { // bursts, so that several are on their way at once
				time.Sleep(2 * time.Millisecond)
			}
			binary.BigEndian.PutUint64(b, number)
			s.sent.Add(1)
			_, _ = client.WriteTo(b, server.LocalAddr()) // a device may be down
		}
	})
	t.Cleanup(func() { cancel(); s.sender.Wait(); server.Close(); receiver.Wait() })
	return s
}

// stop ends the sending, and returns an error if anything was lost or overtaken.
func (s *numbered) stop() error {
	s.quiet()
	s.sender.Wait()
	for end := time.Now().Add(3 * time.Second); s.received.Load() < s.sent.Load() && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	if sent, received, late := s.sent.Load(), s.received.Load(), s.late.Load(); received != sent || late != 0 {
		return fmt.Errorf("of %d datagrams %d were lost and %d overtaken", sent, int64(sent)-int64(received), late)
	}
	return nil
}

// TestPodPathLosesNothing sends pings and datagrams at a high rate to a pod that is in use,
// from its neighbour on the node and from a pod of another node. None are lost and none
// overtaken while the daemon is killed and started again, and with other flags. What the
// neighbour sends arrives also while the daemon starts for the first time, with the fast
// path off, and while the node is cleaned up.
//
//	n1: neighbour ── cni0 ── pod ◄── cvt.1 ══ n2 ── other
func TestPodPathLosesNothing(t *testing.T) {
	c := newCluster(t, 2)
	c.setConfig(config)
	n := c.Nodes[0]
	run := func(mode string) *lab.Process {
		t.Helper()
		p := c.start(n, "--datapath", "kernel", "--fast-path", mode)
		c.wait(n, "is ready with --fast-path="+mode, func(s api.Status) bool {
			f := s.Datapath.FastPath
			return s.Ready && f.Mode == mode && f.On == (mode != "off") && len(s.Peers) == 1
		})
		return p
	}
	c.start(c.Nodes[1], "--datapath", "kernel")
	p := run("off")
	c.waitReady(c.Nodes[1], 1)
	add := func(n *lab.Node, name string) *lab.Pod {
		t.Helper()
		p, err := n.AddPod(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	pod, neighbour, other := add(n, "pod"), add(n, "neighbour"), add(c.Nodes[1], "other")
	stop(t, p)
	c.cleanup(n)

	near, nearPings := startNumbered(t, neighbour, pod), startPingsEvery(t, neighbour, pod, time.Millisecond)
	p = run("auto")
	far, back, farPings := startNumbered(t, other, pod), startNumbered(t, pod, other), startPingsEvery(t, other, pod, time.Millisecond)
	short := func() {
		t.Helper()
		egress, ingress := c.podFrames(n)
		c.wait(n, "has the datagrams go from pod to pod", func(api.Status) bool {
			e, i := c.podFrames(n)
			return e > egress+100 && i > ingress+100
		})
	}
	short()
	for _, mode := range []string{"on", "pod", "auto"} {
		stop(t, p)
		p = run(mode)
	}
	short()
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Exited()
	p = run("auto")
	short()
	all := func(from string, datagrams *numbered, pings *pings) {
		t.Helper()
		if err := datagrams.stop(); err != nil {
			t.Errorf("from %s: %v", from, err)
		}
		if sent, lost := pings.stop(); lost != 0 {
			t.Errorf("from %s: of %d pings %d were lost", from, sent, lost)
		}
	}
	all("another node", far, farPings)
	if err := back.stop(); err != nil {
		t.Errorf("to another node: %v", err)
	}
	for _, mode := range []string{"off", "auto"} {
		stop(t, p)
		p = run(mode)
	}
	stop(t, p)
	c.cleanup(n)
	run("auto")
	c.wait(n, "takes the pods in again", func(s api.Status) bool { return s.Datapath.FastPath.Pods.Links == 2 })
	all("the neighbour", near, nearPings)
}
