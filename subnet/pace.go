package subnet

import (
	"context"
	"time"
)

// gatherLimit is how long changes are let gather at most.
const gatherLimit = 200 * time.Millisecond

// Pace is the end of a Registry's Watch that all stores share: it yields what
// take returns whenever news comes, until ctx ends or the consumer has enough.
// fresh says that the snapshot is another than the last; an error only informs.
// The consumer's own pace decides how many changes one snapshot holds.
func Pace(ctx context.Context, news <-chan struct{}, take func() (s Snapshot, fresh bool, err error), yield func(Snapshot, error) bool) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-news:
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
		// Thousands of leases take milliseconds: while a thousand nodes join, the
		// changes are let gather, so that a fifth of a core is the most.
		gather := time.NewTimer(min(4*built, gatherLimit))
		select {
		case <-ctx.Done():
			gather.Stop()
			return
		case <-gather.C:
		}
	}
}
