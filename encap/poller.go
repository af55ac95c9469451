package encap

import (
	"time"

	"golang.org/x/sys/unix"
)

// poller implements adaptive busy polling: after a short block the queue polls for up
// to limit before it blocks again. Blocking and waking up cost more than many polls: a
// sixth of all CPU time in bulk transfer, and half the round trip of a request and its
// reply, since an idle core sleeps too. Polling in vain also costs, so the queue polls
// only if it would have been woken soon, and it yields the CPU between polls.
type poller struct {
	limit time.Duration // how long to poll before blocking; 0 disables polling

	busy      bool      // poll: the last block was short, or the last poll succeeded
	since     time.Time // start of the current polling period; zero if there is none
	blocked   time.Time // when it blocked last
	contended time.Time // when a yield last took longer than longYield
}

const (
	// pollTime is the limit of a queue that busy-polls.
	pollTime = 50 * time.Microsecond
	// If a yield took longer than longYield, other work needs the CPU, and blocking
	// would have given it back sooner: do not busy-poll for pollBackoff.
	longYield   = time.Millisecond
	pollBackoff = 200 * time.Millisecond
)

// ready records that a poll found a ready descriptor.
func (p *poller) ready() { p.since = time.Time{} }

// empty yields the CPU after an empty poll. After polling for p.limit it clears busy
// instead.
func (p *poller) empty() {
	now := time.Now()
	if p.since.IsZero() {
		p.since = now
	}
	if now.Sub(p.since) >= p.limit {
		p.busy = false
		return
	}
	_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	p.yielded(now)
}

// yielded backs off if the yield that began at the given time took too long.
func (p *poller) yielded(at time.Time) {
	if now := time.Now(); now.Sub(at) > longYield {
		p.contended = now
		p.busy = false
	}
}

// block and wake are called before and after blocking.
func (p *poller) block() { p.blocked = time.Now() }

// wake enables polling if the block was so short that polling would have caught the
// event. Twice p.limit allows for the wake-up latency.
func (p *poller) wake() {
	p.since = time.Time{}
	now := time.Now()
	p.busy = !p.blocked.IsZero() && now.Sub(p.blocked) < 2*p.limit && now.Sub(p.contended) > pollBackoff
}
