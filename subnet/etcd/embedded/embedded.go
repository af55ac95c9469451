// Package embedded runs culvert-etcd, an etcd server, as a child process of the daemon
// and restarts it when it ends. It does not contain the server, which package member
// does, and does not talk to it. It owns the process.
package embedded

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Server is how to run the server, for a small site without etcd. Other nodes use it as
// their endpoint.
type Server struct {
	Program string   // the culvert-etcd binary
	Args    []string // its flags
}

// Find returns the culvert-etcd binary beside the running one, or in PATH.
func Find() (string, error) {
	const name = "culvert-etcd"
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s is neither beside culvert nor in PATH: install it from the same release: %w", name, err)
	}
	return path, nil
}

const (
	etcdStart = 60 * time.Second // until the server serves; replaying a large log is slow
	etcdStop  = 15 * time.Second // from SIGTERM to SIGKILL
)

// Process is the running server, which is restarted when it ends.
type Process struct {
	cancel context.CancelFunc
	done   chan struct{}
	first  chan struct{} // closed when the first server serves or has ended
	err    error         // why it ended; valid after first is closed
	after  <-chan struct{}
}

// Start starts the server and restarts it whenever it ends. If after is not nil, it
// waits for it first: the predecessor's server still serves.
func (e Server) Start(ctx context.Context, after <-chan struct{}, log *slog.Logger) *Process {
	// The server outlives ctx: while stopping, the daemon still writes to etcd. Stop
	// ends it.
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	p := &Process{cancel: cancel, done: make(chan struct{}), first: make(chan struct{}), after: after}
	go func() {
		defer close(p.done)
		if after != nil {
			select {
			case <-after:
			case <-running.Done():
				return
			}
		}
		// Pdeathsig ends the server with the thread that started it, so that a killed
		// daemon leaves no server behind. Keep the thread while supervising.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		p.supervise(running, e, log)
	}()
	return p
}

// Await waits until the server serves. It returns an error if the server ended first.
func (p *Process) Await(ctx context.Context) error {
	if p.after != nil { // the predecessor's server serves until ours starts
		return nil
	}
	var err error
	select {
	case <-p.first:
		err = p.err
	case <-time.After(etcdStart):
		err = fmt.Errorf("it does not serve after %s", etcdStart)
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("starting the embedded etcd: %w", err)
	}
	return nil
}

// supervise runs the server, with backoff between restarts, until ctx ends.
func (p *Process) supervise(ctx context.Context, e Server, log *slog.Logger) {
	told := false
	tell := func(err error) {
		if !told {
			told, p.err = true, err
			close(p.first)
		}
	}
	pause := time.Second
	for {
		began := time.Now()
		err := e.runOnce(ctx, log, func() { tell(nil) })
		if ctx.Err() != nil {
			return
		}
		tell(err)
		if time.Since(began) > time.Minute {
			pause = time.Second
		}
		log.Error("the embedded etcd exited; restarting it", "error", err, "pause", pause)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, 30*time.Second)
	}
}

// runOnce runs the server until it ends or ctx does. It calls serving when the server
// reports that it is ready.
func (e Server) runOnce(ctx context.Context, log *slog.Logger, serving func()) error {
	cmd := exec.CommandContext(ctx, e.Program, e.Args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = etcdStop
	// A separate process group: Ctrl-C reaches the daemon only, which stops the server
	// in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	var complaint lastLines
	cmd.Stderr = &complaint
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if url, ok := strings.CutPrefix(lines.Text(), "ready "); ok {
			log.Info("embedded etcd serves", "url", url, "pid", cmd.Process.Pid)
			serving()
		}
	}
	err = cmd.Wait()
	if text := complaint.String(); text != "" && err != nil {
		return fmt.Errorf("%w: %s", err, text)
	}
	if err == nil {
		return errors.New("it ended by itself")
	}
	return err
}

// Stop stops the server and waits until it has ended.
func (p *Process) Stop() {
	p.cancel()
	<-p.done
}

// lastLines is a writer that keeps the last 2 KB.
type lastLines struct{ b []byte }

func (l *lastLines) Write(p []byte) (int, error) {
	const keep = 2048
	l.b = append(l.b, p...)
	if len(l.b) > keep {
		l.b = append(l.b[:0], l.b[len(l.b)-keep:]...)
	}
	return len(p), nil
}

func (l *lastLines) String() string { return strings.TrimSpace(string(l.b)) }
