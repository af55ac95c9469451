package bench

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/perf/benchfmt"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// sample returns a report with everything that the output formats show: several
// underlays, spread, a doubtful ratio and all kinds of failures.
func sample() *Report {
	r := &Report{Schema: Schema, Machine: Machine{
		Time: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC), Culvert: "v1.2.3", Go: "go1.26.0", Kernel: "6.18.44",
		Arch: "amd64", CPU: "AMD EPYC", CPUs: 2, MemoryMB: 24000, Governor: "none", Load: 0.25, Steal: 0.01,
		Congestion: "cubic", Generator: "builtin", Nodes: 2, Ends: Nodes, Duration: 1, Warmup: 0.25,
		Offloads: map[string]map[string]bool{"offload": {"rx-gro": true}, "bare": {"rx-gro": false, "tx-udp-segmentation": false}},
		Programs: map[string]string{"tinc": "tinc version 1.0.36"},
	}}
	add := func(underlay, datapath, workload string, m Metric, values ...float64) {
		for _, v := range values {
			r.add(underlay, datapath, workload, m, v)
		}
	}
	add("bare", "vxlan/kernel", "tcp1", Throughput, 6.4, 6.5, 6.3)
	add("offload", "native", "tcp1", Throughput, 53.3, 52, 54)
	add("offload", "vxlan/kernel", "tcp1", Throughput, 22, 21.5, 22.4)
	add("offload", "vxlan/kernel", "tcp1", CPUPerGB, 0.52, 0.51, 0.53)
	add("offload", "vxlan/userspace", "tcp1", Throughput, 10.5, 24, 11)
	add("offload", "vxlan/userspace", "tcp1", CPUPerGB, 1.1, 1.2, 1)
	add("offload", "vxlan/userspace", "tcp1", DaemonCPUPerGB, 0.7, 0.71, 0.72)
	add("offload", "vxlan/userspace", "tcp1", SyscallsPerPacket, 0.12, 0.13, 0.11)
	add("offload", "vxlan/userspace", "rr", P50, 95)
	add("offload", "vxlan/kernel", "rr", P50, 59)
	add("offload", "wireguard-go", "rr", P50, 20983)
	r.fail(Failure{Underlay: "offload", Datapath: "ipip/kernel", Reason: "the kernel has no ipip device", Unavailable: true})
	r.fail(Failure{Underlay: "bare", Datapath: "ipip/kernel", Reason: "the kernel has no ipip device", Unavailable: true})
	r.fail(Failure{Underlay: "offload", Datapath: "native", Workload: "rr", Reason: "no answer within 3s"})
	r.sort()
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
		t.Errorf("%s differs (go test ./bench -update rewrites it):\n%s", name, got)
	}
}

func TestForms(t *testing.T) {
	r := sample()
	var table, csv, gobench bytes.Buffer
	if err := r.Table(&table, "vxlan/kernel"); err != nil {
		t.Fatal(err)
	}
	if err := r.CSV(&csv); err != nil {
		t.Fatal(err)
	}
	if err := r.GoBench(&gobench); err != nil {
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
	if err := r.Ratios(&ratios, "vxlan/kernel"); err != nil {
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
	if err := read.Err(); err != nil || lines == 0 || units != len(metrics) {
		t.Errorf("%d lines, %d units: %v", lines, units, err)
	}
}

func TestSaveAndLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report.json")
	r := sample()
	if err := r.Save(path); err != nil {
		t.Fatal(err)
	}
	again, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	a, aerr := r.JSON()
	b, berr := again.JSON()
	if aerr != nil || berr != nil || !bytes.Equal(a, b) {
		t.Errorf("the report read back differs:\n%s", b)
	}
	if left, _ := filepath.Glob(path + ".*"); len(left) > 0 {
		t.Errorf("temporary files are left: %v", left)
	}
}

func TestLoadRefuses(t *testing.T) {
	for text, want := range map[string]string{
		`{"schema":0,"results":[]}`: "has schema 0, and this version reads schema 1: measure again",
		`{}`:                        "has schema 0",
		`[]`:                        "is not a report of culvert bench --json",
		`{"schema":1,"results":[{"metric":"speed","rounds":[1]}]}`:  `metric "speed"`,
		`{"schema":1,"results":[{"metric":"throughput"}]}`:          "0 rounds",
		`{"schema":1,"results":[{"metric":"throughput","rounds":1}`: "is not a report",
	} {
		path := filepath.Join(t.TempDir(), "report.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{3, 1}, 2}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(c.in); got != c.want {
			t.Errorf("median of %v: %v", c.in, got)
		}
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
	with := func(m Metric, before, after []float64) Comparison {
		a, b := &Report{}, &Report{}
		for _, v := range before {
			a.add("offload", "native", "tcp1", m, v)
		}
		for _, v := range after {
			b.add("offload", "native", "tcp1", m, v)
		}
		c, err := Compare(a, b)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for _, c := range []struct {
		name          string
		metric        Metric
		before, after []float64
		changed       bool
		better        bool
		regression    bool // beyond 10 %
	}{
		{"the same", Throughput, []float64{10, 11, 12}, []float64{10, 11, 12}, false, false, false},
		{"less than EffectFloor", Throughput, []float64{10, 10, 10}, []float64{9.6, 9.6, 9.6}, false, false, false},
		{"overlapping rounds", Throughput, []float64{10, 11, 8}, []float64{7, 7.5, 8.5}, false, false, false},
		{"a little worse", Throughput, []float64{10, 10.1, 9.9}, []float64{9.2, 9.3, 9.1}, true, false, false},
		{"much worse", Throughput, []float64{10, 10.1, 9.9}, []float64{7, 7.1, 7.2}, true, false, true},
		{"much better", Throughput, []float64{10, 10.1, 9.9}, []float64{20, 20, 20}, true, true, false},
		{"latency up is worse", P50, []float64{55, 56, 57}, []float64{80, 81, 82}, true, false, true},
		{"cost down is better", CPUPerGB, []float64{0.5, 0.51, 0.52}, []float64{0.4, 0.41, 0.42}, true, true, false},
		{"from nothing", SyscallsPerPacket, []float64{0, 0, 0}, []float64{1, 1, 1}, true, false, true},
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
		factor := map[Metric]float64{Throughput: 0.5, P50: 0.9}[x.Metric]
		for j := range x.Rounds {
			if factor != 0 {
				x.Rounds[j] *= factor
			}
		}
		x.summarize()
	}
	after.Results = after.Results[1:]
	after.add("cloud", "native", "rr", P99, 3)
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
	after.Machine.Ends = Pods
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
	if err := sample().HTML(&b, "vxlan/kernel"); err != nil {
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
	if err := sample().Docs(dir, "vxlan/kernel"); err == nil {
		t.Error("Docs without a page succeeded")
	}
	page := "# Page\n" + docsScaleBegin + "\nold scale\n" + docsScaleEnd + "\nbetween\n" + docsBegin + "\nold results\n" + docsEnd + "\npods\n" + docsPodsBegin + "\nold pods\n" + docsPodsEnd + "\nend\n"
	if err := os.WriteFile(path, []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time replaces the first results
		if err := sample().Docs(dir, "vxlan/kernel"); err != nil {
			t.Fatal(err)
		}
		pods := sample()
		pods.Machine.Ends = Pods
		pods.Results = pods.Results[:1]
		if err := pods.Docs(dir, "vxlan/kernel"); err != nil {
			t.Fatal(err)
		}
		if err := (&ScaleReport{Scale: []Scaled{{Peers: 7, ReadyMS: 12}}}).Docs(dir); err != nil {
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
	text, err := os.ReadFile(filepath.Join("..", "docs", DocsFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, mark := range []string{docsBegin, docsEnd, docsPodsBegin, docsPodsEnd, docsScaleBegin, docsScaleEnd} {
		if strings.Count(string(text), mark) != 1 {
			t.Errorf("%s does not have exactly one line %q", DocsFile, mark)
		}
	}
	for _, w := range Workloads() {
		if !strings.Contains(string(text), "`"+w+"`") {
			t.Errorf("%s does not describe the workload %s", DocsFile, w)
		}
	}
	for _, m := range metrics {
		if !strings.Contains(string(text), "`"+string(m.name)+"`") {
			t.Errorf("%s does not describe the metric %s", DocsFile, m.name)
		}
	}
}

// TestChartIsXML checks that the SVG files are well-formed XML, and that bars with
// ratios far beyond the scale stay within the panel.
func TestChartIsXML(t *testing.T) {
	r := sample()
	r.add("offload", "naive", "tcp1", Throughput, 0)
	r.add("offload", "tinc", "tcp1", Throughput, 1e-6)
	charts := r.charts("vxlan/kernel")
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
	if none := r.charts("nobody"); len(none) != len(charts) || strings.Contains(none[0].SVG(), "<path class=\"span") {
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
		r := &Report{}
		for i, u := range []string{"offload", "bare"} {
			for _, v := range c.x[i] {
				r.add(u, "vxlan/userspace", "tcp1", Throughput, v)
				r.add(u, "vxlan/kernel", "tcp1", Throughput, 10)
			}
		}
		says, lines := r.against("vxlan/userspace", "vxlan/kernel")
		if len(says) != 1 || len(lines) != 1 || says[0].Name+" "+says[0].Value != c.want {
			t.Errorf("%s: %v %v", c.name, says, lines)
		}
	}
	if says, _ := sample().against("tinc", "native"); len(says) > 0 {
		t.Errorf("without figures of one datapath: %v", says)
	}
}

// TestReadableNames checks that all datapaths, underlays, workloads and metrics have
// titles, and that those of datapaths are unique.
func TestReadableNames(t *testing.T) {
	seen := map[string]string{}
	for _, d := range Datapaths() {
		title := readable(d.Name)
		if d.Title == "" || d.About == "" || seen[title] != "" {
			t.Errorf("%s and %s are %q", d.Name, seen[title], title)
		}
		seen[title] = d.Name
	}
	for _, u := range Underlays() {
		if underlayTitles[u] == "" {
			t.Errorf("the underlay %s has no title", u)
		}
	}
	for _, w := range workloads() {
		if w.title == "" || w.about == "" {
			t.Errorf("the workload %s has no title", w.name)
		}
	}
	for _, m := range metrics {
		if metricTitles[m.name] == "" {
			t.Errorf("the metric %s has no title", m.name)
		}
	}
	if got := readable("vxlan/kernel#2"); got != "VXLAN, kernel, once more (2)" {
		t.Error(got)
	}
}
