package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"culvert/bench"
	"culvert/bench/report"
	"culvert/internal/lab"
)

// benchFlags are the flags of culvert bench.
type benchFlags struct {
	underlays, datapaths, workloads []string
	nodes, rounds                   int
	ends                            string
	duration, warmup                time.Duration
	quick                           bool
	preset                          string
	generator                       string
	resume                          string
	server                          bool
	listen, client, token           string
	out                             benchOutput
}

// benchOutput is where a report goes: to files or to standard output ("-"). If none of
// them is standard output, the table goes there.
type benchOutput struct {
	reference                string
	json, csv, gobench, html string
	docs                     string
	ratios                   bool
}

func (o *benchOutput) addTo(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&o.reference, "reference", "vxlan/kernel", "datapath that ratios refer to")
	for _, f := range []struct {
		value       *string
		name, usage string
	}{
		{&o.json, "json", "write the report as JSON to this file, or without one to standard output"},
		{&o.csv, "csv", "write it as CSV, likewise"},
		{&o.gobench, "gobench", "write it in Go's benchmark format, for benchstat, likewise"},
	} {
		flags.StringVar(f.value, f.name, "", f.usage)
		flags.Lookup(f.name).NoOptDefVal = toStdout
	}
	flags.BoolVar(&o.ratios, "ratios", false, "show only the main figures, as ratios to the reference")
	flags.StringVar(&o.html, "html", "", "write the report as an HTML page with charts to this file")
	flags.StringVar(&o.docs, "docs", "", "put results and charts into benchmarks.md of this directory")
	_ = c.RegisterFlagCompletionFunc("reference", cobra.FixedCompletions(benchDatapaths(), cobra.ShellCompDirectiveNoFileComp))
}

func (o *benchOutput) check() error {
	if _, ok := bench.FindDatapath(o.reference); !ok {
		return usagef("bench: --reference %s: %s", o.reference, strings.Join(benchDatapaths(), ", "))
	}
	// Check before an hour of measuring, not after.
	for _, path := range []string{o.json, o.csv, o.gobench, o.html} {
		if path == "" || path == "-" {
			continue
		}
		if st, err := os.Stat(filepath.Dir(path)); err != nil || !st.IsDir() {
			return usagef("bench: %s cannot be written: %s is no directory", path, filepath.Dir(path))
		}
	}
	if o.docs != "" {
		if _, err := os.Stat(filepath.Join(o.docs, report.DocsFile)); err != nil {
			return usagef("bench: --docs %s: %w", o.docs, err)
		}
	}
	return nil
}

func benchDatapaths() []string {
	var names []string
	for _, d := range bench.Datapaths() {
		names = append(names, d.Name)
	}
	return names
}

// write writes the report in the requested formats.
func (o *benchOutput) write(out io.Writer, r *bench.Report) error {
	shown := false
	var errs []error
	for _, f := range []struct {
		path  string
		write func(io.Writer) error
	}{
		{o.json, func(w io.Writer) error {
			text, err := r.JSON()
			if err == nil {
				_, err = w.Write(text)
			}
			return err
		}},
		{o.csv, func(w io.Writer) error { return report.CSV(w, r) }},
		{o.gobench, func(w io.Writer) error { return report.GoBench(w, r) }},
		{o.html, func(w io.Writer) error { return report.HTML(w, r, o.reference) }},
	} {
		switch f.path {
		case "":
		case "-":
			shown = true
			errs = append(errs, f.write(out))
		default:
			errs = append(errs, writeFile(f.path, f.write))
		}
	}
	if o.docs != "" {
		errs = append(errs, report.Docs(o.docs, r, o.reference))
	}
	switch {
	case shown:
	case o.ratios:
		errs = append(errs, report.Ratios(out, r, o.reference))
	default:
		errs = append(errs, report.Table(out, r, o.reference))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("bench: writing the report: %w", err)
	}
	return nil
}

func writeFile(path string, write func(io.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}

// benchPreset is the settings of a --preset. Flags that are given override it.
type benchPreset struct {
	name, about                     string
	underlays, datapaths, workloads []string
	ends                            string
	rounds                          int
	duration, warmup                time.Duration
	ratios                          bool
}

// quick is the preset that --quick names.
const quick = "quick"

var benchPresets = []benchPreset{
	{
		name: quick, about: "the most important ones, within a minute",
		underlays: []string{"offload", "cloud"}, datapaths: []string{"native", "vxlan/kernel", "vxlan/userspace"},
		workloads: []string{"tcp1", "udp64", "rr"}, ends: bench.Nodes, rounds: 3, duration: 600 * time.Millisecond, warmup: 150 * time.Millisecond,
	},
	{
		name: "fast-path", about: "the fast path between pods, as ratios to the kernel's vxlan device, within ten minutes",
		underlays: []string{"offload", "cloud", "plain", "bare"},
		datapaths: []string{"vxlan/auto", "vxlan/kernel", "vxlan/kernel+on", "vxlan/userspace", "vxlan/userspace+fast", "flannel-vxlan"},
		workloads: []string{"tcp1", "tcp4", "rr", "rr-loaded", "rr-loaded-reverse", "udp64", "crr"},
		ends:      bench.Pods, rounds: 5, duration: 400 * time.Millisecond, warmup: 150 * time.Millisecond, ratios: true,
	},
}

func presetNames() []string {
	var names []string
	for _, p := range benchPresets {
		names = append(names, p.name)
	}
	return names
}

func newBenchCommand() *cobra.Command {
	var f benchFlags
	c := &cobra.Command{
		Use:   "bench",
		Short: "Compare datapaths on this machine, side by side",
		Long: `Compare datapaths on this machine, side by side.

Two nodes in network namespaces are joined by a veth pair whose offloads imitate
a kind of network (--underlay), and by each datapath in turn. All are measured
in interleaved rounds, so that a drift of the machine affects all alike. The output
shows medians, and ratios to the reference.

The traffic runs between sockets on the nodes, or between pods on them (--ends pods):
each behind a veth on its node's bridge, with culvert's daemon on every node, as in
production.

More than two nodes (--nodes) are joined by a bridge, and all but the first send to the
first at the same time: rates are sums, latencies are of all senders. Do not compare
such figures with those of two nodes.

To measure between two real hosts, on which no culvert daemon runs, use --underlay
existing, with --server on one host and --client on the other.

It needs root, or user namespaces and /dev/net/tun; root for real hosts.

Exit code 0: measured, though a datapath may not be available; 1: one failed.`,
		Example: `  culvert bench --quick
  culvert bench --underlay cloud --datapath vxlan/kernel,vxlan/userspace --workload tcp1,rr
  culvert bench --ends pods --datapath vxlan/kernel,vxlan/kernel#2,ipip/userspace
  culvert bench --preset fast-path
  culvert bench --nodes 5 --datapath vxlan/kernel,vxlan/userspace
  culvert bench --underlay existing --server
  culvert bench --underlay existing --client 192.0.2.1 --token TOKEN --html page.html`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return f.run(c) },
	}
	flags := c.Flags()
	flags.SortFlags = false
	flags.BoolVar(&f.quick, "quick", false, "the most important datapaths and workloads, within a minute: --preset quick")
	flags.StringVar(&f.preset, "preset", "", "set the flags below to: "+presetUsage())
	flags.StringSliceVar(&f.underlays, "underlay", bench.Underlays()[:4], "kinds of network")
	flags.StringSliceVar(&f.datapaths, "datapath", nil, "datapaths (default: all); NAME#2 is a second instance of NAME: the difference of the two is noise")
	flags.StringSliceVar(&f.workloads, "workload", bench.WorkloadNames(), "kinds of traffic")
	flags.Lookup("workload").DefValue = "all" // they are many
	flags.IntVar(&f.nodes, "nodes", 2, fmt.Sprintf("number of nodes, at most %d; all but the first send to the first at once", bench.MostNodes))
	flags.StringVar(&f.ends, "ends", bench.Nodes, "ends of the traffic: "+strings.Join(bench.Ends(), " or "))
	flags.IntVar(&f.rounds, "rounds", 3, "number of rounds")
	flags.DurationVar(&f.duration, "duration", time.Second, "duration of each measurement")
	flags.DurationVar(&f.warmup, "warmup", 250*time.Millisecond, "warm-up before each measurement")
	flags.StringVar(&f.generator, "generator", "builtin", "traffic generator: "+strings.Join(bench.Generators(), " or "))
	flags.StringVar(&f.resume, "resume", "", "keep the report in this JSON file, and measure only what it lacks")
	f.out.addTo(c)
	flags.BoolVar(&f.server, "server", false, "with --underlay existing: be the far end for a client on another host")
	flags.StringVar(&f.listen, "listen", fmt.Sprintf(":%d", bench.DefaultPort), "where the server listens: an address and a port, or :port for all addresses")
	flags.StringVar(&f.token, "token", "", "secret that server and client share (default: the server generates and prints one)")
	flags.StringVar(&f.client, "client", "", "with --underlay existing: measure between this host and the server at this address")
	for name, choices := range map[string][]string{"underlay": bench.Underlays(), "datapath": benchDatapaths(), "workload": bench.WorkloadNames(), "generator": bench.Generators(), "nodes": {"2", "3", "5", "10"}, "ends": bench.Ends(), "preset": presetNames()} {
		_ = c.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(choices, cobra.ShellCompDirectiveNoFileComp))
	}
	c.AddCommand(newBenchCompareCommand(), newBenchReportCommand(), newBenchScaleCommand(), newBenchNodeCommand())
	return c
}

func presetUsage() string {
	var all []string
	for _, p := range benchPresets {
		all = append(all, p.name+" ("+p.about+")")
	}
	return strings.Join(all, "; ")
}

// take applies the preset to the flags that were not given.
func (p benchPreset) take(c *cobra.Command, f *benchFlags) {
	choose(c, "underlay", &f.underlays, p.underlays)
	choose(c, "datapath", &f.datapaths, p.datapaths)
	choose(c, "workload", &f.workloads, p.workloads)
	choose(c, "ends", &f.ends, p.ends)
	choose(c, "rounds", &f.rounds, p.rounds)
	choose(c, "duration", &f.duration, p.duration)
	choose(c, "warmup", &f.warmup, p.warmup)
	choose(c, "ratios", &f.out.ratios, p.ratios)
}

func (f *benchFlags) run(c *cobra.Command) error {
	if f.quick {
		if f.preset != "" && f.preset != quick {
			return usagef("bench: --quick and --preset %s are two presets", f.preset)
		}
		f.preset = quick
	}
	if f.preset != "" {
		i := slices.Index(presetNames(), f.preset)
		if i < 0 {
			return usagef("bench: there is no preset %q: %s", f.preset, strings.Join(presetNames(), ", "))
		}
		benchPresets[i].take(c, f)
	}
	if len(f.datapaths) == 0 {
		f.datapaths = benchDatapaths()
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	o := bench.Options{
		Underlays: f.underlays, Datapaths: f.datapaths, Workloads: f.workloads,
		Nodes: f.nodes, Ends: f.ends, Rounds: f.rounds, Duration: f.duration, Warmup: f.warmup, Lossfree: f.preset == "", Generator: f.generator,
		Version: Version(), Self: self,
	}
	if f.server || f.client != "" {
		if err := f.existing(c, &o); err != nil || f.server {
			return err
		}
		defer o.Remote.Close()
	}
	if err := o.Check(); err != nil {
		return usagef("bench: %w", err)
	}
	if err := f.out.check(); err != nil {
		return err
	}
	if f.resume != "" {
		prior, err := bench.Load(f.resume)
		if err == nil {
			err = o.Resume(prior)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("bench: --resume: %w", err)
		}
		o.Save = func(r *bench.Report) error { return r.Save(f.resume) }
	}
	if o.Remote != nil {
		return f.measure(c, o)
	}
	return inLab("bench", func() error { return f.measure(c, o) })
}

// existing runs the server for measurements between two hosts, or connects the client.
func (f *benchFlags) existing(c *cobra.Command, o *bench.Options) error {
	choose(c, "underlay", &f.underlays, []string{bench.Existing})
	o.Underlays = f.underlays
	switch {
	case f.server && f.client != "":
		return usagef("bench: --server and --client are for different hosts")
	case !slices.Equal(f.underlays, []string{bench.Existing}):
		return usagef("bench: --server and --client are for --underlay %s", bench.Existing)
	case f.nodes != 2:
		return usagef("bench: the underlay %s joins two hosts: --nodes is for labs", bench.Existing)
	case !lab.Privileged():
		return errors.New("bench: measuring between real hosts makes devices on them, and needs root")
	}
	if f.client != "" {
		remote, err := bench.Connect(c.Context(), f.client, f.token)
		if err != nil {
			return fmt.Errorf("bench: --client %s: %w", f.client, err)
		}
		fmt.Fprintf(c.ErrOrStderr(), "The server is on %s.\n", remote.Machine)
		o.Remote = remote
		return nil
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(c.Context(), "tcp", f.listen)
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("bench: --listen %s: the port is in use: stop the other server, or name another port", f.listen)
	}
	if err != nil {
		return usagef("bench: --listen %s: %w", f.listen, err)
	}
	server := bench.Server{Self: o.Self, Token: f.token, Log: slog.New(slog.NewTextHandler(c.ErrOrStderr(), nil))}
	if server.Token == "" {
		server.Token = bench.NewToken()
	}
	fmt.Fprintf(c.OutOrStdout(), "token %s\nready %s\n", server.Token, l.Addr())
	if err := server.Serve(c.Context(), l); err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	return nil
}

// choose sets a flag's value if the flag was not given.
func choose[T any](c *cobra.Command, flag string, value *T, to T) {
	if !c.Flags().Changed(flag) {
		*value = to
	}
}

// inLab calls fn with the privileges to create labs: as root, or in a new user
// namespace, for which it runs the program again.
func inLab(command string, fn func() error) error {
	code, again, err := lab.EnterUserNamespace()
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	if again {
		if code != exitOK {
			return errReported
		}
		return nil
	}
	if err := lab.CheckTUN(); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return fn()
}

func (f *benchFlags) measure(c *cobra.Command, o bench.Options) error {
	measured, err := runBench(c, "bench", func(ctx context.Context, progress func(bench.Progress)) (*bench.Report, error) {
		o.Progress = progress
		return bench.Run(ctx, o)
	})
	if measured == nil {
		return err
	}
	if err := errors.Join(f.out.write(c.OutOrStdout(), measured), err); err != nil {
		return err
	}
	if measured.Broken() {
		return errReported // the report names the failures
	}
	return nil
}

// runBench measures, and shows the progress. After an interruption it returns what was
// finished, and errReported.
func runBench[R any](c *cobra.Command, name string, measure func(context.Context, func(bench.Progress)) (*R, error)) (*R, error) {
	ctx, end := benchContext(c)
	defer end()
	bar := newProgressBar(c.ErrOrStderr())
	measured, err := measure(ctx, bar.show)
	bar.clear()
	switch {
	case measured != nil && ctx.Err() != nil:
		fmt.Fprintln(c.ErrOrStderr(), "culvert: interrupted; this is what was finished")
		err = errReported
	case err != nil:
		err = fmt.Errorf("%s: %w", name, err)
	}
	return measured, err
}

// progressBar shows a run's progress: as a bar on a terminal, else as an occasional
// line.
type progressBar struct {
	w        io.Writer
	terminal bool
	last     time.Time
}

func newProgressBar(w io.Writer) *progressBar {
	b := &progressBar{w: w}
	if f, ok := w.(*os.File); ok {
		st, err := f.Stat()
		b.terminal = err == nil && st.Mode()&os.ModeCharDevice != 0
	}
	return b
}

func (b *progressBar) show(p bench.Progress) {
	const width, between = 24, 10 * time.Second
	left := ""
	if p.Left > 0 {
		left = fmt.Sprintf(", %s left", p.Left.Round(time.Second))
	}
	if !b.terminal {
		if time.Since(b.last) > between {
			b.last = time.Now()
			fmt.Fprintf(b.w, "%d of %d measured%s; %s\n", p.Done, p.Total, left, p.Doing)
		}
		return
	}
	full := 0
	if p.Total > 0 {
		full = width * p.Done / p.Total
	}
	fmt.Fprintf(b.w, "\r\x1b[K[%s%s] %d/%d%s; %s", strings.Repeat("#", full), strings.Repeat(".", width-full), p.Done, p.Total, left, p.Doing)
}

func (b *progressBar) clear() {
	if b.terminal {
		fmt.Fprint(b.w, "\r\x1b[K")
	}
}

func newBenchReportCommand() *cobra.Command {
	var o benchOutput
	c := &cobra.Command{
		Use:   "report FILE",
		Short: "Show a report written as JSON, or write it in another form",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if err := o.check(); err != nil {
				return err
			}
			r, err := bench.Load(args[0])
			if err != nil {
				return fmt.Errorf("bench report: %w", err)
			}
			return o.write(c.OutOrStdout(), r)
		},
	}
	o.addTo(c)
	return c
}

func newBenchCompareCommand() *cobra.Command {
	floor := 10.0
	c := &cobra.Command{
		Use:   "compare OLD NEW",
		Short: "Show what changed between two reports beyond noise",
		Long: `Show what changed between two reports (culvert bench --json=FILE) beyond noise: by
5 % or more, and with no round of one report among the rounds of the other.

Exit code 1 if a figure got worse by more than --floor.`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			if floor < 0 {
				return usagef("bench compare: --floor %g: 0 or more", floor)
			}
			before, err := bench.Load(args[0])
			if err != nil {
				return fmt.Errorf("bench compare: %w", err)
			}
			after, err := bench.Load(args[1])
			if err != nil {
				return fmt.Errorf("bench compare: %w", err)
			}
			changes, err := report.Compare(before, after)
			if err != nil {
				return fmt.Errorf("bench compare: %w", err)
			}
			if err := changes.Table(c.OutOrStdout(), floor/100); err != nil {
				return fmt.Errorf("bench compare: %w", err)
			}
			if worse := changes.Regressions(floor / 100); len(worse) > 0 {
				fmt.Fprintf(c.ErrOrStderr(), "culvert: bench compare: %s got worse by more than %g %%\n", count(len(worse), "figure"), floor)
				return errReported
			}
			return nil
		},
	}
	c.Flags().Float64Var(&floor, "floor", floor, "how much worse a figure may get, in percent")
	return c
}

// newBenchNodeCommand is the hidden command that culvert bench runs in its nodes.
func newBenchNodeCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "node PART",
		Short:  "Carry one node's part of a datapath (culvert bench starts this)",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			var p bench.Part
			if err := json.Unmarshal([]byte(args[0]), &p); err != nil {
				return usagef("bench node: %w", err)
			}
			return bench.RunNode(c.Context(), p, c.OutOrStdout(), slog.New(slog.NewTextHandler(c.ErrOrStderr(), nil)))
		},
	}
}
