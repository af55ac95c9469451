package report

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"

	"culvert/bench"
)

// ScaleTable writes the result of `culvert bench scale` as a table for a terminal.
func ScaleTable(w io.Writer, r *bench.ScaleReport) error {
	var b strings.Builder
	fmt.Fprintf(&b, "culvert %s, Linux %s, %d x %s, load %.2f\n\n", r.Machine.Culvert, r.Machine.Kernel, r.Machine.CPUs, r.Machine.CPU, r.Machine.Load)
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, strings.Join(scaleTitles, "\t")+"\t")
	for _, s := range r.Scale {
		fmt.Fprintln(t, strings.Join(scaleRow(s), "\t")+"\t")
	}
	_ = t.Flush()
	_, err := io.WriteString(w, b.String())
	return err
}

var scaleTitles = []string{
	"peers", "tcp1 Gbit/s", "udp64 kpps", "daemons us/packet", "ready ms", "start CPU ms", "daemon MB", "etcd MB", "CPU ms/event", "lease to packet ms",
}

// scaleRow returns a row of the table, with a dash for what was not measured.
func scaleRow(s bench.Scaled) []string {
	cells := []string{strconv.Itoa(s.Peers)}
	for _, f := range []bench.Figures{s.Throughput, s.Rate, s.PerPacket} {
		cells = append(cells, scaleCell(f))
	}
	for _, v := range []float64{s.ReadyMS, s.StartCPU, s.DaemonRSS, s.EtcdRSS, s.EventCPU} {
		if v == 0 {
			cells = append(cells, "-")
		} else {
			cells = append(cells, figure(v))
		}
	}
	return append(cells, scaleCell(s.FirstPacket))
}

func scaleCell(f bench.Figures) string {
	if len(f.Rounds) == 0 {
		return "-"
	}
	return figure(f.Median)
}

// ScaleDocs writes the result of `culvert bench scale` to DocsFile in dir, between its
// marker lines.
func ScaleDocs(dir string, r *bench.ScaleReport) error {
	var b strings.Builder
	m := r.Machine
	fmt.Fprintf(&b, "%s, culvert %s, Linux %s, %d x %s, load %.2f.\n\n", m.Time.Format("2006-01-02"), m.Culvert, m.Kernel, m.CPUs, m.CPU, m.Load)
	fmt.Fprintf(&b, "| %s |\n|%s\n", strings.Join(scaleTitles, " | "), strings.Repeat(" ---: |", len(scaleTitles)))
	for _, s := range r.Scale {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(scaleRow(s), " | "))
	}
	return replaceBetween(dir, docsScaleBegin, docsScaleEnd, b.String())
}
