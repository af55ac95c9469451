package encap

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestPatience simulates a burst, a pause, a trickle and CPU contention: the thread
// busy-polls only if it would have been woken soon and no other work needs the CPU.
func TestPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := patience{looking: looking}
		sleep := func(d time.Duration) {
			p.sleeps()
			time.Sleep(d)
			p.woken()
		}
		// looks polls once, lets d pass, and reports whether polling was enabled.
		looks := func(d time.Duration) bool {
			if !p.busy {
				return false
			}
			p.look()
			time.Sleep(d)
			return true
		}
		if looks(0) {
			t.Error("it looks before anything ever came")
		}
		sleep(looking)
		if !looks(looking / 2) {
			t.Error("after a short sleep it does not look")
		}
		if !looks(0) {
			t.Error("it gives up too early")
		}
		p.fed()
		if !looks(looking) || !looks(0) {
			t.Error("what it was fed does not begin a new look")
		}
		if looks(0) {
			t.Error("it never gives up")
		}
		sleep(20 * looking)
		if looks(0) {
			t.Error("a trickle keeps it awake")
		}

		sleep(looking)
		p.yielded(time.Now().Add(-2 * longWait))
		if looks(0) {
			t.Error("it looks on a core that others want")
		}
		sleep(looking)
		if looks(0) {
			t.Error("it looks on a core that others wanted a moment ago")
		}
		time.Sleep(shyness)
		sleep(looking)
		if !looks(0) {
			t.Error("it never looks again on a core that others wanted once")
		}

		p = patience{}
		sleep(0)
		if looks(0) {
			t.Error("it looks though it is not to")
		}
	})
}
