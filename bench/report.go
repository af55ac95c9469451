package bench

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"culvert/internal/lab"
	"culvert/internal/statefile"
)

// Schema is the version of the report's JSON form.
const Schema = 1

// Report is the result of a run.
type Report struct {
	Schema  int      `json:"schema"`
	Machine Machine  `json:"machine"`
	Results []Result `json:"results"`
	// Failed lists what could not be measured, and why.
	Failed []Failure `json:"failed,omitempty"`
}

// Result is one figure, with its value in each round.
type Result struct {
	Underlay string    `json:"underlay"`
	Datapath string    `json:"datapath"`
	Workload string    `json:"workload"`
	Metric   Metric    `json:"metric"`
	Unit     string    `json:"unit"`
	Median   float64   `json:"median"`
	Min      float64   `json:"min"`
	Max      float64   `json:"max"`
	Rounds   []float64 `json:"rounds"`
}

// Failure is a datapath, or one workload on it, without a result.
type Failure struct {
	Underlay string `json:"underlay"`
	Datapath string `json:"datapath"`
	Workload string `json:"workload,omitempty"` // empty: all of them
	Reason   string `json:"reason"`
	// Unavailable means that this machine cannot run the datapath or the workload,
	// which is not an error.
	Unavailable bool `json:"unavailable,omitempty"`
}

// Metric names a figure.
type Metric string

// The figures.
const (
	Throughput        Metric = "throughput"
	Rate              Metric = "rate"
	RateLossfree      Metric = "rate_lossfree"
	P50               Metric = "p50"
	P90               Metric = "p90"
	P99               Metric = "p99"
	P999              Metric = "p999"
	Connections       Metric = "connections"
	Jain              Metric = "jain"
	LeastShare        Metric = "share_min"
	MostShare         Metric = "share_max"
	CPUPerGB          Metric = "cpu_seconds_per_gb"
	DaemonCPUPerGB    Metric = "daemon_cpu_seconds_per_gb"
	RSS               Metric = "rss_mb"
	SyscallsPerPacket Metric = "syscalls_per_packet"
	FastShare         Metric = "fast_path_share"
)

// metrics lists all metrics in display order.
var metrics = []struct {
	name   Metric
	unit   string
	higher bool // higher is better
}{
	{Throughput, "Gbit/s", true},
	{Rate, "kpps", true},
	{RateLossfree, "kpps", true},
	{P50, "us", false},
	{P90, "us", false},
	{P99, "us", false},
	{P999, "us", false},
	{Connections, "1/s", true},
	{Jain, "1", true},
	{LeastShare, "1", true},
	{MostShare, "1", false},
	{CPUPerGB, "s/GB", false},
	{DaemonCPUPerGB, "s/GB", false},
	{RSS, "MB", false},
	{SyscallsPerPacket, "1", false},
	{FastShare, "1", true},
}

// Metrics returns all metrics in display order.
func Metrics() []Metric {
	var all []Metric
	for _, d := range metrics {
		all = append(all, d.name)
	}
	return all
}

// Unit is the metric's unit.
func (m Metric) Unit() string { return metrics[max(m.order(), 0)].unit }

// Higher reports whether higher values are better.
func (m Metric) Higher() bool { return metrics[max(m.order(), 0)].higher }

func (m Metric) order() int {
	for i, d := range metrics {
		if d.name == m {
			return i
		}
	}
	return -1
}

// Key says which figure a result is; two results with one Key can be compared.
type Key struct {
	underlay, datapath, workload string
	metric                       Metric
}

// Key returns which figure the result is.
func (x Result) Key() Key { return Key{x.Underlay, x.Datapath, x.Workload, x.Metric} }

// Find returns a figure, if the report has it.
func (r *Report) Find(underlay, datapath, workload string, m Metric) (Result, bool) {
	for _, x := range r.Results {
		if x.Underlay == underlay && x.Datapath == datapath && x.Workload == workload && x.Metric == m {
			return x, true
		}
	}
	return Result{}, false
}

// Add appends one round's value.
func (r *Report) Add(underlay, datapath, workload string, m Metric, value float64) {
	for i := range r.Results {
		if x := &r.Results[i]; x.Key() == (Key{underlay, datapath, workload, m}) {
			x.Rounds = append(x.Rounds, value)
			x.summarize()
			return
		}
	}
	x := Result{Underlay: underlay, Datapath: datapath, Workload: workload, Metric: m, Unit: m.Unit(), Rounds: []float64{value}}
	x.summarize()
	r.Results = append(r.Results, x)
}

// rounds returns how many rounds of a workload were measured.
func (r *Report) rounds(underlay, datapath, workload string) int {
	n := 0
	for _, x := range r.Results {
		if x.Underlay == underlay && x.Datapath == datapath && x.Workload == workload {
			n = max(n, len(x.Rounds))
		}
	}
	return n
}

// Fail records a failure and replaces an earlier one of the same datapath and workload.
func (r *Report) Fail(f Failure) {
	r.clearFailure(f.Underlay, f.Datapath, f.Workload)
	r.Failed = append(r.Failed, f)
}

// clearFailure removes a failure.
func (r *Report) clearFailure(underlay, datapath, workload string) {
	r.Failed = slices.DeleteFunc(r.Failed, func(f Failure) bool {
		return f.Underlay == underlay && f.Datapath == datapath && f.Workload == workload
	})
}

// Failure returns the failure of the workload or of the whole datapath, if any.
func (r *Report) Failure(underlay, datapath, workload string) (Failure, bool) {
	for _, f := range r.Failed {
		if f.Underlay == underlay && f.Datapath == datapath && (f.Workload == workload || f.Workload == "") {
			return f, true
		}
	}
	return Failure{}, false
}

// Broken reports whether anything failed that is available on this machine.
func (r *Report) Broken() bool {
	return slices.ContainsFunc(r.Failed, func(f Failure) bool { return !f.Unavailable })
}

func (x *Result) summarize() {
	x.Median, x.Min, x.Max = median(x.Rounds), slices.Min(x.Rounds), slices.Max(x.Rounds)
}

// Spread is the range of the rounds relative to the median.
func (x Result) Spread() float64 {
	if x.Median == 0 {
		return 0
	}
	return (x.Max - x.Min) / x.Median
}

func median(values []float64) float64 {
	v := slices.Sorted(slices.Values(values))
	if len(v) == 0 {
		return 0
	}
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// Sort sorts the results into display order.
func (r *Report) Sort() {
	slices.SortStableFunc(r.Results, func(a, b Result) int {
		return cmp.Or(
			cmp.Compare(slices.Index(Underlays(), a.Underlay), slices.Index(Underlays(), b.Underlay)),
			CompareDatapaths(a.Datapath, b.Datapath),
			cmp.Compare(slices.Index(WorkloadNames(), a.Workload), slices.Index(WorkloadNames(), b.Workload)),
			cmp.Compare(a.Metric.order(), b.Metric.order()))
	})
}

// Load reads a report that was written as JSON.
func Load(path string) (*Report, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var r Report
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("%s is not a report of culvert bench --json: %w", path, err)
	}
	if r.Schema != Schema {
		return nil, fmt.Errorf("%s has schema %d, and this version reads schema %d: measure again, or compare with the version that wrote it", path, r.Schema, Schema)
	}
	if r.Machine.Nodes == 0 {
		r.Machine.Nodes = 2 // older reports lack the field
	}
	r.Machine.Ends = cmp.Or(r.Machine.Ends, Nodes) // likewise
	for i, x := range r.Results {
		if x.Metric.order() < 0 || len(x.Rounds) == 0 {
			return nil, fmt.Errorf("%s: result %d (metric %q, %d rounds) does not conform to schema %d", path, i+1, string(x.Metric), len(x.Rounds), Schema)
		}
	}
	return &r, nil
}

// Save writes the report atomically.
func (r *Report) Save(path string) error {
	text, err := r.JSON()
	if err != nil {
		return err
	}
	return statefile.Write(path, text, 0o644)
}

// JSON returns the report in the documented JSON form.
func (r *Report) JSON() ([]byte, error) {
	if r.Results == nil {
		r.Results = []Result{}
	}
	text, err := json.MarshalIndent(r, "", "  ")
	return append(text, '\n'), err
}

// Machine describes the machine and the method of a measurement.
type Machine struct {
	Time     time.Time `json:"time"`
	Culvert  string    `json:"culvert"`
	Go       string    `json:"go"`
	Kernel   string    `json:"kernel"`
	Arch     string    `json:"arch"`
	CPU      string    `json:"cpu"`
	CPUs     int       `json:"cpus"`
	MemoryMB int       `json:"memory_mb"`
	Governor string    `json:"governor"` // CPU frequency governor; "none" if there is none
	// Load is the one-minute load average before the run, and Steal the highest share
	// of CPU time that the hypervisor took during a measurement.
	Load  float64 `json:"load"`
	Steal float64 `json:"steal"`

	Congestion string  `json:"congestion_control"`
	Generator  string  `json:"generator"`
	Nodes      int     `json:"nodes"`            // all but the first sent to the first at the same time
	Ends       string  `json:"ends"`             // Nodes or Pods
	Duration   Seconds `json:"duration_seconds"` // of one measurement
	Warmup     Seconds `json:"warmup_seconds"`   // before each
	// Offloads are the features of the underlay's links, by profile, as read back from
	// the kernel.
	Offloads map[string]map[string]bool `json:"offloads,omitempty"`
	// Bridge are the features of the bridge's ports, if there are more than two nodes.
	Bridge map[string]map[string]bool `json:"bridge_offloads,omitempty"`
	// Programs are the versions of the third-party programs used.
	Programs map[string]string `json:"programs,omitempty"`
}

// Bridged reports whether the nodes are joined by a bridge: the figures cannot be
// compared with those of two nodes.
func (m Machine) Bridged() bool { return underlayOf(m.Nodes) == lab.Bridged }

// Seconds is a duration, in seconds.
type Seconds float64

func (s Seconds) String() string {
	return time.Duration(float64(s) * float64(time.Second)).Round(time.Millisecond).String()
}
