package readiness

import (
	"context"
	"errors"
	"net"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	ok := "HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n"
	for text, want := range map[string]Answer{
		ok + `{"ready":true}`: {Ready: true},
		ok + `{"ready":false,"code":"fenced","reason":"the lease ran out"}`: {Code: Fenced, Reason: "the lease ran out"},
		ok + `{"ready":false,"code":"new","reason":"words","more":1}`:       {Code: "new", Reason: "words"},
	} {
		if got, err := parse([]byte(text)); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q was parsed as %+v (%v)", text, got, err)
		}
	}
	for text, says := range map[string]string{
		"":                    "is not HTTP",
		"HTTP/1.0 200 OK\r\n": "is not HTTP",
		"SSH-2.0-x\r\n\r\n":   "is not HTTP",
		"HTTP/1.0 404 Not Found\r\n\r\n404 page not found": "older than the plugin",
		ok:                  "unexpected end of JSON",
		ok + `{}`:           "neither ready nor has a reason",
		ok + `{"ready":"y"`: "unexpected end of JSON",
	} {
		if got, err := parse([]byte(text)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q was parsed as %+v: got error %v, want %q", text, got, err, says)
		}
	}
}

func TestAskDoesNotHang(t *testing.T) {
	dir, err := os.MkdirTemp("", "culvert") // a socket's path is limited to 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if _, err := Ask(t.Context(), dir); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("without a socket: %v", err)
	}
	// A daemon that accepts the connection but does not answer, as if stopped.
	l, err := net.Listen("unix", SocketPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := Ask(ctx, dir); err == nil || errors.Is(err, ErrNoDaemon) {
		t.Errorf("a daemon that does not answer: %v", err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("Ask took %s", took)
	}
	// A socket left behind by a killed daemon.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Ask(t.Context(), dir); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("a stale socket: %v", err)
	}
}
