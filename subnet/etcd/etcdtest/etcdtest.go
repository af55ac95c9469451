// Package etcdtest runs a real etcd server inside a test.
package etcdtest

import (
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"culvert/subnet/etcd/member"
)

// Server is an etcd server of one member that ends with the test. Clients
// reach it through a line that the test can cut:
//
//	client ── URL ── line ── member
type Server struct {
	t      testing.TB
	opts   member.Options
	member *member.Member // nil while stopped
	line   *line
	scheme string
}

// Start runs a server on a free loopback port with its data in t.TempDir, and
// returns its client URL.
func Start(t testing.TB) (endpoint string) {
	t.Helper()
	return StartServer(t, member.Options{}).URL()
}

// StartServer runs a server that the test can stop, start, wipe and cut off.
// What the options leave empty is chosen for tests: a free port, no fsync,
// short elections.
func StartServer(t testing.TB, o member.Options) *Server {
	t.Helper()
	if o.DataDir == "" {
		o.DataDir = t.TempDir()
	}
	if o.ListenClient == "" {
		o.ListenClient = "127.0.0.1:0"
	}
	if o.TickMs == 0 {
		o.TickMs = 20
	}
	if o.Log == nil {
		o.Log = io.Discard
	}
	o.UnsafeNoFsync = true
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("etcdtest: %v", err)
	}
	s := &Server{t: t, opts: o, line: &line{listener: listener, cut: true, conns: map[net.Conn]bool{}}}
	s.line.running.Go(s.line.accept)
	t.Cleanup(s.line.close)
	t.Cleanup(s.Stop)
	s.Start()
	return s
}

// URL is where clients reach the server. It is the same after a restart.
func (s *Server) URL() string { return s.scheme + "://" + s.line.listener.Addr().String() }

// Start starts a stopped server with the data that it had.
func (s *Server) Start() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	m, err := member.Start(ctx, s.opts)
	if err != nil {
		s.t.Fatalf("etcdtest: %v", err)
	}
	s.member = m
	var host string
	s.scheme, host, _ = strings.Cut(m.URL(), "://")
	s.line.connect(host)
}

// Stop breaks all connections and stops the server, if it runs; the data stays.
func (s *Server) Stop() {
	s.Cut()
	if s.member != nil {
		s.member.Stop()
		s.member = nil
	}
}

// Wipe stops the server, and lets the next Start begin with an empty store.
func (s *Server) Wipe() {
	s.t.Helper()
	s.Stop()
	s.opts.DataDir = s.t.TempDir()
}

// Cut breaks all connections and lets no new one through. The server runs on.
func (s *Server) Cut() { s.line.disconnect() }

// Mend ends a Cut or a Freeze.
func (s *Server) Mend() {
	_, host, _ := strings.Cut(s.member.URL(), "://")
	s.line.connect(host)
}

// Freeze lets nothing more through, and closes nothing: a black hole, as a
// firewall makes one. Mend ends it, and what was held back arrives.
func (s *Server) Freeze() {
	s.line.mu.Lock()
	defer s.line.mu.Unlock()
	if s.line.frozen == nil {
		s.line.frozen = make(chan struct{})
	}
}

// Direct is the server's own URL, which Cut does not touch.
func (s *Server) Direct() string { return s.member.URL() }

// line is a TCP proxy before the member.
type line struct {
	listener net.Listener
	running  sync.WaitGroup

	mu     sync.Mutex
	to     string
	cut    bool
	frozen chan struct{} // closed when it ends; nil: nothing is held back
	conns  map[net.Conn]bool
}

func (l *line) accept() {
	for {
		near, err := l.listener.Accept()
		if err != nil {
			return
		}
		l.join(near)
	}
}

// join dials under the lock, so that no connection outlives a Cut.
func (l *line) join(near net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut {
		_ = near.Close()
		return
	}
	far, err := net.Dial("tcp", l.to)
	if err != nil {
		_ = near.Close()
		return
	}
	l.conns[near], l.conns[far] = true, true
	l.running.Go(func() { l.pipe(near, far) })
	l.running.Go(func() { l.pipe(far, near) })
}

func (l *line) pipe(from, to net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		l.mu.Lock()
		frozen := l.frozen
		l.mu.Unlock()
		if frozen != nil {
			<-frozen
		}
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	_, _ = from.Close(), to.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, from)
	delete(l.conns, to)
}

func (l *line) connect(to string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.to, l.cut = to, false
	l.thaw()
}

func (l *line) disconnect() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = true
	l.thaw()
	for c := range l.conns {
		_ = c.Close()
	}
}

// thaw is called under the lock.
func (l *line) thaw() {
	if l.frozen != nil {
		close(l.frozen)
		l.frozen = nil
	}
}

func (l *line) close() {
	_ = l.listener.Close()
	l.disconnect()
	l.running.Wait()
}
