package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"culvert/internal/api/readiness"
)

// DefaultRunDir is the default directory of the daemon's socket, subnet.env and
// state.
const DefaultRunDir = "/run/culvert"

// SocketPath returns the daemon's socket in its run directory.
func SocketPath(runDir string) string { return readiness.SocketPath(runDir) }

// Listen opens the daemon's socket and locks the run directory until the listener
// is closed, so that only one daemon can use it. It replaces a socket left behind
// by a killed daemon.
func Listen(runDir string) (net.Listener, error) {
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return nil, err
	}
	lock, err := lockDir(runDir)
	if err != nil {
		return nil, err
	}
	l, err := listen(SocketPath(runDir))
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	return &lockedListener{l, lock}, nil
}

// lockDir locks the run directory with flock(2), which the kernel releases when
// the process ends. The lock file contains the process ID.
func lockDir(runDir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(runDir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 20))
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another daemon (pid %s) uses the run directory %s: stop it, or give this one another --run-dir", bytes.TrimSpace(pid), runDir)
		}
		return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
	}
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt(fmt.Appendln(nil, os.Getpid()), 0)
	}
	return f, nil
}

func listen(path string) (net.Listener, error) {
	// A daemon of a version without the lock.
	if c, err := net.Dial("unix", path); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("another daemon listens on %s: stop it, or give this one another --run-dir", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	// The status contains addresses and counters but no secrets; still, only root
	// may read it.
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

type lockedListener struct {
	net.Listener
	lock *os.File
}

// Close implements net.Listener.
func (l *lockedListener) Close() error {
	return errors.Join(l.Listener.Close(), l.lock.Close())
}

// Handler serves GET /status.
func Handler(status func() Status) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		// Ignore clients that disconnect.
		_ = json.NewEncoder(w).Encode(status())
	})
	return mux
}

// ReadinessHandler serves the query of the CNI plugin. answer must not block.
func ReadinessHandler(answer func() readiness.Answer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+readiness.Path, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(answer())
	})
	return mux
}

// maxAnswer is the largest status read, in bytes; 5,000 peers take about 1 MB.
const maxAnswer = 64 << 20

// GetStatus requests the status of the daemon that uses the run directory. If
// there is none, the error says what to do.
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
			return Status{}, fmt.Errorf("%s: permission denied: run this as root", path)
		}
		return Status{}, fmt.Errorf("requesting the status on %s: %w", path, err)
	}
	defer func() { _ = answer.Body.Close() }()
	if answer.StatusCode != http.StatusOK {
		return Status{}, fmt.Errorf("requesting the status on %s: %s", path, answer.Status)
	}
	var s Status
	if err := json.NewDecoder(io.LimitReader(answer.Body, maxAnswer)).Decode(&s); err != nil {
		return Status{}, fmt.Errorf("decoding the status from %s: %w", path, err)
	}
	return s, nil
}
