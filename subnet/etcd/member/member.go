// Package member runs one etcd server in this process: a cluster of its own,
// for a small site, a demo or a test, or a member of one whose members are told
// of each other at their start.
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

// Options describe the member.
type Options struct {
	// Name is the member's, "culvert" if empty. It must stay the same for one
	// data directory.
	Name string
	// DataDir is required; it is made with mode 0700 if missing.
	DataDir string
	// ListenClient is host:port; port 0 takes a free one (Member.URL tells it).
	// 127.0.0.1:2379 if empty.
	ListenClient string
	// AdvertiseClient is the URL that other nodes reach it by; the one that it
	// listens on if empty.
	AdvertiseClient string
	// ListenPeer is host:port for other members. A member of a cluster of its
	// own needs none: 127.0.0.1:0 if empty.
	ListenPeer string
	// InitialCluster are the members of a new cluster, this one too, as
	// name=http://host:port,... of their peer listeners; this one alone if empty.
	InitialCluster string
	// CertFile and KeyFile make the client listener TLS. CAFile, besides, makes
	// it ask for client certificates and verify them.
	CertFile, KeyFile, CAFile string
	// UnsafeNoFsync gives up durability over a power cut, and strong hashes of
	// passwords, for speed: for tests.
	UnsafeNoFsync bool
	// TickMs is the heartbeat interval in milliseconds, 100 if zero; elections
	// take ten of them, and no lease is shorter than fifteen.
	TickMs uint
	// LogLevel is etcd's: debug, info, warn, error (if empty), panic, fatal. Log
	// receives its lines; standard error if nil.
	LogLevel string
	Log      io.Writer
}

// Member is a running server.
type Member struct {
	server *embed.Etcd
	tls    bool
	log    *gate
}

// gate is where the log goes. etcd reports each listener that it closes itself
// as an error; those lines are held back while it stops.
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

// Start runs a member and returns when it serves, or with the reason why it
// does not before ctx ends. The listeners are opened before anything else and
// stay open, so that no port is lost between a look and its use.
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
		err = errors.New("it stopped")
	case err = <-server.Err():
	case <-ctx.Done():
		err = fmt.Errorf("it did not become ready: %w", context.Cause(ctx))
	}
	m.Stop()
	return nil, fmt.Errorf("start etcd: %w", err)
}

// URL is where the member listens for clients, with the port that it has.
func (m *Member) URL() string {
	scheme := "http://"
	if m.tls {
		scheme = "https://"
	}
	return scheme + m.server.Clients[0].Addr().String()
}

// Err gives the reason if the server ends by itself.
func (m *Member) Err() <-chan error { return m.server.Err() }

// Stop ends the member in order: no new requests, then those under way, then
// the store. The data stays.
func (m *Member) Stop() {
	m.log.stopping.Store(true)
	m.server.Close()
}

func (o Options) config(log io.Writer) (*embed.Config, error) {
	if o.DataDir == "" {
		return nil, errors.New("etcd: no data directory")
	}
	if (o.CertFile == "") != (o.KeyFile == "") {
		return nil, errors.New("etcd: a certificate needs its key, and a key its certificate")
	}
	if o.CAFile != "" && o.CertFile == "" {
		return nil, errors.New("etcd: a CA for clients needs the server's own certificate")
	}
	if err := os.MkdirAll(o.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("etcd: data directory: %w", err)
	}
	cfg := embed.NewConfig()
	cfg.Name = orString(o.Name, "culvert")
	cfg.Dir = o.DataDir
	cfg.UnsafeNoFsync = o.UnsafeNoFsync
	if o.UnsafeNoFsync {
		cfg.BcryptCost = 4 // the least: it is a test's
	}
	if o.TickMs != 0 {
		cfg.TickMs, cfg.ElectionMs = o.TickMs, 10*o.TickMs
	}
	cfg.AutoCompactionMode = v3compactor.ModePeriodic
	cfg.AutoCompactionRetention = "1h"
	cfg.QuotaBackendBytes = 2 << 30

	client := url.URL{Scheme: "http", Host: orString(o.ListenClient, "127.0.0.1:2379")}
	if o.CertFile != "" {
		// etcd would open them only after it is ready.
		if _, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile); err != nil {
			return nil, fmt.Errorf("etcd: certificate: %w", err)
		}
		if o.CAFile != "" {
			if _, err := os.ReadFile(o.CAFile); err != nil {
				return nil, fmt.Errorf("etcd: CA for clients: %w", err)
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
		return nil, fmt.Errorf("etcd: log level %q: it is debug, info, warn, error, panic or fatal", o.LogLevel)
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
