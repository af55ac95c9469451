package subnet

import (
	"log/slog"
	"time"
)

// Outage logs a failure that lasts: at once, then once a minute, and its end. Only
// one goroutine may use it.
type Outage struct {
	log      *slog.Logger
	ended    string
	since    time.Time
	reminder Reminder
}

// NewOutage returns an Outage that logs the message ended, such as "etcd answers
// again", when a failure is over.
func NewOutage(log *slog.Logger, ended string) *Outage { return &Outage{log: log, ended: ended} }

// Failed logs the message and the error, unless it did within the last minute.
func (o *Outage) Failed(message string, err error) {
	if o.since.IsZero() {
		o.since = time.Now()
	}
	if o.reminder.Due() {
		o.log.Warn(message, "error", err)
	}
}

// Over logs the end if Failed was called since the last one.
func (o *Outage) Over() {
	if o.since.IsZero() {
		return
	}
	o.log.Info(o.ended, "after", time.Since(o.since).Round(time.Millisecond))
	o.since, o.reminder = time.Time{}, Reminder{}
}

// remindEvery is how often Reminder is due.
const remindEvery = time.Minute

// Reminder is due at once, then once a minute.
type Reminder struct{ last time.Time }

// Due reports whether to remind now. If so, it is not due again for a minute.
func (r *Reminder) Due() bool {
	if !r.last.IsZero() && time.Since(r.last) < remindEvery {
		return false
	}
	r.last = time.Now()
	return true
}
