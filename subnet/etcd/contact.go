package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"culvert/internal/remedy"
)

// contact records how the last attempt to reach each server failed. gRPC retries
// silently and only reports that a request timed out.
type contact struct {
	options Options

	mu     sync.Mutex
	failed map[string]error // by address; absent if the server answered
}

func newContact(o Options) *contact { return &contact{options: o, failed: map[string]error{}} }

func (c *contact) record(address string, err error) {
	if errors.Is(err, context.Canceled) || errors.Is(err, net.ErrClosed) {
		return // caused by us
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		delete(c.failed, address)
	} else {
		c.failed[address] = err
	}
}

// errSilent: the server accepted the connection and sent nothing, until this client gave it
// up.
var errSilent = errors.New("it accepts the connection and sends nothing")

// errClosedSilently: the server closed the connection without sending anything, as
// one does that expects TLS.
var errClosedSilently = errors.New("it closes the connection without answering")

// trouble returns why no server can be reached; nil if one answered last, or none
// has been tried.
func (c *contact) trouble() error {
	c.mu.Lock()
	failed := make(map[string]error, len(c.failed))
	for a, err := range c.failed {
		failed[a] = err
	}
	c.mu.Unlock()
	if len(failed) < len(c.options.Endpoints) {
		return nil
	}
	var causes, remedies []string
	for _, e := range c.options.Endpoints {
		_, address, _ := strings.Cut(e, "://")
		what, do := remedy.Split(c.explain(address, failed[address]))
		if w := e + ": " + what; !slices.Contains(causes, w) {
			causes = append(causes, w)
		}
		if do != "" && !slices.Contains(remedies, do) {
			remedies = append(remedies, do)
		}
	}
	why := errors.New("etcd is unreachable at " + strings.Join(causes, "; "))
	if len(remedies) == 0 {
		return why
	}
	return &remedy.Error{Err: why, Do: strings.Join(remedies, "; ")}
}

// explain returns what is wrong and what to do.
func (c *contact) explain(address string, err error) error {
	if err == nil {
		return errors.New("no answer")
	}
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	var record tls.RecordHeaderError
	var lookup *net.DNSError
	switch {
	case errors.As(err, &unknown) && c.options.CAFile != "":
		return remedy.Errorf("set the right one with --etcd-cafile", "its certificate is not signed by the CA in %s", c.options.CAFile)
	case errors.As(err, &unknown):
		return remedy.Errorf("set the CA with --etcd-cafile", "its certificate is signed by an unknown CA")
	case errors.As(err, &name):
		return remedy.Errorf("use an address that is in the certificate", "%w", name)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return remedy.Errorf("renew the server's certificate, or set this host's clock", "%w", invalid)
	case errors.As(err, &record), errors.Is(err, errHandshake) && speaksHTTP2(c.options, address):
		return remedy.Errorf("write http:// in --etcd-endpoints and set no CA and no certificate", "it does not use TLS")
	case strings.Contains(err.Error(), "remote error: tls:"):
		return remedy.Errorf("set a certificate that it accepts with --etcd-certfile and --etcd-keyfile", "it rejects this client (%w)", err)
	case errors.Is(err, errAfterHandshake) && c.options.CertFile == "":
		return remedy.Errorf("set one that it accepts with --etcd-certfile and --etcd-keyfile", "%w, as a server does that requires a client certificate", errAfterHandshake)
	case errors.Is(err, errClosedSilently), errors.Is(err, errNotHTTP2):
		if speaksTLS(c.options, address) {
			return remedy.Errorf("write https:// in --etcd-endpoints and set its CA with --etcd-cafile", "it requires TLS")
		}
		return remedy.Errorf("is this etcd's client port?", "%w", err)
	case errors.Is(err, errSilent):
		return remedy.Errorf("is this etcd's client port, and does the server work?", "%w", err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return remedy.Errorf("is etcd running there, and is the port right?", "connection refused")
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return remedy.Errorf("is the address right? `ip route get` shows this host's route to it", "%w", errors.Unwrap(err))
	case errors.As(err, &lookup):
		return remedy.Errorf("is the name right, and the name server in /etc/resolv.conf? An address needs none", "%w", lookup)
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return remedy.Errorf("is the address right, and does a firewall block it?", "connecting timed out")
	}
	return err
}

// errNotHTTP2: the server's first bytes are not HTTP/2.
var errNotHTTP2 = errors.New("it does not speak gRPC")

// errHandshake: the server closed the connection during the TLS handshake.
var errHandshake = errors.New("it closes the connection during the TLS handshake")

// errAfterHandshake: the server closed the connection after the TLS handshake, as
// one does that requires a client certificate and got none (TLS 1.3).
var errAfterHandshake = errors.New("it closes the connection after the TLS handshake")

// probeLimit limits a probe for the protocol of a server.
const probeLimit = time.Second

// speaksHTTP2 reports whether the server answers the client connection preface
// without TLS (RFC 9113, 3.4).
func speaksHTTP2(o Options, address string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), probeLimit)
	defer cancel()
	conn, err := dialer(o.Dial)(ctx, address)
	if err != nil {
		return false
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	var frame [9]byte
	if _, err := conn.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")); err != nil {
		return false
	}
	_, err = io.ReadFull(conn, frame[:])
	return err == nil && frame[3] == 4
}

func speaksTLS(o Options, address string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), probeLimit)
	defer cancel()
	conn, err := dialer(o.Dial)(ctx, address)
	if err != nil {
		return false
	}
	defer conn.Close()
	// No verification: nothing is sent, only the protocol is probed.
	err = tls.Client(conn, &tls.Config{InsecureSkipVerify: true}).HandshakeContext(ctx)
	return err == nil || strings.Contains(err.Error(), "remote error: tls:")
}

// observedConn records the outcome of a connection by the first bytes received.
type observedConn struct {
	net.Conn
	address string
	contact *contact
	plain   bool // the bytes are HTTP/2, not TLS
	once    sync.Once
}

// Read implements net.Conn.
func (l *observedConn) Read(b []byte) (int, error) {
	n, err := l.Conn.Read(b)
	l.once.Do(func() {
		switch {
		case n == 0 && errors.Is(err, net.ErrClosed):
			l.contact.record(l.address, errSilent)
		// The server's first frame must be SETTINGS: a length below 2^16, type 4
		// (RFC 9113, 3.4 and 4.1).
		case n > 0 && l.plain && (b[0] != 0 || n > 3 && b[3] != 4):
			l.contact.record(l.address, errNotHTTP2)
		case n > 0:
			l.contact.record(l.address, nil)
		case err != nil && strings.Contains(err.Error(), "remote error: tls:"):
			l.contact.record(l.address, err) // TLS 1.3 rejects a client only now
		case err != nil && !errors.Is(err, net.ErrClosed) && l.plain:
			l.contact.record(l.address, errClosedSilently)
		case err != nil && !errors.Is(err, net.ErrClosed):
			// The alert with the reason may be lost to the RST that follows it.
			l.contact.record(l.address, fmt.Errorf("%w: %w", errAfterHandshake, err))
		}
	})
	return n, err
}

// Write implements net.Conn. If it fails, it reads what the server sent before it
// closed the connection, such as an alert that asks for a certificate.
func (l *observedConn) Write(b []byte) (int, error) {
	n, err := l.Conn.Write(b)
	if err != nil && !errors.Is(err, net.ErrClosed) {
		_ = l.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, _ = l.Read(make([]byte, 1))
	}
	return n, err
}
