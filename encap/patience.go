package encap

import (
	"time"

	"golang.org/x/sys/unix"
)

// patience decides whether who has run dry looks again before it sleeps.
// Falling asleep and being woken costs more than many looks: in bulk transfer a
// sixth of all CPU time, and of a request and its answer half the time, since a
// core that has nothing to do sleeps too. But looking in vain costs as well, so
// only who would have been woken soon looks again, and between looks it yields
// its core to whoever wants it.
type patience struct {
	looking time.Duration // how long it looks before it sleeps; 0: not at all

	busy    bool      // the last sleep was short, or the last looking found something
	dry     time.Time // since when there has been nothing; zero if there has been
	slept   time.Time // when it went to sleep last
	crowded time.Time // when it was last kept waiting for its core
}

const (
	// looking is how long a busy thread looks before it sleeps.
	looking = 50 * time.Microsecond
	// Who yields a core that others want for long gets it back later than who
	// is woken. After having waited for longWait it does not look for shyness.
	longWait = time.Millisecond
	shyness  = 200 * time.Millisecond
)

// fed notes that there was something to carry.
func (p *patience) fed() { p.dry = time.Time{} }

// look gives the core to whoever wants it before the next look, or says by busy
// that it has looked for long enough.
func (p *patience) look() {
	now := time.Now()
	if p.dry.IsZero() {
		p.dry = now
	}
	if now.Sub(p.dry) >= p.looking {
		p.busy = false
		return
	}
	_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	p.yielded(now)
}

// yielded notes that the core is back, which was given away at a time.
func (p *patience) yielded(at time.Time) {
	if now := time.Now(); now.Sub(at) > longWait {
		p.crowded = now
		p.busy = false
	}
}

// sleeps and woken stand around a sleep.
func (p *patience) sleeps() { p.slept = time.Now() }

// woken finds a sleep short that looking would have bridged, a woken thread's
// own start included.
func (p *patience) woken() {
	p.dry = time.Time{}
	now := time.Now()
	p.busy = !p.slept.IsZero() && now.Sub(p.slept) < 2*p.looking && now.Sub(p.crowded) > shyness
}
