// Package kept is the node's copy of the leases on its disk: what a daemon that
// is restarted while the store is unreachable goes on with.
//
// The lease in the file is the node's for as long as it certainly has not run
// out, by the two clocks that can be asked after a restart: the one that counts
// since this boot, suspended or not, whatever is done to the wall clock; and the
// wall clock, which alone notices that a virtual machine was put back to an
// earlier state.
package kept

import (
	"errors"
	"fmt"
	"io/fs"
	"time"

	"culvert/internal/boottime"
	"culvert/internal/statefile"
	"culvert/subnet"
)

// State is a lease, and the leases around it, as a process of this node last had
// them from the store.
type State struct {
	Node      string
	Prefix    string   // the network's place in the store
	Endpoints []string // where the store was reached
	Config    subnet.Config
	// Lease is the node's own. Expires is when it may run out; a lease without
	// an ID never does.
	Lease    subnet.Lease
	Cluster  uint64 // identity of the store, never zero
	Revision int64  // of the store
	// Entries are all leases that can be read, the node's own among them.
	Entries []subnet.Entry
	Saved   time.Time // when it was written; Write sets it
}

// Read returns what the file holds if its lease has certainly not run out; nil
// without an error if there is no file.
func Read(name string) (*State, error) {
	text, err := statefile.Read(name, maxSize)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f, s, err := parse(text)
	if err != nil {
		return nil, err
	}
	now, err := boottime.Now()
	if err != nil {
		return nil, err
	}
	if s.Lease.Expires, err = f.believe(s.Lease, now); err != nil {
		return nil, err
	}
	return s, nil
}

// Write replaces the file in one step.
func Write(name string, s State) error {
	// The clocks first, so that a process which is stopped here writes too early
	// an end.
	at, err := boottime.Now()
	if err != nil {
		return err
	}
	text, err := marshal(s, at)
	if err != nil {
		return err
	}
	return statefile.Write(name, text, 0o600)
}

// believe returns when the lease may run out (zero for never), or why it may
// have run out already.
func (f file) believe(l subnet.Lease, now boottime.Moment) (time.Time, error) {
	switch {
	case f.BootID != now.Boot:
		return time.Time{}, errors.New("the machine was booted since")
	case now.Up < f.SavedUp:
		return time.Time{}, errors.New("the clock since the boot goes back")
	case l.ID == 0: // never ends
		return time.Time{}, nil
	}
	left := min(f.EndsUp-now.Up, f.Ends.Sub(now.Wall.Round(0)))
	if left <= 0 {
		return time.Time{}, fmt.Errorf("its lease of %v may have run out at %s", l.Subnets(), f.Ends.Format(time.RFC3339))
	}
	return now.Wall.Add(left), nil
}
