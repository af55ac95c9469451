package report

import (
	"encoding/csv"
	"fmt"
	"io"
	"strconv"
	"strings"

	"culvert/bench"
)

// CSV writes the report as CSV with a header, one line per figure.
func CSV(w io.Writer, of *bench.Report) error {
	r := view{of}
	c := csv.NewWriter(w)
	_ = c.Write([]string{"underlay", "datapath", "workload", "metric", "unit", "median", "min", "max", "rounds"})
	number := func(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }
	for _, x := range r.Results {
		var rounds []string
		for _, v := range x.Rounds {
			rounds = append(rounds, number(v))
		}
		_ = c.Write([]string{
			x.Underlay, x.Datapath, x.Workload, string(x.Metric), x.Unit,
			number(x.Median), number(x.Min), number(x.Max), strings.Join(rounds, " "),
		})
	}
	c.Flush()
	return c.Error()
}

// GoBench writes the report in Go's benchmark format, one line per round, for
// benchstat:
//
//	BenchmarkTcp1/underlay=offload/datapath=vxlan-kernel 1 22.1 throughput-Gbit/s
func GoBench(w io.Writer, of *bench.Report) error {
	r := view{of}
	var b strings.Builder
	m := r.Machine
	fmt.Fprintf(&b, "goos: linux\ngoarch: %s\ncpu: %s\nkernel: %s\nculvert: %s\nnodes: %d\nends: %s\n", m.Arch, m.CPU, m.Kernel, m.Culvert, m.Nodes, m.Ends)
	for _, m := range bench.Metrics() {
		better := "lower"
		if m.Higher() {
			better = "higher"
		}
		fmt.Fprintf(&b, "Unit %s better=%s\n", benchUnit(m), better)
	}
	type group struct{ underlay, datapath, workload string }
	var order []group
	rounds := map[group][]string{}
	for _, x := range r.Results {
		g := group{x.Underlay, x.Datapath, x.Workload}
		if rounds[g] == nil {
			order = append(order, g)
		}
		for i, v := range x.Rounds {
			if i == len(rounds[g]) {
				rounds[g] = append(rounds[g], "")
			}
			rounds[g][i] += fmt.Sprintf(" %s %s", strconv.FormatFloat(v, 'g', 6, 64), benchUnit(x.Metric))
		}
	}
	for _, g := range order {
		name := strings.ToUpper(g.workload[:1]) + g.workload[1:]
		for _, values := range rounds[g] {
			fmt.Fprintf(&b, "Benchmark%s/underlay=%s/datapath=%s 1%s\n", name, g.underlay, strings.ReplaceAll(g.datapath, "/", "-"), values)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// benchUnit returns the metric's unit for benchstat. It includes the metric's name,
// since the format distinguishes values only by their unit.
func benchUnit(m bench.Metric) string {
	if m.Unit() == "1" {
		return string(m)
	}
	return string(m) + "-" + m.Unit()
}
