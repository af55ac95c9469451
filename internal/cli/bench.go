package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"culvert/bench"
	"culvert/internal/lab"
)

// benchFlags are the flags of culvert bench.
type benchFlags struct {
	underlays, datapaths, workloads []string
	rounds                          int
	duration, warmup                time.Duration
	quick                           bool
	generator                       string
	reference                       string
	json                            string
}

// What --quick chooses.
var (
	quickUnderlays = []string{"offload", "cloud"}
	quickDatapaths = []string{"native", "vxlan/kernel", "vxlan/userspace"}
	quickWorkloads = []string{"tcp1", "udp64", "rr"}
)

const (
	quickDuration = 600 * time.Millisecond
	quickWarmup   = 150 * time.Millisecond
)

func newBenchCommand() *cobra.Command {
	var f benchFlags
	c := &cobra.Command{
		Use:   "bench",
		Short: "Compare datapaths on this machine, side by side",
		Long: `Compare datapaths on this machine, side by side.

Two nodes in network namespaces are joined by a veth pair whose offloads imitate
a kind of network (--underlay), and by each datapath in turn. All are measured
in interleaved rounds, so that a drift of the machine meets all alike; shown are
medians, and ratios to the reference.

It needs root, or user namespaces and /dev/net/tun.`,
		Example: `  culvert bench --quick
  culvert bench --underlay cloud --datapath vxlan/kernel,vxlan/userspace --workload tcp1,rr`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return f.run(c) },
	}
	flags := c.Flags()
	flags.SortFlags = false
	flags.BoolVar(&f.quick, "quick", false, "the few that matter most, within a minute")
	flags.StringSliceVar(&f.underlays, "underlay", bench.Underlays()[:4], "kinds of network")
	flags.StringSliceVar(&f.datapaths, "datapath", nil, "datapaths (all)")
	flags.StringSliceVar(&f.workloads, "workload", bench.Workloads(), "kinds of traffic")
	flags.IntVar(&f.rounds, "rounds", 3, "how often each is measured")
	flags.DurationVar(&f.duration, "duration", time.Second, "how long each is measured")
	flags.DurationVar(&f.warmup, "warmup", 250*time.Millisecond, "how long traffic runs before that")
	flags.StringVar(&f.generator, "generator", "builtin", "what makes the traffic: builtin or iperf3")
	flags.StringVar(&f.reference, "reference", "vxlan/kernel", "the datapath that ratios are to")
	flags.StringVar(&f.json, "json", "", "write the report as JSON to this file")
	flags.Lookup("json").NoOptDefVal = "-"
	c.AddCommand(newBenchNodeCommand())
	return c
}

func (f *benchFlags) run(c *cobra.Command) error {
	if f.quick {
		choose(c, "underlay", &f.underlays, quickUnderlays)
		choose(c, "datapath", &f.datapaths, quickDatapaths)
		choose(c, "workload", &f.workloads, quickWorkloads)
		choose(c, "duration", &f.duration, quickDuration)
		choose(c, "warmup", &f.warmup, quickWarmup)
	}
	if len(f.datapaths) == 0 {
		for _, d := range bench.Datapaths() {
			f.datapaths = append(f.datapaths, d.Name)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	o := bench.Options{
		Underlays: f.underlays, Datapaths: f.datapaths, Workloads: f.workloads,
		Rounds: f.rounds, Duration: f.duration, Warmup: f.warmup, Lossfree: !f.quick, Generator: f.generator,
		Version: Version(), Self: self,
	}
	if err := o.Check(); err != nil {
		return usagef("bench: %w", err)
	}
	if !slices.ContainsFunc(bench.Datapaths(), func(d bench.Datapath) bool { return d.Name == f.reference }) {
		return usagef("bench: --reference %s: %s", f.reference, strings.Join(f.datapaths, ", "))
	}
	return inLab("bench", func() error { return f.measure(c, o) })
}

// choose sets a flag that was not given.
func choose[T any](c *cobra.Command, flag string, value *T, to T) {
	if !c.Flags().Changed(flag) {
		*value = to
	}
}

// inLab calls fn where labs can be made.
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
	if _, err := lab.Sweep(); err != nil {
		fmt.Fprintf(c.ErrOrStderr(), "culvert: %s\n", oneLine(err))
	}
	ctx, stop := signal.NotifyContext(c.Context(), syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	// A second Ctrl-C ends it at once; the next run cleans up.
	defer context.AfterFunc(ctx, func() { signal.Reset(os.Interrupt, syscall.SIGTERM) })()

	bar := newProgressBar(c.ErrOrStderr())
	o.Progress = bar.show
	report, err := bench.Run(ctx, o)
	bar.clear()
	if report == nil {
		return fmt.Errorf("bench: %w", err)
	}
	if ctx.Err() != nil {
		fmt.Fprintln(c.ErrOrStderr(), "culvert: interrupted; this is what was finished")
		err = errReported
	} else if err != nil {
		err = fmt.Errorf("bench: %w", err)
	}
	return errors.Join(f.write(c.OutOrStdout(), report), err)
}

func (f *benchFlags) write(out io.Writer, r *bench.Report) error {
	if f.json == "-" {
		text, err := r.JSON()
		if err == nil {
			_, err = out.Write(text)
		}
		return err
	}
	if f.json != "" {
		if err := r.Save(f.json); err != nil {
			return fmt.Errorf("bench: %w", err)
		}
	}
	return r.Table(out, f.reference)
}

// progressBar shows how far a run has come: on a terminal as a bar, else as a
// line now and then.
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
	left := p.Left.Round(time.Second)
	if !b.terminal {
		if time.Since(b.last) > between {
			b.last = time.Now()
			fmt.Fprintf(b.w, "%d of %d measured, %s left; %s\n", p.Done, p.Total, left, p.Doing)
		}
		return
	}
	full := 0
	if p.Total > 0 {
		full = width * p.Done / p.Total
	}
	fmt.Fprintf(b.w, "\r\x1b[K[%s%s] %d/%d, %s left; %s", strings.Repeat("#", full), strings.Repeat(".", width-full), p.Done, p.Total, left, p.Doing)
}

func (b *progressBar) clear() {
	if b.terminal {
		fmt.Fprint(b.w, "\r\x1b[K")
	}
}

// newBenchNodeCommand is what culvert bench starts in its nodes.
func newBenchNodeCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "node HALF",
		Short:  "Carry one half of a datapath (culvert bench starts this)",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			var h bench.Half
			if err := json.Unmarshal([]byte(args[0]), &h); err != nil {
				return usagef("bench node: %w", err)
			}
			return bench.RunNode(c.Context(), h, c.OutOrStdout(), slog.New(slog.NewTextHandler(c.ErrOrStderr(), nil)))
		},
	}
}
