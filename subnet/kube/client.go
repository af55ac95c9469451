package kube

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Media types for the Accept header.
const (
	whole        = "application/json"
	metadata     = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"
	metadataList = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
)

// client is an HTTP client of the API server. Its methods are safe for concurrent
// use.
type client struct {
	access access
	http   *http.Client
	limit  time.Duration // timeout of a request other than list or watch
	// observe is Options.Observe.
	observe func(operation string, took time.Duration, failed bool)

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	token string // from tokenFile
	read  time.Time
}

// tokenEvery is how often a token file is read. The kubelet renews a token long
// before it expires.
const tokenEvery = 10 * time.Second

func newClient(a access, limit time.Duration) (*client, error) {
	c := &client{access: a, limit: limit, conns: map[net.Conn]struct{}{}}
	if a.server.Scheme == "https" {
		if _, err := a.tls(); err != nil {
			return nil, err
		}
	}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext:         c.dial,
		DialTLSContext:      c.dialTLS,
		ForceAttemptHTTP2:   true,
		TLSHandshakeTimeout: 10 * time.Second,
		IdleConnTimeout:     90 * time.Second,
		// Pings detect a dead connection.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second},
	}}
	return c, nil
}

// tls builds the configuration for each connection, so that renewed files take
// effect.
func (a access) tls() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: a.serverName, InsecureSkipVerify: a.insecure, NextProtos: []string{"h2", "http/1.1"}}
	if cfg.ServerName == "" {
		cfg.ServerName = a.server.Hostname()
	}
	pem := a.ca
	if a.caFile != "" {
		var err error
		if pem, err = os.ReadFile(a.caFile); err != nil {
			return nil, fmt.Errorf("kubernetes: read the CA: %w", err)
		}
	}
	if len(pem) > 0 {
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("kubernetes: the CA %s contains no PEM certificate", a.caFile)
		}
	}
	cert, key := a.cert, a.key
	if a.certFile != "" {
		var err error
		if cert, err = os.ReadFile(a.certFile); err == nil {
			key, err = os.ReadFile(a.keyFile)
		}
		if err != nil {
			return nil, fmt.Errorf("kubernetes: read the client certificate: %w", err)
		}
	}
	if len(cert) > 0 {
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("kubernetes: the client certificate: %w", err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg, nil
}

// tracked is a connection that breakAll can close.
type tracked struct {
	net.Conn
	forget func()
}

func (t *tracked) Close() error {
	t.forget()
	return t.Conn.Close()
}

func (c *client) dial(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: 5 * time.Second, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}}
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	t := &tracked{Conn: conn}
	t.forget = func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.conns, t)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns[t] = struct{}{}
	return t, nil
}

func (c *client) dialTLS(ctx context.Context, network, address string) (net.Conn, error) {
	cfg, err := c.access.tls()
	if err != nil {
		return nil, err
	}
	conn, err := c.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	secured := tls.Client(conn, cfg)
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := secured.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return secured, nil
}

// breakAll closes the connections. Pending requests fail and are retried.
func (c *client) breakAll() {
	c.mu.Lock()
	conns := make([]net.Conn, 0, len(c.conns))
	for conn := range c.conns {
		conns = append(conns, conn)
	}
	c.mu.Unlock()
	for _, conn := range conns {
		_ = conn.Close()
	}
}

// bearer returns the token; after a refusal it reads the file again.
func (c *client) bearer(refused bool) (string, error) {
	if c.access.tokenFile == "" {
		return c.access.token, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.token != "" && !refused && time.Since(c.read) < tokenEvery {
		return c.token, nil
	}
	text, err := os.ReadFile(c.access.tokenFile)
	if err != nil {
		return "", fmt.Errorf("read the service account's token: %w", err)
	}
	c.token, c.read = strings.TrimSpace(string(text)), time.Now()
	return c.token, nil
}

// apiError is a response with an error status.
type apiError struct {
	code    int // HTTP status
	message string
	after   time.Duration // Retry-After
}

func (e *apiError) Error() string {
	switch e.code {
	case http.StatusUnauthorized:
		return "the API server rejects this daemon's credentials (401): " + e.message +
			"; check that the service account exists and its token is mounted, or check the user in the kubeconfig"
	case http.StatusForbidden:
		return "the API server denies access (403): " + e.message +
			"; apply the ClusterRole and its binding in deploy/kubernetes (nodes: get, list, watch; nodes/status: patch)"
	case http.StatusTooManyRequests:
		return "the API server throttles this daemon (429): " + e.message
	}
	return fmt.Sprintf("the API server returned %d: %s", e.code, e.message)
}

// has reports whether err is an apiError with this code.
func has(err error, code int) bool {
	e, ok := errors.AsType[*apiError](err)
	return ok && e.code == code
}

// retryAfter returns the Retry-After of an apiError, at most a minute.
func retryAfter(err error) time.Duration {
	if e, ok := errors.AsType[*apiError](err); ok {
		return min(e.after, time.Minute)
	}
	return 0
}

// status is metav1.Status.
type status struct {
	Message string `json:"message"`
	Code    int    `json:"code"`
	Details struct {
		RetryAfterSeconds int `json:"retryAfterSeconds"`
	} `json:"details"`
}

// errorOf reads the body of an error response.
func errorOf(resp *http.Response) error {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	var s status
	if json.Unmarshal(text, &s) != nil || s.Message == "" {
		s.Message = strings.TrimSpace(fmt.Sprintf("%.200s", text))
	}
	e := &apiError{code: resp.StatusCode, message: s.Message, after: time.Duration(s.Details.RetryAfterSeconds) * time.Second}
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil {
		e.after = time.Duration(n) * time.Second
	}
	return e
}

// request is one HTTP request.
type request struct {
	method, path string
	query        url.Values
	accept       string
	contentType  string
	body         []byte
}

// operation is what the request does, in Kubernetes' words.
func (r request) operation() string {
	switch {
	case r.method != http.MethodGet:
		return strings.ToLower(r.method)
	case r.query.Has("watch"):
		return "watch"
	case r.query.Has("limit"):
		return "list"
	}
	return "get"
}

// do returns a successful response, whose body the caller must close, or an
// apiError. If the token is rejected, it reads the token again and retries once.
func (c *client) do(ctx context.Context, r request) (*http.Response, error) {
	for refused := false; ; refused = true {
		u := *c.access.server
		u.Path += r.path
		u.RawQuery = r.query.Encode()
		req, err := http.NewRequestWithContext(ctx, r.method, u.String(), bytes.NewReader(r.body))
		if err != nil {
			return nil, err
		}
		req.Header.Set("Accept", r.accept)
		req.Header.Set("User-Agent", "culvert")
		if r.contentType != "" {
			req.Header.Set("Content-Type", r.contentType)
		}
		token, err := c.bearer(refused)
		if err != nil {
			return nil, err
		}
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		began := time.Now()
		resp, err := c.http.Do(req)
		if c.observe != nil {
			c.observe(r.operation(), time.Since(began), err != nil || resp.StatusCode >= 400)
		}
		if err != nil {
			if cause := context.Cause(ctx); cause != nil && ctx.Err() != nil {
				return nil, cause
			}
			return nil, err
		}
		if resp.StatusCode/100 == 2 {
			return resp, nil
		}
		err = errorOf(resp)
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized || refused || c.access.tokenFile == "" {
			return nil, err
		}
	}
}

// call sends a request with a small response, limited to c.limit.
func (c *client) call(ctx context.Context, r request, into any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.limit, fmt.Errorf("no answer from %s within %v", c.access.server, c.limit))
	defer cancel()
	resp, err := c.do(ctx, r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if into == nil {
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

func nodePath(name string) string { return "/api/v1/nodes/" + url.PathEscape(name) }

// node reads one whole Node: the latest version if at is "", any cached version if
// at is "0".
func (c *client) node(ctx context.Context, name, at string) (*object, error) {
	r := request{method: http.MethodGet, path: nodePath(name), accept: whole}
	if at != "" {
		r.query = url.Values{"resourceVersion": {at}}
	}
	var o object
	if err := c.call(ctx, r, &o); err != nil {
		return nil, fmt.Errorf("read the Node %s: %w", name, err)
	}
	return &o, nil
}

// patchStatus patches a Node's annotations through its status subresource, so that
// no permission on its spec is needed.
func (c *client) patchStatus(ctx context.Context, name string, p patch) error {
	body, err := json.Marshal(p)
	if err != nil {
		return err
	}
	err = c.call(ctx, request{
		method: http.MethodPatch, path: nodePath(name) + "/status", accept: metadata,
		query:       url.Values{"fieldManager": {"culvert"}},
		contentType: "application/strategic-merge-patch+json", body: body,
	}, nil)
	if err != nil {
		return fmt.Errorf("patch the status of the Node %s: %w", name, err)
	}
	return nil
}

// list calls each for every Node, one at a time; each must not keep the object. It
// returns the list's revision.
func (c *client) list(ctx context.Context, accept string, query url.Values, each func(*object)) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 6*c.limit, fmt.Errorf("no list of the Nodes from %s within %v", c.access.server, 6*c.limit))
	defer cancel()
	resp, err := c.do(ctx, request{method: http.MethodGet, path: "/api/v1/nodes", accept: accept, query: query})
	if err != nil {
		return "", fmt.Errorf("list the Nodes: %w", err)
	}
	defer resp.Body.Close()
	at, err := decodeList(resp.Body, each)
	if err != nil {
		return "", fmt.Errorf("list the Nodes: %w", err)
	}
	return at, nil
}

// decodeList decodes a list as a stream, since thousands of Nodes take 100 MB.
func decodeList(body io.Reader, each func(*object)) (string, error) {
	d := json.NewDecoder(body)
	expect := func(delim json.Delim) error {
		t, err := d.Token()
		if err == nil && t != delim {
			err = fmt.Errorf("got %v, expected %v", t, delim)
		}
		return err
	}
	if err := expect('{'); err != nil {
		return "", err
	}
	var meta struct {
		ResourceVersion string `json:"resourceVersion"`
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return "", err
		}
		switch key {
		case "metadata":
			err = d.Decode(&meta)
		case "items":
			var t json.Token
			if t, err = d.Token(); err != nil || t == nil { // null is an empty list
				break
			}
			if t != json.Delim('[') {
				return "", fmt.Errorf("items is %v, not a list", t)
			}
			for d.More() && err == nil {
				var o object
				if err = d.Decode(&o); err == nil {
					each(&o)
				}
			}
			if err == nil {
				err = expect(']')
			}
		default:
			var skipped json.RawMessage
			err = d.Decode(&skipped)
		}
		if err != nil {
			return "", err
		}
	}
	if err := expect('}'); err != nil {
		return "", err
	}
	if meta.ResourceVersion == "" {
		return "", errors.New("the response has no resourceVersion")
	}
	return meta.ResourceVersion, nil
}

// event is one line of a watch.
type event struct {
	Type   string `json:"type"` // ADDED, MODIFIED, DELETED, BOOKMARK or ERROR
	Object struct {
		object
		// Fields of an ERROR, whose object is a Status. Status hides the Node's
		// field of that name, which in a Status is a string.
		Status  json.RawMessage `json:"status"`
		Message string          `json:"message"`
		Code    int             `json:"code"`
	} `json:"object"`
}

// watch calls began once the watch is established, and each for every event after
// the revision. It always returns an error; io.EOF if the server ended the watch,
// as it does after lasting.
func (c *client) watch(ctx context.Context, after string, lasting time.Duration, began func(), each func(*event) error) error {
	resp, err := c.do(ctx, request{method: http.MethodGet, path: "/api/v1/nodes", accept: metadata, query: url.Values{
		"watch": {"1"}, "allowWatchBookmarks": {"true"}, "resourceVersion": {after},
		"timeoutSeconds": {strconv.Itoa(int(lasting.Seconds()))},
	}})
	if err != nil {
		return fmt.Errorf("watch the Nodes: %w", err)
	}
	defer resp.Body.Close()
	began()
	for d := json.NewDecoder(resp.Body); ; {
		var e event
		if err := d.Decode(&e); err != nil {
			if errors.Is(err, io.ErrUnexpectedEOF) {
				err = io.EOF // cut off within an event: the same as between two
			}
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return err
		}
		if e.Type == "ERROR" {
			return fmt.Errorf("watch the Nodes: %w", &apiError{code: e.Object.Code, message: e.Object.Message})
		}
		if err := each(&e); err != nil {
			return err
		}
	}
}
