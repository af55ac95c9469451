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
	"culvert/internal/firewall"
)

// Planner computes the wanted state from facts about the host. It does no I/O. An
// error leaves the host unchanged.
type Planner func(View) (State, error)

// Keeper keeps the kernel equal to what a plan wants. It reconciles when the
// plan changes, when the kernel reports a change, and periodically; all three
// run the same code.
type Keeper struct {
	underlay  int // interface index
	log       *slog.Logger
	followers []Follower
	watched   atomic.Pointer[watched]
	others    survey // cached knowledge of other programs' routes
	bridges   podBridges
	hears     atomic.Bool
	asked     chan chan<- struct{} // requests of Look; answered by closing

	// status is the result of the last reconciliation. Readers do not wait for a running
	// one, since other programs may hold the kernel's locks for long.
	status atomic.Pointer[Status]

	mu      sync.Mutex // serializes reconciliation
	plan    Planner
	next    Status
	planned bool
	took    time.Duration // duration of the last reconciliation
	looked  time.Duration // of the last one that changed nothing
}

// Status is a Keeper's status.
type Status struct {
	State   State           // last planned
	View    View            // last seen
	Repairs map[Kind]uint64 // changes that undid someone else's
	// Obstacles are what may block packets but is not culvert's to remove.
	Obstacles []api.Warning
	// Err is why the kernel is not in the wanted state; nil if it is.
	Err error
	// Took is the histogram of repair durations, in seconds.
	Took api.Histogram
	// Writes counts all changes since the start.
	Writes uint64
}

// NewKeeper returns an idle Keeper. The underlay is the index of the interface
// that the plan is told about, even if it is renamed.
func NewKeeper(underlay int, log *slog.Logger, followers ...Follower) *Keeper {
	k := &Keeper{underlay: underlay, log: log, followers: followers, asked: make(chan chan<- struct{}), next: Status{
		Repairs: make(map[Kind]uint64), Took: api.NewHistogram(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
	}}
	k.publish()
	return k
}

// Apply makes the kernel equal to what the plan wants; Run then keeps it so.
func (k *Keeper) Apply(p Planner) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.plan = p
	return k.reconcile()
}

// Status returns the result of the last reconciliation. It is safe for concurrent use
// and does not wait. The caller must not change it.
func (k *Keeper) Status() Status { return *k.status.Load() }

// Look has Run reconcile at once, and waits until it has: the Status is then that of now.
// It returns early when ctx ends.
func (k *Keeper) Look(ctx context.Context) {
	done := make(chan struct{})
	select {
	case k.asked <- done:
	case <-ctx.Done():
		return
	}
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// publish makes the current state the Status.
func (k *Keeper) publish() {
	s := k.next
	s.Repairs, s.Took = maps.Clone(s.Repairs), s.Took.Clone()
	k.status.Store(&s)
}

// Intervals of reconciliation.
const (
	// resync is the interval without notifications, because some settings
	// change without one. If looking alone is slow, it uses at most 1/resyncShare
	// of the time.
	resync      = 4 * time.Second
	resyncShare = 200
	// settle is the delay after a notification, because changes come in bursts.
	settle = 100 * time.Millisecond
	// share limits the load by notifications: after one, the delay is at least
	// this multiple of the last reconciliation's duration.
	share = 10
)

// Run reconciles until ctx ends. It opens its sockets in the network namespace
// of the calling thread, and reads and writes the kernel on that thread only.
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
	k.others.due.Store(true) // notifications from before the subscription are missing
	timer := time.NewTimer(settle)
	defer timer.Stop()
	for {
		pause := settle
		select {
		case <-ctx.Done():
			return nil
		case done := <-k.asked:
			timer.Reset(k.repair())
			close(done)
			continue
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
		select { // drop a notification that this reconciliation covers
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

// repair reconciles and returns the delay until the next resync.
func (k *Keeper) repair() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.plan == nil {
		return resync
	}
	before := k.next.Err
	err := k.reconcile()
	if err != nil && (before == nil || before.Error() != err.Error()) {
		k.log.Error("cannot apply the wanted state to the host", "error", err)
	}
	if k.bridges.again() {
		return settle
	}
	if k.others.putOff {
		return min(resync, max(settle, surveyShare*k.others.took-time.Since(k.others.at)))
	}
	return max(resync, resyncShare*k.looked)
}

// reconcile reads the kernel, plans, and writes the difference. It is the only
// path from the plan to the kernel.
func (k *Keeper) reconcile() (err error) {
	defer func() {
		k.next.Err = err
		k.publish()
	}()
	began := time.Now()
	defer func() { k.took = time.Since(began) }()
	if !k.hears.Load() { // without notifications the cached routes may be stale
		k.others.read = false
	}
	have, err := read(k.underlay, &k.others)
	if err != nil {
		return err
	}
	k.next.View = have.view
	want, err := k.plan(have.view)
	if err != nil {
		return err
	}
	k.others.end()
	if err := k.others.within(want.Firewall.Forward); err != nil {
		return err
	}
	have.foreign = k.others.foreign
	have.podBridges = k.bridges.find(have, want, k.others.leads)
	isRepair := k.repairs(want)
	k.next.State, k.planned = want, true
	if len(want.Firewall.Forward) > 0 {
		warnings := firewall.Obstacles(have.firewall, want.Firewall, have.podDevices(want))
		_, routes := foreignRoutes(have, want)
		k.obstacles(slices.Concat(warnings, routes, have.astray(want), k.bridges.cutOff(have, want)))
		if i := slices.IndexFunc(warnings, func(w api.Warning) bool { return w.Check == firewall.CheckInput }); i >= 0 {
			have.view.InputDrop = warnings[i].Text
		}
		if want.ShortWay {
			have.view.EachPacket = firewall.EachPacket(have.firewall, want.Firewall, have.podDevices(want))
		}
	}
	steps := diff(have, want)
	done, err := write(have, steps)
	for _, f := range k.followers {
		changes, failed := f.Follow(want, have.view)
		done, err = append(done, changes...), errors.Join(err, failed)
	}
	if len(done) == 0 {
		k.looked = time.Since(began)
	}
	k.watched.Store(newWatched(have, k.underlay))
	k.reorder(done, want)
	k.next.Writes += uint64(len(done))
	repaired := false
	for i, c := range done {
		message := "host changed"
		if isRepair(c.Kind) {
			message, repaired = "host repaired", true
			k.next.Repairs[c.Kind]++
		}
		if i < 20 || len(done) < 30 {
			k.log.Info(message, "command", c.Command)
		} else if i == 20 {
			k.log.Info(message, "command", fmt.Sprintf("and %d more", len(done)-i))
		}
	}
	if repaired {
		k.next.Took.Observe(time.Since(began).Seconds())
	}
	return err
}

// repairs tells whether a change of a kind is a repair: if that part of the plan is the
// same as before, any difference was made by another program. The rules are a separate
// part, since they also depend on whether the fast path is on.
func (k *Keeper) repairs(want State) func(Kind) bool {
	old, rest := k.next.State, want
	rules := k.planned && reflect.DeepEqual(want.Firewall, old.Firewall)
	old.Firewall, rest.Firewall = firewall.Policy{}, firewall.Policy{}
	others := k.planned && reflect.DeepEqual(rest, old)
	return func(kind Kind) bool {
		if kind == KindNFTables || kind == KindForward {
			return rules
		}
		return others
	}
}

// reorder makes the next reconciliation read the foreign routes again if our routes for
// the same prefix were changed: their order in the kernel may differ now.
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
		if !slices.Contains(k.next.Obstacles, o) {
			k.log.Warn(o.Text, "check", o.Check, "fix", o.Fix)
		}
	}
	k.next.Obstacles = now
}
