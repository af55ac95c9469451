package cli

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"culvert/cni"
)

func newCNICommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "cni",
		Short: "Install or remove the CNI plugin on this host",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	var i cni.Install
	c.PersistentFlags().StringVar(&i.BinDir, "bin-dir", "/opt/cni/bin", "where the runtime looks for plugins")
	c.PersistentFlags().StringVar(&i.ConfDir, "conf-dir", "/etc/cni/net.d", "where the runtime looks for configurations")
	c.PersistentFlags().StringVar(&i.ConfName, "conf-name", "10-culvert.conflist", "name of the configuration; the first by name is used")

	install := &cobra.Command{
		Use:   "install",
		Short: "Install the plugin, the missing ones that it delegates to, and the configuration",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if i.From == "" {
				self, err := os.Executable()
				if err != nil {
					return fmt.Errorf("finding culvert's own directory (name it with --from): %w", err)
				}
				i.From = filepath.Dir(self)
			}
			done, warnings, err := i.Run()
			for _, path := range done {
				fmt.Fprintln(c.OutOrStdout(), "installed", path)
			}
			for _, w := range warnings {
				fmt.Fprintln(c.ErrOrStderr(), "warning:", w)
			}
			return err
		},
	}
	install.Flags().StringVar(&i.From, "from", "", "directory of culvert-cni and cni/ (default: that of this program)")
	install.Flags().StringVar(&i.SubnetFile, "subnet-file", cni.DefaultsFor(cni.PluginName).SubnetFile, "the daemon's subnet.env")

	uninstall := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove the configuration and the plugin; the plugins that it delegates to stay",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			done, err := i.Remove()
			for _, path := range done {
				fmt.Fprintln(c.OutOrStdout(), "removed", path)
			}
			return err
		},
	}
	c.AddCommand(install, uninstall)
	return c
}
