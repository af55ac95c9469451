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
)

// DefaultPrefix is flannel's.
const DefaultPrefix = "/coreos.com/network"

// Options say how to reach etcd. The password is shown in no form of them.
type Options struct {
	// Endpoints are client URLs, such as https://10.0.0.1:2379. Without a scheme
	// they are https where a CA or a certificate is given, else http.
	Endpoints []string
	// Prefix is the directory of the network; DefaultPrefix if empty.
	Prefix string
	// CAFile is the PEM file that servers are verified with; the system's roots
	// if empty. CertFile and KeyFile are the client's own, both or neither. All
	// are read again for each connection, so that what is renewed comes into use.
	CAFile, CertFile, KeyFile string
	// User and Password are for etcd's own authentication. PasswordFile holds
	// the password instead; it is read again whenever etcd is asked for a token.
	User         string
	Password     string `json:"-"`
	PasswordFile string
	// StateFile is where the handle of the held lease is kept (replaced in one
	// step), so that a restarted daemon knows its own lease even if its
	// address changed meanwhile. Nothing is kept if it is empty. It should not
	// outlive the machine's boot nor be copied with an image.
	StateFile string
	// SnapshotFile is where the leases are kept as last read, for a start while
	// etcd is away (Kept); nothing is kept if it is empty. Of one node alone.
	SnapshotFile string
	// DialTimeout bounds one attempt to connect; 5 s if zero. RequestTimeout
	// bounds one request; 5 s if zero.
	DialTimeout, RequestTimeout time.Duration
	// FailFast has a request fail as soon as no server can be reached, for who
	// would rather be told than wait.
	FailFast bool
	// Settle is how long the peers of the last good snapshot are kept when the
	// store comes back wiped or at an older revision, while their nodes write
	// their leases anew; 2 minutes if zero.
	Settle time.Duration
	// Quarantine is how long a freed subnet rests before another node is given
	// it, while others are free; no rest if zero. It is rounded up to seconds.
	Quarantine time.Duration
	// Dial opens connections; the system's own way if nil. Simulations reach
	// servers in other network namespaces by it.
	Dial func(ctx context.Context, address string) (net.Conn, error) `json:"-"`
	// Logger is required.
	Logger *slog.Logger
}

// String hides the password, and so do the other forms that fmt, slog and
// encoding/json ask for.
func (o Options) String() string {
	password := ""
	if o.Password != "" {
		password = " password=(hidden)"
	}
	return fmt.Sprintf("endpoints=%s prefix=%s ca=%q cert=%q key=%q user=%q%s",
		strings.Join(o.Endpoints, ","), o.Prefix, o.CAFile, o.CertFile, o.KeyFile, o.User, password)
}

// GoString is String.
func (o Options) GoString() string { return o.String() }

// LogValue is String.
func (o Options) LogValue() slog.Value { return slog.StringValue(o.String()) }

// complete checks the options and fills in the defaults.
func (o Options) complete() (Options, error) {
	if o.Logger == nil {
		return o, errors.New("etcd: no logger")
	}
	// Lists that people write have blanks after their commas, and a last comma.
	var given []string
	for _, e := range o.Endpoints {
		if e = strings.TrimSpace(e); e != "" {
			given = append(given, e)
		}
	}
	if o.Endpoints = given; len(given) == 0 {
		return o, errors.New("etcd: no endpoint; give one with --etcd-endpoints")
	}
	if (o.CertFile == "") != (o.KeyFile == "") {
		return o, errors.New("etcd: a client certificate needs its key, and a key its certificate")
	}
	if o.Password != "" && o.PasswordFile != "" {
		return o, errors.New("etcd: a password and a file that holds it: give one of them")
	}
	if (o.User == "") != (o.Password == "" && o.PasswordFile == "") {
		return o, errors.New("etcd: a user needs a password, and a password its user")
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
			return o, fmt.Errorf("etcd: endpoints %s and %s: all are https or none is", endpoints[0], full)
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
		// The text is not repeated: it may hold user and password.
		return "", errors.New("etcd: an endpoint is not a URL such as http://10.0.0.1:2379")
	}
	switch {
	case u.User != nil:
		return "", errors.New("etcd: an endpoint holds a user; give it with --etcd-username and the password by file")
	case u.Scheme != "http" && u.Scheme != "https":
		return "", fmt.Errorf("etcd: endpoint %s: the scheme is http or https", e)
	case u.Scheme == "http" && secured:
		return "", fmt.Errorf("etcd: endpoint %s is http, and a CA or a certificate is given; write https", e)
	case u.Port() == "":
		u.Host += ":2379"
	}
	return u.Scheme + "://" + u.Host, nil
}

func scheme(endpoint string) string { return endpoint[:strings.Index(endpoint, "://")] }

// tls returns nil where the endpoints are http.
func (o Options) tls() (*tls.Config, error) {
	if scheme(o.Endpoints[0]) == "http" {
		return nil, nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("etcd: read the CA: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("etcd: %s holds no certificate in PEM", o.CAFile)
		}
	}
	if o.CertFile != "" {
		load := func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
			if err != nil {
				return nil, fmt.Errorf("etcd: read the client certificate: %w", err)
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
