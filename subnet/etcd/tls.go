package etcd

import (
	"context"
	"net"

	"google.golang.org/grpc/credentials"
)

// renewedTLS reads the CA, the certificate and the key anew for each
// connection, so that what was renewed on disk comes into use.
type renewedTLS struct{ options Options }

// ClientHandshake implements credentials.TransportCredentials.
func (c *renewedTLS) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cfg, err := c.options.tls()
	if err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	return credentials.NewTLS(cfg).ClientHandshake(ctx, authority, conn)
}

// ServerHandshake implements credentials.TransportCredentials; there is no
// server here.
func (c *renewedTLS) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return credentials.NewTLS(nil).ServerHandshake(conn)
}

// Info implements credentials.TransportCredentials.
func (c *renewedTLS) Info() credentials.ProtocolInfo { return credentials.NewTLS(nil).Info() }

// Clone implements credentials.TransportCredentials.
func (c *renewedTLS) Clone() credentials.TransportCredentials { return &renewedTLS{options: c.options} }

// OverrideServerName implements credentials.TransportCredentials, which calls it
// deprecated; nobody here does.
func (c *renewedTLS) OverrideServerName(string) error { return nil }
