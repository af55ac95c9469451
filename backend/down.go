package backend

import (
	"context"
	"fmt"
	"time"

	"culvert/internal/api"
	"culvert/internal/host"
	"culvert/subnet"
)

// Down stands in for a datapath that cannot be opened now: the node keeps its
// lease, follows its underlay and is not ready, instead of ending. It reports
// itself broken after a while, so that opening is tried again.
type Down struct {
	Format string // on the wire
	Err    error  // why the datapath cannot be opened
	Retry  time.Duration
}

// Apply reports why nothing is carried.
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

// Status says that nothing is carried, and why.
func (d Down) Status() api.Datapath {
	return api.Datapath{WireFormat: d.Format, Kind: "none", Why: d.Err.Error()}
}

// Close leaves what earlier datapaths left, or removes it.
func (d Down) Close(how How) error {
	if how != Remove {
		return nil
	}
	_, err := host.Apply(host.State{})
	return err
}
