package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"culvert/cni"
	"culvert/internal/remedy"
)

// cniConfName is the file name of our network configuration.
const cniConfName = "10-culvert.conflist"

func newCNICommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "cni",
		Short: "Install, inspect or remove the CNI plugin on this host",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	var i cni.Install
	c.PersistentFlags().StringVar(&i.BinDir, "bin-dir", "/opt/cni/bin", "where the runtime looks for plugins")
	c.PersistentFlags().StringVar(&i.ConfDir, "conf-dir", "/etc/cni/net.d", "where the runtime looks for configurations")
	c.PersistentFlags().StringVar(&i.ConfName, "conf-name", cniConfName, "name of the configuration; the first by name is used")

	install := &cobra.Command{
		Use:   "install",
		Short: "Install the plugin, those it delegates to, and the configuration",
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
			if errors.Is(err, fs.ErrNotExist) {
				return remedy.Errorf("name the directory of culvert-cni and its delegates with --from", "%w", err)
			}
			return err
		},
	}
	install.Flags().StringVar(&i.From, "from", "", "directory of culvert-cni and cni/ (default: that of this program)")
	install.Flags().StringVar(&i.SubnetFile, "subnet-file", cni.DefaultsFor(cni.PluginName).SubnetFile, "the daemon's subnet.env")
	install.Flags().StringVar(&i.Network, "network-name", "culvert", "name of the configuration, under which host-local stores addresses; on a node with pods of flannel's, flannel's name (cbr0)")
	install.Flags().StringVar(&i.DataDir, "data-dir", "", "directory of the plugin's records; on a node with pods of flannel's, flannel's (/var/lib/cni/flannel)")
	install.Flags().BoolVar(&i.WhenReady, "when-ready", false, "leave the configuration to the daemon, which puts it in place when pods can be added (culvert run --cni-conf-dir)")
	install.Flags().StringVar(&i.RunDir, "run-dir", "", "the daemon's --run-dir (default: the directory of --subnet-file)")

	var out output
	status := &cobra.Command{
		Use:   "status",
		Short: "Show the state of the plugin, and whether a pod can be added",
		Long: `Show the state of the plugin on this host: its programs and configuration, the
subnet, the addresses in use, and whether a pod can be added now. If not, the exit
code is 1.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			r := i.Status(c.Context())
			if err := out.write(c.OutOrStdout(), r, func(w io.Writer) error { return writeCNIStatus(w, r) }); err != nil {
				return err
			}
			if !r.Ready {
				return fmt.Errorf("no pod can be added: %s", r.NotReady)
			}
			return nil
		},
	}
	out.addTo(status)

	uninstall := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove the configuration and the plugin, not its delegates",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			done, err := i.Remove()
			for _, path := range done {
				fmt.Fprintln(c.OutOrStdout(), "removed", path)
			}
			return err
		},
	}
	c.AddCommand(install, status, uninstall)
	return c
}

// writeCNIStatus shows the report as a table.
func writeCNIStatus(w io.Writer, r cni.Report) error {
	t := newColumns(w)
	line := func(name, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	state := "a pod can be added"
	if !r.Ready {
		state = "NOT READY: " + r.NotReady
	}
	line("state", "%s", state)
	config := r.Config
	if r.Problem != "" {
		config = r.Problem
	}
	line("configuration", "%s", config)
	for _, rival := range r.Rivals {
		line("  but", "%s", rival)
	}
	for _, p := range r.Programs {
		problem := ""
		if p.Problem != "" {
			problem = ": " + p.Problem
		}
		line("program", "%s%s", p.Path, problem)
	}
	if r.SubnetFile != "" {
		expires := ""
		if !r.Expires.IsZero() {
			expires = ", leased until " + r.Expires.Format(time.RFC3339)
		}
		line("subnet", "%s in %s%s", join(r.Subnets), r.SubnetFile, expires)
		line("in use", "%d attachments, %d addresses", r.Attachments, r.Addresses)
	}
	return t.Flush()
}
