package subnet_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"culvert/subnet"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMemoryLifetimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := subnet.NewMemory()
		a, b := claimOf(t, "a", "192.0.2.1"), claimOf(t, "b", "192.0.2.2")
		m.SetConfig(a.Config)
		a.TTL, b.TTL = time.Hour, time.Hour
		la, err := m.Acquire(t.Context(), a)
		if err != nil {
			t.Fatal(err)
		}
		lb, err := m.Acquire(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}

		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() {
			if err := m.Hold(ctx, la); err != nil {
				t.Errorf("hold: %v", err)
			}
		})
		var latest atomic.Pointer[subnet.Snapshot]
		last := func() subnet.Snapshot { return *latest.Load() }
		running.Go(func() {
			for s := range m.Watch(ctx, la) {
				latest.Store(&s)
			}
		})
		synctest.Wait()
		if len(last().Peers) != 1 || last().Self.Key() != la.Key() {
			t.Errorf("%+v", last())
		}
		// b's lease is not renewed; a's is.
		time.Sleep(59 * time.Minute)
		synctest.Wait()
		if len(last().Peers) != 1 {
			t.Error("b's lease expired early")
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if len(last().Peers) != 0 {
			t.Error("b's lease did not expire after its TTL")
		}
		time.Sleep(7 * 24 * time.Hour)
		synctest.Wait()
		if last().Self.Key() != la.Key() || last().Self.CreateRevision != la.CreateRevision {
			t.Errorf("a's lease became %+v", last().Self)
		}
		// A deleted lease is recreated.
		m.Delete(la.Key())
		synctest.Wait()
		if last().Self.CreateRevision <= la.CreateRevision {
			t.Errorf("a's lease was not recreated: %+v", last().Self)
		}
		_ = m.Release(ctx, lb) // already deleted
		cancel()
		running.Wait()
		time.Sleep(25 * time.Hour)
	})
}

func TestMemoryLoss(t *testing.T) {
	for value, says := range map[string]string{
		`{"PublicIP":"192.0.2.9","BackendType":"ipip","NodeID":"thief"}`: `"thief"`,
		"oops": "not a lease",
	} {
		testMemoryLoss(t, value, says)
	}
}

// testMemoryLoss overwrites a held lease with the value.
func testMemoryLoss(t *testing.T, value, says string) {
	synctest.Test(t, func(t *testing.T) {
		m := subnet.NewMemory()
		a := claimOf(t, "a", "192.0.2.1")
		m.SetConfig(a.Config)
		l, err := m.Acquire(t.Context(), a)
		if err != nil {
			t.Fatal(err)
		}
		var running sync.WaitGroup
		running.Go(func() {
			if err := m.Hold(t.Context(), l); !errors.Is(err, subnet.ErrLost) || !strings.Contains(err.Error(), says) {
				t.Errorf("hold: %v, want %s", err, says)
			}
		})
		synctest.Wait()
		m.Put(l.Key(), []byte(value))
		running.Wait()
		if _, err := m.Update(t.Context(), l); !errors.Is(err, subnet.ErrLost) {
			t.Errorf("update: %v", err)
		}
		if err := m.Release(t.Context(), l); err != nil {
			t.Errorf("release: %v", err)
		}
	})
}

func TestMemoryRace(t *testing.T) {
	m := subnet.NewMemory()
	leases := make([]subnet.Lease, 100)
	var racing sync.WaitGroup
	for i := range leases {
		c := claimOf(t, fmt.Sprint("node-", i), fmt.Sprintf("192.0.2.%d", i+1))
		m.SetConfig(c.Config)
		c.TTL = time.Hour
		racing.Go(func() {
			var err error
			if leases[i], err = m.Acquire(t.Context(), c); err != nil {
				t.Error(err)
			}
		})
	}
	racing.Wait()
	for i, a := range leases {
		for _, b := range leases[:i] {
			if a.Overlaps(b) {
				t.Errorf("%s and %s", a, b)
			}
		}
		_ = m.Release(t.Context(), a)
	}
}
