package subnet

import (
	"context"
	"math/rand/v2"
	"time"
)

// Backoff is a delay between attempts that doubles from 50 ms to BackoffLimit. Each
// delay is shortened by a random part of up to one half, so that nodes that failed
// together do not retry together. The zero value is ready for use.
type Backoff struct{ next time.Duration }

const (
	backoffFirst = 50 * time.Millisecond
	// BackoffLimit is the longest delay.
	BackoffLimit = 10 * time.Second
)

// Wait sleeps for the next delay plus extra, or returns ctx's error if ctx ends
// first.
func (b *Backoff) Wait(ctx context.Context, extra time.Duration) error {
	b.next = min(max(b.next*2, backoffFirst), BackoffLimit)
	return Sleep(ctx, extra+b.next/2+rand.N(b.next/2+1))
}

// Reset makes the next delay the shortest again.
func (b *Backoff) Reset() { b.next = 0 }

// Sleep sleeps for d, or returns ctx's error if ctx ends first.
func Sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
