package backend

import (
	"context"
	"fmt"
	"time"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// Down is a placeholder for a datapath that cannot be opened at the moment: the
// daemon keeps running, unready, with its lease held. Run returns ErrBroken after
// Retry, so that the daemon tries to open the datapath again.
type Down struct {
	Format string // wire format
	Err    error  // why the datapath cannot be opened
	Retry  time.Duration
}

// Apply returns the reason why the datapath is not open.
func (d Down) Apply(context.Context, subnet.Snapshot) error { return d.Err }

// Run waits for Retry and returns ErrBroken.
func (d Down) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(d.Retry):
		return fmt.Errorf("%w: %w", ErrBroken, d.Err)
	}
}

// Status reports a datapath of kind "none" and the reason.
func (d Down) Status() api.Datapath {
	return api.Datapath{WireFormat: d.Format, Kind: "none", Why: d.Err.Error()}
}

// Look does nothing.
func (d Down) Look(context.Context) {}

// Peers returns no peers.
func (d Down) Peers() ([]api.PeerState, int) { return nil, 0 }

// Close with Remove removes what earlier datapaths left in the kernel.
func (d Down) Close(how How) error {
	if how != Remove {
		return nil
	}
	_, err := host.Apply(host.State{})
	return err
}
