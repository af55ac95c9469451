package daemon

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

// EmbeddedEtcd is an etcd server that the daemon carries along, as a process
// of its own: for a small site that has no etcd. Other nodes point at it.
type EmbeddedEtcd struct {
	Program string   // the culvert-etcd binary
	Args    []string // its flags
}

// FindEtcd returns the culvert-etcd binary beside the running one, or in PATH.
func FindEtcd() (string, error) {
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
	etcdStart = 60 * time.Second // until the server answers: a large log takes its time
	etcdStop  = 15 * time.Second
)

// supervised is a running server and its successors.
type supervised struct {
	cancel context.CancelFunc
	done   chan struct{}
	first  chan struct{} // closed when the first server serves, or has ended
	err    error         // why it ended, then
	after  <-chan struct{}
}

// start starts the server, and keeps it running: it is started anew when it
// ends. Where a predecessor's still serves, it starts after that (nil: at once).
func (e EmbeddedEtcd) start(ctx context.Context, after <-chan struct{}, log *slog.Logger) *supervised {
	// The server outlives ctx: the daemon gives its last word to etcd while
	// stopping, and stops it last.
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s := &supervised{cancel: cancel, done: make(chan struct{}), first: make(chan struct{}), after: after}
	go func() {
		defer close(s.done)
		if after != nil {
			select {
			case <-after:
			case <-running.Done():
				return
			}
		}
		// The server is told to end when the thread that started it does
		// (Pdeathsig), so that a killed daemon leaves none behind: the thread is
		// kept for as long as it supervises.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		s.supervise(running, e, log)
	}()
	return s
}

// await waits until the server serves. One that ended before it ever did is an
// error.
func (s *supervised) await(ctx context.Context) error {
	if s.after != nil { // the predecessor's serves, or comes back as ours
		return nil
	}
	var err error
	select {
	case <-s.first:
		err = s.err
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

// supervise runs the server again and again until ctx ends.
func (s *supervised) supervise(ctx context.Context, e EmbeddedEtcd, log *slog.Logger) {
	told := false
	tell := func(err error) {
		if !told {
			told, s.err = true, err
			close(s.first)
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
		log.Error("the embedded etcd ended; starting it again", "error", err, "pause", pause)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, 30*time.Second)
	}
}

// runOnce runs the server until it ends or ctx does, and calls serving when it
// has said that it is ready.
func (e EmbeddedEtcd) runOnce(ctx context.Context, log *slog.Logger, serving func()) error {
	cmd := exec.CommandContext(ctx, e.Program, e.Args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = etcdStop
	// A group of its own: Ctrl-C is for the daemon, which stops it in order.
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

// stop ends the server and returns when it has ended.
func (s *supervised) stop() {
	s.cancel()
	<-s.done
}

// lastLines keeps the end of what is written to it.
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
