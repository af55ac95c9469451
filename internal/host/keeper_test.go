package host_test

import (
	"log/slog"
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
