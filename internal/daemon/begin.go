package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"culvert/internal/host"
	"culvert/subnet"
	"culvert/subnet/kept"
)

// A daemon that is restarted while the store is unreachable serves from its snapshot
// on disk, until the lease in it may have expired:
//
//	the store answers ── standFence ── join ──┐
//	     │ not within answerPatience        ├── carry
//	     └── kept on disk ── Resume ────────┘
//
// So does a node with the embedded etcd, which starts together with the daemon.
//
// From then on it behaves as if it had run all along: Hold renews the lease or
// finds it lost, and the first list from the store replaces the snapshot.

const (
	// answerPatience is how long to wait for the store's answer before serving from
	// the snapshot. If connections are refused, there is no wait.
	answerPatience = 500 * time.Millisecond
	// joinPatience bounds leasing from the store if the snapshot has a usable lease.
	joinPatience = 5 * time.Second
)

var errAway = errors.New("the store is unreachable")

// tenure is a lease to serve, with its network configuration and place.
type tenure struct {
	config subnet.Config
	lease  subnet.Lease
	at     place
	// nets are the host's own networks inside the cluster network: peers' leases
	// there are rejected.
	nets []subnet.HostNetwork
}

// begin returns the lease to serve: from the store, or from the snapshot on disk
// while the store is unreachable.
func (d *node) begin(ctx context.Context, r store, at place) (tenure, error) {
	if k, _, err := d.kept(r); k == nil {
		if err != nil {
			d.log.Warn("what is kept for a start without "+d.options.storeName()+" is not used", "file", d.options.snapshotFile(), "reason", err)
		}
		return d.enter(ctx, r, at)
	}
	asking, cancel := context.WithTimeoutCause(ctx, joinPatience, errAway)
	defer cancel()
	answering, cancelAnswer := context.WithTimeoutCause(asking, answerPatience, fmt.Errorf("%w: no answer within %s", errAway, answerPatience))
	defer cancelAnswer()
	d.health.notReady("asking whether " + d.options.storeName() + " is there")
	why := r.Answers(answering)
	if why == nil {
		t, err := d.enter(asking, r, at)
		if err == nil || ctx.Err() != nil || asking.Err() == nil {
			return t, err
		}
		why = err
	}
	if ctx.Err() != nil {
		return tenure{}, ctx.Err()
	}
	// Check again: the snapshot may have become unusable meanwhile.
	k, there, err := d.kept(r)
	if k == nil {
		d.log.Warn(d.options.storeName()+" is unreachable, and what was kept does not serve any more", "reason", err)
		return d.enter(ctx, r, at)
	}
	d.log.Warn(d.options.storeName()+" is unreachable: serving from the snapshot on disk", "saved", k.Saved, "subnet", k.Lease.Subnets(),
		"leases", len(k.Entries), "until", k.Lease.Expires, "reason", why)
	r.Resume(k, d.options.LeaseTTL)
	d.health.setUnderlay(there.underlay)
	d.health.setConfig(k.Config)
	d.health.setLease(k.Lease)
	nets, err := d.survey(ctx, k.Config, there)
	if err != nil {
		d.log.Warn("the cluster network overlaps what this host needs", "error", err)
	}
	return tenure{k.Config, k.Lease, there, nets}, nil
}

// enter leases from the store. It waits for the embedded etcd first; if that does
// not start, the daemon ends, as it has no snapshot to serve from.
func (d *node) enter(ctx context.Context, r store, at place) (tenure, error) {
	if d.embedded != nil {
		if err := d.embedded.await(ctx); err != nil {
			return tenure{}, err
		}
	}
	if err := d.standFence(ctx, r, at); err != nil {
		return tenure{}, err
	}
	return d.join(ctx, r)
}

// kept returns the snapshot on disk if it fits this daemon: same node and place, not
// fenced, and subnet.env names its subnets. It returns nil without an error if there
// is no snapshot.
func (d *node) kept(r store) (*kept.State, place, error) {
	k, err := r.Kept(d.options.Node)
	if err != nil || k == nil {
		return nil, place{}, err
	}
	u, err := host.FindUnderlay(d.options.Underlay, d.known(&k.Config, k.Lease.Publics()))
	if err != nil {
		return nil, place{}, err
	}
	at := place{u, d.publics(u)}
	claim, err := d.claim(k.Config, at)
	if err != nil {
		return nil, place{}, err
	}
	for i, e := range k.Lease.Endpoints { // as many as networks: Admits
		if e.Subnet = claim.Ends[i].Subnet; e != claim.Ends[i] {
			return nil, place{}, fmt.Errorf("its lease is at %s, and this node at %s", e.Public, claim.Ends[i].Public)
		}
	}
	if _, err := os.Stat(d.fencePath()); !errors.Is(err, fs.ErrNotExist) {
		return nil, place{}, errors.New("this node is fenced")
	}
	if previous := d.previous(); !slices.Equal(previous, k.Lease.Subnets()) {
		return nil, place{}, fmt.Errorf("its lease is of %v, and %s says %v", k.Lease.Subnets(), d.options.SubnetFile, previous)
	}
	return k, at, nil
}
