package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"culvert/internal/remedy"
)

// DefaultPrefix is flannel's default.
const DefaultPrefix = "/coreos.com/network"

// Options configure access to etcd. No text form of them shows the password.
type Options struct {
	// Endpoints are client URLs, such as https://10.0.0.1:2379. The default
	// scheme is https if a CA or a certificate is given, else http.
	Endpoints []string
	// Prefix is the network's key prefix; default DefaultPrefix.
	Prefix string
	// CAFile is the PEM file of the CAs that servers are verified with; default:
	// the system's roots. CertFile and KeyFile are the client certificate; set
	// both or neither. All are read again for each connection, so that renewed
	// files take effect.
	CAFile, CertFile, KeyFile string
	// User and Password are for etcd's authentication. PasswordFile replaces
	// Password; it is read again for each token.
	User         string
	Password     string `json:"-"`
	PasswordFile string
	// StateFile stores the ID of the held lease, so that a restarted daemon
	// recognizes its own lease even if its address has changed; none if empty. It
	// must not outlive the boot nor be part of a machine image.
	StateFile string
	// SnapshotFile stores all leases as last read, for a start while etcd is
	// unreachable (Kept); none if empty. Each node needs its own file.
	SnapshotFile string
	// DialTimeout limits one connection attempt, RequestTimeout one request; both
	// default to 5 s.
	DialTimeout, RequestTimeout time.Duration
	// FailFast makes a request fail at once if no server can be reached, instead
	// of waiting until RequestTimeout.
	FailFast bool
	// Settle is how long the peers of the last snapshot are kept when etcd
	// returns wiped or at an older revision, while their nodes recreate their
	// leases; default 2 minutes.
	Settle time.Duration
	// Quarantine is how long a freed subnet is not leased to another node while
	// others are free; 0 disables it. It is rounded up to seconds.
	Quarantine time.Duration
	// Dial opens connections; default: the system's dialer. Simulations use it to
	// reach servers in other network namespaces.
	Dial func(ctx context.Context, address string) (net.Conn, error) `json:"-"`
	// Logger is required.
	Logger *slog.Logger
	// Observe is told how long each request but a watch took; may be nil.
	Observe func(operation string, took time.Duration, failed bool) `json:"-"`
}

// String omits the password, as do the forms that fmt, slog and encoding/json
// use.
func (o Options) String() string {
	password := ""
	if o.Password != "" {
		password = " password=(hidden)"
	}
	return fmt.Sprintf("endpoints=%s prefix=%s ca=%q cert=%q key=%q user=%q%s",
		strings.Join(o.Endpoints, ","), o.Prefix, o.CAFile, o.CertFile, o.KeyFile, o.User, password)
}

// GoString implements fmt.GoStringer.
func (o Options) GoString() string { return o.String() }

// LogValue implements slog.LogValuer.
func (o Options) LogValue() slog.Value { return slog.StringValue(o.String()) }

// complete validates the options and fills in the defaults.
func (o Options) complete() (Options, error) {
	if o.Logger == nil {
		return o, errors.New("etcd: no logger")
	}
	// Accept blanks around commas and a trailing comma.
	var given []string
	for _, e := range o.Endpoints {
		if e = strings.TrimSpace(e); e != "" {
			given = append(given, e)
		}
	}
	if o.Endpoints = given; len(given) == 0 {
		return o, remedy.Errorf("set one with --etcd-endpoints", "etcd: no endpoint")
	}
	if (o.CertFile == "") != (o.KeyFile == "") {
		return o, remedy.Errorf("set both --etcd-certfile and --etcd-keyfile, or neither", "etcd: the client certificate and its key must be set together")
	}
	if o.Password != "" && o.PasswordFile != "" {
		return o, remedy.Errorf("set only one of them", "etcd: both a password and a password file are set")
	}
	if (o.User == "") != (o.Password == "" && o.PasswordFile == "") {
		return o, remedy.Errorf("set both --etcd-username and --etcd-password-file, or neither", "etcd: the user and the password must be set together")
	}
	if _, err := o.password(); err != nil {
		return o, err
	}
	if o.Prefix == "" {
		o.Prefix = DefaultPrefix
	}
	o.Prefix = "/" + strings.Trim(o.Prefix, "/")
	for _, d := range []struct {
		value *time.Duration
		usual time.Duration
	}{{&o.DialTimeout, 5 * time.Second}, {&o.RequestTimeout, 5 * time.Second}, {&o.Settle, 2 * time.Minute}} {
		if *d.value == 0 {
			*d.value = d.usual
		}
	}
	secured := o.CAFile != "" || o.CertFile != ""
	endpoints := make([]string, len(o.Endpoints))
	for i, e := range o.Endpoints {
		full, err := completeEndpoint(e, secured)
		if err != nil {
			return o, err
		}
		endpoints[i] = full
		if scheme(full) != scheme(endpoints[0]) {
			return o, remedy.Errorf("use https for all of them or for none", "etcd: the endpoints %s and %s differ in their scheme", endpoints[0], full)
		}
	}
	o.Endpoints = endpoints
	return o, nil
}

func completeEndpoint(e string, secured bool) (string, error) {
	full := e
	if !strings.Contains(e, "://") {
		full = "http://" + e
		if secured {
			full = "https://" + e
		}
	}
	u, err := url.Parse(full)
	if err != nil || u.Hostname() == "" || (u.Path != "" && u.Path != "/") {
		// Do not repeat the text: it may contain user and password.
		return "", remedy.Errorf("write --etcd-endpoints such as http://10.0.0.1:2379", "etcd: an endpoint is not a URL of scheme, host and port")
	}
	switch {
	case u.User != nil:
		return "", remedy.Errorf("set it with --etcd-username and --etcd-password-file", "etcd: an endpoint contains a user")
	case u.Scheme != "http" && u.Scheme != "https":
		return "", remedy.Errorf("write http:// or https://", "etcd: endpoint %s: the scheme is neither http nor https", e)
	case u.Scheme == "http" && secured:
		return "", remedy.Errorf("write https://, or leave them out", "etcd: endpoint %s is http, but a CA or a certificate is set", e)
	case u.Port() == "":
		u.Host += ":2379"
	}
	return u.Scheme + "://" + u.Host, nil
}

func scheme(endpoint string) string { return endpoint[:strings.Index(endpoint, "://")] }

// tls returns nil if the endpoints are http.
func (o Options) tls() (*tls.Config, error) {
	if scheme(o.Endpoints[0]) == "http" {
		return nil, nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, remedy.Errorf("give the CA's certificate with --etcd-cafile", "etcd: read the CA: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, remedy.Errorf("give the CA's certificate with --etcd-cafile", "etcd: %s contains no PEM certificate", o.CAFile)
		}
	}
	if o.CertFile != "" {
		load := func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
			if err != nil {
				return nil, remedy.Errorf("give a certificate and its key with --etcd-certfile and --etcd-keyfile", "etcd: read the client certificate: %w", err)
			}
			return &pair, nil
		}
		if _, err := load(); err != nil {
			return nil, err
		}
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	return cfg, nil
}
