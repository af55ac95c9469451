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

// This file is the running daemon's side of a handover; takeover.go is the
// successor's. The messages are drawn in package handover. What each owns:
//
//	              store, subnet.env   host's state     packets    sockets of status and metrics
//	before        running daemon      running          running    running
//	from offer    successor           running          running    running
//	from take     successor           nobody           nobody     nobody: the kernel keeps what comes
//	from yours    successor           successor        successor  successor
//	from running  the running daemon has ended
//
// "From take" lasts for one message there and one back, and the time that the
// packets take that were read already.

// HandedOver is what a daemon does that has handed over.
type HandedOver string

// The ways.
const (
	// Exit ends it.
	Exit HandedOver = "exit"
	// Wait keeps it until it is told to stop, as a supervisor that would start an
	// ended one again does. Should the successor end first, it takes its place.
	Wait HandedOver = "wait"
)

const (
	// handoverPatience is how long a successor may take to prepare, and to say that
	// it runs.
	handoverPatience = time.Minute
	// stopPatience is the same once this daemon is told to stop.
	stopPatience = 10 * time.Second
	// requestPatience is how long a successor waits for a daemon that is between two
	// states.
	requestPatience = 5 * time.Second
)

var (
	// errHandedOver ends a daemon whose successor runs.
	errHandedOver = errors.New("handed over")
	// errKept says that a successor did not get to run, and this daemon goes on.
	errKept = errors.New("the successor did not take over")
)

// asked says that a successor asks.
type asked struct{ request }

func (asked) Error() string { return "a successor asks for this node" }

// request is a successor's.
type request struct {
	conn  *handover.Conn
	hello handover.Message
}

// socketHandler serves everything that is asked on the daemon's unix socket.
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

// untilAsked returns a context that ends, too, when a successor asks, and what
// returns the request then, nil if there is none. It must be called.
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

// carrying is a datapath that a successor may get.
type carrying struct {
	facts map[string]string
	stop  func() error    // stops carrying, and returns when all that was read is written
	drop  func()          // closes the datapath, if the successor wants another
	ended <-chan struct{} // by itself
}

// give hands this node over, with the datapath, if one carries (else nil). It
// returns errHandedOver, or errKept when this daemon is to go on. The parts that
// write to the store have ended.
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

// offer is what a successor gets: the names are in the order of the descriptors.
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

// patience waits for a successor's messages: less long once this daemon is told
// to stop.
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

// message returns the next message, or why there is none that goes on.
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

// closeAll closes descriptors.
func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
