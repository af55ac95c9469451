// Package readiness is the one question that the CNI plugin asks the node
// daemon, can a pod be added now, and its answer. The plugin is started anew
// for every call, so the question is put without net/http, whose packages cost
// more to start than the question takes.
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

// Code is why no pod can be added; empty if one can.
type Code string

// The codes. A daemon that is newer than the plugin may say others.
const (
	NoLease      Code = "no-lease"      // the node has no subnet yet
	Fenced       Code = "fenced"        // the lease ran out: the subnet may be another node's
	DatapathDown Code = "datapath-down" // the node's packets are not carried
)

// Answer is what the daemon says.
type Answer struct {
	Ready  bool   `json:"ready"`
	Code   Code   `json:"code,omitempty"`
	Reason string `json:"reason,omitempty"` // a sentence for people
}

// Path is the question's path on the daemon's socket.
const Path = "/cni-status"

// ErrNoDaemon says that nothing answers on the socket.
var ErrNoDaemon = errors.New("no daemon answers")

// SocketPath is the daemon's socket within its run directory.
func SocketPath(runDir string) string { return filepath.Join(runDir, "culvert.sock") }

// maxAnswer bounds what is read, in bytes; an answer has about 200.
const maxAnswer = 64 << 10

// Ask asks the daemon that has the run directory. It returns when ctx ends, at
// the latest. An error that satisfies errors.Is(err, ErrNoDaemon) means that
// there is none.
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
	// HTTP/1.0: the answer ends with the connection.
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

// parse reads an HTTP response whose body ends with the text.
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
		return Answer{}, errors.New("it says neither that it is ready nor why not")
	}
	return a, nil
}
