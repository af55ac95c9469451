// Package httpd serves HTTP on a listening socket that a handover can pass on: a Service
// can be paused, and started again, while connections wait in the kernel's backlog. It
// limits requests, and protects an address with TLS and a token (Access). It knows no
// request: the handlers are the daemon's. It owns its connections; the descriptor stays
// the caller's.
package httpd

import (
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"culvert/internal/handover"
)

// New returns a service on a listening unix socket.
func New(fd int, h http.Handler, log *slog.Logger) *Service {
	return &Service{fd: fd, handler: h, log: log}
}

// Descriptor returns the listening socket.
func (s *Service) Descriptor() int { return s.fd }

// listenTimeout is how long to wait for the address: a daemon that was killed frees its
// descriptors one after the other.
const listenTimeout = time.Second

// ListenTCP returns the descriptor of a listening socket.
func ListenTCP(address string) (fd int, err error) {
	l, err := net.Listen("tcp", address)
	for end := time.Now().Add(listenTimeout); errors.Is(err, syscall.EADDRINUSE) && time.Now().Before(end); l, err = net.Listen("tcp", address) {
		time.Sleep(listenTimeout / 50)
	}
	if err == nil {
		fd, err = handover.Descriptor(l.(*net.TCPListener))
		_ = l.Close()
	}
	if err != nil {
		return -1, err
	}
	return fd, nil
}

// Service is a listening socket and its HTTP handler. It is not safe for concurrent use.
type Service struct {
	fd      int
	handler http.Handler
	log     *slog.Logger
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

// Start serves until Pause or Stop.
func (s *Service) Start() error {
	l, err := handover.Listener(s.fd)
	if err != nil {
		return err
	}
	if s.wrap != nil {
		l = s.wrap(l)
	}
	v := &serving{listener: l, accepts: make(chan struct{})}
	v.server = bounded(s.handler, s.write, s.log)
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

// lastAnswers is how long accepted connections may take after Pause.
const lastAnswers = time.Second

// Pause stops accepting connections and does not wait. Requests on accepted ones are
// answered, including the last one, which http.Server.Shutdown might close unanswered.
func (s *Service) Pause() {
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

// Stop closes all connections and waits for paused servers.
func (s *Service) Stop() {
	if v := s.now; v != nil {
		s.now = nil
		_ = v.server.Close()
		<-v.accepts
	}
	s.ending.Wait()
}
