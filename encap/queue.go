package encap

import (
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// queue is one queue of the device and the sockets that belong to it, with the
// two goroutines that serve them.
//
// While little comes, the first serves all: a request and its answer then wake
// one thread, which is quick. When much comes, the second takes over the
// sending direction, so that each has a thread of its own, and gives it back
// when there has been nothing to send for a while.
type queue struct {
	*common
	device uintptr
	out    *egress
	in     []*ingress

	patience patience // of the first goroutine, while it serves all

	split atomic.Bool // the second goroutine has the device
	turn  eventfd     // says to the second that it is to take over
	kick  eventfd     // says to the first that the device is its own again

	errors errorQueue
	polls  []unix.PollFd // kick, the sockets, those that only send, the device
}

// dozing is how long a thread sleeps in a system call that the runtime does
// not know of, before it sleeps in one that it does. It is less than the 10 ms
// after which the runtime would ask the goroutine for its processor.
const dozing = 5 * time.Millisecond

func newQueue(c *common, device uintptr, out *egress, in []*ingress) (*queue, error) {
	q := &queue{
		common: c, device: device, out: out, in: in, errors: errorQueue{common: c},
		patience: c.patience(lookingAlone),
	}
	var err error
	if q.turn, err = newEventfd(0); err != nil {
		return nil, err
	}
	if q.kick, err = newEventfd(unix.EFD_NONBLOCK); err != nil {
		q.turn.close()
		return nil, err
	}
	q.polls = append(q.polls, unix.PollFd{Fd: int32(q.kick), Events: unix.POLLIN})
	for _, g := range in {
		q.polls = append(q.polls, unix.PollFd{Fd: int32(g.socket), Events: unix.POLLIN})
	}
	q.polls = append(q.polls, unix.PollFd{Fd: int32(device), Events: unix.POLLIN})
	return q, nil
}

// watchErrors has the queue look at the errors of sockets that only send.
func (q *queue) watchErrors(o Options) {
	last := len(q.polls) - 1
	device := q.polls[last]
	q.polls = q.polls[:last]
	for _, u := range []Underlay{o.IPv4, o.IPv6} {
		for _, s := range u.Send {
			if !slices.Contains(u.Receive, s.Socket) {
				q.polls = append(q.polls, unix.PollFd{Fd: int32(s.Socket.FD())})
			}
		}
	}
	q.polls = append(q.polls, device)
}

func (q *queue) close() {
	q.turn.close()
	q.kick.close()
}

// wake makes both goroutines see that the loop is stopping.
func (q *queue) wake() {
	q.turn.signal()
	q.kick.signal()
}

// serve carries what comes from the underlay, and while little comes what goes
// there too, until the loop stops or a descriptor fails.
func (q *queue) serve() error {
	for !q.stopping.Load() {
		alone := !q.split.Load()
		polls := q.polls
		if !alone {
			polls = polls[:len(polls)-1]
		}
		if !alone || !q.look(polls) {
			q.await(polls, alone)
		}
		if polls[0].Revents != 0 {
			q.kick.drain()
		}
		for i := 1; i < len(polls); i++ {
			if polls[i].Revents&unix.POLLERR != 0 {
				q.errors.drain(uintptr(polls[i].Fd))
			}
		}
		much := false
		for i, g := range q.in {
			if polls[1+i].Revents == 0 {
				continue
			}
			g.counters.Waits.Add(1)
			g.patience.woken()
			more, err := g.drain(!alone)
			if err != nil {
				return err
			}
			much = much || more
		}
		if !alone {
			continue
		}
		if polls[len(polls)-1].Revents != 0 {
			q.out.counters.Waits.Add(1)
			more, err := q.out.drain(q.device, false)
			if err != nil {
				return err
			}
			much = much || more
		}
		if much {
			q.split.Store(true)
			q.turn.signal()
		}
	}
	return nil
}

// look looks again and again, as long as something can be expected soon, and
// says whether one of the descriptors is ready.
func (q *queue) look(polls []unix.PollFd) (ready bool) {
	for q.patience.again() {
		if wait(polls, 0) {
			q.patience.fed()
			return true
		}
	}
	return false
}

// await sleeps until one of the descriptors is ready; if others are served
// elsewhere, perhaps less long.
func (q *queue) await(polls []unix.PollFd, alone bool) {
	q.patience.sleeps()
	for _, g := range q.in {
		g.patience.sleeps()
	}
	if !wait(polls, dozing) && alone {
		sleep(polls)
	}
	q.patience.woken()
}

// serveDevice carries what goes to the underlay whenever it is its turn.
func (q *queue) serveDevice() error {
	device := []unix.PollFd{{Fd: int32(q.device), Events: unix.POLLIN}}
	for {
		q.turn.wait()
		for {
			if q.stopping.Load() {
				return nil
			}
			q.out.patience.woken()
			if _, err := q.out.drain(q.device, true); err != nil {
				return err
			}
			q.out.patience.sleeps()
			if !wait(device, dozing) {
				break
			}
			q.out.counters.Waits.Add(1)
		}
		q.split.Store(false)
		q.kick.signal()
	}
}

// wait sleeps until one of the descriptors is ready, and returns false if none
// was for a time of at most dozing. Woken so, a goroutine runs at once, on its own thread: the
// scheduler has no part in it. The price is that it keeps its processor while
// it dozes, so there must be one for it besides those that the rest of the
// program is to use (Loop.Run).
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

// sleep sleeps until one of the descriptors is ready.
func sleep(polls []unix.PollFd) {
	if _, err := unix.Ppoll(polls, nil, nil); err != nil {
		clearEvents(polls)
	}
}

func clearEvents(polls []unix.PollFd) {
	for i := range polls {
		polls[i].Revents = 0
	}
}

// awaitRoom waits a while until a socket takes more.
func awaitRoom(fd uintptr) {
	_ = wait([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, dozing)
}

// eventfd is a counter to wait for (eventfd(2)).
type eventfd int

func newEventfd(flags int) (eventfd, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|flags)
	if err != nil {
		return -1, fmt.Errorf("eventfd: %w", err)
	}
	return eventfd(fd), nil
}

var eventOne = [8]byte{1} // any number but 0, in either byte order

func (e eventfd) signal() { _, _ = unix.Write(int(e), eventOne[:]) }

// wait sleeps until it is signalled.
func (e eventfd) wait() {
	var b [8]byte
	for {
		if _, err := unix.Read(int(e), b[:]); err != unix.EINTR {
			return
		}
	}
}

// drain forgets signals; the descriptor does not block.
func (e eventfd) drain() {
	var b [8]byte
	_, _ = unix.Read(int(e), b[:])
}

func (e eventfd) close() { _ = unix.Close(int(e)) }
