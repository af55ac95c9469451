// Package handover passes a node from a running daemon to its successor: it is
// the protocol between the two, on the running daemon's unix socket. What is
// passed, and what each does between the messages, is the daemon's.
//
//	successor                                running daemon
//	    │ POST /handover, Upgrade ─────────────► │
//	    │ ◄──────────────────────────────── 101  │  (404: it is of a release without it)
//	    │ hello ───────────────────────────────► │  stops writing to the store
//	    │ ◄────── offer, with open descriptors   │
//	    │ take ────────────────────────────────► │  stops reading packets and connections
//	    │ ◄─────────────────────────────── yours │
//	    │ running ─────────────────────────────► │  ends
//
// Until `running` the running daemon can go on by itself, and does when the
// connection breaks; `back`, with a reason, tells the successor to end. From
// `offer` on the successor has all it needs, and goes on alone when the
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

// Version is the protocol's. A daemon answers a hello of another version with
// `back`.
const Version = 1

// Path is where the daemon's socket has the protocol.
const Path = "/handover"

// Step names a message.
type Step string

// The messages, in their order.
const (
	Hello   Step = "hello"
	Offer   Step = "offer"
	Take    Step = "take"
	Yours   Step = "yours"
	Running Step = "running"
	Back    Step = "back" // at any time, from the running daemon
)

// Message is one line of JSON. Fields of other steps are empty.
type Message struct {
	Step Step `json:"step"`
	// Of hello and offer: who speaks.
	Protocol int    `json:"protocol,omitempty"`
	Program  string `json:"program,omitempty"` // its version
	PID      int    `json:"pid,omitempty"`
	// Of offer: what the descriptors are that came with it, one name each, and what
	// they are open for.
	Descriptors []string          `json:"descriptors,omitempty"`
	Metrics     string            `json:"metrics,omitempty"` // the address that was asked for
	Carrying    bool              `json:"carrying,omitempty"`
	Datapath    map[string]string `json:"datapath,omitempty"`
	// Of take: the datapath is used as it is, rather than closed first.
	Inherit bool `json:"inherit,omitempty"`
	// Of back.
	Why string `json:"why,omitempty"`
}

// Conn is one side of the protocol.
type Conn struct {
	unix *net.UnixConn
	rest []byte // read, not yet a whole line

	mu  sync.Mutex
	fds []int // received, not yet taken
}

// descriptorsPerMessage is below the kernel's limit (SCM_MAX_FD, 253).
const descriptorsPerMessage = 200

// sendPatience bounds a write, which the socket's buffer takes unless the other
// side is stopped.
const sendPatience = 2 * time.Second

// Send sends a message, and descriptors before it, which stay the caller's.
func (c *Conn) Send(m Message, fds ...int) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := c.unix.SetWriteDeadline(time.Now().Add(sendPatience)); err != nil {
		return err
	}
	for len(fds) > 0 { // each batch with an empty line
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

// maxLine bounds a message.
const maxLine = 1 << 20

// Receive returns the next message. io.EOF says that the other side has ended.
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
				return Message{}, fmt.Errorf("a message that cannot be read: %w", err)
			}
			return m, nil
		}
		if len(c.rest) > maxLine {
			return Message{}, errors.New("a message without an end")
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
			return Message{}, errors.New("descriptors were lost: this process may not open as many (`ulimit -n`)")
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

// TakeDescriptors returns the descriptors received so far, which are then the
// caller's.
func (c *Conn) TakeDescriptors() []int {
	c.mu.Lock()
	defer c.mu.Unlock()
	fds := c.fds
	c.fds = nil
	return fds
}

// Messages returns what is received until the other side ends, or Close.
// Receive must not be called any more.
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

// Close ends the connection, and closes descriptors that nobody took.
func (c *Conn) Close() error {
	err := c.unix.Close()
	for _, fd := range c.TakeDescriptors() {
		err = errors.Join(err, unix.Close(fd))
	}
	return err
}

// trusted says why the process at the other end is not to be dealt with: it must
// be of this process's user, or root.
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
		return fmt.Errorf("the process %d is of user %d, and a daemon is replaced by its own user or root", cred.Pid, uid)
	}
	return nil
}

// ErrUnknown says that the running daemon has no such protocol.
var ErrUnknown = errors.New("the running daemon cannot hand over: it is of a release without that. Stop it, then start this one")

// ErrEnded says that the running daemon ended before it offered anything.
var ErrEnded = errors.New("the running daemon ended while it was asked to hand over")

// Ask asks the daemon behind a unix socket to hand over, and returns the
// connection with its offer. Errors of dialling are the kernel's: fs.ErrNotExist
// or ECONNREFUSED say that no daemon runs there.
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
	// It says no more before the hello, so that nothing is read too far here.
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
	}
	return offer, nil
}

// Handler gives accept the connection of each successor that asks, whose hello
// has been read.
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
		_ = c.unix.SetReadDeadline(time.Now().Add(sendPatience))
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
			_ = c.Send(Message{Step: Back, Why: fmt.Sprintf("it speaks version %d of the protocol, not %d: stop it, then start this one", Version, hello.Protocol)})
			_ = c.Close()
		default:
			accept(c, hello)
		}
	})
}
