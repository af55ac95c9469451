package report

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"unicode/utf8"

	"culvert/bench"
)

// column is one figure of a table.
type column struct {
	workload string
	metric   bench.Metric
	title    string
}

// section is a table of related figures.
type section struct {
	title   string
	columns []column
}

func sections() []section {
	costs := func(w string) []column {
		return []column{
			{w, bench.CPUPerGB, w + " CPU s/GB"},
			{w, bench.DaemonCPUPerGB, w + " daemon s/GB"},
			{w, bench.RSS, w + " RSS MB"},
			{w, bench.SyscallsPerPacket, w + " syscalls/packet"},
			{w, bench.FastShare, w + " fast path share"},
		}
	}
	var tcp, udp, latency, loaded []column
	for _, w := range bench.Workloads() {
		switch {
		case !w.Plain():
		case w.Streams > 0:
			tcp = append(tcp, column{w.Name, bench.Throughput, w.Name + " Gbit/s"})
		case w.Payload > 0:
			udp = append(udp, column{w.Name, bench.Rate, w.Name + " kpps"}, column{w.Name, bench.RateLossfree, w.Name + " loss-free kpps"})
		}
	}
	for _, m := range []bench.Metric{bench.P50, bench.P90, bench.P99, bench.P999} {
		latency = append(latency, column{"rr", m, fmt.Sprintf("rr %s us", m)})
	}
	for _, w := range bench.Workloads() {
		if w.Loaded {
			for _, m := range []bench.Metric{bench.P50, bench.P90, bench.P99, bench.P999} {
				loaded = append(loaded, column{w.Name, m, fmt.Sprintf("%s %s us", w.Name, m)})
			}
			loaded = append(loaded, column{w.Name, bench.Throughput, w.Name + " Gbit/s"})
		}
	}
	latency = append(latency, column{"crr", bench.Connections, "crr 1/s"})
	return []section{
		{"Throughput", tcp},
		{"Packets received", udp},
		{"Latency", latency},
		{"Latency under load", loaded},
		{"Fairness", []column{
			{"fair8", bench.Throughput, "fair8 Gbit/s"},
			{"fair8", bench.Jain, "fair8 Jain's index"},
			{"fair8", bench.LeastShare, "fair8 least share"},
			{"fair8", bench.MostShare, "fair8 greatest share"},
			{"tcp1-flooded", bench.Throughput, "tcp1-flooded Gbit/s"},
			{"tcp1-flooded", bench.Rate, "tcp1-flooded kpps"},
		}},
		{"Cost of throughput", costs("tcp1")},
		{"Cost of small packets", costs("udp64")},
	}
}

// maxSpread is the spread above which a ratio is not significant.
const maxSpread = 0.25

// Table writes the report as tables for a terminal: each figure with its spread and its
// ratio to the reference datapath's.
func Table(w io.Writer, of *bench.Report, reference string) error {
	r := view{of}
	var b strings.Builder
	r.head(&b)
	fmt.Fprintf(&b, "medians, ± half of max - min, x ratio to %s\n", reference)
	for _, u := range r.underlays() {
		for _, s := range sections() {
			r.section(&b, u, s, reference)
		}
	}
	r.notes(&b, reference)
	_, err := io.WriteString(w, b.String())
	return err
}

// head writes a description of the machine and the method.
func (r view) head(b *strings.Builder) {
	m := r.Machine
	fmt.Fprintf(b, "culvert %s, %s, Linux %s, %d x %s, governor %s, load %.2f\n",
		m.Culvert, m.Go, m.Kernel, m.CPUs, cmp.Or(m.CPU, m.Arch), m.Governor, m.Load)
	fmt.Fprintf(b, "generator %s, TCP %s, %s each after %s\n", m.Generator, m.Congestion, m.Duration, m.Warmup)
	fmt.Fprintf(b, "%s; the ends are %s\n", joined(m), between(m))
}

// tableWidth is the maximum width of a table. The columns that do not fit follow in
// another block below.
const tableWidth = 80

func (r view) section(b *strings.Builder, underlay string, s section, reference string) {
	continued := ""
	for columns := r.columns(underlay, s); len(columns) > 0; continued = ", continued" {
		n := len(columns)
		text := r.block(underlay, columns, reference)
		for ; n > 1 && widest(text) > tableWidth; text = r.block(underlay, columns[:n], reference) {
			n--
		}
		fmt.Fprintf(b, "\n%s on underlay %s%s\n%s", s.title, underlay, continued, text)
		columns = columns[n:]
	}
}

// widest returns the length of the longest line.
func widest(text string) (width int) {
	for line := range strings.Lines(text) {
		width = max(width, utf8.RuneCountInString(strings.TrimRight(line, " \n")))
	}
	return width
}

// block returns these columns for each of the underlay's datapaths.
func (r view) block(underlay string, columns []column, reference string) string {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	names := r.datapaths(underlay)
	width := len("datapath")
	for _, d := range names {
		width = max(width, len(d))
	}
	fmt.Fprintf(t, "%-*s\t", width, "datapath")
	for _, c := range columns {
		fmt.Fprintf(t, "%s\t \t", c.title)
	}
	fmt.Fprintln(t)
	for _, d := range names {
		fmt.Fprintf(t, "%-*s\t", width, d)
		for _, c := range columns {
			x, ok := r.Find(underlay, d, c.workload, c.metric)
			if !ok {
				fmt.Fprintf(t, "%s\t\t", r.absent(underlay, d, c))
				continue
			}
			fmt.Fprintf(t, "%s%s\t%s\t", figure(x.Median), spread(x), r.ratio(x, reference))
		}
		fmt.Fprintln(t)
	}
	_ = t.Flush()
	return b.String()
}

// columns returns the section's columns for which the underlay has any figure.
func (r view) columns(underlay string, s section) []column {
	return slices.DeleteFunc(slices.Clone(s.columns), func(c column) bool {
		return !slices.ContainsFunc(r.Results, func(x bench.Result) bool {
			return x.Underlay == underlay && x.Workload == c.workload && x.Metric == c.metric
		})
	})
}

// absent returns the text to show in place of a missing figure.
func (r view) absent(underlay, datapath string, c column) string {
	if f, failed := r.Failure(underlay, datapath, c.workload); failed && !f.Unavailable {
		return "FAILED"
	}
	return "-"
}

// ratio returns the figure's ratio to the reference's, as the table shows it.
func (r view) ratio(x bench.Result, reference string) string {
	ref, ok := r.Find(x.Underlay, reference, x.Workload, x.Metric)
	if !ok || ref.Median == 0 {
		return ""
	}
	mark := ""
	if r.doubtful(x, ref) {
		mark = "?"
	}
	ratio := x.Median / ref.Median
	if ratio >= 10 {
		return fmt.Sprintf("x%s%s", figure(ratio), mark)
	}
	return fmt.Sprintf("x%.2f%s", ratio, mark)
}

func spread(x bench.Result) string {
	if len(x.Rounds) < 2 {
		return ""
	}
	return fmt.Sprintf(" ±%.0f%%", x.Spread()*50)
}

// doubtful reports whether the spread of the two figures is large and their rounds
// overlap, so that their order may be chance.
func (r view) doubtful(x, ref bench.Result) bool {
	if x.Key() == ref.Key() {
		return false
	}
	return max(x.Spread(), ref.Spread()) > maxSpread && x.Min <= ref.Max && ref.Min <= x.Max
}

func (r view) notes(b *strings.Builder, reference string) {
	r.missing(b)
	r.doubts(b, reference)
	r.disturbed(b)
}

// missing lists what has no result.
func (r view) missing(b *strings.Builder) {
	if len(r.Failed) > 0 {
		fmt.Fprintf(b, "\nWithout a result:\n")
		t := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
		for _, f := range grouped(r.Failed) {
			fmt.Fprintf(t, "  %s\t%s\t%s\t%s\n", f.Datapath, f.Underlay, cmp.Or(f.Workload, "all"), f.Reason)
		}
		_ = t.Flush()
	}
}

// doubts lists the ratios that are doubtful.
func (r view) doubts(b *strings.Builder, reference string) {
	var doubts []string
	for _, x := range r.Results {
		if ref, ok := r.Find(x.Underlay, reference, x.Workload, x.Metric); ok && r.doubtful(x, ref) {
			doubts = append(doubts, fmt.Sprintf("%s %s %s on %s (%s to %s; %s to %s)",
				x.Datapath, x.Workload, x.Metric, x.Underlay, figure(x.Min), figure(x.Max), figure(ref.Min), figure(ref.Max)))
		}
	}
	if len(doubts) > 0 {
		const most = 8
		fmt.Fprintf(b, "\nWarning: these ratios to %s (marked ?), %d in all, are not\nsignificant, since the rounds differ too much:\n", reference, len(doubts))
		for i, d := range doubts {
			if i == most {
				fmt.Fprintf(b, "  ... and %d more\n", len(doubts)-most)
				break
			}
			fmt.Fprintf(b, "  %s\n", d)
		}
	}
}

// disturbed warns about CPU steal and a high load.
func (r view) disturbed(b *strings.Builder) {
	const muchSteal = 0.05
	if r.Machine.Steal > muchSteal {
		fmt.Fprintf(b, "\nWarning: the hypervisor took up to %.0f %% of the CPU time during a measurement.\n", r.Machine.Steal*100)
	}
	if busy := 0.5 * float64(r.Machine.CPUs); r.Machine.Load > busy {
		fmt.Fprintf(b, "\nWarning: the machine was busy before the run (load %.2f on %d CPUs).\n", r.Machine.Load, r.Machine.CPUs)
	}
}

// grouped merges failures that differ only in their underlay.
func grouped(all []bench.Failure) []bench.Failure {
	var out []bench.Failure
	for _, f := range all {
		i := slices.IndexFunc(out, func(g bench.Failure) bool {
			return g.Datapath == f.Datapath && g.Workload == f.Workload && g.Reason == f.Reason
		})
		if i < 0 {
			out = append(out, f)
		} else {
			out[i].Underlay += "," + f.Underlay
		}
	}
	return out
}

func (r view) underlays() []string {
	return slices.DeleteFunc(bench.Underlays(), func(u string) bool { return len(r.datapaths(u)) == 0 })
}

// datapaths returns the datapaths with a result on the underlay, in display order.
func (r view) datapaths(underlay string) []string {
	return r.datapathsOf(func(x bench.Result) bool { return x.Underlay == underlay })
}

// datapathsOf returns the datapaths with a result that is wanted, in display order.
func (r view) datapathsOf(wanted func(bench.Result) bool) []string {
	var names []string
	for _, x := range r.Results {
		if wanted(x) && !slices.Contains(names, x.Datapath) {
			names = append(names, x.Datapath)
		}
	}
	slices.SortFunc(names, bench.CompareDatapaths)
	return names
}

// figure formats a value with three significant digits and at most three decimals.
func figure(v float64) string {
	digits := 0
	if v != 0 {
		digits = min(max(2-int(math.Floor(math.Log10(math.Abs(v)))), 0), 3)
	}
	return fmt.Sprintf("%.*f", digits, v)
}
