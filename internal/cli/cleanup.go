package cli

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"culvert/internal/host"
)

func newCleanupCommand() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove culvert's kernel state from this host",
		Long: `Remove culvert's devices, routes, nftables table, and the accept rules that it added to
other programs' FORWARD chains. A daemon that stops leaves them in place, so that an
upgrade interrupts no packets.

The command refuses to run beside a daemon, which would restore everything.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := host.MayConfigure(); err != nil {
				return err
			}
			// Own the namespace meanwhile, so that no daemon starts during the cleanup.
			own, err := host.Own(host.Owner{PID: os.Getpid(), What: "culvert cleanup", Since: time.Now()})
			switch {
			case err == nil:
				defer own.Release()
			case !force:
				return fmt.Errorf("%w (`systemctl stop culvert`), or use --force: the daemon would restore everything", err)
			}
			changes, err := host.Apply(host.State{})
			for _, change := range changes {
				fmt.Fprintln(c.OutOrStdout(), change.Command)
			}
			return err
		},
	}
	var runDir string
	c.Flags().StringVar(&runDir, "run-dir", "", "")
	_ = c.Flags().MarkDeprecated("run-dir", "a running daemon is found wherever its directory is")
	c.Flags().BoolVar(&force, "force", false, "also while a daemon runs")
	return c
}
