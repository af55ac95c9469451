// Package kept stores a node's lease and the leases of its peers in a file, from
// which a restarted daemon continues while the store is unreachable. It reads and
// writes the file and decides whether the lease in it is still valid; the store
// (subnet/etcd, subnet/kube) owns the state and decides what is worth saving.
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
	Saved   time.Time // when it was written; Copy.Write sets it
}

// Look returns the file's content even if its lease may have expired, and in that
// case why, in ended. It is for programs that only inspect the node. All are nil if
// there is no file.
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
