// Package handover is the protocol by which a running daemon passes a node to
// its successor, on the running daemon's unix socket. It transfers messages and
// descriptors; what they contain and what each side does in between is decided
// by package daemon, which owns the state.
//
//	successor                                running daemon
//	    │ POST /handover, Upgrade ─────────────► │
//	    │ ◄──────────────────────────────── 101  │  (404: a release without handover)
//	    │ hello ───────────────────────────────► │  stops writing to the store
//	    │ ◄────── offer, with open descriptors   │
//	    │ take ────────────────────────────────► │  stops reading packets and connections
//	    │ ◄─────────────────────────────── yours │
//	    │ running ─────────────────────────────► │  exits
//
// Until `running` the running daemon can resume, and does so if the connection
// breaks; it sends `back` with a reason to make the successor exit. From
// `offer` on the successor has everything it needs, and continues alone if the
// connection breaks without `back`.
package handover

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Version is the protocol version. A daemon answers a hello of another version
// with `back`.
const Version = 1

// Path is the HTTP path of the protocol on the daemon's socket.
const Path = "/handover"

// Step is the type of a message.
type Step string

// The messages, in order.
const (
	Hello   Step = "hello"
	Offer   Step = "offer"
	Take    Step = "take"
	Yours   Step = "yours"
	Running Step = "running"
	Back    Step = "back" // from the running daemon, at any time
)

// Message is one line of JSON. Only the fields of its step are set.
type Message struct {
	Step Step `json:"step"`
	// hello and offer: the sender.
	Protocol int    `json:"protocol,omitempty"`
	Program  string `json:"program,omitempty"` // version of the program
	PID      int    `json:"pid,omitempty"`
	// offer: the names of the descriptors that came with it, and what they were
	// opened with.
	Descriptors []string          `json:"descriptors,omitempty"`
	Metrics     string            `json:"metrics,omitempty"` // the configured address
	Carrying    bool              `json:"carrying,omitempty"`
	Datapath    map[string]string `json:"datapath,omitempty"`
	// take: use the datapath as it is, without closing it first.
	Inherit bool `json:"inherit,omitempty"`
	// back.
	Why string `json:"why,omitempty"`
}

// Conn is one end of the protocol.
type Conn struct {
	unix *net.UnixConn
	rest []byte // received, not yet a whole line

	mu  sync.Mutex
	fds []int // received, not yet taken
}

// descriptorsPerMessage is below the kernel's limit (SCM_MAX_FD, 253).
const descriptorsPerMessage = 200

// sendTimeout limits a write. The socket's buffer takes it unless the other
// side is stopped.
const sendTimeout = 2 * time.Second

// Send sends a message, preceded by descriptors, which remain the caller's.
func (c *Conn) Send(m Message, fds ...int) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := c.unix.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	for len(fds) > 0 { // an empty line carries each batch
		n := min(len(fds), descriptorsPerMessage)
		if _, _, err := c.unix.WriteMsgUnix([]byte("\n"), unix.UnixRights(fds[:n]...), nil); err != nil {
			return fmt.Errorf("sending descriptors: %w", err)
		}
		fds = fds[n:]
	}
	if _, err := c.unix.Write(append(text, '\n')); err != nil {
		return fmt.Errorf("sending %q: %w", m.Step, err)
	}
	return nil
}

// maxLine limits the length of a message, in bytes.
const maxLine = 1 << 20

// Receive returns the next message; io.EOF if the other side has closed the
// connection.
func (c *Conn) Receive() (Message, error) {
	for {
		for {
			line, rest, whole := bytes.Cut(c.rest, []byte("\n"))
			if !whole {
				break
			}
			c.rest = rest
			if len(line) == 0 {
				continue
			}
			var m Message
			if err := json.Unmarshal(line, &m); err != nil {
				return Message{}, fmt.Errorf("malformed message: %w", err)
			}
			return m, nil
		}
		if len(c.rest) > maxLine {
			return Message{}, errors.New("message too long")
		}
		text, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*descriptorsPerMessage))
		n, k, flags, _, err := c.unix.ReadMsgUnix(text, rights)
		if err == nil && n == 0 {
			err = io.EOF
		}
		if err != nil {
			return Message{}, err
		}
		if flags&unix.MSG_CTRUNC != 0 {
			return Message{}, errors.New("descriptors were lost: this process may not open that many (`ulimit -n`)")
		}
		c.rest = append(c.rest, text[:n]...)
		messages, err := unix.ParseSocketControlMessage(rights[:k])
		if err != nil {
			return Message{}, err
		}
		for _, m := range messages {
			fds, err := unix.ParseUnixRights(&m)
			if err != nil {
				return Message{}, err
			}
			c.mu.Lock()
			c.fds = append(c.fds, fds...)
			c.mu.Unlock()
		}
	}
}

// TakeDescriptors returns the descriptors received so far. The caller then owns
// them.
func (c *Conn) TakeDescriptors() []int {
	c.mu.Lock()
	defer c.mu.Unlock()
	fds := c.fds
	c.fds = nil
	return fds
}

// Messages returns a channel of received messages, which is closed when the
// connection ends. Receive must not be called afterwards.
func (c *Conn) Messages() <-chan Message {
	all := make(chan Message, 4) // more than either side sends
	go func() {
		defer close(all)
		for {
			m, err := c.Receive()
			if err != nil {
				return
			}
			all <- m
		}
	}()
	return all
}

// Close closes the connection and the descriptors that were not taken.
func (c *Conn) Close() error {
	err := c.unix.Close()
	for _, fd := range c.TakeDescriptors() {
		err = errors.Join(err, unix.Close(fd))
	}
	return err
}

// trusted returns an error unless the other process runs as this process's user
// or as root.
func trusted(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return credErr
	}
	if uid := int(cred.Uid); uid != 0 && uid != os.Geteuid() {
		return fmt.Errorf("the process %d runs as user %d: only the daemon's own user or root may replace it", cred.Pid, uid)
	}
	return nil
}

// ErrUnknown means that the running daemon does not support handover.
var ErrUnknown = errors.New("the running daemon cannot hand over: its release does not support it. " + stopFirst)

// stopFirst is what to do if the running daemon cannot hand over.
const stopFirst = "Stop it, then start this one (in Kubernetes: maxSurge: 0 and maxUnavailable: 1 for this update)"

// ErrEnded means that the running daemon ended before its offer.
var ErrEnded = errors.New("the running daemon ended while it was asked to hand over")

// Ask asks the daemon at a unix socket to hand over, and returns the connection
// and the offer. If dialling fails, the error wraps fs.ErrNotExist or
// ECONNREFUSED when no daemon runs there.
func Ask(ctx context.Context, socket string, hello Message) (*Conn, Message, error) {
	var d net.Dialer
	raw, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, Message{}, err
	}
	c := &Conn{unix: raw.(*net.UnixConn)}
	stop := context.AfterFunc(ctx, func() { _ = c.unix.SetDeadline(time.Now()) })
	defer stop()
	offer, err := c.ask(hello)
	if err != nil {
		return nil, Message{}, errors.Join(err, c.Close())
	}
	return c, offer, nil
}

func (c *Conn) ask(hello Message) (Message, error) {
	if err := trusted(c.unix); err != nil {
		return Message{}, err
	}
	const request = "POST " + Path + " HTTP/1.1\r\nHost: culvert\r\nConnection: Upgrade\r\nUpgrade: culvert-handover\r\nContent-Length: 0\r\n\r\n"
	if _, err := io.WriteString(c.unix, request); err != nil {
		return Message{}, err
	}
	// The daemon sends nothing more before the hello, so the buffered reader
	// does not consume part of the next message.
	answer, err := http.ReadResponse(bufio.NewReader(c.unix), nil)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) {
		return Message{}, ErrEnded
	}
	if err != nil {
		return Message{}, fmt.Errorf("asking the running daemon to hand over: %w", err)
	}
	switch answer.StatusCode {
	case http.StatusSwitchingProtocols:
	case http.StatusNotFound, http.StatusMethodNotAllowed:
		return Message{}, ErrUnknown
	default:
		text, _ := io.ReadAll(io.LimitReader(answer.Body, 4096))
		return Message{}, fmt.Errorf("the running daemon does not hand over: %s", bytes.TrimSpace(text))
	}
	hello.Step, hello.Protocol = Hello, Version
	if err := c.Send(hello); err != nil {
		return Message{}, err
	}
	offer, err := c.Receive()
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET):
		return Message{}, ErrEnded
	case err != nil:
		return Message{}, fmt.Errorf("the running daemon's offer: %w", err)
	case offer.Step == Back:
		return Message{}, fmt.Errorf("the running daemon does not hand over: %s", offer.Why)
	case offer.Step != Offer:
		return Message{}, fmt.Errorf("the running daemon answered %q to the hello", offer.Step)
	case offer.Protocol != Version:
		return Message{}, fmt.Errorf("the running daemon offers version %d of the handover, not %d. %s", offer.Protocol, Version, stopFirst)
	}
	return offer, nil
}

// Handler calls accept for each successor, after it has received its hello.
// accept owns the connection.
func Handler(accept func(c *Conn, hello Message)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			http.Error(w, "POST", http.StatusMethodNotAllowed)
			return
		}
		raw, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		c := &Conn{unix: raw.(*net.UnixConn)}
		if err := trusted(c.unix); err != nil {
			_, _ = fmt.Fprintf(c.unix, "HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\n%s\n", err)
			_ = c.Close()
			return
		}
		_ = c.unix.SetReadDeadline(time.Now().Add(sendTimeout))
		_, err = io.WriteString(c.unix, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: culvert-handover\r\n\r\n")
		var hello Message
		if err == nil {
			hello, err = c.Receive()
		}
		_ = c.unix.SetReadDeadline(time.Time{})
		switch {
		case err != nil || hello.Step != Hello:
			_ = c.Close()
		case hello.Protocol != Version:
			_ = c.Send(Message{Step: Back, Why: fmt.Sprintf("it speaks version %d of the handover, not %d. %s", Version, hello.Protocol, stopFirst)})
			_ = c.Close()
		default:
			accept(c, hello)
		}
	})
}
