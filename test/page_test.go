package test

import (
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestPage asks a daemon for its page, over loopback, by a name that is not the
// host's, and from another host.
func TestPage(t *testing.T) {
	c := newCluster(t, 2)
	c.setConfig(config)
	c.startAll("--metrics", ":9472")
	n1, n2 := c.Nodes[0], c.Nodes[1]
	ask := func(dial func() *http.Client, url, host string) (int, string, http.Header) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = host
		answer, err := dial().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		b, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		return answer.StatusCode, string(b), answer.Header
	}
	client := func(dial *http.Transport) func() *http.Client {
		return func() *http.Client { return &http.Client{Transport: dial, Timeout: 5 * time.Second} }
	}
	here := client(&http.Transport{DialContext: n1.Dial, DisableKeepAlives: true})
	there := client(&http.Transport{DialContext: n2.Dial, DisableKeepAlives: true})

	code, text, header := ask(here, "http://127.0.0.1:9472/", "")
	policy := header.Get("Content-Security-Policy")
	if code != http.StatusOK || !strings.Contains(text, "<svg") || !strings.Contains(text, `id="n-n2"`) || !strings.HasPrefix(policy, "default-src 'none'") || strings.Contains(policy, "unsafe") {
		t.Errorf("%d, %q\n%.2000s", code, policy, text)
	}
	// Nothing is asked of another host, and nothing stands in the page that the
	// policy forbids.
	if found := regexp.MustCompile(`(?i)(https?:)?//[a-z0-9.]+|<script>|style=|onclick`).FindAllString(strings.ReplaceAll(text, "<!DOCTYPE", ""), -1); len(found) > 0 {
		t.Errorf("in the page: %q", found)
	}
	for _, name := range []string{"page.css", "page.js", "page.json"} {
		if code, text, _ := ask(here, "http://127.0.0.1:9472/"+name, "localhost:9472"); code != http.StatusOK || text == "" {
			t.Errorf("%s: %d", name, code)
		}
	}
	if code, _, _ := ask(here, "http://127.0.0.1:9472/", "evil.example"); code != http.StatusForbidden {
		t.Errorf("by another name: %d", code)
	}
	outside := "http://" + n1.Addrs[0].String() + ":9472/"
	if code, text, _ := ask(there, outside, "localhost"); code != http.StatusForbidden || !strings.Contains(text, "ssh -L") {
		t.Errorf("from another host: %d, %s", code, text)
	}
	if code, _, _ := ask(there, outside+"metrics", ""); code != http.StatusOK {
		t.Errorf("metrics from another host: %d", code)
	}
}
