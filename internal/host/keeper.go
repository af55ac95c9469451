package host

import (
	"context"
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
	underlay string
	log      *slog.Logger
	watched  atomic.Pointer[watched]

	mu      sync.Mutex // one look at the kernel at a time
	plan    Plan
	said    Standing
	planned bool
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
	// Writes counts all changes since the start.
	Writes uint64
}

// NewKeeper returns a Keeper that does nothing yet. The underlay is the
// interface that the plan is told about.
func NewKeeper(underlay string, log *slog.Logger) *Keeper {
	return &Keeper{underlay: underlay, log: log, said: Standing{Repairs: make(map[Kind]uint64)}}
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
	s.Repairs = maps.Clone(s.Repairs)
	return s
}

// How often the kernel is looked at without a word from it, and how long after
// a word, since changes come in swarms.
const (
	resync = 4 * time.Second
	settle = 100 * time.Millisecond
)

// Run repairs until ctx ends. It opens its sockets in the network namespace of
// the calling thread, and looks at the kernel on that thread only.
func (k *Keeper) Run(ctx context.Context) error {
	events, stop, err := k.watch()
	if err != nil {
		return err
	}
	defer stop()
	tick := time.NewTicker(resync)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-events:
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(settle):
			}
			select { // what was said meanwhile is seen in the same look
			case <-events:
			default:
			}
		}
		k.repair()
	}
}

func (k *Keeper) repair() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.plan == nil {
		return
	}
	before := k.said.Err
	err := k.reconcile()
	if err != nil && (before == nil || before.Error() != err.Error()) {
		k.log.Error("the host cannot be made as it should be", "error", err)
	}
}

// reconcile is the one way from the plan to the kernel.
func (k *Keeper) reconcile() (err error) {
	defer func() { k.said.Err = err }()
	have, err := read(k.underlay)
	if err != nil {
		return err
	}
	k.said.View = have.view
	want, err := k.plan(have.view)
	if err != nil {
		return err
	}
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
	k.watched.Store(newWatched(have, k.underlay))
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
	return err
}

func (k *Keeper) obstacles(now []api.Warning) {
	for _, o := range now {
		if !slices.Contains(k.said.Obstacles, o) {
			k.log.Warn(o.Text, "check", o.Check, "fix", o.Fix)
		}
	}
	k.said.Obstacles = now
}
