package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/handover"
)

// This file is the running daemon's side of a handover, takeover.go the successor's.
// Package handover draws the messages. Who owns what:
//
//	              store, subnet.env   host's state     packets    sockets of status and metrics
//	before        running daemon      running          running    running
//	from offer    successor           running          running    running
//	from take     successor           nobody           nobody     nobody: the kernel queues both
//	from yours    successor           successor        successor  successor
//	from running  the running daemon has ended
//
// "From take" lasts for one round trip plus the time to send the packets that were
// already read.

// HandedOver is what a daemon does after a handover.
type HandedOver string

// The values of --handed-over.
const (
	// Exit ends the process.
	Exit HandedOver = "exit"
	// Wait keeps the process until it is told to stop, for a supervisor that would
	// restart it otherwise. If the successor ends first, it takes its place.
	Wait HandedOver = "wait"
)

const (
	// handoverTimeout is how long a successor may take from the offer until it runs.
	handoverTimeout = time.Minute
	// stopTimeout replaces it once this daemon is told to stop.
	stopTimeout = 10 * time.Second
	// requestTimeout is how long a successor's request waits while this daemon cannot
	// hand over.
	requestTimeout = 5 * time.Second
)

var (
	// errHandedOver stops this daemon: its successor runs.
	errHandedOver = errors.New("handed over")
	// errHandoverFailed means that the handover failed and this daemon goes on.
	errHandoverFailed = errors.New("the successor did not take over")
)

// handoverRequested stops the parts of a session because a successor asks for the node.
type handoverRequested struct{ request }

func (handoverRequested) Error() string { return "a successor requests a handover" }

// request is a successor's request for the node.
type request struct {
	conn  *handover.Conn
	hello handover.Message
}

// untilHandover returns a context that also ends when a successor asks, and a function
// that returns its request, or nil. The function must be called.
func (d *node) untilHandover(ctx context.Context) (context.Context, func() *request) {
	ctx, cancel := context.WithCancel(ctx)
	got := make(chan *request, 1)
	go func() {
		defer close(got)
		select {
		case r := <-d.requests:
			got <- &r
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, func() *request {
		cancel()
		return <-got
	}
}

// runningDatapath is a running datapath that a successor may inherit.
type runningDatapath struct {
	facts map[string]string
	stop  func() error    // stops carrying, and returns when all packets read are sent
	drop  func()          // closes the datapath, if the successor opens another
	ended <-chan struct{} // closed when the datapath has stopped
}

// handOver hands this node over to a successor; c is the running datapath, or nil. It
// returns errHandedOver, or errHandoverFailed if this daemon goes on. The caller has stopped the
// parts that write to the store.
func (d *node) handOver(ctx context.Context, r request, c *runningDatapath) error {
	log := d.log.With("successor", r.hello.PID, "version", r.hello.Program)
	kept := func(why string) error {
		log.Error("the successor did not take over; continuing", "reason", why)
		_ = r.conn.Send(handover.Message{Step: handover.Back, Why: why})
		_ = r.conn.Close()
		return errHandoverFailed
	}
	messages := r.conn.Messages()
	log.Info("a successor requests a handover", "carrying", c != nil)
	offer, fds := d.offer(c)
	if err := r.conn.Send(offer, fds...); err != nil {
		return kept(err.Error())
	}
	wait := newTimeout(ctx, min(handoverTimeout, d.options.LeaseTTL/2))
	defer wait.end()
	var ended <-chan struct{}
	if c != nil {
		ended = c.ended
	}
	m, why := wait.message(messages, handover.Take, ended)
	if why != "" {
		return kept(why)
	}
	d.sockets.pause()
	if c != nil {
		if err := c.stop(); err != nil {
			d.resumeServing(log)
			return kept(err.Error())
		}
		if !m.Inherit {
			c.drop()
		}
	}
	err := r.conn.Send(handover.Message{Step: handover.Yours})
	if err == nil {
		_, why = wait.message(messages, handover.Running, nil)
	} else {
		why = err.Error()
	}
	if why != "" {
		d.resumeServing(log)
		return kept(why)
	}
	log.Info("handed over", "datapath_inherited", m.Inherit && c != nil)
	d.sockets.passed, d.successor = true, r.conn
	return errHandedOver
}

func (d *node) resumeServing(log *slog.Logger) {
	if err := errors.Join(d.sockets.owner.Answer(), d.sockets.serve()); err != nil {
		log.Error("the server of status and metrics failed", "error", err)
	}
}

// offer builds the message that passes the descriptors; their names are in the same
// order.
func (d *node) offer(c *runningDatapath) (handover.Message, []int) {
	p := d.sockets
	lock, socket := p.socket.Descriptors()
	m := handover.Message{
		Step: handover.Offer, Protocol: handover.Version, Program: d.options.Version, PID: os.Getpid(),
		Descriptors: []string{"owner", "lock", "socket"},
	}
	fds := []int{p.owner.Descriptor(), lock, socket}
	if p.metrics != nil {
		m.Metrics = d.options.Metrics
		m.Descriptors, fds = append(m.Descriptors, "metrics"), append(fds, p.metrics.Descriptor())
	}
	if c != nil {
		m.Carrying, m.Datapath = true, c.facts
		for _, fd := range d.store.peek() {
			m.Descriptors, fds = append(m.Descriptors, "datapath"), append(fds, fd)
		}
	}
	return m, fds
}

// messageTimer is the timeout for a successor's messages, shortened when this daemon is
// told to stop.
type messageTimer struct {
	mu    sync.Mutex
	timer *time.Timer
	stop  func() bool
}

func newTimeout(ctx context.Context, most time.Duration) *messageTimer {
	p := &messageTimer{timer: time.NewTimer(most)}
	p.stop = context.AfterFunc(ctx, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.timer.Reset(min(most, stopTimeout))
	})
	return p
}

func (p *messageTimer) end() {
	p.stop()
	p.timer.Stop()
}

// message returns the next message, or why the handover failed.
func (p *messageTimer) message(from <-chan handover.Message, want handover.Step, ended <-chan struct{}) (m handover.Message, why string) {
	select {
	case m, ok := <-from:
		switch {
		case !ok:
			return m, "it ended"
		case m.Step != want:
			return m, fmt.Sprintf("it sent %q instead of %q", m.Step, want)
		}
		return m, ""
	case <-ended:
		return m, "the datapath broke meanwhile"
	case <-p.timer.C:
		return m, fmt.Sprintf("it was not ready within %s: see its log", handoverTimeout)
	}
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
