package encap

import (
	"fmt"
	"runtime"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// queue is one or several queues of the device and their sockets, served by one
// goroutine in both directions: the kernel's reply to a write, such as a TCP ACK,
// is on the device when the write returns, so no other thread has to be woken.
// Several queues use several CPUs.
type queue struct {
	*common
	devices []uintptr
	out     *egress
	in      []*ingress

	stop   eventfd
	errors errorQueue
	polls  []unix.PollFd // stop, receive sockets, send-only sockets (errors), devices
	poller poller
}

// rawBlock is how long a thread blocks in a raw system call, hidden from the Go
// scheduler, before it blocks in one that releases its P. It is less than the
// 10 ms after which the runtime preempts a goroutine.
const rawBlock = 5 * time.Millisecond

func newQueue(c *common, devices []uintptr, out *egress, in []*ingress) (*queue, error) {
	stop, err := newEventfd()
	if err != nil {
		return nil, err
	}
	q := &queue{common: c, devices: devices, out: out, in: in, stop: stop, errors: errorQueue{common: c}}
	q.polls = append(q.polls, unix.PollFd{Fd: int32(q.stop), Events: unix.POLLIN})
	for _, g := range in {
		q.polls = append(q.polls, unix.PollFd{Fd: int32(g.socket), Events: unix.POLLIN})
	}
	for _, d := range devices {
		q.polls = append(q.polls, unix.PollFd{Fd: int32(d), Events: unix.POLLIN})
	}
	return q, nil
}

// watchErrors adds the send-only sockets to the poll set, for their error queues.
func (q *queue) watchErrors(o Options) {
	last := len(q.polls) - len(q.devices)
	devices := slices.Clone(q.polls[last:])
	q.polls = q.polls[:last]
	for _, u := range []Underlay{o.IPv4, o.IPv6} {
		for _, s := range append(u.Send[:len(u.Send):len(u.Send)], u.Fragment) {
			if s.Socket.FD() < 0 {
				continue
			}
			if !slices.Contains(u.Receive, s.Socket) {
				q.polls = append(q.polls, unix.PollFd{Fd: int32(s.Socket.FD())})
			}
		}
	}
	q.polls = append(q.polls, devices...)
}

// close closes the eventfd.
func (q *queue) close() { q.stop.close() }

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
		for i := range q.polls {
			if q.polls[i].Revents&unix.POLLERR != 0 {
				q.errors.drain(uintptr(q.polls[i].Fd))
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
		for i, d := range q.devices {
			if devices[i].Revents == 0 {
				continue
			}
			if err := q.out.drain(d); err != nil {
				return err
			}
		}
	}
}

// look busy-polls while the poller allows it, and reports whether a descriptor is
// ready.
func (q *queue) look() (ready bool) {
	for q.poller.busy {
		if wait(q.polls, 0) {
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
	if !wait(q.polls, rawBlock) {
		if _, err := unix.Ppoll(q.polls, nil, nil); err != nil {
			clearEvents(q.polls)
		}
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

// wait blocks until a descriptor is ready, and returns false after atMost, which
// must not exceed rawBlock. It is a raw system call: after the wake-up the
// goroutine runs at once on its thread, without the Go scheduler. It keeps its P
// meanwhile, so Loop.Run reserves one more per queue.
//
// The runtime, such as the garbage collector, preempts by a signal, which
// interrupts the call: wait then yields (Gosched) and returns true with no events
// set.
func wait(polls []unix.PollFd, atMost time.Duration) (ready bool) {
	timeout := unix.NsecToTimespec(int64(atMost))
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&polls[0])), uintptr(len(polls)), uintptr(unsafe.Pointer(&timeout)), 0, 0, 0)
	if errno != 0 {
		clearEvents(polls)
		runtime.Gosched()
		return true
	}
	return n > 0
}

func clearEvents(polls []unix.PollFd) {
	for i := range polls {
		polls[i].Revents = 0
	}
}

// eventfd is an eventfd(2), used as a wake-up.
type eventfd int

func newEventfd() (eventfd, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("eventfd: %w", err)
	}
	return eventfd(fd), nil
}

var eventOne = [8]byte{1} // not 0 in either byte order

func (e eventfd) signal() { _, _ = unix.Write(int(e), eventOne[:]) }

func (e eventfd) close() { _ = unix.Close(int(e)) }
