package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestServesUntilTold(t *testing.T) {
	data := t.TempDir()
	for range 2 { // the second run uses the data of the first
		ctx, cancel := context.WithCancel(t.Context())
		stdout, w := io.Pipe()
		var stderr bytes.Buffer
		code := make(chan int, 1)
		go func() {
			code <- run(ctx, []string{"--data-dir", data, "--listen-client", "127.0.0.1:0", "--unsafe-no-fsync"}, w, &stderr)
			_ = w.Close()
		}()
		line, err := bufio.NewReader(stdout).ReadString('\n')
		url, ok := strings.CutPrefix(strings.TrimSpace(line), "ready http://127.0.0.1:")
		if err != nil || !ok || url == "0" {
			t.Fatalf("%q, %v, %s", line, err, &stderr)
		}
		resp, err := http.Get("http://127.0.0.1:" + url + "/health")
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if !strings.Contains(string(body), `"health":"true"`) {
			t.Errorf("health: %s", body)
		}
		http.DefaultClient.CloseIdleConnections()
		cancel()
		select {
		case c := <-code:
			if c != 0 || stderr.Len() != 0 {
				t.Errorf("exit %d: %s", c, &stderr)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("the server does not stop")
		}
	}
}

func TestWrongFlags(t *testing.T) {
	for _, args := range [][]string{{}, {"--nonsense"}, {"--data-dir", "x", "y"}, {"--start-timeout", "soon"}} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), args, &stdout, &stderr); code != 2 || stdout.Len() != 0 ||
			strings.Count(stderr.String(), "\n") != 1 || !strings.Contains(stderr.String(), "--help") {
			t.Errorf("%v: exit %d, %q, %q", args, code, &stdout, &stderr)
		}
	}
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"--help"}, &stdout, &stderr); code != 0 || !strings.Contains(stdout.String(), "-data-dir") {
		t.Errorf("exit %d, %s", code, &stdout)
	}
}

func TestWhatCannotStart(t *testing.T) {
	for name, args := range map[string][]string{
		"half of a pair":  {"--cert-file", "x"},
		"a missing pair":  {"--cert-file", "/nonexistent", "--key-file", "/nonexistent"},
		"a bad level":     {"--log-level", "loud"},
		"a bad address":   {"--listen-client", "nowhere.invalid:0"},
		"a bad advertise": {"--advertise-client", "here"},
		"a CA alone":      {"--client-ca-file", "x"},
	} {
		var stdout, stderr bytes.Buffer
		args = append([]string{"--data-dir", t.TempDir(), "--listen-client", "127.0.0.1:0"}, args...)
		if code := run(t.Context(), args, &stdout, &stderr); code != 1 || stdout.Len() != 0 || stderr.Len() == 0 {
			t.Errorf("%s: exit %d, %q, %q", name, code, &stdout, &stderr)
		}
	}
}
