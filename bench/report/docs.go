package report

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"culvert/bench"
)

// DocsFile is the page of the documentation that has the results.
const DocsFile = "benchmarks.md"

// Docs replaces the text between these lines of DocsFile.
const (
	docsBegin      = "<!-- results: written by culvert bench --docs; do not edit -->"
	docsEnd        = "<!-- end of results -->"
	docsPodsBegin  = "<!-- pods: written by culvert bench --ends pods --docs; do not edit -->"
	docsPodsEnd    = "<!-- end of pods -->"
	docsScaleBegin = "<!-- scale: written by culvert bench scale --docs; do not edit -->"
	docsScaleEnd   = "<!-- end of scale -->"
)

// replaceBetween replaces the text between two lines of the page.
func replaceBetween(dir, begin, end, text string) error {
	path := filepath.Join(dir, DocsFile)
	page, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	head, rest, ok := strings.Cut(string(page), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s lacks the lines %q and %q, between which the results go", path, begin, end)
	}
	return os.WriteFile(path, []byte(head+begin+"\n\n"+text+"\n"+end+tail), 0o644)
}

// Docs writes the results to DocsFile in dir, between two marker lines, and the charts
// to the directory charts, or charts/pods, in dir. It replaces earlier results.
// Results with pods as ends have separate marker lines.
func Docs(dir string, of *bench.Report, reference string) error {
	r := view{of}
	charts := r.charts(reference)
	begin, end, charted := docsBegin, docsEnd, "charts"
	if r.Machine.Ends == bench.Pods {
		begin, end, charted = docsPodsBegin, docsPodsEnd, "charts/pods"
	}
	if err := replaceBetween(dir, begin, end, r.markdown(charts, charted, reference)); err != nil {
		return err
	}
	pictures := filepath.Join(dir, charted)
	if err := os.MkdirAll(pictures, 0o755); err != nil {
		return err
	}
	old, err := filepath.Glob(filepath.Join(pictures, "*.svg"))
	if err != nil {
		return err
	}
	for _, f := range old {
		if err := os.Remove(f); err != nil {
			return err
		}
	}
	for _, c := range charts {
		if err := os.WriteFile(filepath.Join(pictures, c.Name+".svg"), []byte(c.SVG()), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// markdownRatios writes the figures that users notice most, as ratios.
func (r view) markdownRatios(b *strings.Builder, reference string) {
	rows := r.ratioRows(reference)
	if len(rows) == 0 {
		return
	}
	underlays := r.underlays()
	fmt.Fprintf(b, "\n### Ratios to %s\n\n%s\n", reference, r.howRatios(reference))
	last := ""
	for _, row := range rows {
		if row.Datapath != last {
			fmt.Fprintf(b, "\n| %s | %s |\n| --- |%s\n", row.Datapath, strings.Join(underlays, " | "), strings.Repeat(" ---: |", len(underlays)))
			last = row.Datapath
		}
		fmt.Fprintf(b, "| %s | %s |\n", row.Title, strings.Join(row.Cells, " | "))
	}
}

func (r view) markdown(charts []chart, charted, reference string) string {
	var b strings.Builder
	for _, f := range facts(r.Machine) {
		fmt.Fprintf(&b, "- %s: %s\n", f.Name, f.Value)
	}
	if answers := r.answers(); len(answers) > 0 {
		fmt.Fprintf(&b, "\n### In short\n\n")
		for _, a := range answers {
			fmt.Fprintf(&b, "- **%s** %s.", a.Question, a.Pair)
			for _, s := range a.Says {
				fmt.Fprintf(&b, " %s: %s.", s.Name, s.Value)
			}
			fmt.Fprintln(&b)
		}
	}
	r.markdownRatios(&b, reference)
	fmt.Fprintf(&b, "\nMedians, half of the span between the least and the greatest round, and the ratio to %s;\na ? marks a ratio that is not significant, because the rounds differ too much.\n", reference)
	for _, u := range r.underlays() {
		for _, s := range sections() {
			columns := r.columns(u, s)
			if len(columns) == 0 {
				continue
			}
			fmt.Fprintf(&b, "\n### %s on underlay %s\n\n| datapath |", s.title, u)
			for _, c := range columns {
				fmt.Fprintf(&b, " %s |", c.title)
			}
			fmt.Fprintf(&b, "\n| --- |%s\n", strings.Repeat(" ---: |", len(columns)))
			for _, d := range r.datapaths(u) {
				fmt.Fprintf(&b, "| %s |", d)
				for _, c := range columns {
					x, ok := r.Find(u, d, c.workload, c.metric)
					if !ok {
						fmt.Fprintf(&b, " %s |", r.absent(u, d, c))
						continue
					}
					fmt.Fprintf(&b, " %s |", strings.TrimSpace(figure(x.Median)+spread(x)+" "+r.ratio(x, reference)))
				}
				fmt.Fprintln(&b)
			}
		}
	}
	if len(r.Failed) > 0 {
		fmt.Fprintf(&b, "\n### Without a result\n\n")
		for _, f := range grouped(r.Failed) {
			where := f.Underlay
			if f.Workload != "" {
				where += ", " + f.Workload
			}
			fmt.Fprintf(&b, "- %s (%s): %s\n", f.Datapath, where, f.Reason)
		}
	}
	fmt.Fprintf(&b, "\n### Charts\n\nEach bar begins at the figure of %s and ends at its own; the thin line spans the rounds' own ratios. Blue is better,\norange worse, grey no clear difference.\n", reference)
	for _, c := range charts {
		fmt.Fprintf(&b, "\n![%s](%s/%s.svg)\n", c.Title, charted, c.Name)
	}
	return b.String()
}
