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
			t.Errorf("%q reads as %+v (%v)", text, got, err)
		}
	}
	for text, says := range map[string]string{
		"":                    "is not HTTP",
		"HTTP/1.0 200 OK\r\n": "is not HTTP",
		"SSH-2.0-x\r\n\r\n":   "is not HTTP",
		"HTTP/1.0 404 Not Found\r\n\r\n404 page not found": "older than the plugin",
		ok:                  "unexpected end of JSON",
		ok + `{}`:           "neither that it is ready nor why not",
		ok + `{"ready":"y"`: "unexpected end of JSON",
	} {
		if got, err := parse([]byte(text)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q reads as %+v: %v, which does not say %q", text, got, err, says)
		}
	}
}

func TestAskDoesNotHang(t *testing.T) {
	dir, err := os.MkdirTemp("", "culvert") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if _, err := Ask(t.Context(), dir); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("without a socket: %v", err)
	}
	// A daemon that takes the connection and says nothing, as a stopped one.
	l, err := net.Listen("unix", SocketPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := Ask(ctx, dir); err == nil || errors.Is(err, ErrNoDaemon) {
		t.Errorf("a mute daemon: %v", err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("it took %s", took)
	}
	// The socket that a killed daemon leaves.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Ask(t.Context(), dir); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("a dead socket: %v", err)
	}
}
