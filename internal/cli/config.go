package cli

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"culvert/internal/overlap"
	"culvert/internal/remedy"
	"culvert/subnet"
	"culvert/subnet/etcd"
)

const (
	// storeTimeout bounds an administrator's command.
	storeTimeout = 15 * time.Second
	// dialTimeout bounds one connection to etcd, and askTimeout one request of a command:
	// a person waits for the answer.
	dialTimeout = 2 * time.Second
	askTimeout  = 5 * time.Second
)

// quarantined enables the quarantine in the registry, for the flag's duration. Commands
// that only read it pass nil.
func quarantined(d *time.Duration) func(*etcd.Options) {
	return func(o *etcd.Options) {
		o.Quarantine = time.Hour
		if d != nil {
			o.Quarantine = *d
		}
	}
}

// withStore opens etcd and calls do with the administrator's interface. Its error names
// the cause if etcd cannot be reached.
func withStore(c *cobra.Command, f *etcdFlags, do func(ctx context.Context, admin subnet.Admin) error, change ...func(*etcd.Options)) error {
	o, err := f.options(slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	for _, ch := range change {
		ch(&o)
	}
	o.FailFast, o.DialTimeout, o.RequestTimeout = true, dialTimeout, askTimeout
	waiting := time.AfterFunc(progressAfter, func() {
		if c.CalledAs() == "" {
			return // completion
		}
		fmt.Fprintf(c.ErrOrStderr(), "waiting for etcd at %s, for at most %s\n", strings.Join(o.Endpoints, ", "), o.RequestTimeout)
	})
	defer waiting.Stop()
	ctx, cancel := context.WithTimeout(c.Context(), storeTimeout)
	defer cancel()
	r, err := etcd.New(o)
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	err = do(ctx, r)
	if err != nil && r.Trouble() != nil {
		if w, stale := overlap.StaleRoute(c.Context(), o.Endpoints); stale {
			return remedy.Errorf(w.Fix, "etcd is unreachable at %s: %s", strings.Join(o.Endpoints, ", "), w.Text)
		}
	}
	return r.Explain(c.Context(), err)
}

func newConfigCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "config",
		Short: "Create, show, check and set the network configuration in etcd",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newConfigInitCommand(), newConfigShowCommand(), newConfigSetCommand(), newConfigCheckCommand())
	return c
}

func newConfigShowCommand() *cobra.Command {
	var f etcdFlags
	c := &cobra.Command{
		Use:   "show",
		Short: "Show the network configuration stored in etcd",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return withStore(c, &f, func(ctx context.Context, admin subnet.Admin) error {
				text, _, err := admin.ConfigText(ctx)
				if err != nil {
					return err
				}
				if text == nil {
					return remedy.Errorf("set one with `culvert config init`", "there is no network configuration yet at %s in etcd", f.prefix)
				}
				fmt.Fprintf(c.OutOrStdout(), "%s\n", text)
				return warn(c, text)
			})
		},
	}
	f.addTo(c.Flags())
	return c
}

func newConfigSetCommand() *cobra.Command {
	var f etcdFlags
	c := &cobra.Command{
		Use:   "set JSON|FILE|-",
		Short: "Set the network configuration",
		Long: `Set the network configuration, given as JSON, as the name of a file that holds
it, or as - for standard input. The keys and their defaults are flannel's.`,
		Example: `  culvert config set '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'`,
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			text, err := readConfig(c, args[0])
			if err != nil {
				return err
			}
			if err := warn(c, text); err != nil {
				return err
			}
			return withStore(c, &f, func(ctx context.Context, admin subnet.Admin) error {
				_, err := admin.SetConfig(ctx, text, subnet.AnyRevision)
				return err
			})
		},
	}
	f.addTo(c.Flags())
	return c
}

func newConfigCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check JSON|FILE|-",
		Short: "Check a network configuration without setting it",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			text, err := readConfig(c, args[0])
			if err != nil {
				return err
			}
			if err := warn(c, text); err != nil {
				return err
			}
			config, _, err := subnet.ParseConfig(text)
			if err != nil {
				return err
			}
			return writeJSON(c.OutOrStdout(), config)
		},
	}
}

// readConfig returns the configuration text that the argument refers to.
func readConfig(c *cobra.Command, arg string) ([]byte, error) {
	switch {
	case arg == "-":
		return io.ReadAll(c.InOrStdin())
	case len(arg) > 0 && arg[0] == '{':
		return []byte(arg), nil
	}
	text, err := os.ReadFile(arg)
	if err != nil {
		return nil, remedy.Errorf("give JSON, the name of a file that holds it, or - for standard input", "%w", err)
	}
	return text, nil
}

// warn prints a configuration's warnings, or returns why it is invalid.
func warn(c *cobra.Command, text []byte) error {
	_, warnings, err := subnet.ParseConfig(text)
	for _, w := range warnings {
		fmt.Fprintf(c.ErrOrStderr(), "warning: %s\n", w)
	}
	if err != nil {
		return remedy.Errorf("correct it; `culvert config init --print` shows one that is valid", "%w", err)
	}
	return nil
}
