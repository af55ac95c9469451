// Package etcdtest runs a real etcd server in a test, behind a TCP proxy that can
// cut or freeze the connections. The server's data is in the test's temporary
// directory.
package etcdtest

import (
	"context"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"culvert/subnet/etcd/member"
)

// Server is a single-member etcd server that ends with the test. Clients reach it
// through a proxy:
//
//	client ── URL ── proxy ── member
type Server struct {
	t      testing.TB
	opts   member.Options
	member *member.Member // nil while stopped
	proxy  *proxy
	scheme string
}

// Start runs a server on a free loopback port and returns its client URL.
func Start(t testing.TB) (endpoint string) {
	t.Helper()
	return StartServer(t, member.Options{}).URL()
}

// StartServer runs a server that the test can stop, restart, wipe and disconnect.
// The defaults of empty options suit tests: a free port, short elections. fsync is
// always off.
func StartServer(t testing.TB, o member.Options) *Server {
	t.Helper()
	if o.DataDir == "" {
		o.DataDir = t.TempDir()
	}
	o = forTests(o)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("etcdtest: %v", err)
	}
	s := &Server{t: t, opts: o, proxy: &proxy{listener: listener, cut: true, conns: map[net.Conn]bool{}}}
	s.proxy.running.Go(s.proxy.accept)
	t.Cleanup(s.proxy.close)
	t.Cleanup(s.Stop)
	s.Start()
	return s
}

// forTests fills in the defaults of StartServer.
func forTests(o member.Options) member.Options {
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
	return o
}

// startLimit is how long a server may take to become ready.
const startLimit = 20 * time.Second

// Shared is a server for those tests of a package that need none of their own. The
// tests must use different prefixes. It has no proxy.
type Shared struct {
	once   sync.Once
	dir    string
	member *member.Member
	err    error
}

// URL returns the URL for clients. The first call starts the server.
func (s *Shared) URL(t testing.TB) string {
	t.Helper()
	s.once.Do(func() {
		if s.dir, s.err = os.MkdirTemp("", "etcdtest-"); s.err != nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), startLimit)
		defer cancel()
		s.member, s.err = member.Start(ctx, forTests(member.Options{DataDir: s.dir}))
	})
	if s.err != nil {
		t.Fatalf("etcdtest: %v", s.err)
	}
	return s.member.URL()
}

// Stop stops the server, if it was started, and removes its data. Call it after the
// last test.
func (s *Shared) Stop() {
	if s.member != nil {
		s.member.Stop()
	}
	if s.dir != "" {
		_ = os.RemoveAll(s.dir)
	}
}

// URL returns the URL for clients. It does not change on a restart.
func (s *Server) URL() string { return s.scheme + "://" + s.proxy.listener.Addr().String() }

// Start starts a stopped server with its existing data.
func (s *Server) Start() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	m, err := member.Start(ctx, s.opts)
	if err != nil {
		s.t.Fatalf("etcdtest: %v", err)
	}
	s.member = m
	var host string
	s.scheme, host, _ = strings.Cut(m.URL(), "://")
	s.proxy.connect(host)
}

// Stop closes all connections and stops the server if it runs. The data stays.
func (s *Server) Stop() {
	s.Cut()
	if s.member != nil {
		s.member.Stop()
		s.member = nil
	}
}

// Wipe stops the server; the next Start begins with an empty store.
func (s *Server) Wipe() {
	s.t.Helper()
	s.Stop()
	s.opts.DataDir = s.t.TempDir()
}

// Cut closes all connections and accepts no new ones. The server keeps running.
func (s *Server) Cut() { s.proxy.disconnect() }

// Mend ends a Cut or a Freeze.
func (s *Server) Mend() {
	_, host, _ := strings.Cut(s.member.URL(), "://")
	s.proxy.connect(host)
}

// Freeze stops forwarding without closing connections, like a firewall that drops
// packets. Mend ends it, and what was held back is delivered.
func (s *Server) Freeze() {
	s.proxy.mu.Lock()
	defer s.proxy.mu.Unlock()
	if s.proxy.frozen == nil {
		s.proxy.frozen = make(chan struct{})
	}
}

// Direct returns the server's own URL, not subject to Cut and Freeze.
func (s *Server) Direct() string { return s.member.URL() }

// proxy is a TCP proxy in front of the member.
type proxy struct {
	listener net.Listener
	running  sync.WaitGroup

	mu     sync.Mutex
	to     string
	cut    bool
	frozen chan struct{} // closed by thaw; nil: not frozen
	conns  map[net.Conn]bool
}

func (l *proxy) accept() {
	for {
		near, err := l.listener.Accept()
		if err != nil {
			return
		}
		l.join(near)
	}
}

// join dials while holding the lock, so that no connection survives a Cut.
func (l *proxy) join(near net.Conn) {
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

func (l *proxy) pipe(from, to net.Conn) {
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

func (l *proxy) connect(to string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.to, l.cut = to, false
	l.thaw()
}

func (l *proxy) disconnect() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = true
	l.thaw()
	for c := range l.conns {
		_ = c.Close()
	}
}

// thaw requires the lock.
func (l *proxy) thaw() {
	if l.frozen != nil {
		close(l.frozen)
		l.frozen = nil
	}
}

func (l *proxy) close() {
	_ = l.listener.Close()
	l.disconnect()
	l.running.Wait()
}
