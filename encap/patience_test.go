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
		var p patience
		sleep := func(d time.Duration) {
			p.sleeps()
			time.Sleep(d)
			p.woken()
		}
		p.woken() // the start
		if p.again() {
			t.Error("it looks again before anything ever came")
		}
		sleep(shortSleep / 2)
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
		sleep(10 * shortSleep)
		p.fed()
		if p.again() {
			t.Error("a trickle keeps it awake")
		}
	})
}
