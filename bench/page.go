package bench

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"maps"
	"slices"
	"strings"

	"culvert/internal/lab"
)

//go:embed page.html
var pageText string

// pageData is what page.html shows.
type pageData struct {
	Palette, PaletteDark template.CSS
	Reference            string
	Key                  []pageKey
	Charts               []pageChart
	Tables               []pageTable
	Failed               []Failure
	Facts                []fact
}

type pageKey struct {
	Index int
	Name  string
}

type pageChart struct {
	Title   string
	Drawing template.HTML
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

// HTML writes the report as one page that needs nothing else.
func (r *Report) HTML(w io.Writer, reference string) error {
	t, err := template.New("page").Parse(pageText)
	if err != nil {
		return err
	}
	data := pageData{Palette: palette, PaletteDark: paletteDark, Reference: reference, Failed: grouped(r.Failed), Facts: r.Machine.facts()}
	for i, u := range Underlays() {
		if slices.Contains(r.underlays(), u) {
			data.Key = append(data.Key, pageKey{i, u})
		}
	}
	charts, err := r.charts()
	if err != nil {
		return err
	}
	for _, c := range charts {
		// The drawing is our own, and its labels are names of this package.
		data.Charts = append(data.Charts, pageChart{c.Title, template.HTML(c.SVG)})
	}
	for _, u := range r.underlays() {
		for _, s := range sections() {
			if table, ok := r.pageTable(u, s, reference); ok {
				data.Tables = append(data.Tables, table)
			}
		}
	}
	return t.Execute(w, data)
}

func (r *Report) pageTable(underlay string, s section, reference string) (pageTable, bool) {
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

// facts describe the machine and the method, for a page.
func (m Machine) facts() []fact {
	all := []fact{
		{"time", m.Time.Format("2006-01-02 15:04 MST")},
		{"culvert", m.Culvert + ", " + m.Go},
		{"kernel", "Linux " + m.Kernel},
		{"processors", fmt.Sprintf("%d x %s, %s, governor %s", m.CPUs, m.CPU, m.Arch, m.Governor)},
		{"memory", fmt.Sprintf("%d MB", m.MemoryMB)},
		{"load before", fmt.Sprintf("%.2f", m.Load)},
		{"stolen by the hypervisor", fmt.Sprintf("at most %.1f %%", m.Steal*100)},
		{"generator", fmt.Sprintf("%s, TCP %s", m.Generator, m.Congestion)},
		{"nodes", m.joined()},
		{"ends", m.between()},
		{"each measurement", fmt.Sprintf("%s after %s of warm-up", seconds(m.Duration), seconds(m.Warmup))},
	}
	for _, p := range slices.Sorted(maps.Keys(m.Programs)) {
		all = append(all, fact{p, m.Programs[p]})
	}
	for _, u := range Underlays() {
		if features, ok := m.Offloads[u]; ok {
			all = append(all, fact{"off on underlay " + u, off(features)})
		}
		if features, ok := m.Bridge[u]; ok {
			all = append(all, fact{"off at the bridge of " + u, off(features)})
		}
	}
	return all
}

// joined says how the nodes are joined, and who sends.
func (m Machine) joined() string {
	if underlayOf(m.Nodes) == lab.Bridged {
		return fmt.Sprintf("%d nodes on a bridge, %d of which send to the first at once: not comparable with two", m.Nodes, m.Nodes-1)
	}
	return fmt.Sprintf("%d nodes", m.Nodes)
}

// between says what sends and receives.
func (m Machine) between() string {
	if m.Ends == Pods {
		return "pods, each behind a veth on the bridge of its node, which forwards"
	}
	return "nodes: sockets on the nodes themselves"
}

// off lists the offloads that an underlay's profile turned off, of those that
// any profile sets.
func off(features map[string]bool) string {
	set, err := offloadProfile.Features()
	if err != nil {
		panic(fmt.Sprintf("the profile %s is not there: %v", offloadProfile, err))
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
