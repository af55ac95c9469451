package httpd

import (
	"crypto/subtle"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"
)

// Access protects a TCP address. The files are read again for each connection
// or request, so they may be replaced.
type Access struct {
	CertFile, KeyFile string // PEM; serve TLS with them
	TokenFile         string // bearer token, required for /metrics and the page
}

// Limits per request and connection. Requests have no large bodies; only the metrics
// and status of thousands of peers are long answers.
const (
	readTimeout    = 5 * time.Second
	writeTimeout   = 30 * time.Second // over TCP; bounds slow clients
	idleTimeout    = time.Minute
	maxHeaderBytes = 16 << 10
	MaxBodyBytes   = 64 << 10
	maxConnections = 512 // over TCP
)

// bounded returns a server with these limits. write is the timeout of an answer, 0 for
// none.
func bounded(h http.Handler, write time.Duration, log *slog.Logger) *http.Server {
	return &http.Server{
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelWarn), // such as a failed accept
		Handler:     http.MaxBytesHandler(h, MaxBodyBytes),
		ReadTimeout: readTimeout, WriteTimeout: write, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes,
	}
}

// Service returns the protected service on a listening TCP socket. The handler itself
// says what needs the token (Guard).
func (a Access) Service(fd int, h http.Handler, log *slog.Logger) (*Service, error) {
	s := &Service{fd: fd, handler: h, log: log, write: writeTimeout}
	s.wrap = func(l net.Listener) net.Listener { return netutil.LimitListener(l, maxConnections) }
	if _, err := a.token(); err != nil {
		return nil, err
	}
	if a.CertFile == "" {
		if at, loopback := listensAt(fd); !loopback {
			log.Warn("metrics are served unencrypted to anyone who can reach the address: --metrics-certfile, --metrics-keyfile and --metrics-token-file protect them", "listen", at)
		}
		return s, nil
	}
	if _, err := tls.LoadX509KeyPair(a.CertFile, a.KeyFile); err != nil {
		return nil, fmt.Errorf("serving metrics with TLS: %w", err)
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			c, err := tls.LoadX509KeyPair(a.CertFile, a.KeyFile)
			return &c, err
		},
	}
	s.wrap = func(l net.Listener) net.Listener {
		return tls.NewListener(netutil.LimitListener(l, maxConnections), config)
	}
	return s, nil
}

// listensAt returns a socket's local address.
func listensAt(fd int) (at netip.AddrPort, loopback bool) {
	name, err := unix.Getsockname(fd)
	if err != nil {
		return at, false
	}
	switch n := name.(type) {
	case *unix.SockaddrInet4:
		at = netip.AddrPortFrom(netip.AddrFrom4(n.Addr), uint16(n.Port))
	case *unix.SockaddrInet6:
		at = netip.AddrPortFrom(netip.AddrFrom16(n.Addr).Unmap(), uint16(n.Port))
	}
	return at, at.Addr().IsLoopback()
}

// token returns the required bearer token, "" if none is.
func (a Access) token() (string, error) {
	if a.TokenFile == "" {
		return "", nil
	}
	b, err := os.ReadFile(a.TokenFile)
	if err != nil {
		return "", fmt.Errorf("--metrics-token-file: %w", err)
	}
	text := strings.TrimSpace(string(b))
	if text == "" {
		return "", fmt.Errorf("--metrics-token-file: %s is empty", a.TokenFile)
	}
	return text, nil
}

// Guard rejects requests without the token.
func (a Access) Guard(h http.Handler) http.Handler {
	if a.TokenFile == "" {
		return h
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		want, err := a.token()
		shown, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if err != nil || !ok || subtle.ConstantTimeCompare([]byte(shown), []byte(want)) != 1 {
			w.Header().Set("WWW-Authenticate", "Bearer")
			http.Error(w, "send the token of --metrics-token-file", http.StatusUnauthorized)
			return
		}
		h.ServeHTTP(w, r)
	})
}
