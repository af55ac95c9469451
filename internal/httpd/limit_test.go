package httpd

import (
	"bufio"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestConnectionsAreLimited makes more requests at once than there may be connections
// over TCP: at most maxConnections are served at a time, the others wait until one of
// these is closed, and all are answered.
func TestConnectionsAreLimited(t *testing.T) {
	const clients = maxConnections + 8
	var state sync.Mutex
	var served, most int
	entered, leave := make(chan struct{}, clients), make(chan struct{})
	fd, err := ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	s, err := Access{}.Service(fd, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		state.Lock()
		served++
		most = max(most, served)
		state.Unlock()
		entered <- struct{}{}
		<-leave
		w.Header().Set("Connection", "close")
		state.Lock()
		served--
		state.Unlock()
	}), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	at, _ := listensAt(fd)

	var requests sync.WaitGroup
	for range clients {
		c, err := net.Dial("tcp", at.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")); err != nil {
			t.Fatal(err)
		}
		requests.Go(func() {
			answer, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Error(err)
				return
			}
			answer.Body.Close()
			if answer.StatusCode != http.StatusOK {
				t.Error(answer.Status)
			}
		})
	}
	for range maxConnections {
		<-entered
	}
	close(leave)
	requests.Wait()
	if most != maxConnections {
		t.Errorf("%d connections were served at a time, not %d", most, maxConnections)
	}
}
