package encap

import (
	"time"

	"golang.org/x/sys/unix"
)

// patience implements adaptive busy polling: after a short block the queue polls
// for up to looking before it blocks again. Blocking and waking up cost more than
// many polls: a sixth of all CPU time in bulk transfer, and half the round trip of
// a request and its reply, since an idle core sleeps too. Polling in vain also
// costs, so the queue polls only if it would have been woken soon, and it yields
// the CPU between polls.
type patience struct {
	looking time.Duration // how long to poll before blocking; 0 disables polling

	busy    bool      // poll: the last block was short, or the last poll succeeded
	dry     time.Time // start of the current polling period; zero if there is none
	slept   time.Time // when it blocked last
	crowded time.Time // when a yield last took longer than longWait
}

const (
	// looking is how long a busy thread polls before it blocks.
	looking = 50 * time.Microsecond
	// If a yield took longer than longWait, other work needs the CPU, and blocking
	// would have given it back sooner: do not busy-poll for shyness.
	longWait = time.Millisecond
	shyness  = 200 * time.Millisecond
)

// fed records that a poll found a ready descriptor.
func (p *patience) fed() { p.dry = time.Time{} }

// look yields the CPU after an empty poll. After polling for p.looking it clears
// busy instead.
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

// yielded backs off if the yield that began at the given time took too long.
func (p *patience) yielded(at time.Time) {
	if now := time.Now(); now.Sub(at) > longWait {
		p.crowded = now
		p.busy = false
	}
}

// sleeps and woken are called before and after blocking.
func (p *patience) sleeps() { p.slept = time.Now() }

// woken enables polling if the block was so short that polling would have caught
// the event. Twice p.looking allows for the wake-up latency.
func (p *patience) woken() {
	p.dry = time.Time{}
	now := time.Now()
	p.busy = !p.slept.IsZero() && now.Sub(p.slept) < 2*p.looking && now.Sub(p.crowded) > shyness
}
