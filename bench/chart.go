package bench

import (
	"bytes"
	"fmt"
	"image/color"
	"math"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// chart is a picture of one figure: the datapaths side by side, and a bar for
// each underlay.
type chart struct {
	Name  string // for a file
	Title string
	SVG   string
}

// mainColumns are the figures worth a picture.
func mainColumns() []column {
	var all []column
	for _, s := range sections() {
		for _, c := range s.columns {
			switch c.metric {
			case P90, P999, RSS, DaemonCPUPerGB:
				continue
			}
			all = append(all, c)
		}
	}
	return all
}

// The plot is drawn in these colours, which stand for the page's: a reader's
// light or dark is not known here.
var (
	ink      = color.RGBA{1, 1, 1, 255}
	grid     = color.RGBA{2, 2, 2, 255}
	paint    = []color.RGBA{{3, 1, 1, 255}, {3, 2, 2, 255}, {3, 3, 3, 255}, {3, 4, 4, 255}, {3, 5, 5, 255}}
	standFor = []string{"#010101", "var(--ink)", "#020202", "var(--grid)", "#030101", "var(--c0)", "#030202", "var(--c1)", "#030303", "var(--c2)", "#030404", "var(--c3)", "#030505", "var(--c4)"}
)

// palette are the colours, in light and in dark.
const palette = `--ink:#1f2328;--grid:#d1d9e0;--paper:#fff;--soft:#f6f8fa;--c0:#0969da;--c1:#bc4c00;--c2:#1a7f37;--c3:#8250df;--c4:#57606a`

const paletteDark = `--ink:#e6edf3;--grid:#3d444d;--paper:#0d1117;--soft:#151b23;--c0:#58a6ff;--c1:#f0883e;--c2:#3fb950;--c3:#bc8cff;--c4:#9198a1`

// charts draws every main figure that the report has.
func (r *Report) charts() ([]chart, error) {
	var all []chart
	for _, c := range mainColumns() {
		names := r.datapathsOf(func(x Result) bool { return x.Workload == c.workload && x.Metric == c.metric })
		if len(names) == 0 {
			continue
		}
		svg, err := r.draw(c, names)
		if err != nil {
			return nil, fmt.Errorf("drawing %s: %w", c.title, err)
		}
		all = append(all, chart{Name: fmt.Sprintf("%s-%s", c.workload, c.metric), Title: c.title, SVG: svg})
	}
	return all, nil
}

func (r *Report) draw(c column, names []string) (string, error) {
	p := plot.New()
	sans := font.Font{Typeface: "Liberation", Variant: "Sans", Size: vg.Points(11)}
	for _, style := range []*draw.TextStyle{&p.X.Tick.Label, &p.Y.Tick.Label, &p.X.Label.TextStyle, &p.Y.Label.TextStyle} {
		style.Font, style.Color = sans, ink
	}
	for _, line := range []*draw.LineStyle{&p.X.LineStyle, &p.Y.LineStyle, &p.X.Tick.LineStyle, &p.Y.Tick.LineStyle} {
		line.Color = ink
	}
	p.BackgroundColor = nil
	p.Y.Label.Text = c.metric.Unit()
	if c.metric == SyscallsPerPacket {
		p.Y.Label.Text = "per packet"
	}
	p.NominalX(names...)
	p.X.Tick.Label.Rotation = math.Pi / 8
	if len(names) > 10 { // else they touch
		p.X.Tick.Label.Rotation = math.Pi / 5
	}
	p.X.Tick.Label.XAlign, p.X.Tick.Label.YAlign = draw.XRight, draw.YTop
	bars := &bars{label: p.Y.Tick.Label}
	bars.label.XAlign, bars.label.YAlign = draw.XCenter, draw.YBottom
	for j, u := range Underlays() {
		for i, d := range names {
			if x, ok := r.Find(u, d, c.workload, c.metric); ok {
				bars.all = append(bars.all, bar{group: i, series: j, result: x})
				if !slices.Contains(bars.series, j) {
					bars.series = append(bars.series, j)
				}
			}
		}
	}
	p.Add(bars)
	p.Y.Min, p.Y.Max = 0, p.Y.Max*1.1
	p.X.Min, p.X.Max = -0.6, float64(len(names))-0.4

	canvas := vgsvg.New(vg.Points(540), vg.Points(240))
	p.Draw(draw.New(canvas))
	var b bytes.Buffer
	if _, err := canvas.WriteTo(&b); err != nil {
		return "", err
	}
	svg := b.String()
	svg = svg[strings.Index(svg, "<svg"):]
	svg = strings.NewReplacer(standFor...).Replace(svg)
	svg = strings.ReplaceAll(svg, "font-family:Liberation Sans", "font-family:Liberation Sans,Arial,Helvetica,sans-serif")
	return strings.Replace(svg, "<svg", fmt.Sprintf("<svg role=%q aria-label=%q", "img", c.title), 1), nil
}

type bar struct {
	group, series int
	result        Result
}

// bars is a plotter of grouped bars, each with a whisker from the least to the
// greatest of its rounds.
type bars struct {
	series []int
	all    []bar
	label  draw.TextStyle // of the figure above a bar
}

// mostLabels is up to how many bars have room for a figure above each.
const mostLabels = 14

// DataRange implements plot.DataRanger.
func (b *bars) DataRange() (xmin, xmax, ymin, ymax float64) {
	for _, x := range b.all {
		xmax = max(xmax, float64(x.group))
		ymax = max(ymax, x.result.Max)
	}
	return 0, xmax, 0, ymax
}

// Plot implements plot.Plotter.
func (b *bars) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	for _, t := range p.Y.Tick.Marker.Ticks(p.Y.Min, p.Y.Max) {
		if !t.IsMinor() && t.Value > 0 {
			c.StrokeLine2(draw.LineStyle{Color: grid, Width: vg.Points(0.5)}, c.Min.X, y(t.Value), c.Max.X, y(t.Value))
		}
	}
	width := (x(1) - x(0)) * 0.8 / vg.Length(len(b.series))
	for _, one := range b.all {
		place := vg.Length(slices.Index(b.series, one.series)) - vg.Length(len(b.series)-1)/2
		middle := x(float64(one.group)) + place*width
		left, right := middle-width*0.45, middle+width*0.45
		r := one.result
		c.FillPolygon(paint[one.series], []vg.Point{
			{X: left, Y: y(0)}, {X: left, Y: y(r.Median)}, {X: right, Y: y(r.Median)}, {X: right, Y: y(0)},
		})
		if len(r.Rounds) > 1 {
			c.StrokeLine2(draw.LineStyle{Color: ink, Width: vg.Points(0.8)}, middle, y(r.Min), middle, y(r.Max))
		}
		if len(b.all) <= mostLabels {
			c.FillText(b.label, vg.Point{X: middle, Y: y(r.Max) + vg.Points(2)}, figure(r.Median))
		}
	}
}
