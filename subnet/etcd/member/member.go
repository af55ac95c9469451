// Package member runs an etcd server in this process: a single-member cluster for a
// small site, a demo or a test, or one member of a static cluster. The state is in
// the data directory, which etcd owns; the package knows nothing of leases.
package member

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3compactor"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Options configure the member.
type Options struct {
	// Name is the member's name; default "culvert". It must not change for a data
	// directory.
	Name string
	// DataDir is required; it is created with mode 0700.
	DataDir string
	// ListenClient is host:port for clients; default 127.0.0.1:2379. Port 0 takes
	// a free port (Member.URL).
	ListenClient string
	// AdvertiseClient is the URL at which other nodes reach it; default: the one
	// it listens on.
	AdvertiseClient string
	// ListenPeer is host:port for other members; default 127.0.0.1:0, which
	// suffices for a single-member cluster.
	ListenPeer string
	// InitialCluster lists the members of a new cluster, including this one, as
	// name=http://host:port,... of their peer listeners; default: only this one.
	InitialCluster string
	// CertFile and KeyFile enable TLS for clients. CAFile also requires client
	// certificates, verified with this CA.
	CertFile, KeyFile, CAFile string
	// UnsafeNoFsync disables fsync and uses cheap password hashes, for tests:
	// a power failure loses data.
	UnsafeNoFsync bool
	// TickMs is the heartbeat interval in milliseconds; default 100. The election
	// timeout is ten of them; the shortest lease is fifteen.
	TickMs uint
	// LogLevel is etcd's: debug, info, warn, error (default), panic, fatal. Log
	// receives the log; default: standard error.
	LogLevel string
	Log      io.Writer
}

// Member is a running server.
type Member struct {
	server *embed.Etcd
	tls    bool
	log    *gate
}

// gate filters etcd's log. While etcd stops, it reports each listener that it
// closes as an error; these lines are dropped.
type gate struct {
	to       io.Writer
	stopping atomic.Bool
}

// Write implements io.Writer.
func (g *gate) Write(line []byte) (int, error) {
	if g.stopping.Load() && bytes.Contains(line, []byte("setting up serving from embedded etcd failed")) {
		return len(line), nil
	}
	return g.to.Write(line)
}

// Start runs a member. It returns when the member is ready, or with the reason if
// it is not before ctx ends.
func Start(ctx context.Context, o Options) (*Member, error) {
	log := &gate{to: o.Log}
	if o.Log == nil {
		log.to = os.Stderr
	}
	cfg, err := o.config(log)
	if err != nil {
		return nil, err
	}
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("start etcd: %w", err)
	}
	m := &Member{server: server, tls: o.CertFile != "", log: log}
	select {
	case <-server.Server.ReadyNotify():
		return m, nil
	case <-server.Server.StopNotify():
		err = errors.New("etcd stopped")
	case err = <-server.Err():
	case <-ctx.Done():
		err = fmt.Errorf("etcd did not become ready: %w", context.Cause(ctx))
	}
	m.Stop()
	return nil, fmt.Errorf("start etcd: %w", err)
}

// URL returns the client URL, with the actual port.
func (m *Member) URL() string {
	scheme := "http://"
	if m.tls {
		scheme = "https://"
	}
	return scheme + m.server.Clients[0].Addr().String()
}

// Err receives the reason if the server stops by itself.
func (m *Member) Err() <-chan error { return m.server.Err() }

// Stop shuts the member down gracefully. The data stays.
func (m *Member) Stop() {
	m.log.stopping.Store(true)
	m.server.Close()
}

func (o Options) config(log io.Writer) (*embed.Config, error) {
	if o.DataDir == "" {
		return nil, errors.New("etcd: no data directory")
	}
	if (o.CertFile == "") != (o.KeyFile == "") {
		return nil, errors.New("etcd: the certificate and its key must be set together")
	}
	if o.CAFile != "" && o.CertFile == "" {
		return nil, errors.New("etcd: a client CA requires a server certificate")
	}
	if err := os.MkdirAll(o.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("etcd: data directory: %w", err)
	}
	cfg := embed.NewConfig()
	cfg.Name = orString(o.Name, "culvert")
	cfg.Dir = o.DataDir
	cfg.UnsafeNoFsync = o.UnsafeNoFsync
	if o.UnsafeNoFsync {
		cfg.BcryptCost = 4 // the minimum
	}
	if o.TickMs != 0 {
		cfg.TickMs, cfg.ElectionMs = o.TickMs, 10*o.TickMs
	}
	cfg.AutoCompactionMode = v3compactor.ModePeriodic
	cfg.AutoCompactionRetention = "1h"
	cfg.QuotaBackendBytes = 2 << 30

	client := url.URL{Scheme: "http", Host: orString(o.ListenClient, "127.0.0.1:2379")}
	if o.CertFile != "" {
		// etcd would load them only after it is ready.
		if _, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile); err != nil {
			return nil, fmt.Errorf("etcd: certificate: %w", err)
		}
		if o.CAFile != "" {
			if _, err := os.ReadFile(o.CAFile); err != nil {
				return nil, fmt.Errorf("etcd: client CA: %w", err)
			}
		}
		client.Scheme = "https"
		cfg.ClientTLSInfo = transport.TLSInfo{
			CertFile: o.CertFile, KeyFile: o.KeyFile, TrustedCAFile: o.CAFile, ClientCertAuth: o.CAFile != "",
		}
	}
	cfg.ListenClientUrls = []url.URL{client}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	if o.AdvertiseClient != "" {
		u, err := url.Parse(o.AdvertiseClient)
		if err != nil || u.Host == "" {
			return nil, fmt.Errorf("etcd: %q is not a URL such as http://10.0.0.1:2379", o.AdvertiseClient)
		}
		cfg.AdvertiseClientUrls = []url.URL{*u}
	}
	peer := url.URL{Scheme: "http", Host: orString(o.ListenPeer, "127.0.0.1:0")}
	cfg.ListenPeerUrls = []url.URL{peer}
	cfg.AdvertisePeerUrls = cfg.ListenPeerUrls
	cfg.InitialCluster = orString(o.InitialCluster, cfg.Name+"="+peer.String())

	level, err := zapcore.ParseLevel(orString(o.LogLevel, "error"))
	if err != nil {
		return nil, fmt.Errorf("etcd: log level %q: it must be debug, info, warn, error, panic or fatal", o.LogLevel)
	}
	sink := zapcore.Lock(zapcore.AddSync(log))
	encoder := zap.NewProductionEncoderConfig()
	encoder.EncodeTime = zapcore.TimeEncoderOfLayout(time.RFC3339Nano)
	cfg.LogLevel = level.String()
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(encoder), sink, level)))
	return cfg, nil
}

func orString(s, usual string) string {
	if s == "" {
		return usual
	}
	return s
}
