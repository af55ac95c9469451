package encap

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// queue is one or several queues of the device and their sockets, served by one
// goroutine in both directions: the kernel's reply to a write, such as a TCP ACK,
// is on the device when the write returns, so no other thread has to be woken.
// Several queues use several CPUs.
type queue struct {
	*common
	devices []device
	last    int      // the device that had the last turn
	turns   []*Turns // of the devices, or nil: see Steering
	sockets []socket // those to receive from, then those only to send from
	out     *egress
	in      []*ingress
	// slab is the receive buffers of all of in, which take turns. They are not in Go's
	// heap, where 4 MB that are rarely used would let as much garbage again stand.
	slab []byte

	stop   eventfd
	errors errorQueue
	polls  []unix.PollFd // stop, sockets, devices
	wait   func(polls []unix.PollFd, atMost time.Duration) (ready bool)
	poller poller
}

// forever is no limit for queue.wait.
const forever = time.Duration(-1)

// rawBlock is how long a thread blocks in a raw system call, hidden from the Go
// scheduler, before it blocks in one that releases its P. It is less than the
// 10 ms after which the runtime preempts a goroutine.
const rawBlock = 5 * time.Millisecond

// newQueue returns a queue. sendOnly are sockets that it watches for errors only.
func newQueue(c *common, devices []device, out *egress, in []*ingress, sendOnly []socket) (*queue, error) {
	stop, err := newEventfd()
	if err != nil {
		return nil, err
	}
	q := &queue{common: c, devices: devices, last: len(devices) - 1, out: out, in: in, stop: stop, errors: errorQueue{common: c}, wait: wait}
	q.polls = append(q.polls, unix.PollFd{Fd: int32(q.stop), Events: unix.POLLIN})
	for _, g := range in {
		q.sockets = append(q.sockets, g.socket)
		q.polls = append(q.polls, unix.PollFd{Fd: int32(g.socket.fd()), Events: unix.POLLIN})
	}
	for _, s := range sendOnly {
		q.sockets = append(q.sockets, s)
		q.polls = append(q.polls, unix.PollFd{Fd: int32(s.fd())})
	}
	for _, d := range devices {
		q.polls = append(q.polls, unix.PollFd{Fd: int32(d.fd()), Events: unix.POLLIN})
	}
	return q, nil
}

// sendOnly returns the sockets that are not received from.
func sendOnly(o Options) []socket {
	var all []socket
	for _, u := range []Underlay{o.IPv4, o.IPv6} {
		for _, s := range append(u.Send[:len(u.Send):len(u.Send)], u.Fragment) {
			if s.Socket.FD() >= 0 && !slices.Contains(u.Receive, s.Socket) {
				all = append(all, inet(s.Socket.FD()))
			}
		}
	}
	return all
}

// close frees what is not in Go's heap.
func (q *queue) close() {
	q.stop.close()
	if q.slab != nil {
		_ = unix.Munmap(q.slab)
		q.slab, q.in = nil, nil
	}
}

// wake wakes the goroutine, so that it sees that the loop is stopping.
func (q *queue) wake() { q.stop.signal() }

// serve carries packets in both directions until the loop stops (it returns nil)
// or a descriptor fails.
func (q *queue) serve() error {
	devices := q.polls[len(q.polls)-len(q.devices):]
	for {
		if !q.look() {
			q.sleep()
		}
		if q.stopping.Load() {
			return nil
		}
		for i, s := range q.sockets {
			if q.polls[1+i].Revents&unix.POLLERR != 0 {
				q.errors.drain(s)
			}
		}
		for i, g := range q.in {
			if q.polls[1+i].Revents == 0 {
				continue
			}
			if err := g.drain(); err != nil {
				return err
			}
		}
		if err := q.drain(devices); err != nil {
			return err
		}
	}
}

// drain gives a turn to the first queue, if flows move from it, and then to one of the
// others, which take turns. polls are those of the devices.
func (q *queue) drain(polls []unix.PollFd) error {
	first := 0
	if q.out.moves != nil {
		first = 1
		if polls[0].Revents != 0 {
			q.out.sharing = false
			if err := q.out.drain(q.devices[0]); err != nil {
				return err
			}
		}
	}
	next, ready := 0, 0
	for i := range q.devices[first:] {
		// The last is the one that had the last turn.
		if k := first + (q.last-first+1+i)%(len(q.devices)-first); polls[k].Revents != 0 {
			if ready++; ready == 1 {
				next = k
			}
		}
	}
	if ready == 0 {
		return nil
	}
	q.last, q.out.sharing = next, ready > 1
	if next >= len(q.turns) {
		return q.out.drain(q.devices[next])
	}
	turns := q.turns[next]
	begun := turns.Begun.Add(1)
	dry, err := q.out.turn(q.devices[next])
	if dry && err == nil {
		turns.Dry.Store(begun)
	}
	return err
}

// look busy-polls while the poller allows it, and reports whether a descriptor is
// ready.
func (q *queue) look() (ready bool) {
	for q.poller.busy {
		if q.wait(q.polls, 0) {
			q.poller.ready()
			return true
		}
		q.poller.empty()
	}
	return false
}

// sleep blocks until a descriptor is ready.
func (q *queue) sleep() {
	q.poller.block()
	if !q.wait(q.polls, rawBlock) {
		q.wait(q.polls, forever)
	}
	q.poller.wake()
	for i, g := range q.in {
		if q.polls[1+i].Revents != 0 {
			g.counters.Waits.Add(1)
		}
	}
	for _, p := range q.polls[len(q.polls)-len(q.devices):] {
		if p.Revents != 0 {
			q.out.counters.Waits.Add(1)
			break
		}
	}
}
