package etcd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"culvert/subnet"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// verifyEvery is how often Hold verifies our key even if Watch reports no change
// to it.
const verifyEvery = time.Minute

// Hold implements subnet.Registry. It retries while etcd is unreachable: the
// lease is lost only if etcd answers that another node has the subnet.
func (r *Registry) Hold(ctx context.Context, l subnet.Lease) error {
	if held, ok := r.Held(); !ok || held.Key() != l.Key() {
		r.setHeld(l)
	}
	r.markLease = 0 // may belong to another subnet
	var g grant
	var k renewal
	var pause subnet.Backoff
	away := r.outage("subnet", l.Key())
	for {
		err := r.verify(ctx, &g)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, subnet.ErrLost):
			r.Forget()
			return err
		case err != nil:
			if !errors.Is(err, errRace) {
				away.Failed("cannot renew the lease; keeping it and retrying", r.Explain(ctx, err))
			}
			if pause.Wait(ctx, 0) != nil {
				return nil
			}
			continue
		}
		away.Over()
		pause.Reset()
		if err := r.renew(ctx, &k); err != nil {
			r.log.Debug("verifying our lease", "subnet", l.Key(), "reason", err)
			// Avoid a busy loop if renewals fail at once.
			if subnet.Sleep(ctx, 50*time.Millisecond+rand.N(50*time.Millisecond)) != nil {
				return nil
			}
		}
	}
}

// renewal is the etcd lease to renew (0: none yet) and when to renew it: after a
// third of its lifetime.
type renewal struct {
	id  int64
	due time.Time
}

// renew renews the etcd lease until our key must be verified, and returns the
// reason for that.
//
// Each renewal is a separate request, so that the new lifetime counts from before
// it was sent. A response that lay unread while the process was stopped says
// nothing about now: counting from its arrival, this node could use a subnet that
// another node has acquired.
func (r *Registry) renew(ctx context.Context, k *renewal) error {
	held, ok := r.Held()
	if !ok {
		return errors.New("released")
	}
	if k.id != held.ID {
		*k = renewal{id: held.ID}
	}
	periodic := time.NewTimer(verifyEvery/2 + rand.N(verifyEvery))
	defer periodic.Stop()
	due := time.NewTimer(time.Until(k.due))
	defer due.Stop()
	if k.id == 0 {
		due.Stop() // it never expires
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-r.verifyNow:
			return errors.New("verification was requested")
		case <-periodic.C:
			return errors.New("periodic")
		case <-due.C:
			ttl, err := r.keepAlive(ctx, k.id)
			if err != nil {
				// Not necessarily an expiry: a broken connection, an election or a
				// slow response fails it too.
				return fmt.Errorf("renew: %w", err)
			}
			r.keepMark(ctx, held)
			k.due = time.Now().Add(ttl / 3)
			due.Reset(time.Until(k.due))
		}
	}
}

// keepAlive renews an etcd lease once and returns its lifetime. It returns
// ErrLeaseNotFound if the lease does not exist.
func (r *Registry) keepAlive(ctx context.Context, id int64) (time.Duration, error) {
	rctx, cancel := r.leaseRequest(ctx)
	defer cancel()
	asked := time.Now()
	resp, err := r.client.KeepAliveOnce(rctx, clientv3.LeaseID(id))
	if err != nil {
		return 0, err
	}
	ttl := time.Duration(resp.TTL) * time.Second
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held.ID == id {
		l := r.held
		l.Expires = asked.Add(ttl)
		r.setHeldLocked(l)
	}
	return ttl, nil
}

// verify makes our key match the held lease: it adopts, rewrites or recreates it.
// It returns ErrLost if another node has the subnet.
func (r *Registry) verify(ctx context.Context, g *grant) error {
	done, err := r.keyLock.Take(ctx)
	if err != nil {
		return err
	}
	defer done()
	held, ok := r.Held()
	if !ok {
		return fmt.Errorf("%w: it was released", subnet.ErrLost)
	}
	return r.repair(ctx, held, g)
}

// repair is verify for the wanted lease. The caller holds keyLock.
func (r *Registry) repair(ctx context.Context, want subnet.Lease, g *grant) error {
	rctx, cancel := r.leaseRequest(ctx)
	defer cancel()
	resp, err := r.client.Get(rctx, r.subnetsDir()+want.Key())
	if err != nil {
		return fmt.Errorf("read our lease: %w", err)
	}
	if len(resp.Kvs) == 0 {
		return r.recreate(ctx, want, g)
	}
	e := r.entry(resp.Kvs[0])
	is, err := r.ours(want, g, e)
	if err != nil {
		return err
	}
	want.CreateRevision, want.ModRevision = e.CreateRevision, e.ModRevision
	id := e.ID
	if id == 0 {
		id = want.ID // also 0 if the lease never expires
	}
	want.ID, want.Expires = id, time.Time{}
	if id != 0 {
		ends, _, err := r.timeToLive(ctx, id)
		switch {
		case err != nil:
			return err
		case !ends.IsZero():
			want.Expires = ends
			r.saveID(want.Node, id)
		case e.ID != 0:
			err = fmt.Errorf("lease %s expired during verification: %w", want, errRace)
		default:
			err = r.ensureGranted(ctx, want.Node, r.lifetime(), g)
			want.ID, want.Expires = g.id, g.ends
		}
		if err != nil {
			return err
		}
	}
	value, err := want.Value()
	if err != nil {
		return err
	}
	if !slices.Equal(value, e.Value) || want.ID != e.ID {
		if is.Node != "" {
			r.log.Info("rewriting our lease", "subnet", want.Key(), "node", want.Node, "public", want.Publics())
		} else {
			r.log.Warn("another program, such as flannel, overwrote our lease; rewriting it", "subnet", want.Key(), "node", want.Node)
		}
		keep := is
		written, err := r.write(ctx, subnet.Choice{Lease: want, Keep: &keep}, resp.Header.Revision, g)
		if err != nil {
			return err
		}
		want = written
	}
	r.setHeld(want)
	return nil
}

// ours returns the entry at our key as a lease if it is ours, else ErrLost. The
// lease ID decides; without a match, identity and address do.
func (r *Registry) ours(want subnet.Lease, g *grant, e subnet.Entry) (subnet.Lease, error) {
	is, err := e.Lease()
	known := e.ID != 0 && (e.ID == want.ID || e.ID == g.id)
	if err != nil {
		if known {
			// The value was corrupted, but the lease ID is still ours.
			return subnet.Lease{Node: want.Node, CreateRevision: e.CreateRevision, ModRevision: e.ModRevision, ID: e.ID}, nil
		}
		return subnet.Lease{}, fmt.Errorf("%w: the value at %s is malformed and not ours: %w", subnet.ErrLost, e.Key, err)
	}
	sameAddress := slices.ContainsFunc(want.Publics(), func(a netip.Addr) bool { return slices.Contains(is.Publics(), a) })
	switch {
	case is.Reserved:
		return is, fmt.Errorf("%w: an administrator reserved %s", subnet.ErrLost, is)
	case known && (is.Node == want.Node || is.Node == ""):
	case is.Node == want.Node && (sameAddress || e.ModRevision == want.ModRevision):
	case is.Node == "" && sameAddress:
	default:
		return is, fmt.Errorf("%w: %s now has the subnet of %s", subnet.ErrLost, is, want)
	}
	return is, nil
}

// recreate writes our missing key again if the subnet is still free. The key is
// missing if the lease expired, was deleted, or etcd was restored to an older
// state.
func (r *Registry) recreate(ctx context.Context, want subnet.Lease, g *grant) error {
	entries, revision, err := r.entries(ctx)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Key == want.Key() {
			return fmt.Errorf("lease %s: %w", want, errRace)
		}
		other, err := e.Lease()
		if err != nil {
			if subnets, err := subnet.ParseKey(e.Key); err == nil {
				for _, s := range subnets {
					other.Endpoints = append(other.Endpoints, subnet.Endpoint{Subnet: s})
				}
			}
		}
		if want.Overlaps(other) {
			return fmt.Errorf("%w: it expired, and %s now has its subnet", subnet.ErrLost, other)
		}
		if err := want.Rival(other); err != nil {
			return fmt.Errorf("%w: it expired, and another node took its identity or address: %w", subnet.ErrLost, err)
		}
	}
	if g.unanswered { // it expired too, or is attached to nothing
		*g = grant{}
	}
	if err := r.ensureGranted(ctx, want.Node, r.lifetime(), g); err != nil {
		return err
	}
	want.ID, want.Expires = g.id, g.ends
	written, err := r.write(ctx, subnet.Choice{Lease: want}, revision, g)
	if err != nil {
		return err
	}
	r.log.Info("our lease was missing from etcd and has been recreated", "subnet", want.Key(), "node", want.Node)
	r.setHeld(written)
	*g = grant{}
	return nil
}

// Update implements subnet.Registry. It does not change the subnets and retries
// while etcd is unreachable. It fails with ErrConflict if another node has the new
// address, and with ErrLost if another node has the subnet.
func (r *Registry) Update(ctx context.Context, l subnet.Lease) (subnet.Lease, error) {
	done, err := r.keyLock.Take(ctx)
	if err != nil {
		return subnet.Lease{}, err
	}
	defer done()
	before, ok := r.Held()
	if !ok || before.Key() != l.Key() {
		return subnet.Lease{}, fmt.Errorf("update lease %s: %w: this registry does not hold it", l, subnet.ErrLost)
	}
	want := before
	want.Backend, want.Endpoints = l.Backend, slices.Clone(l.Endpoints)
	if _, err := want.Value(); err != nil {
		return subnet.Lease{}, fmt.Errorf("update: %w", err)
	}
	var g grant
	var pause subnet.Backoff
	for {
		err := r.checkRivals(ctx, want)
		if err == nil {
			err = r.repair(ctx, want, &g)
		}
		if err == nil {
			after, _ := r.Held()
			return after, nil
		}
		if permanent(err) || pause.Wait(ctx, 0) != nil {
			return subnet.Lease{}, fmt.Errorf("update lease %s: %w", l, err)
		}
	}
}

func (r *Registry) checkRivals(ctx context.Context, l subnet.Lease) error {
	entries, _, err := r.entries(ctx)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if other, err := e.Lease(); err == nil {
			if err := l.Rival(other); err != nil {
				return err
			}
		}
	}
	return nil
}

// Release implements subnet.Registry. It is not an error if the lease no longer
// exists or belongs to another node. A running Hold returns ErrLost.
func (r *Registry) Release(ctx context.Context, l subnet.Lease) error {
	done, err := r.keyLock.Take(ctx)
	if err != nil {
		return err
	}
	defer done()
	held, ok := r.Held()
	if !ok || held.Key() != l.Key() {
		held = l
	}
	r.Forget()
	var g grant
	var pause subnet.Backoff
	for {
		err := r.release(ctx, held, &g)
		if err == nil {
			break
		}
		if permanent(err) || pause.Wait(ctx, 0) != nil {
			return fmt.Errorf("release lease %s: %w", l, err)
		}
	}
	r.setHeld(subnet.Lease{})
	r.verifyNow.Raise()
	return r.dropID()
}

func (r *Registry) release(ctx context.Context, l subnet.Lease, g *grant) error {
	rctx, cancel := r.request(ctx)
	defer cancel()
	key := r.subnetsDir() + l.Key()
	resp, err := r.client.Get(rctx, key)
	if err != nil {
		return err
	}
	if len(resp.Kvs) == 0 {
		return nil
	}
	e := r.entry(resp.Kvs[0])
	if _, err := r.ours(l, g, e); err != nil {
		return nil
	}
	rest, err := r.quarantineOps(ctx, e.Key, l.Node)
	if err != nil {
		return err
	}
	done, err := r.client.Txn(rctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", e.ModRevision)).
		Then(append(rest, clientv3.OpDelete(key))...).Commit()
	switch {
	case err != nil:
		return err
	case !done.Succeeded:
		return errRace
	}
	r.revoke(e.ID)
	return nil
}
