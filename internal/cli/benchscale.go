package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"culvert/bench"
	"culvert/bench/report"
	"culvert/internal/lab"
)

func newBenchScaleCommand() *cobra.Command {
	var json, docs string
	o := bench.ScaleOptions{Version: Version()}
	c := &cobra.Command{
		Use:   "scale",
		Short: "Measure the cost of the number of peers",
		Long: `Measure the cost of the number of peers: throughput and CPU time per packet with that
many peers in the userspace datapath's table; memory and CPU time of a daemon that joins
while etcd has that many leases; and the time from writing a lease to the first packet.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			var err error
			if o.Self, err = os.Executable(); err != nil {
				return err
			}
			if err := o.Check(); err != nil {
				return usagef("bench scale: %w", err)
			}
			if o.Bin, err = demoPrograms(); err != nil {
				return fmt.Errorf("bench scale: %w", err)
			}
			return inLab("bench scale", func() error { return scale(c, o, json, docs) })
		},
	}
	flags := c.Flags()
	flags.SortFlags = false
	flags.IntSliceVar(&o.Peers, "peers", []int{1, 10, 100, 1000, 5000}, "how many")
	flags.IntVar(&o.Rounds, "rounds", 3, "number of rounds")
	flags.DurationVar(&o.Duration, "duration", time.Second, "duration of each measurement")
	flags.DurationVar(&o.Warmup, "warmup", 250*time.Millisecond, "warm-up before each measurement")
	flags.IntVar(&o.Leases, "leases", 10, "number of leases to time, from being written to the first packet")
	flags.StringVar(&json, "json", "", "write the report as JSON to this file, or without one to standard output")
	flags.Lookup("json").NoOptDefVal = toStdout
	flags.StringVar(&docs, "docs", "", "put the result into benchmarks.md of this directory")
	return c
}

func scale(c *cobra.Command, o bench.ScaleOptions, json, docs string) error {
	measured, err := runBench(c, "bench scale", func(ctx context.Context, progress func(bench.Progress)) (*bench.ScaleReport, error) {
		o.Progress = progress
		return bench.Scale(ctx, o)
	})
	if measured == nil {
		return err
	}
	if docs != "" {
		err = errors.Join(report.ScaleDocs(docs, measured), err)
	}
	if json == "" {
		return errors.Join(report.ScaleTable(c.OutOrStdout(), measured), err)
	}
	text, jerr := measured.JSON()
	switch {
	case jerr != nil:
	case json == "-":
		_, jerr = c.OutOrStdout().Write(text)
	default:
		jerr = os.WriteFile(json, text, 0o644)
	}
	return errors.Join(jerr, err)
}

// benchContext removes what killed runs left, and returns a context that also ends when
// the terminal or pipe closes. After its end a second Ctrl-C kills the program; the next
// run cleans up.
func benchContext(c *cobra.Command) (context.Context, func()) {
	if _, err := lab.Sweep(); err != nil {
		writeError(c.ErrOrStderr(), err)
	}
	ctx, stop := signal.NotifyContext(c.Context(), syscall.SIGHUP, syscall.SIGPIPE)
	undo := context.AfterFunc(ctx, func() { signal.Reset(os.Interrupt, syscall.SIGTERM) })
	return ctx, func() { undo(); stop() }
}
