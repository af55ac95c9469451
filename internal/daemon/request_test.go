package daemon

import (
	"bufio"
	"bytes"
	"net/http"
	"net/http/httptest"
	"testing"

	"culvert/internal/fuzzloop"
	"culvert/internal/httpd"
)

// FuzzRequest sends arbitrary bytes as a request to the daemon's socket and the metrics'
// address: there is an answer, and only GET and HEAD succeed.
func FuzzRequest(std *testing.F) {
	f := fuzzloop.Of(std)
	for _, text := range []string{
		"GET /status HTTP/1.1\r\nHost: culvert\r\n\r\n",
		"GET /cni-status HTTP/1.0\r\n\r\n",
		"POST /status HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
		"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\nRange: bytes=0-1\r\n\r\n",
		"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
		"HEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		f.Add([]byte(text))
	}
	h := newState(Options{})
	doors := []http.Handler{h.socket(), probes(h, httpd.Access{})}
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, door := range doors {
			r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(text)))
			if err != nil {
				return
			}
			w := httptest.NewRecorder()
			http.MaxBytesHandler(door, httpd.MaxBodyBytes).ServeHTTP(w, r)
			if w.Code == http.StatusOK && r.Method != http.MethodGet && r.Method != http.MethodHead {
				t.Errorf("%s %s is done", r.Method, r.URL)
			}
			if w.Code < 200 || w.Code > 599 {
				t.Errorf("%s %s: %d", r.Method, r.URL, w.Code)
			}
		}
	})
}
