package bench

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"
)

// TestServerAsksForItsToken connects idle clients, clients with a wrong token and one
// with the right token to a server: only the last is served, without having to wait
// for the others' timeouts.
func TestServerAsksForItsToken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Server{Token: "secret", Log: slog.New(slog.DiscardHandler)}.Serve(ctx, l)
	}()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	at := l.Addr().String()
	for range 3 {
		idle, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer idle.Close()
	}
	began := time.Now()
	for _, token := range []string{"", "Secret"} {
		if _, err := introduce(t.Context(), at, token); err == nil || !strings.Contains(err.Error(), "--token") {
			t.Errorf("with the token %q: %v", token, err)
		}
	}
	r, err := introduce(t.Context(), at, "secret")
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > greetingTime/2 {
		t.Errorf("idle clients delayed it by %v", took)
	}
	if _, err := r.ask(t.Context(), request{Do: "ping"}); err != nil {
		t.Error(err)
	}
	if _, err := introduce(t.Context(), at, "secret"); err == nil || !strings.Contains(err.Error(), "another client") {
		t.Errorf("a second client: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}
