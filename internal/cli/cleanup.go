package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"culvert/internal/host"
)

func newCleanupCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything of culvert's from this host's kernel, and nothing else",
		Long: `Remove culvert's routes and its nftables table. A daemon that stops leaves them,
so that an upgrade interrupts nothing; a daemon that runs puts them back.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			changes, err := host.Apply(host.State{})
			for _, change := range changes {
				fmt.Fprintln(c.OutOrStdout(), change.Command)
			}
			return err
		},
	}
}
