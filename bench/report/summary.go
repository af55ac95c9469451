package report

import (
	"fmt"
	"math"
	"strings"

	"culvert/bench"
)

// Descriptive names for pages, in place of the flags' names.
var (
	underlayTitles = map[string]string{
		"offload":      "all offloads: GSO frames of 64 KB cross the link unsegmented",
		"cloud":        "a cloud VM's NIC: segmentation offload, except for tunnelled packets",
		"plain":        "a simple NIC: no segmentation offload; the receiver has GRO",
		"bare":         "the worst case: no segmentation offload and no GRO",
		bench.Existing: "between two hosts",
	}
	metricTitles = map[bench.Metric]string{
		bench.Throughput: "throughput", bench.Rate: "packets received", bench.RateLossfree: "packets without loss",
		bench.P50: "median latency", bench.P90: "latency, 90 %", bench.P99: "latency, 99 %", bench.P999: "latency, 99.9 %",
		bench.Connections: "connections per second", bench.Jain: "Jain's index of fairness",
		bench.LeastShare: "least share of a stream", bench.MostShare: "greatest share of a stream",
		bench.CPUPerGB: "CPU time per gigabyte", bench.DaemonCPUPerGB: "daemons' CPU time per gigabyte",
		bench.RSS: "largest daemon's memory", bench.SyscallsPerPacket: "daemons' system calls per packet",
		bench.FastShare: "share of the bytes that took the fast path",
	}
)

// readable returns the datapath's title for pages.
func readable(name string) string {
	d, ok := bench.FindDatapath(name)
	if !ok || d.Title == "" {
		return name
	}
	return d.Title
}

// readable returns the column's title for pages.
func (c column) readable() string {
	for _, w := range bench.Workloads() {
		if w.Name == c.workload {
			return w.Title + ": " + metricTitles[c.metric]
		}
	}
	return c.title
}

// question is a question that the summary answers by comparing two datapaths.
type question struct {
	ask string
	// pairs of datapaths to compare; the first pair with figures in the report is used.
	pairs [][2]string
	note  string
}

func questions() []question {
	return []question{
		{"How fast is the datapath that culvert chooses by default?", [][2]string{{"vxlan/auto", "vxlan/kernel"}}, ""},
		{"What does the fast path gain?", [][2]string{{"vxlan/kernel+fast", "vxlan/kernel"}}, "Both use the same kernel device."},
		{"What does the fast path gain with the userspace datapath?", [][2]string{{"vxlan/userspace+fast", "vxlan/userspace"}, {"ipip/userspace+fast", "ipip/userspace"}}, ""},
		{"Userspace or the kernel?", [][2]string{{"vxlan/userspace", "vxlan/kernel"}, {"ipip/userspace", "ipip/kernel"}}, ""},
		{"What does an overlay cost, against plain routes?", [][2]string{{"vxlan/kernel", "host-gw"}, {"vxlan/userspace", "host-gw"}, {"vxlan/kernel", "native"}, {"vxlan/userspace", "native"}}, "Plain routes need nodes on one link, without a router between them."},
		{"IPIP or VXLAN?", [][2]string{{"ipip/kernel", "vxlan/kernel"}, {"ipip/userspace", "vxlan/userspace"}}, ""},
		{"What does encryption cost?", [][2]string{{"wireguard-go", "vxlan/userspace"}, {"nebula", "vxlan/userspace"}, {"wireguard-go", "vxlan/kernel"}}, "The two programs differ in more than encryption."},
		{"Culvert or flannel, both with the kernel's device?", [][2]string{{"vxlan/kernel", "flannel-vxlan"}}, "This includes culvert's firewall rules, which drop packets that are not from peers."},
	}
}

// answer is the report's answer to a question.
type answer struct {
	Question, Pair, Note string
	Says                 []fact   // the figures that are better, worse, and so on
	Lines                []string // the same by underlay
}

// answers returns the answers for which the report has figures.
func (r view) answers() []answer {
	var all []answer
	for _, q := range questions() {
		for _, pair := range q.pairs {
			says, lines := r.against(pair[0], pair[1])
			if len(says) > 0 {
				all = append(all, answer{
					Question: q.ask, Pair: readable(pair[0]) + ", against " + readable(pair[1]),
					Says: says, Lines: lines, Note: q.note,
				})
				break
			}
		}
	}
	return all
}

// difference is the smallest relative difference that the summary mentions.
const difference = EffectFloor

// against compares the key figures of two datapaths in words: a summary, and a line
// per figure with the underlays.
func (r view) against(datapath, other string) (says []fact, lines []string) {
	verdicts := map[string][]string{}
	for _, f := range keyFigures {
		groups := map[int][]string{}
		least, most := math.Inf(1), math.Inf(-1)
		for _, u := range r.underlays() {
			x, ok := r.Find(u, datapath, f.workload, f.metric)
			ref, rok := r.Find(u, other, f.workload, f.metric)
			q, qok := ratioOf(x, ref)
			if !ok || !rok || !qok {
				continue
			}
			least, most = min(least, q.Median), max(most, q.Median)
			judge := q.judge(f.metric)
			groups[judge] = append(groups[judge], fmt.Sprintf("%s (%s)", u, times(q.Median)))
		}
		if len(groups) == 0 {
			continue
		}
		var line []string
		for _, g := range []struct {
			judge int
			word  string
		}{{1, "better on "}, {-1, "worse on "}, {0, "no clear difference on "}} {
			if len(groups[g.judge]) > 0 {
				line = append(line, g.word+strings.Join(groups[g.judge], ", "))
			}
		}
		lines = append(lines, f.title+": "+strings.Join(line, "; "))
		verdict := level
		switch {
		case len(groups[1]) > 0 && len(groups[-1]) > 0:
			verdict = depends
		case len(groups[1]) > 0:
			verdict = better
		case len(groups[-1]) > 0:
			verdict = worse
		}
		if f.short != "" {
			verdicts[verdict] = append(verdicts[verdict], fmt.Sprintf("%s (%s)", f.short, span(least, most)))
		}
	}
	for _, v := range []string{better, worse, depends, level} {
		if len(verdicts[v]) > 0 {
			says = append(says, fact{v, strings.Join(verdicts[v], ", ")})
		}
	}
	return says, lines
}

// Verdicts of a comparison over all underlays.
const (
	better  = "Better"
	worse   = "Worse"
	depends = "Depends on the underlay"
	level   = "No clear difference"
)

func times(q float64) string {
	if q >= 10 {
		return figure(q) + "×"
	}
	return fmt.Sprintf("%.2f×", q)
}

// span formats a range of ratios, or one ratio if both are shown alike.
func span(least, most float64) string {
	if times(least) == times(most) {
		return times(least)
	}
	return times(least) + " to " + times(most)
}

// judge returns 1 if the datapath is better than the reference, -1 if it is worse, and
// 0 if they differ by less than difference or the rounds disagree.
func (q Ratio) judge(m bench.Metric) int {
	switch {
	case math.Abs(q.Median-1) < difference || q.Min <= 1 && 1 <= q.Max:
		return 0
	case q.Median > 1 == m.Higher():
		return 1
	}
	return -1
}

// judged is a datapath's figure and its ratio to the reference, for a chart.
type judged struct {
	name   string
	x      bench.Result
	q      Ratio
	ratio  bool // q is valid
	judge  int
	self   bool // it is the reference
	failed bool
}

// judgedOn returns the underlay's datapaths that have the figure or failed.
func (r view) judgedOn(underlay string, c column, reference string) []judged {
	var all []judged
	ref, _ := r.Find(underlay, reference, c.workload, c.metric)
	for _, d := range r.datapaths(underlay) {
		x, ok := r.Find(underlay, d, c.workload, c.metric)
		if !ok {
			if r.absent(underlay, d, c) != "-" {
				all = append(all, judged{name: d, failed: true})
			}
			continue
		}
		j := judged{name: d, x: x, self: d == reference}
		if j.q, j.ratio = ratioOf(x, ref); j.ratio {
			j.judge = j.q.judge(c.metric)
		}
		all = append(all, j)
	}
	return all
}
