package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"syscall"

	"culvert/internal/api/readiness"
)

// DefaultRunDir is where a daemon keeps its socket, subnet.env and state.
const DefaultRunDir = "/run/culvert"

// SocketPath is the daemon's socket within its run directory.
func SocketPath(runDir string) string { return readiness.SocketPath(runDir) }

// Listen opens the daemon's socket. A socket that a killed daemon left behind
// is replaced; one that a running daemon answers on is an error.
func Listen(runDir string) (net.Listener, error) {
	path := SocketPath(runDir)
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return nil, err
	}
	if c, err := net.Dial("unix", path); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("another daemon answers on %s: stop it, or give this one its own --run-dir", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	// The status shows addresses and counters, not secrets, but is for root.
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// Handler serves the status.
func Handler(status func() Status) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		// A client that went away is no concern of the daemon's.
		_ = json.NewEncoder(w).Encode(status())
	})
	return mux
}

// ReadinessHandler serves the CNI plugin's question. The answer must not wait
// for anything.
func ReadinessHandler(answer func() readiness.Answer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+readiness.Path, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(answer())
	})
	return mux
}

// maxAnswer bounds what a client reads: 5,000 peers take about 1 MB.
const maxAnswer = 64 << 20

// GetStatus asks the daemon that has the run directory. The error says how to
// go on when none answers.
func GetStatus(ctx context.Context, runDir string) (Status, error) {
	path := SocketPath(runDir)
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
		DisableKeepAlives: true,
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://culvert/status", http.NoBody)
	if err != nil {
		return Status{}, err
	}
	answer, err := client.Do(r)
	if err != nil {
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
			return Status{}, fmt.Errorf("no daemon answers on %s: is `culvert run` running, with this --run-dir?", path)
		case errors.Is(err, fs.ErrPermission):
			return Status{}, fmt.Errorf("%s: permission denied: ask as root", path)
		}
		return Status{}, fmt.Errorf("asking the daemon on %s: %w", path, err)
	}
	defer func() { _ = answer.Body.Close() }()
	if answer.StatusCode != http.StatusOK {
		return Status{}, fmt.Errorf("asking the daemon on %s: %s", path, answer.Status)
	}
	var s Status
	if err := json.NewDecoder(io.LimitReader(answer.Body, maxAnswer)).Decode(&s); err != nil {
		return Status{}, fmt.Errorf("the daemon's answer on %s: %w", path, err)
	}
	return s, nil
}
