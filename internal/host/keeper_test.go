package host_test

import (
	"context"
	"log/slog"
	"sync/atomic"
	"testing"

	"culvert/internal/host"
	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

// TestStatusDoesNotWait requests a Keeper's status during a reconciliation: the status,
// and with it the metrics, must not wait for it.
func TestStatusDoesNotWait(t *testing.T) {
	n := labtest.New(t, lab.Options{Nodes: 1}).Nodes[0]
	k := host.NewKeeper(0, slog.New(slog.DiscardHandler))
	looking, goOn, done := make(chan struct{}), make(chan struct{}), make(chan error)
	go func() {
		done <- n.Do(func() error {
			return k.Apply(func(host.View) (host.State, error) {
				close(looking)
				<-goOn
				return host.State{}, nil
			})
		})
	}()
	select {
	case <-looking:
	case err := <-done: // on a host where the kernel cannot be read
		t.Fatal(err)
	}
	if s := k.Status(); s.Err != nil || s.Writes != 0 { // the test's time limit is what fails
		t.Errorf("before the first look has ended there is %+v", s)
	}
	close(goOn)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// TestLook has a Keeper look at the host on request: when Look returns, the plan has been
// asked again, although nothing has changed and the next periodic look is seconds away.
func TestLook(t *testing.T) {
	n := labtest.New(t, lab.Options{Nodes: 1}).Nodes[0]
	k := host.NewKeeper(0, slog.New(slog.DiscardHandler))
	var looks atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		ended <- n.Do(func() error {
			if err := k.Apply(func(host.View) (host.State, error) { looks.Add(1); return host.State{}, nil }); err != nil {
				return err
			}
			return k.Run(ctx)
		})
	}()
	for range 10 {
		before := looks.Load()
		k.Look(ctx)
		if looks.Load() == before {
			t.Error("Look returned before a look at the host")
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	k.Look(ctx) // returns, since ctx has ended
}
