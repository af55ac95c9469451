package etcd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"culvert/subnet"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/connectivity"
)

// What was last read from etcd is kept in a file, so that a daemon which is
// restarted while etcd is away goes on as though it had never stopped:
//
//	etcd ── list, watch ── mirror ── Snapshot
//	                        │  ▲
//	                   keep ▼  │ Resume: the first list, of a start without etcd
//	                        file
//
// The lease in it is ours for as long as it certainly has not run out, by the
// two clocks that can be asked after a restart: the one that counts since this
// boot, suspended or not, whatever is done to the wall clock; and the wall
// clock, which alone notices that a virtual machine was put back to an earlier
// state. It is written at most once a second, beside and then over the old one.

// keepEvery is the least time between two writings; a large file waits longer,
// so that writing takes a fiftieth of a core at most.
const keepEvery = time.Second

// Kept is a lease, and the leases around it, as an earlier process of this node
// last had them from etcd.
type Kept struct {
	Config subnet.Config
	Lease  subnet.Lease // Expires is when it may run out
	Saved  time.Time    // when it was written
	file   keptFile
}

// Leases is how many there are, our own among them.
func (k *Kept) Leases() int { return len(k.file.Leases) }

// instant is a moment, as the clocks have it that outlive a process.
type instant struct {
	boot string        // random(4): another for each boot
	up   time.Duration // since then, suspended or not (CLOCK_BOOTTIME)
	wall time.Time
}

// readClocks reads the clock that a lifetime counts from last, so that a
// process that is stopped in between takes it for shorter.
func readClocks() (instant, error) {
	now := instant{wall: time.Now()}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return instant{}, fmt.Errorf("asking which boot this is: %w", err)
	}
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return instant{}, fmt.Errorf("reading CLOCK_BOOTTIME: %w", err)
	}
	now.boot, now.up = string(boot), time.Duration(up.Nano())
	return now, nil
}

// Kept returns what is kept on disk of this node, nil if there is nothing, or
// the reason why it cannot be relied on.
func (r *Registry) Kept(node string) (*Kept, error) {
	if r.opts.SnapshotFile == "" {
		return nil, nil
	}
	text, err := readBounded(r.opts.SnapshotFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	k, err := parseKept(text)
	if err != nil {
		return nil, err
	}
	now, err := readClocks()
	if err != nil {
		return nil, err
	}
	if err := k.believe(now); err != nil {
		return nil, err
	}
	switch f := k.file; {
	case f.Node != node:
		return nil, fmt.Errorf("it is of the node %q", f.Node)
	case f.Prefix != r.opts.Prefix:
		return nil, fmt.Errorf("it is of the network at %s", f.Prefix)
	case !slices.ContainsFunc(f.Endpoints, func(e string) bool { return slices.Contains(r.opts.Endpoints, e) }):
		return nil, fmt.Errorf("it is of another etcd, at %v", f.Endpoints)
	case k.Lease.ID != 0 && r.opts.StateFile != "" && r.savedID() != k.Lease.ID:
		return nil, errors.New("this node has had another lease since")
	}
	return k, nil
}

// believe says why the lease may have run out, or gives it its end.
func (k *Kept) believe(now instant) error {
	f := k.file
	switch {
	case f.BootID != now.boot:
		return errors.New("the machine was booted since")
	case now.up < f.SavedUp:
		return errors.New("the clock since the boot goes back")
	case k.Lease.ID == 0: // never ends
		return nil
	}
	left := min(f.EndsUp-now.up, f.Ends.Sub(now.wall.Round(0)))
	if left <= 0 {
		return fmt.Errorf("its lease of %v may have run out at %s", k.Lease.Subnets(), f.Ends.Format(time.RFC3339))
	}
	k.Lease.Expires = now.wall.Add(left)
	return nil
}

// Resume has the registry hold the kept lease, and the next Watch begin with the
// kept leases, as though this process had read them. What has changed since is
// found as after any absence: by Hold and by the first list.
func (r *Registry) Resume(k *Kept, ttl time.Duration) {
	r.rememberConfig(k.Config, "")
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held, r.ttl, r.resumed = k.Lease, ttl, k
}

// Answers returns an error if etcd is away: no server can be reached, or none
// that has a leader answers before ctx ends.
func (r *Registry) Answers(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	conn := r.client.ActiveConnection()
	conn.Connect()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
			if state == connectivity.TransientFailure {
				stop(fmt.Errorf("no server of %v can be reached", r.opts.Endpoints))
				return
			}
			if !conn.WaitForStateChange(ctx, state) {
				return
			}
		}
	}()
	_, _, _, err := r.configText(ctx)
	cause := context.Cause(ctx)
	stop(nil)
	<-watched
	switch {
	case err == nil || permanent(err):
		return nil
	case cause != nil:
		return cause
	}
	return err
}

// Forget removes what is kept, and keeps nothing more: the lease is not this
// node's any longer, or soon may not be.
func (r *Registry) Forget() {
	r.keeping.Lock()
	defer r.keeping.Unlock()
	r.forgotten = true
	if r.opts.SnapshotFile == "" {
		return
	}
	if err := os.Remove(r.opts.SnapshotFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.log.Warn("what is kept for a start without etcd cannot be removed", "file", r.opts.SnapshotFile, "error", err)
	}
}

// remember undoes Forget for another lease.
func (r *Registry) remember() {
	r.keeping.Lock()
	defer r.keeping.Unlock()
	r.forgotten = false
}

// keep writes what the mirror has, as it changes, until ctx ends, and then once
// more.
func (r *Registry) keep(ctx context.Context, m *mirror) {
	if r.opts.SnapshotFile == "" {
		return
	}
	var written keptState
	away := outage{log: r.log}
	tick := time.NewTicker(keepEvery) // the lease is renewed without a word
	defer tick.Stop()
	for {
		last := false
		select {
		case <-ctx.Done():
			last = true
		case <-m.changed:
		case <-tick.C:
		}
		began := time.Now()
		state, news := m.state(written)
		if news {
			if err := r.writeKept(state); err != nil {
				away.failed("what etcd says cannot be kept for a start without it", err)
			} else {
				written, written.entries = state, nil
			}
		}
		if last {
			return
		}
		if took := time.Since(began); news && sleep(ctx, max(keepEvery, 50*took)) != nil {
			continue // to the last writing
		}
	}
}

// keptState is what there is to keep.
type keptState struct {
	version int // of the mirror
	held    subnet.Lease
	config  subnet.Config
	cluster uint64
	at      int64 // revision
	entries []subnet.Entry
}

// state returns what there is to keep, if it is worth writing; nothing before
// etcd has been read, nor without a lease whose end is known.
func (m *mirror) state(written keptState) (keptState, bool) {
	held, ok := m.r.Held()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !ok || held.Key() != m.self.Key() || held.ID != 0 && held.Expires.IsZero() || !m.listed || len(m.config.Networks) == 0 {
		return keptState{}, false
	}
	s := keptState{version: m.version, held: held, config: m.config, cluster: m.cluster, at: m.revision}
	if !s.differs(written) {
		return keptState{}, false
	}
	for _, entries := range []map[string]subnet.Entry{m.entries, m.missed} {
		for _, e := range entries {
			if _, err := e.Lease(); err == nil {
				s.entries = append(s.entries, e)
			}
		}
	}
	return s, true
}

// differs says whether it is worth writing: as soon as a lease is another, and
// when our own lasts an eighth longer.
func (s keptState) differs(written keptState) bool {
	return s.version != written.version || s.held.ID != written.held.ID || s.held.ModRevision != written.held.ModRevision ||
		s.held.Expires.Sub(written.held.Expires).Abs() > time.Until(s.held.Expires).Abs()/8
}
