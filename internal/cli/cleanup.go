package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"culvert/internal/api"
	"culvert/internal/host"
)

func newCleanupCommand() *cobra.Command {
	var runDir string
	var force bool
	c := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything of culvert's from this host's kernel, and nothing else",
		Long: `Remove culvert's devices, routes, its nftables table, and the accept that it put
into other programs' FORWARD chains. A daemon that stops leaves them, so that an
upgrade interrupts nothing.

While a daemon runs it is refused: the daemon would put everything back.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(c.Context(), 2*time.Second)
			defer cancel()
			if s, err := api.GetStatus(ctx, runDir); err == nil && !force {
				return fmt.Errorf("the daemon of %s runs here and would put everything back: stop it first (`systemctl stop culvert`), or --force", s.Node)
			}
			changes, err := host.Apply(host.State{})
			for _, change := range changes {
				fmt.Fprintln(c.OutOrStdout(), change.Command)
			}
			return err
		},
	}
	c.Flags().StringVar(&runDir, "run-dir", api.DefaultRunDir, "the daemon's --run-dir")
	c.Flags().BoolVar(&force, "force", false, "even while a daemon runs")
	return c
}
