package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// hostProcess is a program in the namespaces of this process. The kernel kills it
// when this process exits.
type hostProcess struct {
	cmd    *exec.Cmd
	dir    string
	exited chan struct{}
	err    error // valid once exited is closed

	mu    sync.Mutex
	lines []string
	news  chan struct{} // closed and replaced at each new line
}

// stopGrace is how long after SIGTERM a process is killed.
const stopGrace = 10 * time.Second

// startHostProcess starts a program; dir is removed when it has exited.
func startHostProcess(path string, args []string, dir string) (*hostProcess, error) {
	p := &hostProcess{cmd: exec.Command(path, args...), dir: dir, exited: make(chan struct{}), news: make(chan struct{})}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.cmd.Stderr = p.cmd.Stdout
	started := make(chan error, 1)
	go func() {
		// The kernel sends the parent-death signal when the thread that started the
		// program exits.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := p.cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		p.read(out)
		p.err = p.cmd.Wait()
		_ = os.RemoveAll(p.dir)
		close(p.exited)
	}()
	return p, <-started
}

func (p *hostProcess) read(out io.Reader) {
	const most = 200
	for s := bufio.NewScanner(out); s.Scan(); {
		p.mu.Lock()
		if p.lines = append(p.lines, s.Text()); len(p.lines) > most {
			p.lines = p.lines[1:]
		}
		close(p.news)
		p.news = make(chan struct{})
		p.mu.Unlock()
	}
}

func (p *hostProcess) WaitLine(ctx context.Context, prefix string) (string, error) {
	for {
		p.mu.Lock()
		for _, line := range p.lines {
			if rest, ok := strings.CutPrefix(line, prefix); ok {
				p.mu.Unlock()
				return strings.TrimSpace(rest), nil
			}
		}
		news := p.news
		p.mu.Unlock()
		select {
		case <-news:
		case <-p.exited:
			return "", fmt.Errorf("it exited (%w) before it printed %q: %s", cause(p.err), prefix, p.Tail(5))
		case <-ctx.Done():
			return "", fmt.Errorf("waiting for %q: %w: %s", prefix, ctx.Err(), p.Tail(5))
		}
	}
}

func (p *hostProcess) Tail(lines int) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.lines[max(len(p.lines)-lines, 0):], "\n")
}

func (p *hostProcess) Exited() <-chan struct{} { return p.exited }

func (p *hostProcess) Err() error {
	<-p.exited
	return p.err
}

func (p *hostProcess) Pid() int { return p.cmd.Process.Pid }

// Stop sends SIGTERM, and SIGKILL after stopGrace, and waits for the process to exit.
func (p *hostProcess) Stop() error {
	select {
	case <-p.exited:
		return nil
	default:
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.exited:
	case <-time.After(stopGrace):
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
	return nil
}
