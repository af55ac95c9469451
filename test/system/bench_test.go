//go:build system

package system

import (
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"culvert/bench"
	"culvert/internal/lab/labtest"
)

// TestGeneratorBesideIPerf3 measures the underlay with the built-in generator
// and with iperf3 in one run. It checks only that both produce results of the
// same kind; to compare them needs a quiet machine (docs/benchmarks.md).
func TestGeneratorBesideIPerf3(t *testing.T) {
	labtest.NeedTUN(t)
	cmd := exec.Command(filepath.Join(labtest.Bin(t), "culvert"), "bench", "--quick", "--underlay", "offload", "--datapath", "native,native/iperf3",
		"--workload", "tcp1,udp1400", "--rounds", "1", "--duration", "1s", "--warmup", "300ms", "--json")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	text, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	var r bench.Report
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	for workload, metric := range map[string]bench.Metric{"tcp1": bench.Throughput, "udp1400": bench.Rate} {
		for _, datapath := range []string{"native", "native/iperf3"} {
			x, ok := r.Find("offload", datapath, workload, metric)
			if !ok || x.Median <= 0 {
				t.Errorf("%s on %s: %+v", workload, datapath, x)
			}
			t.Logf("%s on %s: %.1f %s", workload, datapath, x.Median, x.Unit)
		}
	}
}

// TestPageInChromium opens the page of a real run in a browser: the charts are
// drawn, the console stays empty, and the page makes no network request.
func TestPageInChromium(t *testing.T) {
	labtest.NeedTUN(t)
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	page := filepath.Join(dir, "page.html")
	cmd := exec.Command(filepath.Join(labtest.Bin(t), "culvert"), "bench", "--quick", "--duration", "100ms", "--rounds", "2", "--html", page)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}

	axe, err := os.ReadFile("../../bin/npm/node_modules/axe-core/axe.min.js")
	if err != nil {
		t.Fatalf("%v: `make test-system` installs it", err)
	}
	t.Run("axe", func(t *testing.T) {
		inBrowser(t, chromium, "bench", withAxe(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			_, _ = w.Write(text)
		}), axe))
	})

	// A proxy records everything that the browser requests.
	var asked []string
	var mu sync.Mutex
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, r.Host)
		http.Error(w, "no", http.StatusForbidden)
	}))
	defer proxy.Close()
	// A script in the page reports what is drawn.
	probe := bytes.Replace(text, []byte("</body>"), []byte(`<script>
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 50).length;
  const bars = [...document.querySelectorAll("svg rect[class]")].filter(r => getComputedStyle(r).fill.startsWith("rgb") && r.getBBox().height > 1).length;
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = ["PROBE", seen, bars, getComputedStyle(document.body).backgroundColor, performance.getEntriesByType("resource").length, "END"].join("|");
  document.body.append(out);
});
</script></body>`), 1)
	probed := filepath.Join(dir, "probed.html")
	if err := os.WriteFile(probed, probe, 0o644); err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(proxy.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	backgrounds := map[string]bool{}
	for _, dark := range []bool{false, true} {
		args := []string{
			"--headless", "--no-sandbox", "--disable-gpu", "--user-data-dir=" + filepath.Join(dir, "profile"),
			"--disable-background-networking", "--disable-component-update", "--no-first-run",
			"--proxy-server=127.0.0.1:" + port,
			"--enable-logging=stderr", "--log-level=0", "--dump-dom", "--virtual-time-budget=5000",
		}
		if dark {
			args = append(args, "--blink-settings=preferredColorScheme=0")
		}
		browser := exec.Command(chromium, append(args, "file://"+probed)...)
		var stdout, stderr bytes.Buffer
		browser.Stdout, browser.Stderr = &stdout, &stderr
		if err := runFor(browser, time.Minute); err != nil {
			t.Fatalf("%v\n%s", err, &stderr)
		}
		_, rest, ok := strings.Cut(stdout.String(), "PROBE|")
		result, _, ok2 := strings.Cut(rest, "|END")
		fields := strings.Split(result, "|")
		if !ok || !ok2 || len(fields) != 4 {
			t.Fatalf("the page did not load:\n%.2000s\n%s", &stdout, &stderr)
		}
		charts, _ := strconv.Atoi(fields[0])
		bars, _ := strconv.Atoi(fields[1])
		// tcp1, udp64, rr p50 and p99, costs; each with bars for the two
		// datapaths and the reference, on two underlays.
		if charts < 5 || bars < 5*2*2 {
			t.Errorf("%d charts with %d bars", charts, bars)
		}
		if fields[3] != "0" {
			t.Errorf("the page asked for %s resources", fields[3])
		}
		backgrounds[fields[2]] = true
		for line := range strings.Lines(stderr.String()) {
			if strings.Contains(line, "CONSOLE") {
				t.Errorf("on the console: %s", line)
			}
		}
	}
	if len(backgrounds) != 2 {
		t.Errorf("light and dark look the same: %v", backgrounds)
	}
	mu.Lock()
	defer mu.Unlock()
	// The browser itself contacts its vendor at start, whatever its flags.
	home := regexp.MustCompile(`(^|\.)(google|googleapis|gvt1|gstatic)\.com(:\d+)?$`)
	asked = slices.DeleteFunc(asked, func(host string) bool { return home.MatchString(host) })
	if len(asked) > 0 {
		t.Errorf("the network was asked for %v", asked)
	}
}

// runFor runs a program, and kills it after atMost.
func runFor(cmd *exec.Cmd, atMost time.Duration) error {
	if err := cmd.Start(); err != nil {
		return err
	}
	timer := time.AfterFunc(atMost, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	return cmd.Wait()
}
