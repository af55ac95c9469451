package encap

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestPoller simulates a burst, a pause, a trickle and CPU contention: the thread
// busy-polls only if it would have been woken soon and no other work needs the CPU.
func TestPoller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := poller{limit: pollTime}
		block := func(d time.Duration) {
			p.block()
			time.Sleep(d)
			p.wake()
		}
		// polls makes one empty poll, lets d pass, and reports whether polling was enabled.
		polls := func(d time.Duration) bool {
			if !p.busy {
				return false
			}
			p.empty()
			time.Sleep(d)
			return true
		}
		if polls(0) {
			t.Error("it polls before anything arrived")
		}
		block(pollTime)
		if !polls(pollTime / 2) {
			t.Error("it does not poll after a short block")
		}
		if !polls(0) {
			t.Error("it stops polling before the limit")
		}
		p.ready()
		if !polls(pollTime) || !polls(0) {
			t.Error("a successful poll does not start a new period")
		}
		if polls(0) {
			t.Error("it polls past the limit")
		}
		block(20 * pollTime)
		if polls(0) {
			t.Error("it polls after a long block")
		}

		block(pollTime)
		p.yielded(time.Now().Add(-2 * longYield))
		if polls(0) {
			t.Error("it polls after a long yield")
		}
		block(pollTime)
		if polls(0) {
			t.Error("it polls before the backoff has passed")
		}
		time.Sleep(pollBackoff)
		block(pollTime)
		if !polls(0) {
			t.Error("it does not poll after the backoff")
		}

		p = poller{}
		block(0)
		if polls(0) {
			t.Error("it polls although polling is disabled")
		}
	})
}
