package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"culvert/bench/load"
	"culvert/internal/lab"
)

// Options configure Run.
type Options struct {
	Underlays, Datapaths, Workloads []string // names

	Nodes            int    // all but the first send to the first at the same time
	Ends             string // one of Ends; Nodes if empty
	Rounds           int
	Duration, Warmup time.Duration // of each measurement
	Lossfree         bool          // UDP: also search the highest rate without loss
	Generator        string        // one of Generators
	Remote           *Remote       // the other host, for the underlay Existing

	Version string // of culvert
	Self    string // path of the program that implements `bench node`
	Bin     string // directory of culvert's programs, needed with pods as ends and for the fast path; empty: lab.FindBin
	// Progress is called before each measurement.
	Progress func(Progress)
	// Save is called after each measurement.
	Save func(*Report) error

	prior *Report
}

// Resume makes Run continue an earlier report: what it contains is not measured
// again. Resume returns an error if the report is from another machine, version or
// method.
func (o *Options) Resume(prior *Report) error {
	now, was := thisMachine(), prior.Machine
	for _, f := range []struct{ what, was, now string }{
		{"culvert", was.Culvert, o.Version},
		{"kernel", was.Kernel, now.Kernel},
		{"CPU", was.CPU, now.CPU},
		{"nodes", strconv.Itoa(was.Nodes), strconv.Itoa(o.Nodes)},
		{"ends", was.Ends, cmp.Or(o.Ends, Nodes)},
		{"generator", was.Generator, o.Generator},
		{"duration", was.Duration.String(), o.Duration.String()},
		{"warm-up", was.Warmup.String(), o.Warmup.String()},
	} {
		if f.was != f.now {
			return fmt.Errorf("the existing report has %s %s, and this run %s: use another file or remove it", f.what, f.was, f.now)
		}
	}
	o.prior = prior
	return nil
}

// MostNodes is the maximum of Options.Nodes.
const MostNodes = 250

// Progress is the progress of a run, in measurements.
type Progress struct {
	Done, Total int
	Left        time.Duration // estimated
	Doing       string
}

// Check returns an error if an option is invalid; it lists the valid values.
func (o Options) Check() error {
	for _, c := range []struct {
		what           string
		given, choices []string
	}{
		{"underlay", o.Underlays, Underlays()},
		{"datapath", o.Datapaths, datapathNames()},
		{"workload", o.Workloads, WorkloadNames()},
	} {
		if len(c.given) == 0 {
			return fmt.Errorf("no %s is chosen: %s", c.what, strings.Join(c.choices, ", "))
		}
		for _, name := range c.given {
			if _, ok := FindDatapath(name); !slices.Contains(c.choices, name) && !(c.what == "datapath" && ok) {
				return fmt.Errorf("there is no %s %q: %s", c.what, name, strings.Join(c.choices, ", "))
			}
		}
	}
	switch existing := slices.Contains(o.Underlays, Existing); {
	case existing && o.Nodes != 2:
		return fmt.Errorf("the underlay %s joins two hosts: --nodes is for labs", Existing)
	case existing && len(o.Underlays) > 1:
		return fmt.Errorf("the underlay %s cannot be combined with others: it is not a lab", Existing)
	case existing && o.Remote == nil:
		return fmt.Errorf("the underlay %s needs --server on one host and --client ADDR on the other", Existing)
	case !existing && o.Remote != nil:
		return fmt.Errorf("--client is for the underlay %s: add --underlay %s", Existing, Existing)
	case o.Nodes < 2 || o.Nodes > MostNodes:
		return fmt.Errorf("%d nodes: 2 to %d", o.Nodes, MostNodes)
	case o.Ends != "" && !slices.Contains(Ends(), o.Ends):
		return fmt.Errorf("there are no ends %q: %s", o.Ends, strings.Join(Ends(), ", "))
	case existing && o.Ends == Pods:
		return fmt.Errorf("on the underlay %s the ends are the hosts: --ends %s is for labs", Existing, Pods)
	case o.Rounds < 1:
		return fmt.Errorf("%d rounds: at least 1", o.Rounds)
	case o.Duration < 50*time.Millisecond:
		return fmt.Errorf("a duration of %s: at least 50ms", o.Duration)
	case !slices.Contains(Generators(), o.Generator):
		return fmt.Errorf("there is no generator %q: %s", o.Generator, strings.Join(Generators(), ", "))
	case o.Warmup < 0:
		return fmt.Errorf("a warm-up of %s: at least 0s", o.Warmup)
	}
	return nil
}

// runner is the state of one Run.
type runner struct {
	Options
	method method
	report *Report
	sites  map[string]*site // by datapath, of the current underlay

	generators map[string]generator // by datapath

	cells  [2]int           // measurements: done, total
	plan   [2]time.Duration // their estimated time: of those done, of all
	spent  time.Duration    // time that those done took
	starts [2]int           // starts of datapaths: done, total
	waited time.Duration    // time that those done took
}

// Run measures. When ctx ends it returns ctx's error and the report so far. A
// datapath or workload that fails is not an error: the report has the failure.
func Run(ctx context.Context, o Options) (*Report, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	o.Ends = cmp.Or(o.Ends, Nodes)
	slices.SortFunc(o.Datapaths, CompareDatapaths)
	o.Datapaths = slices.Compact(o.Datapaths)
	r := &runner{Options: o, method: method{warmup: o.Warmup, duration: o.Duration, lossfree: o.Lossfree}, generators: map[string]generator{}}
	if ok, why := (iperf3{}).available(); o.Generator == iperf3Name && !ok {
		return nil, fmt.Errorf("--generator %s: %s (apt-get install iperf3, or use --generator %s)", iperf3Name, why, builtinName)
	}
	for _, name := range o.Datapaths {
		d, _ := FindDatapath(name)
		r.generators[name] = generatorOf(cmp.Or(d.generator, o.Generator))
	}
	r.report = &Report{Schema: Schema, Machine: thisMachine()}
	m := &r.report.Machine
	m.Culvert, m.Congestion = o.Version, load.Congestion
	m.Generator = o.Generator
	m.Duration, m.Warmup = Seconds(o.Duration.Seconds()), Seconds(o.Warmup.Seconds())
	m.Nodes, m.Ends = o.Nodes, o.Ends
	if m.Bridged() {
		m.Bridge = map[string]map[string]bool{}
	}
	m.Programs = versions(o.Datapaths)
	if ok, _ := (iperf3{}).available(); ok && (o.Generator == iperf3Name || slices.Contains(o.Datapaths, checkedNative)) {
		m.Programs[iperf3Name] = iperf3Version()
	}
	m.Offloads = map[string]map[string]bool{}
	if o.prior != nil {
		r.report.Results, r.report.Failed = slices.Clone(o.prior.Results), slices.Clone(o.prior.Failed)
		m.Time, m.Load, m.Steal = o.prior.Machine.Time, max(m.Load, o.prior.Machine.Load), o.prior.Machine.Steal
		maps.Copy(m.Offloads, o.prior.Machine.Offloads)
		maps.Copy(m.Bridge, o.prior.Machine.Bridge)
		maps.Copy(m.Programs, o.prior.Machine.Programs)
		// Try again what failed.
		for _, u := range o.Underlays {
			for _, d := range o.Datapaths {
				for _, w := range append([]string{""}, o.Workloads...) {
					r.report.clearFailure(u, d, w)
				}
			}
		}
	}
	defer load.Quiet(mostStreams * (o.Nodes - 1))()
	err := r.run(ctx)
	r.report.Sort()
	return r.report, err
}

func (r *runner) run(ctx context.Context) error {
	for _, u := range r.Underlays {
		for _, d := range r.Datapaths {
			if !r.complete(u, d) {
				r.starts[1]++
			}
			for _, w := range r.chosen() {
				n := max(r.Rounds-r.report.rounds(u, d, w.Name), 0)
				r.plan[1] += time.Duration(n) * r.takes(d, w)
				r.cells[1] += n
			}
		}
	}
	for _, u := range r.Underlays {
		if err := r.underlay(ctx, u); err != nil {
			return err
		}
	}
	return nil
}

func (r *runner) chosen() []Workload {
	var chosen []Workload
	for _, w := range Workloads() {
		if slices.Contains(r.Workloads, w.Name) {
			chosen = append(chosen, w)
		}
	}
	return chosen
}

// underlay starts every datapath, measures all rounds, and stops them.
func (r *runner) underlay(ctx context.Context, underlay string) (err error) {
	r.sites = map[string]*site{}
	defer func() {
		for _, s := range r.sites {
			err = errors.Join(err, s.close())
		}
	}()
	for _, name := range r.Datapaths {
		if r.complete(underlay, name) {
			continue
		}
		d, _ := FindDatapath(name)
		if err := r.start(ctx, underlay, d); err != nil {
			return err
		}
	}
	for round := range r.Rounds {
		for _, w := range r.chosen() {
			for _, i := range balanced(len(r.Datapaths), round) {
				name := r.Datapaths[i]
				s := r.sites[name]
				if s == nil || r.report.rounds(underlay, name, w.Name) > round {
					continue
				}
				if err := r.measure(ctx, s, w, round); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// balanced returns the order of n datapaths in a round. It is a balanced Latin
// square (E. J. Williams, 1949): over n rounds, or 2n if n is odd, each datapath is
// in each position, and directly after each other one, equally often. So the effects
// of position and of the predecessor, such as warm caches, are the same for all.
func balanced(n, round int) []int {
	order := make([]int, n)
	for i := range order {
		zigzag := (i + 1) / 2 // 0, 1, n-1, 2, n-2, ...
		if i%2 == 0 {
			zigzag = -zigzag
		}
		order[i] = ((zigzag+round)%n + n) % n
	}
	if n%2 == 1 && round/n%2 == 1 {
		slices.Reverse(order)
	}
	return order
}

func (r *runner) complete(underlay, datapath string) bool {
	return !slices.ContainsFunc(r.chosen(), func(w Workload) bool {
		return r.report.rounds(underlay, datapath, w.Name) < r.Rounds
	})
}

// start starts a datapath. It returns an error only if ctx ends: a datapath that does
// not start is a failure in the report.
func (r *runner) start(ctx context.Context, underlay string, d Datapath) error {
	r.tell(fmt.Sprintf("%s: starting %s", underlay, d.Name))
	r.report.clearFailure(underlay, d.Name, "")
	defer func(began time.Time) {
		r.starts[0]++
		r.waited += time.Since(began)
	}(time.Now())
	ok, why := d.Available()
	if d.Program != nil && r.Nodes > 2 {
		ok, why = false, "connects only two nodes"
	}
	if ok && underlay == Existing {
		ok, why = r.roomFor(d)
	}
	if !ok {
		r.report.Fail(Failure{Underlay: underlay, Datapath: d.Name, Reason: why, Unavailable: true})
		r.skip(underlay, d.Name)
		return nil
	}
	var s *site
	var err error
	if underlay == Existing {
		s, err = startExisting(ctx, d, r.Remote, r.Self)
	} else {
		s, err = startLab(ctx, d, siteOptions{nodes: r.Nodes, profile: lab.Profile(underlay), ends: r.Ends, self: r.Self, bin: r.Bin})
	}
	if ctx.Err() != nil {
		if s != nil && err == nil {
			err = s.close()
		}
		return errors.Join(ctx.Err(), err)
	}
	if err != nil {
		r.report.Fail(Failure{Underlay: underlay, Datapath: d.Name, Reason: oneLine(err), Unavailable: errors.Is(err, ErrUnavailable)})
		r.skip(underlay, d.Name)
		return nil
	}
	r.report.Machine.Offloads[underlay] = s.offloads
	if s.bridge != nil {
		r.report.Machine.Bridge[underlay] = s.bridge
	}
	r.sites[d.Name] = s
	return nil
}

// roomFor reports whether the datapath can be opened in the same network namespace as
// those already open.
func (r *runner) roomFor(d Datapath) (ok bool, why string) {
	for _, other := range []string{"vxlan/userspace", "ipip/userspace"} {
		if d.Name != other && strings.HasSuffix(d.Name, "/userspace") && r.sites[other] != nil {
			return false, "a host has only one culvert0, which " + other + " uses: measure them in separate runs"
		}
	}
	return true, ""
}

// skip removes a datapath's measurements from the plan.
func (r *runner) skip(underlay, datapath string) {
	for _, w := range r.chosen() {
		r.skipWorkload(underlay, datapath, w)
	}
}

// takes estimates how long a measurement takes.
func (r *runner) takes(datapath string, w Workload) time.Duration {
	return r.generators[datapath].takes(w, r.method)
}

func (r *runner) skipWorkload(underlay, datapath string, w Workload) {
	n := max(r.Rounds-r.report.rounds(underlay, datapath, w.Name), 0)
	r.plan[1] -= time.Duration(n) * r.takes(datapath, w)
	r.cells[1] -= n
}

func (r *runner) measure(ctx context.Context, s *site, w Workload, round int) error {
	if _, failed := r.report.Failure(s.underlay, s.datapath.Name, w.Name); failed {
		return nil
	}
	r.tell(fmt.Sprintf("%s: round %d of %d, %s on %s", s.underlay, round+1, r.Rounds, w.Name, s.datapath.Name))
	// A measurement that hangs must not hang the run.
	began := time.Now()
	limited, cancel := context.WithTimeout(ctx, 2*r.takes(s.datapath.Name, w)+10*time.Second)
	f, err := r.generators[s.datapath.Name].measure(limited, s, w, r.method)
	cancel()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	dead := alive(s.daemons)
	switch {
	case dead != nil:
		r.report.Fail(Failure{Underlay: s.underlay, Datapath: s.datapath.Name, Reason: fmt.Sprintf("during %s: %s", w.Name, oneLine(dead))})
		r.skip(s.underlay, s.datapath.Name)
	case err != nil:
		r.report.Fail(Failure{Underlay: s.underlay, Datapath: s.datapath.Name, Workload: w.Name, Reason: oneLine(err), Unavailable: errors.Is(err, ErrUnavailable)})
		r.skipWorkload(s.underlay, s.datapath.Name, w)
	default:
		for _, m := range metrics {
			if v, ok := f[m.name]; ok {
				r.report.Add(s.underlay, s.datapath.Name, w.Name, m.name, v)
			}
		}
		r.report.Machine.Steal = max(r.report.Machine.Steal, s.steal)
		r.plan[0] += r.takes(s.datapath.Name, w)
		r.spent += time.Since(began)
		r.cells[0]++
	}
	if r.Save != nil {
		return r.Save(r.report)
	}
	return nil
}

func (r *runner) tell(doing string) {
	if r.Progress == nil {
		return
	}
	left := r.plan[1] - r.plan[0]
	if r.plan[0] > 0 {
		// Scale the estimate by how it turned out so far.
		left = time.Duration(float64(left) * float64(r.spent) / float64(r.plan[0]))
	}
	if r.starts[0] > 0 {
		left += r.waited / time.Duration(r.starts[0]) * time.Duration(r.starts[1]-r.starts[0])
	}
	r.Progress(Progress{Done: r.cells[0], Total: r.cells[1], Left: left, Doing: doing})
}

func oneLine(err error) string {
	return strings.Join(strings.FieldsFunc(err.Error(), func(c rune) bool { return c == '\n' }), "; ")
}
