package report

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/perf/benchfmt"

	"culvert/bench"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// sample returns a report with everything that the output formats show: several
// underlays, spread, a doubtful ratio and all kinds of failures.
func sample() *bench.Report {
	r := &bench.Report{Schema: bench.Schema, Machine: bench.Machine{
		Time: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC), Culvert: "v1.2.3", Go: "go1.26.0", Kernel: "6.18.44",
		Arch: "amd64", CPU: "AMD EPYC", CPUs: 2, MemoryMB: 24000, Governor: "none", Load: 0.25, Steal: 0.01,
		Congestion: "cubic", Generator: "builtin", Nodes: 2, Ends: bench.Nodes, Duration: 1, Warmup: 0.25,
		Offloads: map[string]map[string]bool{"offload": {"rx-gro": true}, "bare": {"rx-gro": false, "tx-udp-segmentation": false}},
		Programs: map[string]string{"tinc": "tinc version 1.0.36"},
	}}
	add := func(underlay, datapath, workload string, m bench.Metric, values ...float64) {
		for _, v := range values {
			r.Add(underlay, datapath, workload, m, v)
		}
	}
	add("bare", "vxlan/kernel", "tcp1", bench.Throughput, 6.4, 6.5, 6.3)
	add("offload", "native", "tcp1", bench.Throughput, 53.3, 52, 54)
	add("offload", "vxlan/kernel", "tcp1", bench.Throughput, 22, 21.5, 22.4)
	add("offload", "vxlan/kernel", "tcp1", bench.CPUPerGB, 0.52, 0.51, 0.53)
	add("offload", "vxlan/userspace", "tcp1", bench.Throughput, 10.5, 24, 11)
	add("offload", "vxlan/userspace", "tcp1", bench.CPUPerGB, 1.1, 1.2, 1)
	add("offload", "vxlan/userspace", "tcp1", bench.DaemonCPUPerGB, 0.7, 0.71, 0.72)
	add("offload", "vxlan/userspace", "tcp1", bench.SyscallsPerPacket, 0.12, 0.13, 0.11)
	add("offload", "vxlan/userspace", "rr", bench.P50, 95)
	add("offload", "vxlan/kernel", "rr", bench.P50, 59)
	add("offload", "wireguard-go", "rr", bench.P50, 20983)
	r.Fail(bench.Failure{Underlay: "offload", Datapath: "ipip/kernel", Reason: "the kernel has no ipip device", Unavailable: true})
	r.Fail(bench.Failure{Underlay: "bare", Datapath: "ipip/kernel", Reason: "the kernel has no ipip device", Unavailable: true})
	r.Fail(bench.Failure{Underlay: "offload", Datapath: "native", Workload: "rr", Reason: "no answer within 3s"})
	r.Sort()
	return r
}

// golden compares got with a file in testdata, or writes it with -update.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (go test ./bench/report -update rewrites it):\n%s", name, got)
	}
}

func TestForms(t *testing.T) {
	r := sample()
	var table, csv, gobench bytes.Buffer
	if err := Table(&table, r, "vxlan/kernel"); err != nil {
		t.Fatal(err)
	}
	if err := CSV(&csv, r); err != nil {
		t.Fatal(err)
	}
	if err := GoBench(&gobench, r); err != nil {
		t.Fatal(err)
	}
	text, err := r.JSON()
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "report.table", table.Bytes())
	golden(t, "report.csv", csv.Bytes())
	golden(t, "report.gobench", gobench.Bytes())
	golden(t, "report.json", text)
	var ratios bytes.Buffer
	if err := Ratios(&ratios, r, "vxlan/kernel"); err != nil {
		t.Fatal(err)
	}
	golden(t, "report.ratios", ratios.Bytes())

	// benchstat's parser accepts the output.
	read, units := benchfmt.NewReader(&gobench, "report"), 0
	lines := 0
	for read.Scan() {
		switch x := read.Result().(type) {
		case *benchfmt.Result:
			lines++
			if _, ok := x.Value("ns/op"); ok || len(x.Values) == 0 {
				t.Errorf("%s has the values %v", x.Name, x.Values)
			}
		case *benchfmt.UnitMetadata:
			units++
		case *benchfmt.SyntaxError:
			t.Error(x)
		}
	}
	if err := read.Err(); err != nil || lines == 0 || units != len(bench.Metrics()) {
		t.Errorf("%d lines, %d units: %v", lines, units, err)
	}
}

func TestFigure(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.01234: "0.012", 0.5: "0.500", 6.437: "6.44", 53.31: "53.3", 287.4: "287", 20983.2: "20983"} {
		if got := figure(v); got != want {
			t.Errorf("%v is shown as %s", v, got)
		}
	}
}

func TestCompare(t *testing.T) {
	with := func(m bench.Metric, before, after []float64) Comparison {
		a, b := &bench.Report{}, &bench.Report{}
		for _, v := range before {
			a.Add("offload", "native", "tcp1", m, v)
		}
		for _, v := range after {
			b.Add("offload", "native", "tcp1", m, v)
		}
		c, err := Compare(a, b)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for _, c := range []struct {
		name          string
		metric        bench.Metric
		before, after []float64
		changed       bool
		better        bool
		regression    bool // beyond 10 %
	}{
		{"the same", bench.Throughput, []float64{10, 11, 12}, []float64{10, 11, 12}, false, false, false},
		{"less than EffectFloor", bench.Throughput, []float64{10, 10, 10}, []float64{9.6, 9.6, 9.6}, false, false, false},
		{"overlapping rounds", bench.Throughput, []float64{10, 11, 8}, []float64{7, 7.5, 8.5}, false, false, false},
		{"a little worse", bench.Throughput, []float64{10, 10.1, 9.9}, []float64{9.2, 9.3, 9.1}, true, false, false},
		{"much worse", bench.Throughput, []float64{10, 10.1, 9.9}, []float64{7, 7.1, 7.2}, true, false, true},
		{"much better", bench.Throughput, []float64{10, 10.1, 9.9}, []float64{20, 20, 20}, true, true, false},
		{"latency up is worse", bench.P50, []float64{55, 56, 57}, []float64{80, 81, 82}, true, false, true},
		{"cost down is better", bench.CPUPerGB, []float64{0.5, 0.51, 0.52}, []float64{0.4, 0.41, 0.42}, true, true, false},
		{"from nothing", bench.SyscallsPerPacket, []float64{0, 0, 0}, []float64{1, 1, 1}, true, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := with(c.metric, c.before, c.after)
			if (len(got.Changes) == 1) != c.changed || got.Same != 1-len(got.Changes) {
				t.Fatalf("%+v", got)
			}
			if c.changed && got.Changes[0].Better != c.better {
				t.Errorf("better: %t", got.Changes[0].Better)
			}
			if (len(got.Regressions(0.10)) == 1) != c.regression {
				t.Errorf("regressions: %+v", got.Regressions(0.10))
			}
		})
	}
}

func TestCompareTable(t *testing.T) {
	before, after := sample(), sample()
	for i := range after.Results {
		x := &after.Results[i]
		factor, ok := map[bench.Metric]float64{bench.Throughput: 0.5, bench.P50: 0.9}[x.Metric]
		if !ok {
			continue
		}
		x.Median, x.Min, x.Max = x.Median*factor, x.Min*factor, x.Max*factor
	}
	after.Results = after.Results[1:]
	after.Add("cloud", "native", "rr", bench.P99, 3)
	after.Machine.Kernel = "6.19"
	var b bytes.Buffer
	c, err := Compare(before, after)
	if err == nil {
		err = c.Table(&b, 0.10)
	}
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "compare.table", b.Bytes())
	after.Machine.Ends = bench.Pods
	if _, err := Compare(before, after); err == nil || !strings.Contains(err.Error(), "old report are nodes and in the new one pods") {
		t.Errorf("other ends: %v", err)
	}
	after.Machine.Nodes = 3
	if _, err := Compare(before, after); err == nil || !strings.Contains(err.Error(), "of 2 nodes and the new one of 3") {
		t.Errorf("other nodes: %v", err)
	}
}

func TestPage(t *testing.T) {
	var b bytes.Buffer
	if err := HTML(&b, sample(), "vxlan/kernel"); err != nil {
		t.Fatal(err)
	}
	page := b.String()
	for _, want := range []string{
		"<svg", "prefers-color-scheme:dark", "var(--better)", "the kernel has no ipip device", "x0.50", "<code>vxlan/userspace</code>",
		// The summary's questions and answers, the reference, the bars' labels.
		"Userspace or the kernel?", "VXLAN, userspace, against VXLAN, kernel", "<strong>Worse:</strong> the time of a request (1.61×)",
		"request and answer, p50: worse on offload (1.61×)", "22.0 Gbit/s, the reference", "≈ 0.50×  11.0 Gbit/s", "▲ 2.42×  53.3 Gbit/s",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	// The page is self-contained: it has no URLs except XML namespaces.
	for _, namespace := range []string{`xmlns="http://www.w3.org/2000/svg"`, `xmlns:xlink="http://www.w3.org/1999/xlink"`} {
		page = strings.ReplaceAll(page, namespace, "")
	}
	if opened, closed := strings.Count(page, "<svg"), strings.Count(page, "</svg>"); opened != closed || opened != strings.Count(page, `role="img" aria-label="`) {
		t.Errorf("%d <svg> and %d </svg>, or one without a label", opened, closed)
	}
	for _, bad := range []string{"http:", "https:", "<script", "@import", "src=", "NaN", "Inf", "%!"} {
		if strings.Contains(page, bad) {
			t.Errorf("the page contains %q", bad)
		}
	}
}

func TestDocs(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, DocsFile)
	if err := Docs(dir, sample(), "vxlan/kernel"); err == nil {
		t.Error("Docs without a page succeeded")
	}
	page := "# Page\n" + docsScaleBegin + "\nold scale\n" + docsScaleEnd + "\nbetween\n" + docsBegin + "\nold results\n" + docsEnd + "\npods\n" + docsPodsBegin + "\nold pods\n" + docsPodsEnd + "\nend\n"
	if err := os.WriteFile(path, []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time replaces the first results
		if err := Docs(dir, sample(), "vxlan/kernel"); err != nil {
			t.Fatal(err)
		}
		pods := sample()
		pods.Machine.Ends = bench.Pods
		pods.Results = pods.Results[:1]
		if err := Docs(dir, pods, "vxlan/kernel"); err != nil {
			t.Fatal(err)
		}
		if err := ScaleDocs(dir, &bench.ScaleReport{Scale: []bench.Scaled{{Peers: 7, ReadyMS: 12}}}); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got := string(text)
	for want, times := range map[string]int{
		"# Page\n": 1, "\nbetween\n": 1, "\nend\n": 1, "old": 0, "| 7 | - | - | - | 12.0 | - |": 1,
		"| vxlan/userspace | 11.0 ±61% x0.50? |": 1, "](charts/tcp1-throughput.svg)": 1, "](charts/pods/tcp1-throughput.svg)": 1,
		"- ends: nodes": 1, "- ends: pods, each behind a veth": 1,
	} {
		if n := strings.Count(got, want); n != times {
			t.Errorf("%q occurs %d times:\n%s", want, n, got)
		}
	}
	charts, _ := filepath.Glob(filepath.Join(dir, "charts", "*.svg"))
	pods, _ := filepath.Glob(filepath.Join(dir, "charts", "pods", "*.svg"))
	charts = append(charts, pods...)
	if len(pods) != 1 || len(charts) != strings.Count(got, "](charts/") {
		t.Errorf("the charts are %v", charts)
	}
}

// TestDocsOfThisProject checks that the real page has the marker lines and describes
// all workloads and metrics.
func TestDocsOfThisProject(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", DocsFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, mark := range []string{docsBegin, docsEnd, docsPodsBegin, docsPodsEnd, docsScaleBegin, docsScaleEnd} {
		if strings.Count(string(text), mark) != 1 {
			t.Errorf("%s does not have exactly one line %q", DocsFile, mark)
		}
	}
	for _, w := range bench.WorkloadNames() {
		if !strings.Contains(string(text), "`"+w+"`") {
			t.Errorf("%s does not describe the workload %s", DocsFile, w)
		}
	}
	for _, m := range bench.Metrics() {
		if !strings.Contains(string(text), "`"+string(m)+"`") {
			t.Errorf("%s does not describe the metric %s", DocsFile, m)
		}
	}
}

// TestChartIsXML checks that the SVG files are well-formed XML, and that bars with
// ratios far beyond the scale stay within the panel.
func TestChartIsXML(t *testing.T) {
	r := sample()
	r.Add("offload", "naive", "tcp1", bench.Throughput, 0)
	r.Add("offload", "tinc", "tcp1", bench.Throughput, 1e-6)
	charts := view{r}.charts("vxlan/kernel")
	if len(charts) < 4 {
		t.Fatalf("%d charts", len(charts))
	}
	for _, c := range charts {
		text := c.SVG()
		for d := xml.NewDecoder(strings.NewReader(text)); ; {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v\n%s", c.Name, err, text)
			}
			e, ok := token.(xml.StartElement)
			if !ok || e.Name.Local != "rect" {
				continue
			}
			for _, a := range e.Attr {
				if v, err := strconv.ParseFloat(a.Value, 64); err == nil && (v < 0 || v > panelWidth) {
					t.Errorf("%s: a bar with %s=%s", c.Name, a.Name.Local, a.Value)
				}
			}
		}
	}
	if none := (view{r}).charts("nobody"); len(none) != len(charts) || strings.Contains(none[0].SVG(), "<path class=\"span") {
		t.Error("without a reference the charts must have figures and no ratios")
	}
}

// TestAgainst compares two datapaths that differ on all underlays, on some, or on none.
func TestAgainst(t *testing.T) {
	for _, c := range []struct {
		name string
		x    [2][]float64 // rounds of tcp1 on two underlays; the other datapath has 10 always
		want string
	}{
		{"better", [2][]float64{{20, 20}, {15, 15}}, "Better TCP with one stream (1.50× to 2.00×)"},
		{"better, and level", [2][]float64{{20, 20}, {10, 10}}, "Better TCP with one stream (1.00× to 2.00×)"},
		{"worse", [2][]float64{{5, 5}, {5, 5}}, "Worse TCP with one stream (0.50×)"},
		{"both", [2][]float64{{20, 20}, {5, 5}}, "Depends on the underlay TCP with one stream (0.50× to 2.00×)"},
		{"small", [2][]float64{{10.4, 10.4}, {9.7, 9.7}}, "No clear difference TCP with one stream (0.97× to 1.04×)"},
		{"rounds disagree", [2][]float64{{8, 30}, {10, 10}}, "No clear difference TCP with one stream (1.00× to 1.90×)"},
	} {
		r := &bench.Report{}
		for i, u := range []string{"offload", "bare"} {
			for _, v := range c.x[i] {
				r.Add(u, "vxlan/userspace", "tcp1", bench.Throughput, v)
				r.Add(u, "vxlan/kernel", "tcp1", bench.Throughput, 10)
			}
		}
		says, lines := view{r}.against("vxlan/userspace", "vxlan/kernel")
		if len(says) != 1 || len(lines) != 1 || says[0].Name+" "+says[0].Value != c.want {
			t.Errorf("%s: %v %v", c.name, says, lines)
		}
	}
	if says, _ := (view{sample()}).against("tinc", "native"); len(says) > 0 {
		t.Errorf("without figures of one datapath: %v", says)
	}
}

// TestReadableNames checks that all datapaths, underlays, workloads and metrics have
// titles, and that those of datapaths are unique.
func TestReadableNames(t *testing.T) {
	seen := map[string]string{}
	for _, d := range bench.Datapaths() {
		title := readable(d.Name)
		if d.Title == "" || d.About == "" || seen[title] != "" {
			t.Errorf("%s and %s are %q", d.Name, seen[title], title)
		}
		seen[title] = d.Name
	}
	for _, u := range bench.Underlays() {
		if underlayTitles[u] == "" {
			t.Errorf("the underlay %s has no title", u)
		}
	}
	for _, w := range bench.Workloads() {
		if w.Title == "" || w.About == "" {
			t.Errorf("the workload %s has no title", w.Name)
		}
	}
	for _, m := range bench.Metrics() {
		if metricTitles[m] == "" {
			t.Errorf("the metric %s has no title", m)
		}
	}
	if got := readable("vxlan/kernel#2"); got != "VXLAN, kernel, instance 2" {
		t.Error(got)
	}
}

func TestScaleTable(t *testing.T) {
	r := &bench.ScaleReport{
		Machine: bench.Machine{Culvert: "v1.2.3", Kernel: "6.18.44", CPUs: 2, CPU: "AMD EPYC", Load: 0.25},
		Scale: []bench.Scaled{
			{Peers: 1, Throughput: bench.Figures{Median: 12.34, Rounds: []float64{12.34}}, ReadyMS: 80, DaemonRSS: 31.5},
			{Peers: 5000, ReadyMS: 950},
		},
	}
	var b bytes.Buffer
	if err := ScaleTable(&b, r); err != nil {
		t.Fatal(err)
	}
	golden(t, "scale.table", b.Bytes())
}

func TestRatio(t *testing.T) {
	of := func(rounds ...float64) bench.Result {
		r := &bench.Report{}
		for _, v := range rounds {
			r.Add("offload", "native", "tcp1", bench.Throughput, v)
		}
		return r.Results[0]
	}
	for _, c := range []struct {
		name    string
		x, ref  bench.Result
		ratio   Ratio
		higher  string // the verdict if more is better
		lower   string
		nothing bool
	}{
		{"twice", of(2, 4, 6, 8, 10), of(1, 2, 3, 4, 5), Ratio{2, 2, 2, 5}, "+", "-", false},
		{"half", of(1, 1, 1, 1, 1), of(2, 2, 2, 2, 2), Ratio{0.5, 0.5, 0.5, 5}, "-", "+", false},
		{"both drift", of(11, 22, 33, 44, 55), of(10, 20, 30, 40, 50), Ratio{1.1, 1.1, 1.1, 5}, "+", "-", false},
		{"rounds disagree", of(1, 3, 1, 3, 2), of(2, 2, 2, 2, 2), Ratio{1, 0.5, 1.5, 5}, ".", ".", false},
		{"too few rounds", of(4, 4), of(2, 2), Ratio{2, 2, 2, 2}, ".", ".", false},
		{"one has more rounds", of(2, 2, 2), of(1, 1, 1, 1), Ratio{2, 2, 2, 3}, ".", ".", false},
		{"the reference is 0", of(1, 1), of(0, 0), Ratio{}, "", "", true},
	} {
		got, ok := ratioOf(c.x, c.ref)
		if ok == c.nothing || !c.nothing && (fmt.Sprintf("%.4v", got) != fmt.Sprintf("%.4v", c.ratio) || got.verdict(true) != c.higher || got.verdict(false) != c.lower) {
			t.Errorf("%s: %+v %t, verdicts %s and %s", c.name, got, ok, got.verdict(true), got.verdict(false))
		}
	}
}
