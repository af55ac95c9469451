package tunnel

import (
	"log/slog"
	"testing"

	"culvert/internal/lab"
	"culvert/internal/lab/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// TestSparseQueue opens a device of which sparse flows have a queue of their own.
func TestSparseQueue(t *testing.T) {
	labtest.NeedTUN(t)
	n := labtest.New(t, lab.Options{Nodes: 1}).Nodes[0]
	if err := n.Do(func() error {
		for _, threads := range []int{1, 3} {
			d, err := openDevice(DeviceName, 1450, deviceSize{threads: threads, sparse: true}, slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			if !d.sparse || len(d.queues) != 2*threads {
				t.Errorf("%d threads: %d queues, and %q", threads, len(d.queues), d.noSparse)
			}
			if err := d.close(); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
