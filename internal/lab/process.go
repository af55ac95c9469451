package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Command is a program to start inside a namespace.
type Command struct {
	// Name must be unique within the lab: it names the log and the record.
	Name string
	Path string
	Args []string // without the program's name
	Env  []string // added to this process's environment
}

// Process is a program that runs inside a namespace of a lab. It has its own
// process group: Ctrl-C reaches only this process, which stops the others in order.
type Process struct {
	Name string
	PID  int
	Log  string // path of the file with its standard output and standard error

	ident  processID
	exited chan struct{}
	err    error // valid once exited is closed
}

// stopGrace is how long after SIGTERM a process is killed.
const stopGrace = 10 * time.Second

// Start starts a program inside the namespace. Unless Options.Keep is set, the
// kernel kills the program when this process exits, even by a signal.
func (n *Namespace) Start(c Command) (*Process, error) {
	if c.Name == "" || strings.ContainsAny(c.Name, "/.") {
		return nil, fmt.Errorf("starting %s: the process name %q is empty or has a slash or a dot in it", c.Path, c.Name)
	}
	p := &Process{Name: c.Name, Log: filepath.Join(n.lab.Dir, "logs", c.Name+".log"), exited: make(chan struct{})}
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", c.Name, err)
	}
	defer log.Close()

	cmd := exec.Command(c.Path, c.Args...)
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if n.lab.options.Keep {
		// In a new session it also outlives the terminal.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	}
	if kerr := n.onKeeper(func() { err = cmd.Start() }); kerr != nil {
		return nil, kerr
	}
	if err != nil {
		return nil, fmt.Errorf("starting %s in %s: %w", c.Name, n.Name, err)
	}
	p.PID = cmd.Process.Pid
	// Before Wait the PID cannot be reused.
	p.ident, err = identify(p.PID)
	go func() {
		p.err = cmd.Wait()
		close(p.exited)
	}()
	if err == nil {
		err = n.lab.record(n, p)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		<-p.exited
		return nil, fmt.Errorf("recording process %s: %w", c.Name, err)
	}
	return p, nil
}

// Run runs a program inside the namespace and waits for it. An error includes its
// standard error.
func (n *Namespace) Run(ctx context.Context, path string, args ...string) (stdout []byte, err error) {
	cmd := exec.CommandContext(ctx, path, args...)
	var out, errout bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errout
	if err := n.Do(cmd.Run); err != nil {
		return out.Bytes(), fmt.Errorf("%s %s in %s: %w: %s", filepath.Base(path), strings.Join(args, " "), n.Name, err, bytes.TrimSpace(errout.Bytes()))
	}
	return out.Bytes(), nil
}

// Exited is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Err waits for the process to exit and returns its status: nil for exit code 0,
// else an *exec.ExitError.
func (p *Process) Err() error {
	<-p.exited
	return p.err
}

// Signal sends a signal to the process. If it has exited, the error is
// os.ErrProcessDone.
func (p *Process) Signal(s syscall.Signal) error { return p.ident.signal(s) }

// Stop sends SIGTERM, and SIGKILL after ten seconds, and waits for the process to
// exit. Stopping a process that has exited is not an error.
func (p *Process) Stop() error {
	if err := p.ident.stop(stopGrace); err != nil {
		return fmt.Errorf("stopping %s (pid %d): %w", p.Name, p.PID, err)
	}
	<-p.exited
	return nil
}

// Kill sends SIGKILL, as the kernel's OOM killer would, and waits for the process to
// exit.
func (p *Process) Kill() error {
	if err := p.ident.signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("killing %s (pid %d): %w", p.Name, p.PID, err)
	}
	<-p.exited
	return nil
}

// Tail returns the last lines of the process's log.
func (p *Process) Tail(lines int) string { return tail(p.Log, lines) }

func tail(path string, lines int) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 64 << 10
	if st, err := f.Stat(); err == nil && st.Size() > most {
		_, _ = f.Seek(-most, 2)
	}
	var all []string
	for s := bufio.NewScanner(f); s.Scan(); {
		all = append(all, s.Text())
	}
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return strings.Join(all, "\n")
}

// WaitLine waits until the process has printed a line that begins with prefix,
// and returns the rest of it. If the process exits first, the error includes the end
// of its log.
func (p *Process) WaitLine(ctx context.Context, prefix string) (string, error) {
	for {
		ended := false
		select {
		case <-p.exited:
			ended = true
		default:
		}
		text, err := os.ReadFile(p.Log)
		if err != nil {
			return "", fmt.Errorf("waiting for %s: %w", p.Name, err)
		}
		for line := range bytes.Lines(text) {
			if rest, ok := bytes.CutPrefix(line, []byte(prefix)); ok && bytes.HasSuffix(rest, []byte("\n")) {
				return strings.TrimSpace(string(rest)), nil
			}
		}
		if ended {
			return "", fmt.Errorf("%s exited (%w) before it printed %q:\n%s", p.Name, p.endedWith(), prefix, p.Tail(20))
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("waiting for %s to print %q: %w:\n%s", p.Name, prefix, ctx.Err(), p.Tail(20))
		case <-p.exited:
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (p *Process) endedWith() error {
	if p.err == nil {
		return errors.New("exit status 0")
	}
	return p.err
}

// processID identifies a process by PID and start time: the kernel reuses PIDs.
type processID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot: proc(5), /proc/pid/stat field 22
}

// identify returns the identity of the process that has the PID now.
func identify(pid int) (processID, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return processID{}, err
	}
	// The second field is the program's name in parentheses, which may itself
	// contain any character: count fields from the last ")".
	i := bytes.LastIndexByte(text, ')')
	fields := strings.Fields(string(text[i+1:]))
	const startTime = 22 - 3 // fields[0] is field 3
	if i < 0 || len(fields) <= startTime {
		return processID{}, fmt.Errorf("/proc/%d/stat has not the format of proc(5)", pid)
	}
	start, err := strconv.ParseUint(fields[startTime], 10, 64)
	if err != nil {
		return processID{}, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	return processID{PID: pid, Start: start}, nil
}

// open returns a pidfd of the process, or os.ErrProcessDone if it has exited, even
// if another process has its PID now.
func (id processID) open() (int, error) {
	fd, err := unix.PidfdOpen(id.PID, 0)
	// ENOENT, or EINVAL before Linux 6.9: another process's thread has the PID now.
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		return -1, os.ErrProcessDone
	}
	if err != nil {
		return -1, fmt.Errorf("opening process %d: %w", id.PID, err)
	}
	now, err := identify(id.PID)
	if err != nil || now != id {
		_ = unix.Close(fd)
		return -1, os.ErrProcessDone
	}
	return fd, nil
}

// alive reports whether the process is running. A zombie is not.
func (id processID) alive() bool {
	fd, err := id.open()
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return !ended(fd, 0)
}

func (id processID) signal(s syscall.Signal) error {
	fd, err := id.open()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, s, nil, 0); errors.Is(err, unix.ESRCH) {
		return os.ErrProcessDone
	} else if err != nil {
		return err
	}
	return nil
}

// stop sends SIGTERM, waits for grace, and sends SIGKILL. The process need not be a
// child of this one.
func (id processID) stop(grace time.Duration) error {
	fd, err := id.open()
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, step := range []struct {
		signal syscall.Signal
		wait   time.Duration
	}{{syscall.SIGTERM, grace}, {syscall.SIGKILL, 5 * time.Second}} {
		err := unix.PidfdSendSignal(fd, step.signal, nil, 0)
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		if err != nil {
			return err
		}
		if ended(fd, step.wait) {
			return nil
		}
	}
	return errors.New("it did not exit after SIGKILL")
}

// ended waits up to atMost for the pidfd's process to exit, and reports whether it
// did.
func ended(pidfd int, atMost time.Duration) bool {
	deadline := time.Now().Add(atMost)
	for {
		fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(max(time.Until(deadline), 0).Milliseconds()))
		if n > 0 {
			return true
		}
		if err == nil || !errors.Is(err, unix.EINTR) {
			return false
		}
	}
}

// processRecord is the record on disk of a process that the lab started.
type processRecord struct {
	Name      string    `json:"name"`
	Namespace string    `json:"namespace"`
	Process   processID `json:"process"`
}

func (l *Lab) record(n *Namespace, p *Process) error {
	text, err := json.Marshal(processRecord{Name: p.Name, Namespace: n.Name, Process: p.ident})
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.processes = append(l.processes, p)
	l.mu.Unlock()
	return os.WriteFile(filepath.Join(l.Dir, "processes", p.Name+".json"), text, 0o644)
}

// processRecords returns the records of the lab with the given directory, sorted by
// name.
func processRecords(dir string) ([]processRecord, error) {
	files, err := os.ReadDir(filepath.Join(dir, "processes"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var all []processRecord
	for _, f := range files {
		text, err := os.ReadFile(filepath.Join(dir, "processes", f.Name()))
		if err != nil {
			return nil, err
		}
		var r processRecord
		if json.Unmarshal(text, &r) == nil { // truncated by a crash: processesIn finds the process
			all = append(all, r)
		}
	}
	return all, nil
}

// processesIn returns the processes, except this one, whose network namespace is one
// of the named ones.
func processesIn(names []string) []processID {
	type nsfile struct{ dev, ino uint64 }
	inside := map[nsfile]bool{}
	var st unix.Stat_t
	var fsstat unix.Statfs_t
	for _, name := range names {
		path := filepath.Join(netnsDir, name)
		if unix.Statfs(path, &fsstat) == nil && fsstat.Type == unix.NSFS_MAGIC && unix.Stat(path, &st) == nil {
			inside[nsfile{st.Dev, st.Ino}] = true
		}
	}
	if len(inside) == 0 {
		return nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var found []processID
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		id, err := identify(pid)
		if err != nil || unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st) != nil {
			continue
		}
		if inside[nsfile{st.Dev, st.Ino}] {
			found = append(found, id)
		}
	}
	return found
}
