package kept

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"

	"culvert/internal/boottime"
	"culvert/internal/statefile"
	"culvert/subnet"
)

// Copy is the file with a node's copy of the store. Its methods are safe for
// concurrent use.
type Copy struct {
	name string // "": nothing is saved
	log  *slog.Logger

	mu  sync.Mutex // locked while the file is written or removed
	off bool       // after Forget, until Allow
}

// NewCopy returns the copy in the named file. If the name is empty, nothing is saved.
func NewCopy(name string, log *slog.Logger) *Copy { return &Copy{name: name, log: log} }

// Read returns the state that the node has saved, if its lease has certainly not
// expired; nil if there is none; or an error that says why it cannot be used.
func (c *Copy) Read(node string) (*State, error) {
	if c.name == "" {
		return nil, nil
	}
	s, ended, err := Look(c.name)
	switch {
	case err != nil || s == nil:
		return nil, err
	case ended != nil:
		return nil, ended
	case s.Node != node:
		return nil, fmt.Errorf("it belongs to the node %q", s.Node)
	}
	return s, nil
}

// Write atomically replaces the file. It does nothing after Forget, since the lease
// may have been lost or released while the caller prepared the state.
func (c *Copy) Write(s State) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.off || c.name == "" {
		return nil
	}
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
	return statefile.Write(c.name, text, 0o600)
}

// Forget deletes the file and stops saving: the lease is not this node's any more,
// or may soon not be.
func (c *Copy) Forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off = true
	if c.name == "" {
		return
	}
	if err := os.Remove(c.name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.log.Warn("cannot remove the snapshot file", "file", c.name, "error", err)
	}
}

// Allow allows saving again, for a new lease.
func (c *Copy) Allow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off = false
}

// saveEvery is the shortest interval between two writes of Save. It is longer if a
// write takes long, so that writing uses at most 2 % of a core.
const saveEvery = time.Second

// Save writes the state that next returns, until ctx ends, and then once more. It
// calls next when changed signals and once a second, which also retries a failed
// write. next returns nil if nothing has changed that is worth saving; written is
// called once the state is in the file.
func (c *Copy) Save(ctx context.Context, changed <-chan struct{}, next func() (s *State, written func())) {
	if c.name == "" {
		return
	}
	outage := subnet.NewOutage(c.log.With("file", c.name), "the snapshot file is written again")
	tick := time.NewTicker(saveEvery)
	defer tick.Stop()
	for last := false; !last; {
		select {
		case <-ctx.Done():
			last = true
		case <-changed:
		case <-tick.C:
		}
		began := time.Now()
		s, written := next()
		if s == nil {
			continue
		}
		if err := c.Write(*s); err != nil {
			outage.Failed("cannot write the snapshot file", err)
		} else {
			outage.Over()
			written()
		}
		if !last {
			_ = subnet.Sleep(ctx, max(saveEvery, 50*time.Since(began))) // cut short by the last write
		}
	}
}
