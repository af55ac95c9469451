package report

import (
	"fmt"
	"html"
	"math"
	"strings"

	"culvert/bench"
)

// chart shows one figure: a panel per underlay, with a bar per datapath from 1 to its
// ratio to the reference, on a logarithmic scale. A thin line spans the least to the
// greatest ratio of the rounds.
type chart struct {
	Name   string // file name without .svg
	Title  string
	Better string // which direction is better
	Panels []panel
}

// panel is one SVG drawing, panelWidth wide.
type panel struct {
	Underlay string
	Height   int
	SVG      string
}

// Sizes in SVG user units.
const (
	panelWidth = 350
	rowHeight  = 34
	axisHeight = 20
)

// mainColumns returns the figures that have a chart.
func mainColumns() []column {
	var all []column
	for _, s := range sections() {
		for _, c := range s.columns {
			switch c.metric {
			case bench.P90, bench.P999, bench.RSS, bench.DaemonCPUPerGB, bench.FastShare:
				continue
			}
			all = append(all, c)
		}
	}
	return all
}

// palette and paletteDark are the colours of the light and the dark theme. Better is
// blue and worse is orange, which colour-blind readers can tell apart.
const palette = `--ink:#1f2328;--quiet:#59636e;--grid:#d1d9e0;--paper:#fff;--soft:#f6f8fa;--better:#0969da;--worse:#bc4c00;--level:#818b98;--link:#0550ae`

const paletteDark = `--ink:#e6edf3;--quiet:#9198a1;--grid:#3d444d;--paper:#0d1117;--soft:#151b23;--better:#4493f8;--worse:#f0883e;--level:#6e7681;--link:#79c0ff`

// charts draws all main figures that the report has.
func (r view) charts(reference string) []chart {
	var all []chart
	for _, c := range mainColumns() {
		if one := r.chart(c, reference); len(one.Panels) > 0 {
			all = append(all, one)
		}
	}
	return all
}

func (r view) chart(c column, reference string) chart {
	one := chart{
		Name: fmt.Sprintf("%s-%s", c.workload, c.metric), Title: c.readable(), Better: "less is better: bars to the left",
	}
	if c.metric.Higher() {
		one.Better = "more is better: bars to the right"
	}
	rows := map[string][]judged{}
	// All panels have the same scale, so that they can be compared.
	scale := scale{low: 0.5, high: 2}
	for _, u := range r.underlays() {
		rows[u] = r.judgedOn(u, c, reference)
		for _, j := range rows[u] {
			if j.ratio {
				scale.take(j.q)
			}
		}
	}
	for _, u := range r.underlays() {
		if len(rows[u]) > 0 && r.has(u, c) {
			one.Panels = append(one.Panels, draw(u, c, rows[u], scale, reference))
		}
	}
	return one
}

func (r view) has(underlay string, c column) bool {
	for _, x := range r.Results {
		if x.Underlay == underlay && x.Workload == c.workload && x.Metric == c.metric {
			return true
		}
	}
	return false
}

// scale is a logarithmic scale of ratios that includes 1.
type scale struct{ low, high float64 }

// farthest limits the scale to 1/farthest and farthest. A ratio beyond is drawn at the
// edge, with its figure beside the bar.
const farthest = 32

func (s *scale) take(q Ratio) {
	s.low = max(min(s.low, floorPower(q.Min)), 1.0/farthest)
	s.high = min(max(s.high, 1/floorPower(1/q.Max)), farthest)
}

// floorPower returns the greatest power of two that is not greater than v.
func floorPower(v float64) float64 {
	if v <= 0 {
		return 1.0 / farthest
	}
	return math.Exp2(math.Floor(math.Log2(v) + 1e-9))
}

// x returns the horizontal position of a ratio in a panel.
func (s scale) x(v float64) float64 {
	const margin = 8
	at := (math.Log2(min(max(v, s.low), s.high)) - math.Log2(s.low)) / (math.Log2(s.high) - math.Log2(s.low))
	return margin + at*(panelWidth-2*margin)
}

// ticks returns the powers of two on the scale, every second one if there are many.
func (s scale) ticks() []float64 {
	step := 1.0
	if octaves := math.Log2(s.high / s.low); octaves > 6 {
		step = 2
	}
	var all []float64
	for e := math.Ceil(math.Log2(s.low)); e <= math.Log2(s.high)+1e-9; e++ {
		if math.Mod(e, step) == 0 {
			all = append(all, math.Exp2(e))
		}
	}
	return all
}

func tick(v float64) string {
	if v < 1 {
		return fmt.Sprintf("1/%g", 1/v)
	}
	return fmt.Sprintf("%g", v)
}

// draw draws a panel: an axis, then two rows for each datapath, one with its name and
// figures and one with its bar.
func draw(underlay string, c column, rows []judged, s scale, reference string) panel {
	height := axisHeight + rowHeight*len(rows) + 4
	var b strings.Builder
	var told []string
	for _, v := range s.ticks() {
		class := "grid"
		if v == 1 {
			class = "one"
		}
		// Draw grid lines only in the bars' rows, not through the names.
		fmt.Fprintf(&b, `<path class="%s" d="M%.1f %dv4`, class, s.x(v), axisHeight-5)
		for i, j := range rows {
			if j.ratio {
				fmt.Fprintf(&b, `M%.1f %dv12`, s.x(v), axisHeight+i*rowHeight+17)
			}
		}
		b.WriteString(`"/>`)
		anchor := "middle"
		switch {
		case s.x(v) < 20:
			anchor = "start"
		case s.x(v) > panelWidth-20:
			anchor = "end"
		}
		fmt.Fprintf(&b, `<text class="tick" x="%.1f" y="%d" text-anchor="%s">%s</text>`, s.x(v), axisHeight-8, anchor, tick(v))
	}
	b.WriteString("\n")
	for i, j := range rows {
		top := axisHeight + i*rowHeight
		name, value := html.EscapeString(readable(j.name)), ""
		class := "name"
		switch {
		case j.failed:
			value = "failed"
		case j.self:
			value, class = withUnit(j.x)+", the reference", "name self"
		case j.ratio:
			value = mark(j.judge) + " " + times(j.q.Median) + "  " + withUnit(j.x)
		default:
			value = withUnit(j.x)
		}
		fmt.Fprintf(&b, `<text class="%s" x="8" y="%d">%s</text>`, class, top+14, name)
		fmt.Fprintf(&b, `<text class="figure" x="%d" y="%d" text-anchor="end">%s</text>`, panelWidth-8, top+14, html.EscapeString(value))
		if j.ratio {
			left, right := min(s.x(1), s.x(j.q.Median)), max(s.x(1), s.x(j.q.Median))
			if right-left < 2 {
				left, right = left-1, left+1
			}
			fmt.Fprintf(&b, `<rect class="%s" x="%.1f" y="%d" width="%.1f" height="8"/>`, judgeClass(j.judge), left, top+19, right-left)
			if j.q.Rounds > 1 && !j.self {
				fmt.Fprintf(&b, `<path class="span" d="M%.1f %dv6M%.1f %dH%.1fM%.1f %dv6"/>`, s.x(j.q.Min), top+20, s.x(j.q.Min), top+23, s.x(j.q.Max), s.x(j.q.Max), top+20)
			}
		}
		b.WriteString("\n")
		told = append(told, readable(j.name)+" "+strings.TrimSpace(value))
	}
	label := html.EscapeString(fmt.Sprintf("%s on %s, ratios to %s: %s", c.readable(), underlay, readable(reference), strings.Join(told, "; ")))
	return panel{Underlay: underlay, Height: height, SVG: fmt.Sprintf(
		`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img" aria-label="%s">%s</svg>`, panelWidth, height, label, "\n"+b.String())}
}

// mark repeats the colour's meaning as a character.
func mark(judge int) string { return [...]string{"▼", "≈", "▲"}[judge+1] }

func judgeClass(judge int) string { return [...]string{"worse", "level", "better"}[judge+1] }

func withUnit(x bench.Result) string {
	if x.Metric.Unit() == "1" {
		return figure(x.Median)
	}
	return figure(x.Median) + " " + x.Metric.Unit()
}

// chartStyle is the CSS of the drawings' classes.
const chartStyle = `.grid,.one{stroke:var(--grid);stroke-width:1;fill:none}.one{stroke:var(--ink)}` +
	`.tick{font-size:11px;fill:var(--quiet)}.name,.figure{font-size:12.5px;fill:var(--ink)}.self{font-weight:600}` +
	`.figure{font-variant-numeric:tabular-nums;white-space:pre}.span{stroke:var(--ink);stroke-width:1.2;fill:none}` +
	`.better{fill:var(--better)}.worse{fill:var(--worse)}.level{fill:var(--level)}`

// SVG returns the chart as one standalone drawing with its panels in two columns.
func (c chart) SVG() string {
	const gap, title, head = 24, 30, 24
	var b strings.Builder
	y := title
	width := 2*panelWidth + gap
	if len(c.Panels) == 1 {
		width = panelWidth
	}
	for i := 0; i < len(c.Panels); i += 2 {
		tallest := 0
		for k, p := range c.Panels[i:min(i+2, len(c.Panels))] {
			x := k * (panelWidth + gap)
			fmt.Fprintf(&b, `<text class="underlay" x="%d" y="%d">%s</text>`+"\n", x+8, y+14, p.Underlay)
			body := p.SVG[strings.Index(p.SVG, ">")+1 : strings.LastIndex(p.SVG, "</svg>")]
			fmt.Fprintf(&b, `<svg x="%d" y="%d" width="%d" height="%d">%s</svg>`+"\n", x, y+head, panelWidth, p.Height, body)
			tallest = max(tallest, p.Height)
		}
		y += head + tallest + gap
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="%s">
<style>:root{%s}@media (prefers-color-scheme:dark){:root{%s}}text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif}%s.underlay{font-size:14px;font-weight:600;fill:var(--ink)}</style>
<rect width="100%%" height="100%%" style="fill:var(--paper)"/>
<text class="underlay" x="8" y="18">%s</text>
%s</svg>
`, width, y, width, y, html.EscapeString(c.Title), palette, paletteDark, chartStyle, html.EscapeString(c.Title+" ("+c.Better+")"), b.String())
}
