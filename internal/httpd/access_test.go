package httpd

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"culvert/internal/testca"
)

// TestAccess requests with and without TLS and token, and with too large a header.
func TestAccess(t *testing.T) {
	dir := t.TempDir()
	token := filepath.Join(dir, "token")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(token, "secret\n")
	ca := testca.New(t)
	certificate, _ := ca.Issue(t, "server", ca)
	roots := x509.NewCertPool()
	roots.AddCert(certificate)

	access := Access{CertFile: ca.Path("server.pem"), KeyFile: ca.Path("server-key.pem"), TokenFile: token}
	log := slog.New(slog.DiscardHandler)
	handler := func(a Access) http.Handler {
		mux := http.NewServeMux()
		mux.Handle("/metrics", a.Guard(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
		mux.HandleFunc("/livez", func(http.ResponseWriter, *http.Request) {})
		return mux
	}
	listen := func(a Access) (*Service, error) {
		fd, err := ListenTCP("127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		return a.Service(fd, handler(a), log)
	}
	s, err := listen(access)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	at, loopback := listensAt(s.fd)
	if !loopback {
		t.Errorf("%s is no loopback address", at)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
	for _, c := range []struct {
		url, header, value string
		want               int
	}{
		{"https://" + at.String() + "/metrics", "Authorization", "Bearer secret", http.StatusOK},
		{"https://" + at.String() + "/metrics", "Authorization", "Bearer secrets", http.StatusUnauthorized},
		{"https://" + at.String() + "/metrics", "Authorization", "secret", http.StatusUnauthorized},
		{"https://" + at.String() + "/metrics", "", "", http.StatusUnauthorized},
		{"https://" + at.String() + "/livez", "", "", http.StatusOK},
		{"https://" + at.String() + "/livez", "X-Large", strings.Repeat("x", 2*maxHeaderBytes), http.StatusRequestHeaderFieldsTooLarge},
		{"http://" + at.String() + "/metrics", "", "", http.StatusBadRequest},
	} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.url, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		if c.header != "" {
			r.Header.Set(c.header, c.value)
		}
		answer, err := client.Do(r)
		if err != nil {
			t.Errorf("%s %.30s: %v", c.url, c.value, err)
			continue
		}
		answer.Body.Close()
		if answer.StatusCode != c.want {
			t.Errorf("%s %.30s: %d, not %d", c.url, c.value, answer.StatusCode, c.want)
		}
	}
	// A new token in the file is valid at once.
	write(token, "other")
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+at.String()+"/metrics", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer other")
	if answer, err := client.Do(r); err != nil || answer.StatusCode != http.StatusOK {
		t.Errorf("with the new token: %v %v", answer, err)
	} else {
		answer.Body.Close()
	}
	for _, wrong := range []Access{{TokenFile: filepath.Join(dir, "none")}, {CertFile: ca.Path("server-key.pem"), KeyFile: ca.Path("server.pem")}} {
		if _, err := listen(wrong); err == nil {
			t.Errorf("%+v is taken", wrong)
		}
	}
}
