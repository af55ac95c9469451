package encap

import (
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// newFakeQueue returns a queue on a fake node and a second, send-only socket.
func newFakeQueue(t *testing.T, n *fakeNode) (*queue, *fakeWait, *fakeSocket) {
	t.Helper()
	sendOnly := &fakeSocket{number: 1}
	q, err := newQueue(n.common, []device{n.device}, n.out, []*ingress{n.in}, []socket{sendOnly})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.close)
	w := &fakeWait{q: q}
	q.wait = w.wait
	return q, w, sendOnly
}

// TestQueueServes makes descriptors ready, and states what the queue does and how it
// waits: 0 is a busy poll, then a block in the raw call, then one without limit.
func TestQueueServes(t *testing.T) {
	const long = time.Second
	out := func(n *fakeNode) func() {
		return func() { s := udpSpec(10); n.device.queue(s.vnet(0), s.partial()) }
	}
	in := func(n *fakeNode) func() {
		return func() {
			n.socket.arriving = append(n.socket.arriving, arrival{from: peerAddr, data: n.from(udpSpec(10).reply().bytes())})
		}
	}
	for _, c := range []struct {
		name  string
		poll  bool
		steps func(n *fakeNode) []step
		waits []time.Duration
		// What was sent and written, and the blocking waits that each direction ended.
		sent, written    int
		outWaits, inWait uint64
	}{
		{"a frame after a long time", false, func(n *fakeNode) []step {
			return []step{{after: long, ready: []int{100}, do: out(n)}}
		}, []time.Duration{rawBlock, forever, rawBlock}, 1, 0, 1, 0},
		{"a datagram at once", false, func(n *fakeNode) []step {
			return []step{{ready: []int{200}, do: in(n)}}
		}, []time.Duration{rawBlock, rawBlock}, 0, 1, 0, 1},
		{"both", false, func(n *fakeNode) []step {
			return []step{{ready: []int{100, 200}, do: func() { in(n)(); out(n)() }}}
		}, []time.Duration{rawBlock, rawBlock}, 1, 1, 1, 1},
		{"nothing, as a signal interrupted", false, func(*fakeNode) []step { return []step{{}} }, []time.Duration{rawBlock, rawBlock}, 0, 0, 0, 0},
		// The first block is short, so the next wait is a busy poll.
		{"a poll that succeeds", true, func(n *fakeNode) []step {
			return []step{{after: pollTime, ready: []int{100}, do: out(n)}, {ready: []int{100}, do: out(n)}}
		}, []time.Duration{rawBlock, 0, 0}, 2, 0, 1, 0},
		{"no poll after a long block", true, func(n *fakeNode) []step {
			return []step{{after: long, ready: []int{100}, do: out(n)}, {ready: []int{100}, do: out(n)}}
		}, []time.Duration{rawBlock, forever, rawBlock, 0}, 2, 0, 2, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newFakeNode(VXLAN)
				outWaits, inWaits := &Counters{}, &Counters{}
				n.out.counters, n.in.counters = outWaits, inWaits
				q, w, _ := newFakeQueue(t, n)
				if c.poll {
					q.poller.limit = pollTime
				}
				w.steps = c.steps(n)
				if err := q.serve(); err != nil {
					t.Fatal(err)
				}
				if !slices.Equal(w.calls, c.waits) {
					t.Errorf("it waits for %v, want %v", w.calls, c.waits)
				}
				if sent := len(n.sentPackets()); sent != c.sent || len(n.device.out) != c.written {
					t.Errorf("%d packets sent, %d written, want %d and %d", sent, len(n.device.out), c.sent, c.written)
				}
				if outWaits.Waits.Load() != c.outWaits || inWaits.Waits.Load() != c.inWait {
					t.Errorf("blocking waits: out %d, in %d", outWaits.Waits.Load(), inWaits.Waits.Load())
				}
			})
		})
	}
}

// TestQueueCountsTurns counts the turns of a queue for bulk flows, and notes those that
// left it empty and sent all of it.
func TestQueueCountsTurns(t *testing.T) {
	n := newFakeNode(VXLAN)
	n.out.moves = new(atomic.Uint64)
	bulk := &fakeDevice{}
	q, err := newQueue(n.common, []device{n.device, bulk}, n.out, []*ingress{n.in}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.close)
	var turns [2]Turns
	q.turns = []*Turns{&turns[0], &turns[1]}
	packet := udpSpec(10)
	for turn, c := range []struct {
		packets int
		dry     uint64
	}{{turnFrames + 1, 0}, {0, 2}, {turnFrames, 2}, {0, 4}, {1, 5}} {
		for range c.packets {
			bulk.queue(packet.vnet(0), packet.partial())
		}
		if err := q.drain([]unix.PollFd{{}, {Revents: unix.POLLIN}}); err != nil {
			t.Fatal(err)
		}
		if begun, dry := turns[1].Begun.Load(), turns[1].Dry.Load(); begun != uint64(turn+1) || dry != c.dry {
			t.Errorf("after turn %d: %d have begun, %d was the last to leave nothing; want %d", turn+1, begun, dry, c.dry)
		}
		if begun := turns[0].Begun.Load(); begun != 0 {
			t.Errorf("%d turns of the first queue are counted", begun)
		}
	}
}

// TestQueueTakesTurns has a flood of datagrams and a stream of large frames in two queues of
// the device, and single packets in the first one: each turn of another queue comes after
// the first queue is empty, the two take turns, and the flood's are short as long as the
// stream waits.
func TestQueueTakesTurns(t *testing.T) {
	const datagrams, frames = 500, 10
	for _, c := range []struct {
		name  string
		first bool // the first queue is for sparse flows
		turns int
		flood int // how many datagrams of the flood were read
	}{
		{"first queue for sparse flows", true, 2 * frames, 15 * frames},
		{"equal queues", false, 3 * frames, 15 * frames},
	} {
		n := newFakeNode(VXLAN)
		if c.first {
			n.out.moves = new(atomic.Uint64)
		}
		flood, stream := &fakeDevice{}, &fakeDevice{}
		devices := []*fakeDevice{n.device, flood, stream}
		q, err := newQueue(n.common, []device{n.device, flood, stream}, n.out, []*ingress{n.in}, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(q.close)
		var turns [3]Turns
		if c.first {
			q.turns = []*Turns{&turns[0], &turns[1], &turns[2]}
		}
		datagram, frame, lone := udpSpec(1400), tcpSpec(60000), udpSpec(10)
		for range datagrams {
			flood.queue(datagram.vnet(0), datagram.partial())
		}
		for range frames {
			stream.queue(frame.vnet(1400), frame.partial())
		}
		for range c.turns {
			n.device.queue(lone.vnet(0), lone.partial())
			polls := make([]unix.PollFd, len(devices))
			for i, d := range devices {
				if len(d.in) > 0 {
					polls[i].Revents = unix.POLLIN
				}
			}
			if err := q.drain(polls); err != nil {
				t.Fatal(err)
			}
			if c.first && len(n.device.in) > 0 {
				t.Errorf("%s: a sparse flow's packet waits for a bulk flow's", c.name)
			}
		}
		if len(stream.in) != 0 {
			t.Errorf("%s: %d of the stream's frames wait", c.name, len(stream.in))
		}
		if dry := turns[1].Dry.Load(); dry != 0 {
			t.Errorf("%s: the flood's queue counts as empty after turn %d", c.name, dry)
		}
		if got := datagrams - len(flood.in); got != c.flood {
			t.Errorf("%s: %d datagrams of the flood were read, want %d", c.name, got, c.flood)
		}
	}
}

// TestQueuePollTimeout busy-polls until the limit, and blocks then.
func TestQueuePollTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(VXLAN)
		q, w, _ := newFakeQueue(t, n)
		q.poller.limit = pollTime
		s := udpSpec(10)
		n.device.queue(s.vnet(0), s.partial())
		w.steps = []step{{ready: []int{100}}, {after: time.Millisecond, ready: []int{100}}}
		polls := 0
		q.wait = func(p []unix.PollFd, atMost time.Duration) bool {
			if atMost == 0 {
				polls++
				time.Sleep(pollTime / 10)
			}
			return w.wait(p, atMost)
		}
		if err := q.serve(); err != nil {
			t.Fatal(err)
		}
		if polls < 10 || polls > 12 {
			t.Errorf("%d polls of a tenth of the limit each", polls)
		}
		if last := w.calls[len(w.calls)-2]; last != rawBlock {
			t.Errorf("after the polls it waits for %v", last)
		}
	})
}

// TestQueueStopsOnErrors ends when a descriptor fails.
func TestQueueStopsOnErrors(t *testing.T) {
	for name, breaks := range map[string]func(n *fakeNode){
		"device": func(n *fakeNode) { n.device.readErrors = []unix.Errno{unix.EBADFD} },
		"socket": func(n *fakeNode) { n.socket.receiveErrors = []unix.Errno{unix.ENODEV} },
	} {
		n := newFakeNode(VXLAN)
		breaks(n)
		q, w, _ := newFakeQueue(t, n)
		w.steps = []step{{ready: []int{100, 200}}}
		if err := q.serve(); err == nil || !errors.Is(err, unix.EBADFD) && !errors.Is(err, unix.ENODEV) {
			t.Errorf("%s: the error is %v", name, err)
		}
	}
}

// TestQueueReadsErrors reads the error queue of the socket that has an error, until it is
// empty, and clears a pending error, which would keep the socket ready.
func TestQueueReadsErrors(t *testing.T) {
	n := newFakeNode(VXLAN)
	q, w, sendOnly := newFakeQueue(t, n)
	quote := append(slices.Clone(n.peer.header), tcpSpec(100).bytes()...)
	sendOnly.icmp = []icmpError{
		{to: peerAddr, by: here4, errno: unix.ECONNREFUSED, quote: quote},
		{to: peerAddr, by: here4, errno: unix.EMSGSIZE, mtu: 1400, quote: quote},
	}
	w.steps = []step{{errs: []int{201}}}
	if err := q.serve(); err != nil {
		t.Fatal(err)
	}
	if k, ok := n.peer.PathMTU(); !ok || k.MTU != 1350 || k.By != here4 {
		t.Errorf("the path MTU is %+v", k)
	}
	if sendOnly.cleared != 1 || n.socket.cleared != 0 {
		t.Errorf("pending errors cleared: %d and %d", sendOnly.cleared, n.socket.cleared)
	}
}
