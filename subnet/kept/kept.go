// Package kept stores a node's lease and the leases of its peers in a file, from
// which a restarted daemon continues while the store is unreachable. It reads and
// writes the file and decides whether the lease in it is still valid; the store
// (subnet/etcd, subnet/kube) owns the state and decides when to save it.
//
// The lease counts as valid only while it has not expired by either of the clocks
// that survive a restart of the process: CLOCK_BOOTTIME, which counts suspend and
// cannot be set, and the wall clock, which also detects that a virtual machine
// was restored to an earlier snapshot.
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

// State is the node's lease and all leases of the network, as last read from the
// store.
type State struct {
	Node      string
	Prefix    string   // the store's key or annotation prefix
	Endpoints []string // addresses of the store
	Config    subnet.Config
	// Lease is the node's own lease. Expires is the earliest time at which it can
	// have expired; a lease without an ID never expires.
	Lease    subnet.Lease
	Cluster  uint64 // identity of the store, never zero
	Revision int64  // store revision
	// Entries are all valid leases, including the node's own.
	Entries []subnet.Entry
	Saved   time.Time // when it was written; Write sets it
}

// Read returns the file's content if its lease has certainly not expired. It
// returns nil without an error if there is no file.
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
	if s.Lease.Expires, err = f.expiry(s.Lease, now); err != nil {
		return nil, err
	}
	return s, nil
}

// Look returns what the file holds whether its lease may have run out or not, and
// with ended why it may not be relied on: for who only looks at the node.
func Look(name string) (s *State, ended, err error) {
	text, err := statefile.Read(name, maxSize)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	f, s, err := parse(text)
	if err != nil {
		return nil, nil, err
	}
	now, err := boottime.Now()
	if err != nil {
		return nil, nil, err
	}
	if s.Lease.Expires, ended = f.expiry(s.Lease, now); ended != nil {
		s.Lease.Expires = f.Ends
	}
	return s, ended, nil
}

// Write atomically replaces the file.
func Write(name string, s State) error {
	// Read the clocks first: if the process is stopped here, the recorded expiry is
	// too early rather than too late.
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

// expiry returns when the lease expires (zero: never), or an error if it may
// have expired already.
func (f file) expiry(l subnet.Lease, now boottime.Moment) (time.Time, error) {
	switch {
	case f.BootID != now.Boot:
		return time.Time{}, errors.New("the machine was rebooted since it was written")
	case now.Up < f.SavedUp:
		return time.Time{}, errors.New("CLOCK_BOOTTIME is earlier than when it was written")
	case l.ID == 0: // never expires
		return time.Time{}, nil
	}
	left := min(f.EndsUp-now.Up, f.Ends.Sub(now.Wall.Round(0)))
	if left <= 0 {
		return time.Time{}, fmt.Errorf("its lease of %v may have expired at %s", l.Subnets(), f.Ends.Format(time.RFC3339))
	}
	return now.Wall.Add(left), nil
}
