package httpd

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// failsOnce is a listener whose first Accept fails, as without descriptors.
type failsOnce struct {
	net.Listener
	failed sync.Once
}

func (l *failsOnce) Accept() (c net.Conn, err error) {
	l.failed.Do(func() { err = outOfDescriptors{errors.New("too many open files")} })
	if err != nil {
		return nil, err
	}
	return l.Listener.Accept()
}

type outOfDescriptors struct{ error }

func (outOfDescriptors) Timeout() bool   { return false }
func (outOfDescriptors) Temporary() bool { return true }

// TestErrorsAreLogged makes an accept fail: the server goes on, and the error is in the
// daemon's log.
func TestErrorsAreLogged(t *testing.T) {
	var text bytes.Buffer
	log := slog.New(slog.NewTextHandler(&text, nil))
	fd, err := ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	s := New(fd, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }), log)
	s.wrap = func(l net.Listener) net.Listener { return &failsOnce{Listener: l} }
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	at, _ := listensAt(fd)
	answer, err := http.Get("http://" + at.String())
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	s.Stop() // nothing is logged after it
	if got := text.String(); !strings.Contains(got, "level=WARN") || !strings.Contains(got, "too many open files") {
		t.Errorf("the log is %q", got)
	}
}

// TestPause pauses a service: connections wait, and are answered after the next Start.
func TestPause(t *testing.T) {
	fd, err := ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	s := New(fd, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }), slog.New(slog.DiscardHandler))
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	s.Pause()
	at, _ := listensAt(fd)
	answered := make(chan error, 1)
	conn, err := net.Dial("tcp", at.String()) // accepted by the kernel
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		_, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if err == nil {
			_, err = io.ReadAll(conn)
		}
		answered <- err
	}()
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	if err := <-answered; err != nil {
		t.Error(err)
	}
	s.Stop()
}
