package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/api"
	"culvert/internal/handover"
	"culvert/internal/host"
)

// possessions are what only one daemon of a node can have at a time, besides the
// datapath: the lock of the network namespace, the run directory with its socket, and
// the listen address of metrics and probes. All are descriptors, which a handover
// passes on (package handover): connections made in between wait in the kernel's
// backlog for the successor.
type possessions struct {
	owner   *host.Ownership
	socket  *api.Socket
	asked   *service // on the socket
	metrics *service // nil without --metrics
	// passed means that another daemon uses them, the successor or still the
	// predecessor: do not remove them when this process ends.
	passed bool
}

// possess acquires the possessions if no daemon runs.
func (d *node) possess(ctx context.Context) error {
	own, err := host.AwaitOwn(ctx, d.options.owner(), ownerPatience)
	if owned, ok := errors.AsType[*host.OwnedError](err); ok && owned.By.Same(d.options.owner()) {
		return fmt.Errorf("%w, or start this one with --replace, which takes over from it", err)
	}
	if err != nil {
		return err
	}
	p := &d.possessions
	p.owner = own
	if p.socket, err = api.Open(d.options.RunDir, d.options.SocketGroup); err != nil {
		return err
	}
	_, listener := p.socket.Descriptors()
	p.asked = &service{fd: listener, handler: d.socketHandler()}
	if d.options.Metrics != "" {
		fd, err := listenTCP(d.options.Metrics)
		if err != nil {
			return err
		}
		if p.metrics, err = d.web(fd); err != nil {
			return err
		}
	}
	return p.serve()
}

func listenTCP(address string) (fd int, err error) {
	l, err := net.Listen("tcp", address)
	if err == nil {
		fd, err = handover.Descriptor(l.(*net.TCPListener))
		_ = l.Close()
	}
	if err != nil {
		return -1, fmt.Errorf("serving metrics: %w (take another address with --metrics, or \"\" for none)", err)
	}
	return fd, nil
}

// serve starts serving the socket and, if configured, metrics.
func (p *possessions) serve() error {
	err := p.asked.start()
	if p.metrics != nil {
		err = errors.Join(err, p.metrics.start())
	}
	return err
}

// pause stops accepting connections; requests on accepted ones are answered.
func (p *possessions) pause() {
	p.owner.Pause()
	p.asked.pause()
	if p.metrics != nil {
		p.metrics.pause()
	}
}

// close stops serving and releases the possessions; if passed, it closes only this
// process's descriptors.
func (p *possessions) close() {
	if p.asked != nil {
		p.asked.stop()
	}
	if p.metrics != nil {
		p.metrics.stop()
		_ = unix.Close(p.metrics.fd)
	}
	switch {
	case p.socket == nil:
	case p.passed:
		_ = p.socket.Leave()
	default:
		_ = p.socket.Close()
	}
	if p.owner != nil {
		p.owner.Release()
	}
}

// service is a listening socket and its HTTP handler.
type service struct {
	fd      int
	handler http.Handler
	wrap    func(net.Listener) net.Listener // or nil
	write   time.Duration                   // timeout of an answer; 0 for none

	now    *serving       // nil while not serving
	ending sync.WaitGroup // paused servers that answer their last requests
}

// serving is a running server on a service's socket.
type serving struct {
	listener net.Listener
	server   *http.Server
	accepts  chan struct{}  // closed when it no longer accepts connections
	open     sync.WaitGroup // open connections
}

// start serves until pause or stop.
func (s *service) start() error {
	l, err := handover.Listener(s.fd)
	if err != nil {
		return err
	}
	if s.wrap != nil {
		l = s.wrap(l)
	}
	v := &serving{listener: l, accepts: make(chan struct{})}
	v.server = bounded(s.handler, s.write)
	v.server.ConnState = v.count
	s.now = v
	go func() {
		defer close(v.accepts)
		_ = v.server.Serve(l) // until l is closed
	}()
	return nil
}

func (v *serving) count(_ net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		v.open.Add(1)
	case http.StateClosed, http.StateHijacked:
		v.open.Done()
	}
}

// lastAnswers is how long accepted connections may take after pause.
const lastAnswers = time.Second

// pause stops accepting connections and does not wait. Requests on accepted ones are
// answered, including the last one, which http.Server.Shutdown might close unanswered.
func (s *service) pause() {
	v := s.now
	if v == nil {
		return
	}
	s.now = nil
	_ = v.listener.Close()
	<-v.accepts
	v.server.SetKeepAlivesEnabled(false)
	s.ending.Go(func() {
		timer := time.AfterFunc(lastAnswers, func() { _ = v.server.Close() })
		defer timer.Stop()
		v.open.Wait()
	})
}

// stop closes all connections and waits for paused servers.
func (s *service) stop() {
	if v := s.now; v != nil {
		s.now = nil
		_ = v.server.Close()
		<-v.accepts
	}
	s.ending.Wait()
}
