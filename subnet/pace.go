package subnet

import (
	"context"
	"time"
)

// gatherLimit is the longest pause between two snapshots.
const gatherLimit = 200 * time.Millisecond

// Pace is the loop shared by the Watch of all stores: on each notification it
// calls take and yields the result, until ctx ends or the consumer stops. fresh
// reports whether the snapshot is new; it and err may be returned together.
// Changes that arrive while the consumer is busy are combined into the next
// snapshot.
func Pace(ctx context.Context, notify <-chan struct{}, take func() (s Snapshot, fresh bool, err error), yield func(Snapshot, error) bool) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-notify:
		}
		began := time.Now()
		snapshot, fresh, err := take()
		built := time.Since(began)
		if fresh && !yield(snapshot, nil) {
			return
		}
		if err != nil && !yield(Snapshot{}, err) {
			return
		}
		// Building a snapshot of thousands of leases takes milliseconds. Pause for 4
		// times that, so that a burst of joining nodes costs at most 20 % of a core
		// (more only if building one takes over 50 ms).
		gather := time.NewTimer(min(4*built, gatherLimit))
		select {
		case <-ctx.Done():
			gather.Stop()
			return
		case <-gather.C:
		}
	}
}
