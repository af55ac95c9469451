package encap

import (
	"fmt"
	"runtime"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// queue is one or several queues of the device and the sockets that belong to
// them, with the goroutine that serves them.
//
// One serves both directions: what the kernel answers to a write, an
// acknowledgement above all, is on the device when the write returns, and needs
// nobody to be woken. Several processors are for several queues.
type queue struct {
	*common
	devices []uintptr
	out     *egress
	in      []*ingress

	stop     eventfd
	errors   errorQueue
	polls    []unix.PollFd // stop, the sockets, those that only send, the devices
	patience patience
}

// dozing is how long a thread sleeps in a system call that the runtime does
// not know of, before it sleeps in one that it does. It is less than the 10 ms
// after which the runtime would ask the goroutine for its processor.
const dozing = 5 * time.Millisecond

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

// watchErrors has the queue look at the errors of sockets that only send.
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

// close lets go of what newQueue made.
func (q *queue) close() { q.stop.close() }

// wake makes the goroutine see that the loop is stopping.
func (q *queue) wake() { q.stop.signal() }

// serve carries what comes, in both directions, until the loop stops or a
// descriptor fails.
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

// look looks again and again, as long as something can be expected soon, and
// says whether a descriptor is ready.
func (q *queue) look() (ready bool) {
	for q.patience.busy {
		if wait(q.polls, 0) {
			q.patience.fed()
			return true
		}
		q.patience.look()
	}
	return false
}

// sleep sleeps until a descriptor is ready.
func (q *queue) sleep() {
	q.patience.sleeps()
	if !wait(q.polls, dozing) {
		if _, err := unix.Ppoll(q.polls, nil, nil); err != nil {
			clearEvents(q.polls)
		}
	}
	q.patience.woken()
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

// wait waits until one of the descriptors is ready, and returns false if none
// was for a time of at most dozing. Woken so, a goroutine runs at once, on its
// own thread: the scheduler has no part in it. The price is that it keeps its
// processor while it waits, so there must be one for it besides those that the
// rest of the program is to use (Loop.Run).
//
// Whoever needs the processor, the garbage collector above all, asks for it by
// a signal, which ends the system call; Gosched then gives it away.
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

// eventfd is a counter to wait for (eventfd(2)).
type eventfd int

func newEventfd() (eventfd, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("eventfd: %w", err)
	}
	return eventfd(fd), nil
}

var eventOne = [8]byte{1} // any number but 0, in either byte order

func (e eventfd) signal() { _, _ = unix.Write(int(e), eventOne[:]) }

func (e eventfd) close() { _ = unix.Close(int(e)) }
