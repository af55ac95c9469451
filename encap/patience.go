package encap

import (
	"time"

	"golang.org/x/sys/unix"
)

// patience decides whether a direction that has run dry looks again before it
// sleeps. Falling asleep and being woken costs more than many looks: in bulk
// transfer a sixth of all CPU time. But looking in vain costs too, so only a
// direction that would have been woken at once looks again, and between looks
// it yields its core to whoever wants it.
type patience struct {
	busy  bool      // the last sleep was short, or the last looking found something
	dry   time.Time // since when there has been nothing; zero if there has been
	slept time.Time // when it went to sleep last
}

const (
	// looking is how long a busy direction looks before it sleeps.
	looking = 20 * time.Microsecond
	// shortSleep is what looking would have bridged, a woken thread's own start
	// included.
	shortSleep = 40 * time.Microsecond
)

// fed notes that there was something to carry.
func (p *patience) fed() { p.dry = time.Time{} }

// again says whether to look again; if not, the direction is to sleep.
func (p *patience) again() bool {
	if !p.busy {
		return false
	}
	now := time.Now()
	if p.dry.IsZero() {
		p.dry = now
	}
	if now.Sub(p.dry) < looking {
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		return true
	}
	p.busy = false
	return false
}

// sleeps and woken stand around a sleep.
func (p *patience) sleeps() { p.slept = time.Now() }

func (p *patience) woken() {
	p.dry = time.Time{}
	p.busy = !p.slept.IsZero() && time.Since(p.slept) < shortSleep
}
