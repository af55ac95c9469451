package cli

import (
	"errors"

	"github.com/spf13/cobra"

	"culvert/internal/host"
)

// newProbeCommand is for a container's startup probe. Status and metrics cannot be used:
// during an update the old daemon answers them until the new one has taken over.
func newProbeCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "probe",
		Short:  "Succeed if the node's daemon runs in this container",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			pid, err := host.OwnerHere()
			if err == nil && pid == 0 {
				err = errors.New("the daemon of this node is not in this PID namespace: the updated one has not taken over yet")
			}
			return err
		},
	}
}
