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
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/api/readiness"
	"culvert/internal/handover"
	"culvert/internal/remedy"
)

// DefaultRunDir is the default directory of the daemon's socket, subnet.env and
// state.
const DefaultRunDir = "/run/culvert"

// SocketPath returns the daemon's socket in its run directory.
func SocketPath(runDir string) string { return readiness.SocketPath(runDir) }

// Socket is the daemon's socket, and the lock of its run directory.
type Socket struct {
	runDir         string
	lock, listener int // descriptors
}

// Open opens the daemon's socket, and locks the run directory until it is closed: of
// daemons that start at the same time, only one succeeds. It replaces a socket that a
// killed daemon left. A group, by name or number, may use the socket besides root; "" for
// none.
func Open(runDir, group string) (*Socket, error) {
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return nil, remedy.Errorf("choose a directory that can be written, with --run-dir", "making the run directory: %w", err)
	}
	lock, err := lockDir(runDir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	s := &Socket{runDir: runDir}
	if s.lock, err = handover.Descriptor(lock); err != nil {
		return nil, err
	}
	if s.listener, err = listen(SocketPath(runDir), group); err != nil {
		_ = unix.Close(s.lock)
		return nil, err
	}
	return s, nil
}

// Inherit returns the socket that a predecessor passed on as descriptors.
func Inherit(runDir string, lock, listener int) *Socket { return &Socket{runDir, lock, listener} }

// Descriptors returns the descriptors that a successor needs. The Socket still owns them.
func (s *Socket) Descriptors() (lock, listener int) { return s.lock, s.listener }

// Sign writes this process's ID into the lock file.
func (s *Socket) Sign() {
	if unix.Ftruncate(s.lock, 0) == nil {
		_, _ = unix.Pwrite(s.lock, fmt.Appendln(nil, os.Getpid()), 0)
	}
}

// Close removes the socket and frees the run directory.
func (s *Socket) Close() error {
	return errors.Join(os.Remove(SocketPath(s.runDir)), s.Leave())
}

// Leave closes this process's descriptors, and leaves the socket to a successor.
func (s *Socket) Leave() error {
	return errors.Join(unix.Close(s.listener), unix.Close(s.lock))
}

// Listen is Open for a process that has no successor.
func Listen(runDir string) (net.Listener, error) {
	s, err := Open(runDir, "")
	if err != nil {
		return nil, err
	}
	l, err := handover.Listener(s.listener)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return &socketListener{l, s}, nil
}

type socketListener struct {
	net.Listener
	socket *Socket
}

// Close implements net.Listener.
func (l *socketListener) Close() error {
	return errors.Join(l.Listener.Close(), l.socket.Close())
}

// lockTimeout is how long to wait for the lock: a process that was killed frees its
// descriptors one after the other.
const lockTimeout = time.Second

// lockDir locks the run directory with flock(2), which the kernel releases when
// the process ends. The lock file contains the process ID.
func lockDir(runDir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(runDir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, remedy.Errorf("choose a directory that can be written, with --run-dir", "locking the run directory: %w", err)
	}
	for end := time.Now().Add(lockTimeout); ; time.Sleep(lockTimeout / 50) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 20))
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, remedy.Errorf("stop it, or give this one another --run-dir", "another daemon (pid %s) uses the run directory %s", bytes.TrimSpace(pid), runDir)
		}
		return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
	}
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt(fmt.Appendln(nil, os.Getpid()), 0)
	}
	return f, nil
}

func listen(path, group string) (fd int, err error) {
	// A daemon of a version without the lock.
	if c, err := net.Dial("unix", path); err == nil {
		_ = c.Close()
		return -1, fmt.Errorf("another daemon listens on %s: stop it, or give this one another --run-dir", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return -1, err
	}
	gid := -1
	if group != "" {
		if gid, err = groupID(group); err != nil {
			return -1, err
		}
	}
	// The status contains addresses and counters but no secrets; still, only root may
	// read it. The file has that mode from its creation: the kernel creates it with the
	// socket's mode, less the umask (unix_bind_bsd).
	private := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }), err)
	}}
	l, err := private.Listen(context.Background(), "unix", path)
	if err != nil {
		return -1, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	defer l.Close()
	if gid >= 0 {
		if err := errors.Join(os.Chown(path, -1, gid), os.Chmod(path, 0o660)); err != nil {
			return -1, errors.Join(fmt.Errorf("giving the socket to the group %s: %w", group, err), os.Remove(path))
		}
	}
	return handover.Descriptor(l.(*net.UnixListener))
}

// groupID returns the ID of a group given by name or number.
func groupID(group string) (int, error) {
	if id, err := strconv.Atoi(group); err == nil && id >= 0 {
		return id, nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return -1, err
	}
	return strconv.Atoi(g.Gid)
}

// Handler serves the status and the peers. look has the daemon compare the host with what it
// wants before it answers GetStatusNow, which waits for that at most lookTimeout.
func Handler(status func() Status, peers func() Peers, look func(context.Context)) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Has("now") {
			ctx, cancel := context.WithTimeout(r.Context(), lookTimeout)
			look(ctx)
			cancel()
		}
		WriteJSON(w, status())
	})
	mux.HandleFunc("GET /peers", func(w http.ResponseWriter, _ *http.Request) { WriteJSON(w, peers()) })
	return mux
}

// WriteJSON answers with v.
func WriteJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	// Ignore the error: the client has disconnected.
	_ = json.NewEncoder(w).Encode(v)
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
	return getJSON[Status](ctx, runDir, "/status")
}

// GetStatusNow is GetStatus, but the daemon first compares the host with what it wants, which
// it otherwise does every few seconds: some changes, such as iptables-legacy's, are not
// notified. An older daemon answers as to GetStatus.
func GetStatusNow(ctx context.Context, runDir string) (Status, error) {
	return getJSON[Status](ctx, runDir, "/status?now")
}

// lookTimeout is how long GetStatusNow waits for the comparison.
const lookTimeout = 3 * time.Second

// GetPeers requests the state of the daemon's peers.
func GetPeers(ctx context.Context, runDir string) (Peers, error) {
	return getJSON[Peers](ctx, runDir, "/peers")
}

func getJSON[T any](ctx context.Context, runDir, what string) (v T, err error) {
	answer, err := get(ctx, runDir, what)
	if err != nil {
		return v, err
	}
	defer func() { _ = answer.Close() }()
	if err := json.NewDecoder(io.LimitReader(answer, maxAnswer)).Decode(&v); err != nil {
		return v, fmt.Errorf("decoding %s from %s: %w", what, SocketPath(runDir), err)
	}
	return v, nil
}

// GetLog returns the last lines of the daemon's log.
func GetLog(ctx context.Context, runDir string) ([]byte, error) {
	answer, err := get(ctx, runDir, LogPath)
	if err != nil {
		return nil, err
	}
	defer func() { _ = answer.Close() }()
	return io.ReadAll(io.LimitReader(answer, maxAnswer))
}

// LogPath is where the daemon's socket serves the last lines of its log.
const LogPath = "/log"

// get sends a request to the daemon of the run directory. The caller closes the answer.
func get(ctx context.Context, runDir, what string) (io.ReadCloser, error) {
	path := SocketPath(runDir)
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
		DisableKeepAlives: true,
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://culvert"+what, http.NoBody)
	if err != nil {
		return nil, err
	}
	answer, err := client.Do(r)
	if err != nil {
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
			return nil, remedy.Errorf("is `culvert run` running, with this --run-dir?", "no daemon answers on %s", path)
		case errors.Is(err, fs.ErrPermission):
			return nil, remedy.Errorf("run this as root, or as a member of the daemon's --socket-group", "%s: permission denied", path)
		}
		return nil, fmt.Errorf("requesting %s on %s: %w", what, path, err)
	}
	if answer.StatusCode != http.StatusOK {
		_ = answer.Body.Close()
		return nil, fmt.Errorf("requesting %s on %s: %s", what, path, answer.Status)
	}
	return answer.Body, nil
}
