package encap

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestPatience walks a direction through a burst, a pause and a trickle: it
// looks again only where it would have been woken at once.
func TestPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const looking = lookingBetween
		p := patience{looking: looking}
		sleep := func(d time.Duration) {
			p.sleeps()
			time.Sleep(d)
			p.woken()
		}
		p.woken() // the start
		if p.again() {
			t.Error("it looks again before anything ever came")
		}
		sleep(looking)
		p.fed()
		if !p.again() {
			t.Error("after a short sleep it does not look again")
		}
		time.Sleep(looking / 2)
		if !p.again() {
			t.Error("it gives up too early")
		}
		p.fed()
		time.Sleep(looking)
		if !p.again() {
			t.Error("what it was fed does not begin a new look")
		}
		time.Sleep(looking)
		if p.again() {
			t.Error("it never gives up")
		}
		sleep(20 * looking)
		p.fed()
		if p.again() {
			t.Error("a trickle keeps it awake")
		}

		sleep(looking)
		p.yielded(time.Now().Add(-2 * longWait))
		if p.again() {
			t.Error("it looks on a core that others want")
		}
		sleep(looking)
		if p.again() {
			t.Error("it looks again on a core that others wanted a moment ago")
		}
		time.Sleep(shyness)
		sleep(looking)
		if !p.again() {
			t.Error("it never looks again on a core that others wanted once")
		}
		if p = (patience{}); p.again() {
			t.Error("it looks though it is not to")
		}
		sleep(0)
		if p.again() {
			t.Error("it looks after a sleep though it is not to")
		}
	})
}
