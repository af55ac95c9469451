// Package readiness is the query of the CNI plugin to the node daemon: can a pod
// be added now? The daemon owns the answer; package api serves it. The client does
// without net/http, since the plugin is started for every call and initializing
// net/http takes longer than the query.
package readiness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"syscall"
)

// Code is the reason why no pod can be added; empty if one can.
type Code string

// The codes. A newer daemon may return others.
const (
	NoLease      Code = "no-lease"      // the node has no subnet yet
	Fenced       Code = "fenced"        // the lease expired or was lost: another node may have the subnet
	DatapathDown Code = "datapath-down" // the datapath does not forward packets
)

// Answer is the daemon's answer.
type Answer struct {
	Ready  bool   `json:"ready"`
	Code   Code   `json:"code,omitempty"`
	Reason string `json:"reason,omitempty"` // human-readable
}

// Path is the HTTP path of the query on the daemon's socket.
const Path = "/cni-status"

// ErrNoDaemon means that nothing listens on the socket.
var ErrNoDaemon = errors.New("no daemon answers")

// SocketPath returns the daemon's socket in its run directory.
func SocketPath(runDir string) string { return filepath.Join(runDir, "culvert.sock") }

// maxAnswer is the largest answer read, in bytes; a real one has about 200.
const maxAnswer = 64 << 10

// Ask queries the daemon of the run directory, until ctx ends. If there is no
// daemon, the error satisfies errors.Is(err, ErrNoDaemon).
func Ask(ctx context.Context, runDir string) (Answer, error) {
	path := SocketPath(runDir)
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return Answer{}, fmt.Errorf("%w on %s", ErrNoDaemon, path)
	case err != nil:
		return Answer{}, fmt.Errorf("asking the daemon on %s: %w", path, err)
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(deadline); err != nil {
			return Answer{}, err
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	// HTTP/1.0: the server closes the connection after the response.
	if _, err := io.WriteString(c, "GET "+Path+" HTTP/1.0\r\nHost: culvert\r\n\r\n"); err != nil {
		return Answer{}, fmt.Errorf("asking the daemon on %s: %w", path, err)
	}
	text, err := io.ReadAll(io.LimitReader(c, maxAnswer))
	if err != nil {
		return Answer{}, fmt.Errorf("the daemon on %s does not answer: %w", path, err)
	}
	a, err := parse(text)
	if err != nil {
		return Answer{}, fmt.Errorf("the daemon's answer on %s: %w", path, err)
	}
	return a, nil
}

// parse parses a complete HTTP response whose body ends with the connection.
func parse(text []byte) (Answer, error) {
	head, body, ok := bytes.Cut(text, []byte("\r\n\r\n"))
	line, _, _ := bytes.Cut(head, []byte("\r\n"))
	fields := bytes.Fields(line)
	if !ok || len(fields) < 2 || !bytes.HasPrefix(fields[0], []byte("HTTP/1.")) {
		return Answer{}, fmt.Errorf("%.60q is not HTTP", line)
	}
	if string(fields[1]) != "200" {
		return Answer{}, fmt.Errorf("%.60q: is the daemon older than the plugin?", line)
	}
	var a Answer
	if err := json.Unmarshal(body, &a); err != nil {
		return Answer{}, err
	}
	if !a.Ready && a.Reason == "" {
		return Answer{}, errors.New("the answer is neither ready nor has a reason")
	}
	return a, nil
}
