package report

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"maps"
	"slices"
	"strings"

	"culvert/internal/lab"

	"culvert/bench"
)

//go:embed page.html
var pageText string

// pageData is the data of the template page.html.
type pageData struct {
	Palette, PaletteDark, ChartStyle template.CSS
	Heading, Version, Date, Ends     string
	Rounds                           int
	Reference                        string
	Answers                          []answer
	Underlays, Datapaths, Facts      []fact
	Sections                         []pageSection
	Tables                           []pageUnderlay
	Failed                           []bench.Failure
}

type pageSection struct {
	ID, Title string
	Charts    []pageChart
}

type pageChart struct {
	Title, Better string
	Panels        []pagePanel
}

type pagePanel struct {
	Underlay string
	Drawing  template.HTML
}

// pageUnderlay are the tables of one underlay.
type pageUnderlay struct {
	Title string
	Open  bool
	Parts []pageTable
}

type pageTable struct {
	Title   string
	Columns []string
	Rows    []pageRow
}

type pageRow struct {
	Name  string
	Cells []pageCell
}

type pageCell struct{ Figure, Ratio, Range string }

type fact struct{ Name, Value string }

// HTML writes the report as one self-contained page.
func HTML(w io.Writer, of *bench.Report, reference string) error {
	r := view{of}
	t, err := template.New("page").Parse(pageText)
	if err != nil {
		return err
	}
	m := r.Machine
	data := pageData{
		Palette: palette, PaletteDark: paletteDark, ChartStyle: chartStyle,
		Heading: "Container networks, datapath by datapath", Version: m.Culvert, Date: m.Time.Format("2 January 2006"), Ends: between(m),
		Rounds: r.mostRounds(), Reference: readable(reference), Answers: r.answers(), Facts: facts(m), Failed: grouped(r.Failed),
	}
	for _, u := range r.underlays() {
		data.Underlays = append(data.Underlays, fact{u, underlayTitles[u]})
		under := pageUnderlay{Title: "on underlay " + u, Open: len(data.Tables) == 0}
		for _, s := range sections() {
			if table, ok := r.pageTable(u, s, reference); ok {
				under.Parts = append(under.Parts, table)
			}
		}
		data.Tables = append(data.Tables, under)
	}
	for _, name := range r.datapathsOf(func(bench.Result) bool { return true }) {
		d, _ := bench.FindDatapath(name)
		data.Datapaths = append(data.Datapaths, fact{readable(name), name + ": " + d.About})
	}
	data.Sections = r.pageSections(reference)
	return t.Execute(w, data)
}

func (r view) pageSections(reference string) []pageSection {
	var all []pageSection
	for _, s := range sections() {
		section := pageSection{ID: strings.ReplaceAll(strings.ToLower(s.title), " ", "-"), Title: s.title}
		for _, c := range s.columns {
			if !slices.Contains(mainColumns(), c) {
				continue
			}
			one := r.chart(c, reference)
			if len(one.Panels) == 0 {
				continue
			}
			shown := pageChart{Title: one.Title, Better: one.Better}
			for _, p := range one.Panels {
				// draw escapes all text in the SVG, so it is safe as HTML.
				shown.Panels = append(shown.Panels, pagePanel{p.Underlay, template.HTML(p.SVG)})
			}
			section.Charts = append(section.Charts, shown)
		}
		if len(section.Charts) > 0 {
			all = append(all, section)
		}
	}
	return all
}

func (r view) pageTable(underlay string, s section, reference string) (pageTable, bool) {
	columns := r.columns(underlay, s)
	table := pageTable{Title: fmt.Sprintf("%s on underlay %s", s.title, underlay)}
	for _, c := range columns {
		table.Columns = append(table.Columns, c.title)
	}
	for _, d := range r.datapaths(underlay) {
		row := pageRow{Name: d}
		for _, c := range columns {
			x, ok := r.Find(underlay, d, c.workload, c.metric)
			if !ok {
				row.Cells = append(row.Cells, pageCell{Figure: r.absent(underlay, d, c)})
				continue
			}
			cell := pageCell{Figure: figure(x.Median), Ratio: r.ratio(x, reference)}
			if len(x.Rounds) > 1 {
				cell.Range = fmt.Sprintf("%s to %s", figure(x.Min), figure(x.Max))
			}
			row.Cells = append(row.Cells, cell)
		}
		table.Rows = append(table.Rows, row)
	}
	return table, len(columns) > 0
}

// facts describes the machine and the method, for a page.
func facts(m bench.Machine) []fact {
	all := []fact{
		{"time", m.Time.Format("2006-01-02 15:04 MST")},
		{"culvert", m.Culvert + ", " + m.Go},
		{"kernel", "Linux " + m.Kernel},
		{"processors", fmt.Sprintf("%d x %s, %s, governor %s", m.CPUs, m.CPU, m.Arch, m.Governor)},
		{"memory", fmt.Sprintf("%d MB", m.MemoryMB)},
		{"load before", fmt.Sprintf("%.2f", m.Load)},
		{"stolen by the hypervisor", fmt.Sprintf("at most %.1f %%", m.Steal*100)},
		{"generator", fmt.Sprintf("%s, TCP %s", m.Generator, m.Congestion)},
		{"nodes", joined(m)},
		{"ends", between(m)},
		{"each measurement", fmt.Sprintf("%s after %s of warm-up", m.Duration, m.Warmup)},
	}
	for _, p := range slices.Sorted(maps.Keys(m.Programs)) {
		all = append(all, fact{p, m.Programs[p]})
	}
	for _, u := range bench.Underlays() {
		if features, ok := m.Offloads[u]; ok {
			all = append(all, fact{"off on underlay " + u, off(features)})
		}
		if features, ok := m.Bridge[u]; ok {
			all = append(all, fact{"off at the bridge of " + u, off(features)})
		}
	}
	return all
}

// joined describes how the nodes are connected and which of them send.
func joined(m bench.Machine) string {
	if m.Bridged() {
		return fmt.Sprintf("%d nodes on a bridge, %d of which send to the first at once: not comparable with two", m.Nodes, m.Nodes-1)
	}
	return fmt.Sprintf("%d nodes", m.Nodes)
}

// between describes the ends.
func between(m bench.Machine) string {
	if m.Ends == bench.Pods {
		return "pods, each behind a veth on the bridge of its node, which forwards"
	}
	return "nodes: sockets on the nodes themselves"
}

// off lists the offloads that are off, of those that profiles set.
func off(features map[string]bool) string {
	set, err := lab.Offload.Features()
	if err != nil {
		panic(fmt.Sprintf("the profile %s is missing: %v", lab.Offload, err))
	}
	var names []string
	for _, name := range slices.Sorted(maps.Keys(set)) {
		if on, known := features[name]; known && !on {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, ", ")
}
