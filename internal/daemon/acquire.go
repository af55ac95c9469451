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
//	the store answers ── waitFenced ── requestLease ──┐
//	     │ not within answerTimeout                   ├── serve
//	     └── kept on disk ── Resume ──────────────────┘
//
// So does a node with the embedded etcd, which starts together with the daemon.
//
// From then on it behaves as if it had run all along: Hold renews the lease or
// finds it lost, and the first list from the store replaces the snapshot.

const (
	// answerTimeout is how long to wait for the store's answer before serving from
	// the snapshot. If connections are refused, there is no wait.
	answerTimeout = 500 * time.Millisecond
	// leaseTimeout bounds leasing from the store if the snapshot has a usable lease.
	leaseTimeout = 5 * time.Second
)

var errStoreUnreachable = errors.New("the store is unreachable")

// grant is a lease to serve, with its network configuration and place.
type grant struct {
	config subnet.Config
	lease  subnet.Lease
	at     place
	// nets are the host's own networks inside the cluster network: peers' leases
	// there are rejected.
	nets []subnet.HostNetwork
}

// acquire returns the lease to serve: from the store, or from the snapshot on disk
// while the store is unreachable.
func (d *node) acquire(ctx context.Context, r store, at place) (grant, error) {
	if k, _, err := d.savedLease(r); k == nil {
		if err != nil {
			d.log.Warn("the snapshot for a start without "+d.options.storeName()+" cannot be used", "file", d.options.snapshotFile(), "reason", err)
		}
		return d.acquireFromStore(ctx, r, at)
	}
	asking, cancel := context.WithTimeoutCause(ctx, leaseTimeout, errStoreUnreachable)
	defer cancel()
	answering, cancelAnswer := context.WithTimeoutCause(asking, answerTimeout, fmt.Errorf("%w: no answer within %s", errStoreUnreachable, answerTimeout))
	defer cancelAnswer()
	d.state.notReady("checking whether " + d.options.storeName() + " is reachable")
	why := r.Answers(answering)
	if why == nil {
		t, err := d.acquireFromStore(asking, r, at)
		if err == nil || ctx.Err() != nil || asking.Err() == nil {
			return t, err
		}
		why = err
	}
	if ctx.Err() != nil {
		return grant{}, ctx.Err()
	}
	// Check again: the snapshot may have become unusable meanwhile.
	k, there, err := d.savedLease(r)
	if k == nil {
		d.log.Warn(d.options.storeName()+" is unreachable, and the snapshot on disk is no longer valid", "reason", err)
		return d.acquireFromStore(ctx, r, at)
	}
	d.log.Warn(d.options.storeName()+" is unreachable: serving from the snapshot on disk", "saved", k.Saved, "subnet", k.Lease.Subnets(),
		"leases", len(k.Entries), "until", k.Lease.Expires, "reason", why)
	r.Resume(k, d.options.LeaseTTL)
	d.state.setUnderlay(there.underlay)
	d.state.setConfig(k.Config)
	d.state.setLease(k.Lease)
	nets, err := d.checkOverlaps(ctx, k.Config, there)
	if err != nil {
		d.log.Warn("the cluster network overlaps what this host needs", "error", err)
	}
	return grant{k.Config, k.Lease, there, nets}, nil
}

// acquireFromStore leases from the store. It waits for the embedded etcd first; if that does
// not start, the daemon ends, as it has no snapshot to serve from.
func (d *node) acquireFromStore(ctx context.Context, r store, at place) (grant, error) {
	if d.embedded != nil {
		if err := d.embedded.Await(ctx); err != nil {
			return grant{}, err
		}
	}
	if err := d.waitFenced(ctx, r, at); err != nil {
		return grant{}, err
	}
	return d.requestLease(ctx, r)
}

// savedLease returns the snapshot on disk if it fits this daemon: same node and place, not
// fenced, and subnet.env names its subnets. It returns nil without an error if there
// is no snapshot.
func (d *node) savedLease(r store) (*kept.State, place, error) {
	k, err := r.Kept(d.options.Node)
	if err != nil || k == nil {
		return nil, place{}, err
	}
	u, err := host.FindUnderlay(d.selector(), d.underlayContext(&k.Config, k.Lease.Publics()))
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
	if previous := d.previousSubnets(); !slices.Equal(previous, k.Lease.Subnets()) {
		return nil, place{}, fmt.Errorf("its lease is of %v, and %s says %v", k.Lease.Subnets(), d.options.SubnetFile, previous)
	}
	return k, at, nil
}
