package metrics

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

var update = flag.Bool("update", false, "write docs/metrics.md anew")

// TestMetricsLint runs Prometheus' linter on every metric.
func TestMetricsLint(t *testing.T) {
	var text strings.Builder
	for _, m := range allMetrics {
		fmt.Fprintf(&text, "# HELP %s %s\n# TYPE %s %s\n", m.name, m.help, m.name, m.kind)
		var labels []string
		for _, l := range m.labels {
			labels = append(labels, l+`="x"`)
		}
		sets := "{" + strings.Join(labels, ",") + "}"
		if m.kind == "histogram" {
			fmt.Fprintf(&text, "%s_bucket{%s} 1\n%s_sum%s 1\n%s_count%s 1\n", m.name, strings.Join(append(labels, `le="+Inf"`), ","), m.name, sets, m.name, sets)
			continue
		}
		fmt.Fprintf(&text, "%s%s 1\n", m.name, sets)
	}
	problems, err := promlint.New(strings.NewReader(text.String())).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// TestMetricsDocs compares docs/metrics.md with the code.
func TestMetricsDocs(t *testing.T) {
	const file, begin, end = "../../docs/metrics.md", "<!-- metrics: generated -->\n", "<!-- end -->\n"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(text), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s lacks its marks", file)
	}
	var table strings.Builder
	table.WriteString("| metric | type | labels | what it says |\n| --- | --- | --- | --- |\n")
	for _, m := range allMetrics {
		fmt.Fprintf(&table, "| `%s` | %s | %s | %s |\n", m.name, m.kind, strings.Join(m.labels, ", "), m.help)
	}
	want := head + begin + table.String() + end + tail
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if want != string(text) {
		t.Errorf("%s is not what the code says: go test ./internal/metrics -run MetricsDocs -update", file)
	}
}
