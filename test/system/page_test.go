//go:build system

package system

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"culvert/internal/api"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
	"culvert/internal/page"
)

// TestDaemonPageInChromium opens the page of a real daemon, and pages with 16,
// 200 and 5,000 peers, in a browser, light and dark, wide and narrow: axe-core
// finds no violation, the console stays empty, and the script runs under the
// page's own security policy. CULVERT_SCREENSHOTS names a directory for
// screenshots.
func TestDaemonPageInChromium(t *testing.T) {
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatal(err)
	}
	axe, err := os.ReadFile("../../bin/npm/node_modules/axe-core/axe.min.js")
	if err != nil {
		t.Fatalf("%v: `make test-system` installs it", err)
	}
	pages := map[string]http.Handler{
		"daemon":   daemonPage(t),
		"many":     page.Handler(manyStatus, func() api.Peers { return manyPeers(5000) }),
		"sixteen":  page.Handler(manyStatus, func() api.Peers { return manyPeers(16) }),
		"hundreds": page.Handler(manyStatus, func() api.Peers { return manyPeers(200) }),
	}
	for name, handler := range pages {
		t.Run(name, func(t *testing.T) { inBrowser(t, chromium, name, withAxe(handler, axe)) })
	}
}

// inBrowser opens a page that has axe-core with ?axe, light and dark, wide and narrow.
func inBrowser(t *testing.T, chromium, name string, handler http.Handler) {
	server := httptest.NewServer(handler)
	defer server.Close()
	for _, dark := range []bool{false, true} {
		for _, width := range []int{1280, 390} {
			look := fmt.Sprintf("%s-%d-%s", name, width, map[bool]string{true: "dark", false: "light"}[dark])
			t.Run(look, func(t *testing.T) {
				args := []string{
					"--headless", "--no-sandbox", "--disable-gpu", "--user-data-dir=" + filepath.Join(t.TempDir(), "profile"),
					"--disable-background-networking", "--disable-component-update", "--no-first-run", "--hide-scrollbars",
					"--enable-logging=stderr", "--log-level=0", "--window-size=" + strconv.Itoa(width) + ",1500",
				}
				if dark {
					args = append(args, "--blink-settings=preferredColorScheme=0")
				}
				if dir := os.Getenv("CULVERT_SCREENSHOTS"); dir != "" {
					shot := exec.Command(chromium, append(args, "--screenshot="+filepath.Join(dir, look+".png"), "--virtual-time-budget=6000", server.URL+"/")...)
					if err := runFor(shot, time.Minute); err != nil {
						t.Fatal(err)
					}
				}
				browser := exec.Command(chromium, append(args, "--dump-dom", "--timeout=20000", "--virtual-time-budget=6000", server.URL+"/?axe")...)
				var stdout, stderr bytes.Buffer
				browser.Stdout, browser.Stderr = &stdout, &stderr
				if err := runFor(browser, time.Minute); err != nil {
					t.Fatalf("%v\n%s", err, &stderr)
				}
				_, rest, ok := strings.Cut(stdout.String(), "AXE|")
				result, _, ok2 := strings.Cut(rest, "|END")
				if !ok || !ok2 {
					t.Fatalf("axe did not run:\n%.1500s\n%.1500s", &stdout, &stderr)
				}
				if result != "" {
					t.Errorf("violations: %s", result)
				}
				for line := range strings.Lines(stderr.String()) {
					if strings.Contains(line, "CONSOLE") {
						t.Errorf("on the console: %s", line)
					}
				}
			})
		}
	}
}

// withAxe adds axe-core to a page requested with ?axe.
func withAxe(next http.Handler, axe []byte) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /axe.js", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/javascript")
		_, _ = w.Write(axe)
		_, _ = w.Write([]byte(`
addEventListener("load", () => setTimeout(async () => {
  const found = await axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"] });
  const out = document.createElement("pre");
  out.textContent = "AXE|" + found.violations.map(v => v.id + ": " + v.nodes.slice(0, 3).map(n => n.html + " " + n.failureSummary).join(" ; ")).join(" / ") + "|END";
  document.body.append(out);
}, 2500));`))
	})
	mux.HandleFunc("GET /favicon.ico", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery != "axe" || r.URL.Path != "/" {
			next.ServeHTTP(w, r)
			return
		}
		r.URL.RawQuery = ""
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		for k, v := range rec.Header() {
			if k != "Content-Length" {
				w.Header()[k] = v
			}
		}
		_, _ = w.Write(bytes.Replace(rec.Body.Bytes(), []byte("</head>"), []byte(`<script src="axe.js"></script></head>`), 1))
	})
	return mux
}

// daemonPage is the page of a real node with one peer.
func daemonPage(t *testing.T) http.Handler {
	t.Helper()
	labtest.NeedTUN(t)
	l := labtest.New(t, lab.Options{Nodes: 2})
	endpoint := labtest.StartEtcd(t, l)
	culvert := filepath.Join(labtest.Bin(t), "culvert")
	command := func(args ...string) {
		t.Helper()
		if out, err := l.Fabric.Run(t.Context(), culvert, append(args, "--etcd-endpoints", endpoint)...); err != nil {
			t.Fatalf("%s\n%v", out, err)
		}
	}
	command("config", "set", `{"Network":"10.5.0.0/22","Backend":{"Type":"vxlan"}}`)
	command("lease", "reserve", "10.5.3.0/24")
	for _, n := range l.Nodes {
		if _, err := n.Start(lab.Command{Name: n.ID, Path: culvert, Args: []string{"run", "--node-id", n.ID, "--run-dir", n.RunDir, "--etcd-endpoints", endpoint, "--datapath", "userspace"}}); err != nil {
			t.Fatal(err)
		}
	}
	dir := l.Nodes[0].RunDir
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		p, err := api.GetPeers(t.Context(), dir)
		if err == nil && len(p.Peers) > 0 && p.Peers[0].State == api.PeerIdle {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%+v, %v", p, err)
		}
	}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "culvert", Path: "/page"})
	proxy.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", api.SocketPath(dir))
	}}
	return proxy
}

func manyStatus() api.Status {
	return api.Status{
		Node: "worker-00000", Ready: true, Lease: &api.Lease{Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24")}},
		Store: api.Store{Kind: "etcd", Connected: true}, Underlay: api.Underlay{Interface: "eth0", MTU: 1500},
		Datapath: api.Datapath{WireFormat: "vxlan", Kind: "userspace", MTU: 1450},
		Warnings: []api.Warning{{Check: "silent-peer", Text: "nothing has come from the peer at 172.16.0.7 (10.0.8.0/24) since 2026-01-02T15:04:05Z, although this node sends to it", Fix: "see that it runs, and that the firewalls there, here and on the way let UDP port 8472 through in both directions"}},
	}
}

// manyPeers returns peers in all states, whose counters grow with time.
func manyPeers(n int) api.Peers {
	now := time.Now()
	p := api.Peers{Node: "worker-00000", At: now, MTU: 1450}
	for i := 1; i <= n; i++ {
		drops := uint64(i % 3)
		s := api.PeerState{
			Node: fmt.Sprintf("worker-%05d", i), Backend: "vxlan", Subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24),
			PublicIP: netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}), Way: api.WayUserspace, State: api.PeerIdle, RTTSeconds: 0.0002 * float64(1+i%40),
			PathMTU: 1450, Heard: now.Add(-time.Duration(i%60) * time.Second), Drops: &drops,
			Sent: &api.PeerCount{Bytes: uint64(now.UnixMilli()) * uint64(i)}, Received: &api.PeerCount{Bytes: uint64(now.UnixMilli()) * uint64(i%7)},
		}
		switch {
		case i%97 == 7:
			s.State, s.Problem, s.RTTSeconds = api.PeerSilent, "no answer", 0
		case i%5 == 0:
			s.State = api.PeerActive
		case i%31 == 11:
			s.State, s.RTTSeconds, s.PathMTU = api.PeerUnknown, 0, 0
		}
		p.Peers = append(p.Peers, s)
	}
	return p
}
