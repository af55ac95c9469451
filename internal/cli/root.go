// Package cli is the command line, one file per command. A command parses flags into
// options, calls the package that does the work, and prints the result. It keeps no state:
// that is owned by the packages it calls (internal/daemon, subnet/etcd, cni, internal/lab).
package cli

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Exit codes.
const (
	exitOK    = 0
	exitError = 1 // the command failed
	exitUsage = 2 // the command line is invalid
)

// version is set by the linker (see the Makefile).
var version = ""

// Version returns the release, or else the build's commit.
func Version() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// Main runs the command line and returns the exit code.
func Main(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRootCommand()
	root.SetArgs(withValues(root, args))
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	if errors.Is(err, errReported) {
		return exitError
	}
	fmt.Fprintf(os.Stderr, "culvert: %s\n", oneLine(err))
	if isUsage(err) {
		fmt.Fprintf(os.Stderr, "See `%s --help`.\n", cmd.CommandPath())
		return exitUsage
	}
	return exitError
}

// withValues rewrites `--json FILE` to `--json=FILE` for flags with an optional value.
// pflag accepts such a value only after =, and would take FILE as an argument.
func withValues(root *cobra.Command, args []string) []string {
	cmd, _, err := root.Find(args)
	if err != nil {
		return args
	}
	var out []string
	for i := 0; i < len(args); i++ {
		name, isFlag := strings.CutPrefix(args[i], "--")
		if isFlag && name == "" { // "--": only arguments follow
			return append(out, args[i:]...)
		}
		f := cmd.Flags().Lookup(name)
		if isFlag && f != nil && f.NoOptDefVal == toStdout && i+1 < len(args) && (args[i+1] == "-" || !strings.HasPrefix(args[i+1], "-")) {
			out = append(out, args[i]+"="+args[i+1])
			i++
			continue
		}
		out = append(out, args[i])
	}
	return out
}

// toStdout is the default value of a file flag that is given without a value.
const toStdout = "-"

// errReported is returned by a command that has already printed what failed.
var errReported = errors.New("reported")

// usageError is an error in the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error {
	return usageError{fmt.Errorf(format, args...)}
}

func isUsage(err error) bool {
	var u usageError
	return errors.As(err, &u) || strings.HasPrefix(err.Error(), "unknown command")
}

// oneLine formats joined errors on one line.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "culvert",
		Short: "A tunnel router for container networks",
		Long: `Culvert joins the container networks of many Linux hosts into one flat network:
each node leases a subnet from etcd, and carries its pods' packets to the
others in VXLAN.

Try it on this machine:   culvert demo
Run it on a node:         culvert run --etcd-endpoints http://10.0.0.1:2379
Ask a running node:       culvert status`,
		Version:       Version(),
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetVersionTemplate("culvert {{.Version}}\n")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(
		newRunCommand(),
		newDemoCommand(),
		newBenchCommand(),
		newStatusCommand(),
		newPeersCommand(),
		newPageCommand(),
		newPingCommand(),
		newDoctorCommand(),
		newTraceCommand(),
		newReportCommand(),
		newConfigCommand(),
		newLeaseCommand(),
		newCNICommand(),
		newCleanupCommand(),
		newProbeCommand(),
		newVersionCommand(),
		newManCommand(),
	)
	for _, c := range root.Commands() {
		prepare(c)
	}
	return root
}

// prepare makes a command and its subcommands read flags from the environment too, and
// report wrong arguments as usage errors.
func prepare(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return usageError{err}
			}
			return nil
		}
	}
	if c.RunE != nil {
		c.PreRunE = func(c *cobra.Command, _ []string) error { return fromEnvironment(c.Flags()) }
	}
	for _, sub := range c.Commands() {
		prepare(sub)
	}
}

// fromEnvironment sets each flag that was not given from CULVERT_<NAME>.
func fromEnvironment(flags *pflag.FlagSet) error {
	var errs []error
	flags.VisitAll(func(f *pflag.Flag) {
		name := environmentName(f.Name)
		value, ok := os.LookupEnv(name)
		if !ok || f.Changed {
			return
		}
		if err := flags.Set(f.Name, value); err != nil {
			// Do not print the value: it may be a password.
			errs = append(errs, usagef("%s: not a value for --%s", name, f.Name))
		}
	})
	return errors.Join(errs...)
}

func environmentName(flag string) string {
	return "CULVERT_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the version",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(c.OutOrStdout(), "culvert %s\n", Version())
			return err
		},
	}
}

// output is the -o flag: the output format.
type output string

func (o *output) addTo(flags *pflag.FlagSet) {
	*o = "table"
	flags.StringVarP((*string)(o), "output", "o", "table", "how to show it: table, json or yaml")
}

// write prints v as JSON or YAML, or calls table. Output is buffered, since tables are
// written cell by cell.
func (o output) write(w io.Writer, v any, table func(io.Writer) error) error {
	b := bufio.NewWriterSize(w, 64<<10)
	return cmp.Or(o.show(b, v, table), b.Flush())
}

func (o output) show(w io.Writer, v any, table func(io.Writer) error) error {
	switch o {
	case "table":
		return table(w)
	case "json":
		return writeJSON(w, v)
	case "yaml":
		return writeYAML(w, v)
	}
	return usagef("--output %s: table, json or yaml", string(o))
}
