package etcd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"

	"google.golang.org/grpc/credentials"
)

// reloadingTLS reads the CA, the certificate and the key again for each connection,
// so that files renewed on disk take effect.
type reloadingTLS struct {
	options Options
	contact *contact
}

// ClientHandshake implements credentials.TransportCredentials.
func (c *reloadingTLS) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	to := authority
	if one, ok := conn.(*connection); ok {
		to = one.address
	}
	cfg, err := c.options.tls()
	if err != nil {
		_ = conn.Close()
		c.contact.record(to, err)
		return nil, nil, err
	}
	secured, info, err := credentials.NewTLS(cfg).ClientHandshake(ctx, authority, conn)
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		err = fmt.Errorf("%w: %w", errHandshake, err)
	}
	if err != nil {
		c.contact.record(to, err)
		return nil, nil, err
	}
	return &observedConn{Conn: secured, address: to, contact: c.contact}, info, nil
}

// ServerHandshake implements credentials.TransportCredentials. It is not used.
func (c *reloadingTLS) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return credentials.NewTLS(nil).ServerHandshake(conn)
}

// Info implements credentials.TransportCredentials.
func (c *reloadingTLS) Info() credentials.ProtocolInfo { return credentials.NewTLS(nil).Info() }

// Clone implements credentials.TransportCredentials.
func (c *reloadingTLS) Clone() credentials.TransportCredentials {
	return &reloadingTLS{c.options, c.contact}
}

// OverrideServerName implements credentials.TransportCredentials. It is deprecated
// and not used.
func (c *reloadingTLS) OverrideServerName(string) error { return nil }

// connections are the open connections to etcd. They can be closed when this
// host's address changes: a connection from the old address would only time out.
type connections struct {
	dial    dial
	contact *contact
	plain   bool // no TLS

	mu   sync.Mutex
	open map[*connection]bool
}

type dial = func(ctx context.Context, address string) (net.Conn, error)

// dialer returns d, or the system's dialer if d is nil.
func dialer(d dial) dial {
	if d != nil {
		return d
	}
	return func(ctx context.Context, address string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", address)
	}
}

func newConnections(o Options, c *contact, plain bool) *connections {
	return &connections{dial: dialer(o.Dial), contact: c, plain: plain, open: map[*connection]bool{}}
}

func (c *connections) connect(ctx context.Context, address string) (net.Conn, error) {
	conn, err := c.dial(ctx, address)
	if err != nil {
		c.contact.record(address, err)
		return nil, err
	}
	if c.plain {
		conn = &observedConn{Conn: conn, address: address, contact: c.contact, plain: true}
	}
	one := &connection{conn, address, c}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open[one] = true
	return one, nil
}

func (c *connections) breakAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for one := range c.open {
		_ = one.Conn.Close() // its user sees EOF and closes it too
	}
}

type connection struct {
	net.Conn
	address string
	of      *connections
}

// Close implements net.Conn.
func (c *connection) Close() error {
	c.of.mu.Lock()
	delete(c.of.open, c)
	c.of.mu.Unlock()
	return c.Conn.Close()
}

// Reconnect closes the connections to etcd, so that new ones are opened; call it
// after this node's address has changed. Pending requests are retried.
func (r *Registry) Reconnect() { r.conns.breakAll() }
