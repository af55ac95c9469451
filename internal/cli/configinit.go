package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"culvert/internal/remedy"
	"culvert/subnet"
)

// configFlags are the settings of a new network.
type configFlags struct {
	network, network6 string
	length, length6   int
	backend           string
	vni               uint32
	port              uint16
	mtu               int
	direct            bool
	print             bool
}

func newConfigInitCommand() *cobra.Command {
	var f etcdFlags
	var n configFlags
	c := &cobra.Command{
		Use:   "init",
		Short: "Create the network configuration from flags",
		Long: `Set the network configuration of a new network, made from flags. If etcd has one
already, it is not changed ('culvert config set' changes it).`,
		Example: `  culvert config init --network 10.5.0.0/16
  culvert config init --network 10.5.0.0/16 --ipv6-network fd00:12::/48
  culvert config init --network none --ipv6-network fd00:12::/48 --print`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			text, err := n.text()
			if err != nil {
				return err
			}
			if err := warn(c, text); err != nil {
				return usageError{err}
			}
			if n.print {
				fmt.Fprintf(c.OutOrStdout(), "%s\n", text)
				return nil
			}
			return withStore(c, &f, func(ctx context.Context, admin subnet.Admin) error {
				_, err := admin.SetConfig(ctx, text, 0)
				if errors.Is(err, subnet.ErrChanged) {
					return remedy.Errorf("see it with `culvert config show`, change it with `culvert config set`", "there is a network configuration already")
				}
				if err == nil {
					fmt.Fprintf(c.OutOrStdout(), "%s\n", text)
				}
				return err
			})
		},
	}
	flags := c.Flags()
	flags.SortFlags = false
	flags.StringVar(&n.network, "network", "10.5.0.0/16", "IPv4 network of all pods, or none")
	flags.IntVar(&n.length, "subnet-len", 0, "prefix length of a node's subnet (default 24, or 2 more than a smaller network's)")
	flags.StringVar(&n.network6, "ipv6-network", "", "IPv6 network of all pods (default: none)")
	flags.IntVar(&n.length6, "ipv6-subnet-len", 0, "the same for IPv6 (default 64)")
	flags.StringVar(&n.backend, "backend", "vxlan", "wire format: "+strings.Join(subnet.Backends, ", "))
	flags.Uint32Var(&n.vni, "vni", subnet.DefaultVNI, "VXLAN network identifier")
	flags.Uint16Var(&n.port, "port", subnet.DefaultVXLANPort, "UDP port of VXLAN")
	flags.IntVar(&n.mtu, "mtu", 0, "MTU of pods (default: what the underlay leaves)")
	flags.BoolVar(&n.direct, "direct-routing", false, "no tunnel between nodes on one link")
	flags.BoolVar(&n.print, "print", false, "show the configuration and set nothing")
	f.addTo(flags)
	_ = c.RegisterFlagCompletionFunc("backend", cobra.FixedCompletions(subnet.Backends, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// text returns the configuration in flannel's JSON, with only the chosen settings.
func (n configFlags) text() ([]byte, error) {
	type backend struct {
		Type          string
		VNI           *uint32 `json:",omitempty"`
		Port          uint16  `json:",omitempty"`
		MTU           int     `json:",omitempty"`
		DirectRouting bool    `json:",omitempty"`
	}
	var v struct {
		Network       string `json:",omitempty"`
		SubnetLen     int    `json:",omitempty"`
		EnableIPv4    *bool  `json:",omitempty"`
		EnableIPv6    bool   `json:",omitempty"`
		IPv6Network   string `json:",omitempty"`
		IPv6SubnetLen int    `json:",omitempty"`
		Backend       backend
	}
	v.Network, v.SubnetLen = n.network, n.length
	if n.network == "none" || n.network == "" {
		no := false
		v.Network, v.EnableIPv4 = "", &no
	}
	if n.network6 != "" {
		v.EnableIPv6, v.IPv6Network, v.IPv6SubnetLen = true, n.network6, n.length6
	}
	v.Backend = backend{Type: n.backend, MTU: n.mtu, DirectRouting: n.direct}
	if n.backend == "vxlan" {
		if n.vni != subnet.DefaultVNI {
			v.Backend.VNI = &n.vni
		}
		if n.port != subnet.DefaultVXLANPort {
			v.Backend.Port = n.port
		}
	}
	return json.Marshal(v)
}
