package handover

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// serve serves a daemon's socket until the test ends, and returns its path.
func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-ended
	})
	return path
}

func ask(t *testing.T, path string) (*Conn, Message, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return Ask(ctx, path, Message{Program: "new", PID: 7})
}

// TestHandover passes a descriptor and both sides' messages.
func TestHandover(t *testing.T) {
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	got := make(chan Message, 2)
	path := serve(t, Handler(func(c *Conn, hello Message) {
		defer c.Close()
		got <- hello
		if err := c.Send(Message{Step: Offer, Protocol: Version, Descriptors: []string{"pipe"}}, int(write.Fd())); err != nil {
			t.Error(err)
		}
		_ = write.Close()
		got <- <-c.Messages()
	}))
	c, offer, err := ask(t, path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if hello := <-got; hello.Program != "new" || hello.PID != 7 || hello.Protocol != Version {
		t.Errorf("the hello is %+v", hello)
	}
	fds := c.TakeDescriptors()
	if len(fds) != 1 || offer.Descriptors[0] != "pipe" {
		t.Fatalf("the offer is %+v, with %d descriptors", offer, len(fds))
	}
	_, err = unix.Write(fds[0], []byte("x"))
	_ = unix.Close(fds[0])
	b := make([]byte, 2)
	if n, readErr := read.Read(b); err != nil || n != 1 {
		t.Errorf("through the descriptor: %d bytes, %v, %v", n, err, readErr)
	}
	if err := c.Send(Message{Step: Take, Inherit: true}); err != nil {
		t.Fatal(err)
	}
	if m := <-got; m.Step != Take || !m.Inherit {
		t.Errorf("the running daemon got %+v", m)
	}
}

// TestRefusals asks daemons that cannot hand over: each error says what to do, if
// anything can be done.
func TestRefusals(t *testing.T) {
	// A daemon of another release answers a hello with m.
	answering := func(m Message) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			raw, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			c := &Conn{unix: raw.(*net.UnixConn)}
			defer c.Close()
			_, _ = c.unix.Write([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: culvert-handover\r\n\r\n"))
			if _, err := c.Receive(); err == nil && m.Step != "" {
				_ = c.Send(m)
			}
		})
	}
	for _, test := range []struct {
		name  string
		h     http.Handler
		says  string
		is    error
		fixed bool // the error says what to do
	}{
		{"a release without handover", http.NewServeMux(), "its release does not support it", ErrUnknown, true},
		{"the path for something else", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusMethodNotAllowed) }), "its release does not support it", ErrUnknown, true},
		{"another version, which refuses", answering(Message{Step: Back, Why: "it speaks version 2"}), "does not hand over: it speaks version 2", nil, false},
		{"another version, which offers", answering(Message{Step: Offer, Protocol: Version + 1}), "offers version 2 of the handover, not 1", nil, true},
		{"another first message", answering(Message{Step: Yours}), `answered "yours"`, nil, false},
		{"it ends", answering(Message{}), "", ErrEnded, false},
		{"another user's", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "not yours", http.StatusForbidden) }), "does not hand over: not yours", nil, false},
	} {
		c, _, err := ask(t, serve(t, test.h))
		if err == nil {
			_ = c.Close()
			t.Errorf("%s: it handed over", test.name)
			continue
		}
		if !strings.Contains(err.Error(), test.says) || test.is != nil && !errors.Is(err, test.is) || test.fixed != strings.Contains(err.Error(), "Stop it, then start this one") {
			t.Errorf("%s: %v", test.name, err)
		}
	}
	if _, _, err := ask(t, filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no daemon: %v", err)
	}
}

// TestOtherSuccessor has a successor of another version ask: it is told why not, and what
// to do.
func TestOtherSuccessor(t *testing.T) {
	path := serve(t, Handler(func(c *Conn, _ Message) {
		t.Error("the running daemon accepts it")
		_ = c.Close()
	}))
	raw, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c := &Conn{unix: raw.(*net.UnixConn)}
	defer c.Close()
	if _, err := c.unix.Write([]byte("POST " + Path + " HTTP/1.1\r\nHost: culvert\r\nConnection: Upgrade\r\nUpgrade: culvert-handover\r\nContent-Length: 0\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	if n, err := c.unix.Read(b); err != nil || !strings.Contains(string(b[:n]), "101") {
		t.Fatalf("%q, %v", b[:n], err)
	}
	if err := c.Send(Message{Step: Hello, Protocol: Version + 1}); err != nil {
		t.Fatal(err)
	}
	if m, err := c.Receive(); err != nil || m.Step != Back || !strings.Contains(m.Why, "version 1 of the handover, not 2. Stop it") {
		t.Errorf("%+v, %v", m, err)
	}
}
