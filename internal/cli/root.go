// Package cli is the command line, one file per command. A command parses flags into
// options, calls the package that does the work, and prints the result. It keeps no state:
// that is owned by the packages it calls (internal/daemon, subnet/etcd, cni, internal/lab).
package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"culvert/internal/remedy"
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
	writeError(os.Stderr, err)
	if isUsage(err) {
		fmt.Fprintf(os.Stderr, "See `%s --help`.\n", cmd.CommandPath())
		return exitUsage
	}
	return exitError
}

// writeError prints a line that says what went wrong and, if that is known, one that says
// what to do.
func writeError(w io.Writer, err error) {
	what, do := remedy.Split(err)
	fmt.Fprintf(w, "culvert: %s\n", oneLine(what))
	if do != "" {
		fmt.Fprintf(w, "     fix: %s\n", oneLine(do))
	}
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
	return errors.As(err, &u)
}

// oneLine joins the lines of joined errors.
func oneLine(text string) string { return strings.ReplaceAll(text, "\n", "; ") }

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
		Args:          cobra.NoArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.SetVersionTemplate("culvert {{.Version}}\n")
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), ".FlagUsages", fmt.Sprintf(".FlagUsagesWrapped %d", defaultWidth)))
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usageError{withFlags(c, err)} })
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
	prepare(root)
	return root
}

// prepare makes a command and its subcommands read flags from the environment too, and
// report wrong arguments as usage errors.
func prepare(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			err := check(c, args)
			switch {
			case err == nil:
				return nil
			case c.HasSubCommands() && len(args) > 0:
				return unknownCommand(c, args[0])
			case len(args) > 0 && check(c, nil) == nil:
				return usagef("%s takes no arguments: what is %q?", c.CommandPath(), args[0])
			}
			return usageError{remedy.Errorf("the form is `"+strings.TrimSuffix(c.UseLine(), " [flags]")+"`", "%s: %w", c.CommandPath(), err)}
		}
	}
	c.Long = reflowed(c.Long)
	if c.RunE != nil && c.HasParent() {
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

// unknownCommand is the error of a word that is no subcommand of c.
func unknownCommand(c *cobra.Command, word string) error {
	err := fmt.Errorf("unknown command %q for %q", word, c.CommandPath())
	if near := nearest(word, c.Commands(), (*cobra.Command).Name); near != "" {
		err = remedy.Errorf("did you mean `"+c.CommandPath()+" "+near+"`?", "%w", err)
	}
	return usageError{err}
}

// withFlags rewords pflag's errors like those of the commands: for a wrong value, and for
// an unknown flag, with the flag that was probably meant.
func withFlags(c *cobra.Command, err error) error {
	if invalid, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		return fmt.Errorf("--%s %s: %w", invalid.GetFlag().Name, invalid.GetValue(), invalid.Unwrap())
	}
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		return err
	}
	var all []*pflag.Flag
	c.Flags().VisitAll(func(f *pflag.Flag) { all = append(all, f) })
	if near := nearest(unknown.GetSpecifiedName(), all, func(f *pflag.Flag) string { return f.Name }); near != "" {
		return remedy.Errorf("did you mean --"+near+"?", "%w", err)
	}
	return err
}

// nearest returns the name of which word is a misspelling or a prefix; "" if there is
// none.
func nearest[T any](word string, all []T, name func(T) string) string {
	best, least := "", 3 // edits
	for _, one := range all {
		n := name(one)
		edits := distance(word, n)
		if len(word) > 2 && strings.HasPrefix(n, word) {
			edits = 1
		}
		if edits < least && edits < len(word) {
			best, least = n, edits
		}
	}
	return best
}

// distance is the number of edits (insert, delete, replace, or swap two adjacent letters)
// that turn a into b (optimal string alignment).
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
		for j := range rows[i] {
			switch {
			case i == 0:
				rows[i][j] = j
			case j > 0 && a[i-1] == b[j-1]:
				rows[i][j] = rows[i-1][j-1]
			case j > 0:
				rows[i][j] = 1 + min(rows[i-1][j-1], rows[i-1][j], rows[i][j-1])
				if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
					rows[i][j] = min(rows[i][j], 1+rows[i-2][j-2])
				}
			}
		}
	}
	return rows[len(a)][len(b)]
}

// reflowed wraps the paragraphs of a text at 80 columns. Lines that are indented or have
// columns stay as they are, with the rest of their paragraph.
func reflowed(text string) string {
	paragraphs := strings.Split(text, "\n\n")
	for i, p := range paragraphs {
		if !strings.Contains(p, "  ") {
			paragraphs[i] = strings.Join(wrapped(strings.ReplaceAll(p, "\n", " "), defaultWidth), "\n")
		}
	}
	return strings.Join(paragraphs, "\n\n")
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

// addTo adds the flag to a command; more are values beside table, json and yaml.
func (o *output) addTo(c *cobra.Command, more ...string) {
	*o = "table"
	values := append([]string{"table"}, append(more, "json", "yaml")...)
	c.Flags().VarP(choice{(*string)(o), values}, "output", "o", "how to show it: "+oneOf(values))
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

// choice is the value of a flag that is one of some words.
type choice struct {
	value *string
	of    []string
}

// String implements pflag.Value.
func (c choice) String() string {
	if c.value == nil {
		return ""
	}
	return *c.value
}

// Type implements pflag.Value.
func (c choice) Type() string { return "string" }

// Set implements pflag.Value.
func (c choice) Set(text string) error {
	if !slices.Contains(c.of, text) {
		return errors.New(oneOf(c.of))
	}
	*c.value = text
	return nil
}

// oneOf lists words: a, b or c.
func oneOf(words []string) string {
	last := len(words) - 1
	if last < 1 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// write prints v as JSON or YAML, or calls table. Output is buffered, since tables are
// written cell by cell.
func (o output) write(w io.Writer, v any, table func(io.Writer) error) error {
	b := newSheet(w)
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
