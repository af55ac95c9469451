package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/api"
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

// HandedOver is what a daemon does after it has handed over.
type HandedOver string

// The values of --handed-over.
const (
	// Exit ends it.
	Exit HandedOver = "exit"
	// Wait keeps the process until it is told to stop, for a supervisor that would
	// restart it otherwise. If the successor ends first, it takes its place.
	Wait HandedOver = "wait"
)

const (
	// handoverPatience is how long a successor may take from the offer until it runs.
	handoverPatience = time.Minute
	// stopPatience replaces it once this daemon is told to stop.
	stopPatience = 10 * time.Second
	// requestPatience is how long a successor's request waits while this daemon cannot
	// hand over.
	requestPatience = 5 * time.Second
)

var (
	// errHandedOver stops this daemon: its successor runs.
	errHandedOver = errors.New("handed over")
	// errKept means that the handover failed and this daemon goes on.
	errKept = errors.New("the successor did not take over")
)

// asked stops the parts of a session because a successor asks for the node.
type asked struct{ request }

func (asked) Error() string { return "a successor asks for this node" }

// request is a successor's request for the node.
type request struct {
	conn  *handover.Conn
	hello handover.Message
}

// socketHandler serves the daemon's unix socket.
func (d *node) socketHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", d.health.socket())
	if recent := d.options.Recent; recent != nil {
		mux.HandleFunc("GET "+api.LogPath, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			_, _ = w.Write(recent.Bytes())
		})
	}
	mux.Handle(handover.Path, handover.Handler(func(c *handover.Conn, hello handover.Message) {
		select {
		case d.requests <- request{c, hello}:
		case <-time.After(requestPatience):
			_ = c.Send(handover.Message{Step: handover.Back, Why: "it is handing over to another, or between two states: try again"})
			_ = c.Close()
		}
	}))
	return mux
}

// untilAsked returns a context that also ends when a successor asks, and a function
// that returns its request, or nil. The function must be called.
func (d *node) untilAsked(ctx context.Context) (context.Context, func() *request) {
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

// carrying is a running datapath that a successor may inherit.
type carrying struct {
	facts map[string]string
	stop  func() error    // stops carrying, and returns when all packets read are sent
	drop  func()          // closes the datapath, if the successor opens another
	ended <-chan struct{} // closed when the datapath has stopped
}

// give hands this node over to a successor; c is the running datapath, or nil. It
// returns errHandedOver, or errKept if this daemon goes on. The caller has stopped the
// parts that write to the store.
func (d *node) give(ctx context.Context, r request, c *carrying) error {
	log := d.log.With("successor", r.hello.PID, "version", r.hello.Program)
	kept := func(why string) error {
		log.Error("the successor did not take over; going on", "reason", why)
		_ = r.conn.Send(handover.Message{Step: handover.Back, Why: why})
		_ = r.conn.Close()
		return errKept
	}
	messages := r.conn.Messages()
	log.Info("a successor asks for this node", "carrying", c != nil)
	offer, fds := d.offer(c)
	if err := r.conn.Send(offer, fds...); err != nil {
		return kept(err.Error())
	}
	wait := newPatience(ctx, min(handoverPatience, d.options.LeaseTTL/2))
	defer wait.end()
	var ended <-chan struct{}
	if c != nil {
		ended = c.ended
	}
	m, why := wait.message(messages, handover.Take, ended)
	if why != "" {
		return kept(why)
	}
	d.possessions.pause()
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
	d.possessions.passed, d.successor = true, r.conn
	return errHandedOver
}

func (d *node) resumeServing(log *slog.Logger) {
	if err := errors.Join(d.possessions.owner.Answer(), d.possessions.serve()); err != nil {
		log.Error("status and metrics are not served any more", "error", err)
	}
}

// offer builds the message that passes the descriptors; their names are in the same
// order.
func (d *node) offer(c *carrying) (handover.Message, []int) {
	p := d.possessions
	lock, socket := p.socket.Descriptors()
	m := handover.Message{
		Step: handover.Offer, Protocol: handover.Version, Program: d.options.Version, PID: os.Getpid(),
		Descriptors: []string{"owner", "lock", "socket"},
	}
	fds := []int{p.owner.Descriptor(), lock, socket}
	if p.metrics != nil {
		m.Metrics = d.options.Metrics
		m.Descriptors, fds = append(m.Descriptors, "metrics"), append(fds, p.metrics.fd)
	}
	if c != nil {
		m.Carrying, m.Datapath = true, c.facts
		for _, fd := range d.store.peek() {
			m.Descriptors, fds = append(m.Descriptors, "datapath"), append(fds, fd)
		}
	}
	return m, fds
}

// patience is the timeout for a successor's messages, shortened when this daemon is
// told to stop.
type patience struct {
	mu    sync.Mutex
	timer *time.Timer
	stop  func() bool
}

func newPatience(ctx context.Context, most time.Duration) *patience {
	p := &patience{timer: time.NewTimer(most)}
	p.stop = context.AfterFunc(ctx, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.timer.Reset(min(most, stopPatience))
	})
	return p
}

func (p *patience) end() {
	p.stop()
	p.timer.Stop()
}

// message returns the next message, or why the handover failed.
func (p *patience) message(from <-chan handover.Message, want handover.Step, ended <-chan struct{}) (m handover.Message, why string) {
	select {
	case m, ok := <-from:
		switch {
		case !ok:
			return m, "it ended"
		case m.Step != want:
			return m, fmt.Sprintf("it said %q where %q was due", m.Step, want)
		}
		return m, ""
	case <-ended:
		return m, "the datapath broke meanwhile"
	case <-p.timer.C:
		return m, fmt.Sprintf("it was not ready in time (%s at most): see its log", handoverPatience)
	}
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
