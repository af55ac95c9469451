package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"culvert/internal/api"
)

// Plan computes, purely, what the host must be like, given what is true of it.
// An error leaves the host as it is.
type Plan func(View) (State, error)

// Keeper keeps the kernel equal to what a plan wants: when the plan changes,
// when the kernel says that something changed, and from time to time. All three
// are the same call.
type Keeper struct {
	underlay  int // index
	log       *slog.Logger
	followers []Follower
	watched   atomic.Pointer[watched]
	others    survey // what is known of other programs' routes
	hears     atomic.Bool

	mu      sync.Mutex // one look at the kernel at a time
	plan    Plan
	said    Standing
	planned bool
	took    time.Duration // the last look
}

// Standing is what a Keeper has to say.
type Standing struct {
	State   State           // as planned last
	View    View            // as seen last
	Repairs map[Kind]uint64 // changes that others made necessary
	// Obstacles are what stands in the packets' way and is not ours to remove.
	Obstacles []api.Warning
	// Err is why the kernel is not as it should be; nil if it is.
	Err error
	// Took has the durations of the repairs, in seconds.
	Took api.Histogram
	// Writes counts all changes since the start.
	Writes uint64
}

// NewKeeper returns a Keeper that does nothing yet. The underlay is the index of
// the interface that the plan is told about, whatever its name becomes.
func NewKeeper(underlay int, log *slog.Logger, followers ...Follower) *Keeper {
	return &Keeper{underlay: underlay, log: log, followers: followers, said: Standing{
		Repairs: make(map[Kind]uint64), Took: api.NewHistogram(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
	}}
}

// Apply makes the kernel equal to what the plan wants, now and, while Run runs,
// from now on.
func (k *Keeper) Apply(p Plan) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.plan = p
	return k.reconcile()
}

// Standing returns what there is to say. It may be called at any time.
func (k *Keeper) Standing() Standing {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.said
	s.Repairs, s.Took = maps.Clone(s.Repairs), s.Took.Clone()
	return s
}

// When the kernel is looked at.
const (
	// resync is how often without a word from it, since some settings change
	// without one; where a look takes long, at most one part in resyncShare of the
	// time is spent on it.
	resync      = 4 * time.Second
	resyncShare = 200
	// settle is how long after a word, since changes come in swarms.
	settle = 100 * time.Millisecond
	// share bounds the time that is spent on words: a look that took a
	// millisecond is followed by another after ten at the earliest.
	share = 10
)

// Run repairs until ctx ends. It opens its sockets in the network namespace of
// the calling thread, and looks at the kernel on that thread only.
func (k *Keeper) Run(ctx context.Context) error {
	events, stop, err := k.watch()
	if err != nil {
		return err
	}
	k.hears.Store(true)
	defer func() {
		k.hears.Store(false)
		stop()
	}()
	k.others.due.Store(true) // for what was not heard
	timer := time.NewTimer(settle)
	defer timer.Stop()
	for {
		pause := settle
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
			pause = 0
		case <-events:
			pause = max(settle, share*k.lastTook())
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		select { // what was said meanwhile is seen in the same look
		case <-events:
		default:
		}
		timer.Reset(k.repair())
	}
}

func (k *Keeper) lastTook() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.took
}

// repair returns when to look again.
func (k *Keeper) repair() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.plan == nil {
		return resync
	}
	before := k.said.Err
	err := k.reconcile()
	if err != nil && (before == nil || before.Error() != err.Error()) {
		k.log.Error("the host cannot be made as it should be", "error", err)
	}
	if k.others.putOff {
		return min(resync, max(settle, surveyShare*k.others.took-time.Since(k.others.at)))
	}
	return max(resync, resyncShare*k.took)
}

// reconcile is the one way from the plan to the kernel.
func (k *Keeper) reconcile() (err error) {
	defer func() { k.said.Err = err }()
	began := time.Now()
	defer func() { k.took = time.Since(began) }()
	if !k.hears.Load() { // of changes to them
		k.others.read = false
	}
	have, err := read(k.underlay, &k.others)
	if err != nil {
		return err
	}
	k.said.View = have.view
	want, err := k.plan(have.view)
	if err != nil {
		return err
	}
	k.others.end()
	if err := k.others.within(want.Firewall.Forward); err != nil {
		return err
	}
	have.foreign = k.others.foreign
	// What changes although the plan did not was somebody else's doing.
	repair := k.planned && reflect.DeepEqual(want, k.said.State)
	k.said.State, k.planned = want, true
	if len(want.Firewall.Forward) > 0 {
		_, warnings := diffOthers(have.firewalls, want.Firewall, have.surroundings(want))
		_, routes := foreignRoutes(have, want)
		k.obstacles(append(warnings, routes...))
	}
	steps := diff(have, want)
	done, err := write(have, steps)
	for _, f := range k.followers {
		changes, failed := f.Follow(want, have.view)
		done, err = append(done, changes...), errors.Join(err, failed)
	}
	k.watched.Store(newWatched(have, k.underlay))
	k.reorder(done, want)
	k.said.Writes += uint64(len(done))
	message := "host changed"
	if repair {
		message = "host repaired"
	}
	for i, c := range done {
		if i < 20 || len(done) < 30 {
			k.log.Info(message, "command", c.Command)
		} else if i == 20 {
			k.log.Info(message, "command", fmt.Sprintf("and %d more", len(done)-i))
		}
		if repair {
			k.said.Repairs[c.Kind]++
		}
	}
	if repair && len(done) > 0 {
		k.said.Took.Observe(time.Since(began).Seconds())
	}
	return err
}

// reorder has the foreign routes read again where ours for the same prefix were
// changed: which of the two is first may be another now.
func (k *Keeper) reorder(done []Change, want State) {
	if len(k.others.foreign) == 0 || !slices.ContainsFunc(done, func(c Change) bool { return c.Kind == KindRoute }) {
		return
	}
	for _, f := range k.others.foreign {
		if slices.ContainsFunc(want.Routes, func(r Route) bool { return r.To == f.To }) {
			k.others.due.Store(true)
			return
		}
	}
}

func (k *Keeper) obstacles(now []api.Warning) {
	for _, o := range now {
		if !slices.Contains(k.said.Obstacles, o) {
			k.log.Warn(o.Text, "check", o.Check, "fix", o.Fix)
		}
	}
	k.said.Obstacles = now
}
