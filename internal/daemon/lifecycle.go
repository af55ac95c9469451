package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"culvert/subnet"
)

// releaseTimeout bounds the request to the store that releases the lease on exit.
const releaseTimeout = 5 * time.Second

// live runs the node from its first lease to its end:
//
//	acquire ── serve ──┬─ told to stop ── (release) ── end
//	  ▲                └─ another node has the subnet: fence ─┐
//	  └── waitFenced: until no pod of the old subnet is left ─┘
func (d *node) live(ctx context.Context, r store, at place) error {
	// A usable snapshot is from this boot, so only this daemon was restarted: no jitter
	// is needed.
	if kept, _, _ := d.savedLease(r); kept == nil {
		if err := d.waitJitter(ctx); err != nil {
			return nil
		}
	}
	for {
		waiting, done := d.untilHandover(ctx)
		t, err := d.acquire(waiting, r, at)
		if request := done(); request != nil {
			if err := d.handOver(ctx, *request, nil); errors.Is(err, errHandedOver) || ctx.Err() != nil {
				return stopped(ctx, err)
			}
			continue
		}
		if err != nil {
			return stopped(ctx, err)
		}
		d.leasedSubnets = append(d.leasedSubnets, t.lease.Subnets()...)
		d.savePlace(t.at.underlay)
		err = d.serve(ctx, r, t)
		if !errors.Is(err, subnet.ErrLost) || ctx.Err() != nil {
			return stopped(ctx, err)
		}
		d.log.Error("the lease is lost", "error", err)
		// The underlay's address may have changed meanwhile.
		if at, err = d.relocate(ctx); err != nil {
			return stopped(ctx, err)
		}
	}
}

// waitJitter waits for a random time of at most StartJitter.
func (d *node) waitJitter(ctx context.Context) error {
	if d.options.StartJitter <= 0 {
		return nil
	}
	wait := rand.N(d.options.StartJitter)
	d.state.notReady("waiting for this node's turn to start (--start-jitter)")
	d.log.Info("delaying the first request to the store", "wait", wait.Round(time.Millisecond), "jitter", d.options.StartJitter)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(wait):
		return nil
	}
}

// release releases the lease in the store.
func (d *node) release(ctx context.Context, r store, l subnet.Lease) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	if err := r.Release(ctx, l); err != nil {
		if d.options.Kubernetes != nil {
			return fmt.Errorf("--release-on-exit: %w (the annotations stay until the Node is deleted)", err)
		}
		return fmt.Errorf("--release-on-exit: %w (the lease expires by itself; `culvert lease release %s` releases it now)", err, l.Subnets()[0])
	}
	d.log.Info("lease released", "subnet", l.Subnets())
	return nil
}
