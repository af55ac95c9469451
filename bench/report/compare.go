package report

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"

	"culvert/bench"
)

// EffectFloor is the smallest relative change that a comparison reports: two runs of
// the same program differ by up to that.
const EffectFloor = 0.05

// Change is a figure that is in both reports and differs.
type Change struct {
	Old, New bench.Result
	// Delta is the change of the median, relative to the old one.
	Delta float64
	// Better reports whether the change is an improvement.
	Better bool
}

// Comparison is the difference between two reports.
type Comparison struct {
	Changes []Change // beyond noise, the worst first
	// Same counts the figures that did not change, OnlyOld and OnlyNew those that
	// only one report has.
	Same, OnlyOld, OnlyNew int
	// Warnings are reasons to doubt the comparison.
	Warnings []string
}

// Compare returns the changes beyond noise: medians that differ by EffectFloor or more
// while the ranges of the rounds do not overlap. Reports with different numbers of
// nodes or different ends cannot be compared, which is an error.
func Compare(before, after *bench.Report) (Comparison, error) {
	var c Comparison
	if a, b := before.Machine.Nodes, after.Machine.Nodes; a != b {
		return c, fmt.Errorf("the old report is of %d nodes and the new one of %d: these cannot be compared (measure again with --nodes %d)", a, b, a)
	}
	if a, b := before.Machine.Ends, after.Machine.Ends; a != b {
		return c, fmt.Errorf("the ends in the old report are %s and in the new one %s: these cannot be compared (measure again with --ends %s)", a, b, a)
	}
	old := map[bench.Key]bench.Result{}
	for _, x := range before.Results {
		old[x.Key()] = x
	}
	single := false
	for _, now := range after.Results {
		was, ok := old[now.Key()]
		if !ok {
			c.OnlyNew++
			continue
		}
		delete(old, now.Key())
		single = single || len(now.Rounds) < 2 || len(was.Rounds) < 2
		ch := Change{Old: was, New: now}
		if was.Median != 0 {
			ch.Delta = now.Median/was.Median - 1
		} else if now.Median != 0 {
			ch.Delta = math.Inf(1)
		}
		apart := now.Min > was.Max || now.Max < was.Min
		if math.Abs(ch.Delta) < EffectFloor || !apart {
			c.Same++
			continue
		}
		ch.Better = ch.Delta > 0 == now.Metric.Higher()
		c.Changes = append(c.Changes, ch)
	}
	c.OnlyOld = len(old)
	slices.SortStableFunc(c.Changes, func(a, b Change) int { return cmp.Compare(a.gain(), b.gain()) })
	c.Warnings = doubts(before.Machine, after.Machine)
	if single {
		c.Warnings = append(c.Warnings, "some figures were measured only once: their noise is unknown")
	}
	return c, nil
}

// gain returns the size of the change, positive for an improvement.
func (c Change) gain() float64 {
	if c.Better {
		return math.Abs(c.Delta)
	}
	return -math.Abs(c.Delta)
}

// doubts lists the differences between the machines and methods of two reports.
func doubts(a, b bench.Machine) []string {
	var found []string
	for _, f := range []struct{ what, a, b string }{
		{"kernel", a.Kernel, b.Kernel},
		{"CPU", fmt.Sprintf("%d x %s", a.CPUs, a.CPU), fmt.Sprintf("%d x %s", b.CPUs, b.CPU)},
		{"governor", a.Governor, b.Governor},
		{"generator", a.Generator, b.Generator},
		{"duration", a.Duration.String(), b.Duration.String()},
		{"congestion control", a.Congestion, b.Congestion},
	} {
		if f.a != f.b {
			found = append(found, fmt.Sprintf("the %s was %s and is %s", f.what, f.a, f.b))
		}
	}
	return found
}

// Regressions returns the changes for the worse whose relative size exceeds floor.
func (c Comparison) Regressions(floor float64) []Change {
	var worse []Change
	for _, ch := range c.Changes {
		if !ch.Better && math.Abs(ch.Delta) > floor {
			worse = append(worse, ch)
		}
	}
	return worse
}

// Table writes the comparison as a table for a terminal.
func (c Comparison) Table(w io.Writer, floor float64) error {
	var b strings.Builder
	for _, s := range c.Warnings {
		fmt.Fprintf(&b, "Warning: %s.\n", s)
	}
	if len(c.Changes) > 0 {
		t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		fmt.Fprintf(t, "UNDERLAY\tDATAPATH\tWORKLOAD\tMETRIC\tOLD\tNEW\tCHANGE\t\n")
		for _, ch := range c.Changes {
			verdict := "better"
			switch {
			case !ch.Better && math.Abs(ch.Delta) > floor:
				verdict = "REGRESSION"
			case !ch.Better:
				verdict = "worse"
			}
			x := ch.New
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%+.1f %%\t%s\n", x.Underlay, x.Datapath, x.Workload, x.Metric,
				figure(ch.Old.Median), figure(x.Median), ch.Delta*100, verdict)
		}
		_ = t.Flush()
	}
	plural := "s"
	if len(c.Changes) == 1 {
		plural = ""
	}
	fmt.Fprintf(&b, "%d figure%s changed by %.0f %% or more beyond the spread of their rounds; %d did not.\n", len(c.Changes), plural, EffectFloor*100, c.Same)
	if c.OnlyOld+c.OnlyNew > 0 {
		fmt.Fprintf(&b, "%d are in the old report only, %d in the new one only.\n", c.OnlyOld, c.OnlyNew)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
