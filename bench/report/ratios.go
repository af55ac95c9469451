package report

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"culvert/bench"
)

// keyFigures are the figures that users notice most.
var keyFigures = []struct {
	title    string // in a table of ratios
	short    string // in the summary; empty if it is not part of it
	workload string
	metric   bench.Metric
}{
	{"TCP, 1 stream", "TCP with one stream", "tcp1", bench.Throughput},
	{"TCP, 4 streams", "TCP with four streams", "tcp4", bench.Throughput},
	{"request and answer, p50", "the time of a request", "rr", bench.P50},
	{"the same beside a bulk stream", "the time of a request beside a bulk stream", "rr-loaded", bench.P50},
	{"the same against a bulk stream", "", "rr-loaded-reverse", bench.P50},
	{"UDP of 64 bytes, received", "small packets per second", "udp64", bench.Rate},
	{"connections", "connections per second", "crr", bench.Connections},
	{"CPU time per gigabyte", "CPU time per gigabyte", "tcp1", bench.CPUPerGB},
	{"8 TCP streams, Jain's index", "", "fair8", bench.Jain},
	{"8 TCP streams, least share", "", "fair8", bench.LeastShare},
	{"TCP beside a UDP flood", "", "tcp1-flooded", bench.Throughput},
}

// Ratio is the ratio of a figure to the same figure of another datapath: of the
// medians, and the least and the greatest of the rounds. The two figures of one round
// were measured shortly after each other. So the rounds' ratios say more about the
// difference than each figure's spread, which includes the machine's drift.
type Ratio struct {
	Median, Min, Max float64
	Rounds           int
}

func ratioOf(x, ref bench.Result) (Ratio, bool) {
	if ref.Median == 0 {
		return Ratio{}, false
	}
	var rounds []float64
	for i := range min(len(x.Rounds), len(ref.Rounds)) {
		if ref.Rounds[i] != 0 {
			rounds = append(rounds, x.Rounds[i]/ref.Rounds[i])
		}
	}
	if len(rounds) == 0 {
		return Ratio{}, false
	}
	return Ratio{Median: x.Median / ref.Median, Min: slices.Min(rounds), Max: slices.Max(rounds), Rounds: len(rounds)}, true
}

// enoughRounds is the least number of rounds for a verdict: by chance five rounds are
// on the same side once in 16 times, two every second time.
const enoughRounds = 5

// verdict returns "+" if every round was better than the reference's, "-" if every
// round was worse, and "." if the rounds disagree or are too few.
func (q Ratio) verdict(higher bool) string {
	better, worse := q.Min > 1, q.Max < 1
	if !higher {
		better, worse = worse, better
	}
	switch {
	case q.Rounds < enoughRounds:
	case better:
		return "+"
	case worse:
		return "-"
	}
	return "."
}

// ratioRow is one of the key figures of one datapath, with a cell per underlay: the
// ratio, or the figure itself if the reference has none.
type ratioRow struct {
	Datapath, Title string
	Cells           []string
}

// ratioRows returns the table of ratios: the reference's own figures, then every other
// datapath's ratios to them.
func (r view) ratioRows(reference string) []ratioRow {
	var rows []ratioRow
	for _, d := range r.ratioOrder(reference) {
		for _, f := range keyFigures {
			row, found := ratioRow{Datapath: d, Title: f.title}, false
			for _, u := range r.underlays() {
				cell := r.ratioCell(u, d, f.workload, f.metric, reference)
				found = found || cell != ""
				row.Cells = append(row.Cells, cell)
			}
			if found {
				rows = append(rows, row)
			}
		}
	}
	return rows
}

// howRatios explains the cells of ratioRows.
func (r view) howRatios(reference string) string {
	return fmt.Sprintf("Ratios to %s, and the least and the greatest of the %d rounds' own ratios; + each round was better, - each was worse, . they disagree or are fewer than %d.",
		reference, r.mostRounds(), enoughRounds)
}

// Ratios writes the table of ratios for a terminal: the figures that users notice most,
// as ratios to the reference's, by underlay. The reference's own figures come first.
func Ratios(w io.Writer, of *bench.Report, reference string) error {
	r := view{of}
	var b strings.Builder
	r.head(&b)
	fmt.Fprintf(&b, "%s\n\n", r.howRatios(reference))
	underlays := r.underlays()
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "\t%s\n", strings.Join(underlays, "\t"))
	last := ""
	for _, row := range r.ratioRows(reference) {
		if row.Datapath != last {
			fmt.Fprintf(t, "%s%s\n", row.Datapath, strings.Repeat("\t", len(underlays)))
			last = row.Datapath
		}
		fmt.Fprintf(t, "  %s\t%s\n", row.Title, strings.Join(row.Cells, "\t"))
	}
	_ = t.Flush()
	r.missing(&b)
	r.disturbed(&b)
	_, err := io.WriteString(w, b.String())
	return err
}

// ratioOrder returns the datapaths of the report, the reference first.
func (r view) ratioOrder(reference string) []string {
	names := r.datapathsOf(func(bench.Result) bool { return true })
	if i := slices.Index(names, reference); i > 0 {
		names = slices.Insert(slices.Delete(names, i, i+1), 0, reference)
	}
	return names
}

func (r view) ratioCell(underlay, datapath, workload string, m bench.Metric, reference string) string {
	x, ok := r.Find(underlay, datapath, workload, m)
	if !ok {
		if f, failed := r.Failure(underlay, datapath, workload); failed && !f.Unavailable {
			return "FAILED"
		}
		return ""
	}
	ref, ok := r.Find(underlay, reference, workload, m)
	if datapath == reference || !ok {
		return withUnit(x) + spread(x)
	}
	q, ok := ratioOf(x, ref)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%.2f %s (%.2f-%.2f)", q.Median, q.verdict(m.Higher()), q.Min, q.Max)
}

func (r view) mostRounds() int {
	most := 0
	for _, x := range r.Results {
		most = max(most, len(x.Rounds))
	}
	return most
}
