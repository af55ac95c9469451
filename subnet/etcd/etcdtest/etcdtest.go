// Package etcdtest runs a real etcd server inside a test.
package etcdtest

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"culvert/subnet/etcd/member"
)

// Server is an etcd server of one member that ends with the test.
type Server struct {
	t      testing.TB
	opts   member.Options
	member *member.Member // nil while stopped
	url    string
}

// Start runs a server on a free loopback port with its data in t.TempDir, and
// returns its client URL.
func Start(t testing.TB) (endpoint string) {
	t.Helper()
	return StartServer(t, member.Options{}).URL()
}

// StartServer runs a server that the test can stop and start again. What the
// options leave empty is chosen for tests: a free port, no fsync, short
// elections.
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
	o.UnsafeNoFsync = true
	if o.Log == nil {
		o.Log = io.Discard
	}
	s := &Server{t: t, opts: o}
	s.Start()
	t.Cleanup(s.Stop)
	return s
}

// URL is the client URL; it stays the same over Stop and Start.
func (s *Server) URL() string { return s.url }

// Start starts a stopped server on the same port and data.
func (s *Server) Start() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	m, err := member.Start(ctx, s.opts)
	if err != nil {
		s.t.Fatalf("etcdtest: %v", err)
	}
	s.member, s.url = m, m.URL()
	_, s.opts.ListenClient, _ = strings.Cut(s.url, "://")
}

// Stop stops the server and keeps its data. A stopped server stays stopped.
func (s *Server) Stop() {
	if s.member != nil {
		s.member.Stop()
		s.member = nil
	}
}

// Wipe stops the server if it runs and lets the next Start begin with an empty
// store.
func (s *Server) Wipe() {
	s.t.Helper()
	s.Stop()
	s.opts.DataDir = s.t.TempDir()
}
