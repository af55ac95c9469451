package etcd

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"culvert/subnet"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// DefaultTTL is the lifetime of a lease without renewal, as in flannel.
const DefaultTTL = 24 * time.Hour

// errRace means that the data read is out of date; retry.
var errRace = errors.New("another write came first")

// grant is an etcd lease that is not yet attached to our key.
type grant struct {
	id int64 // zero: none yet
	// ends is the earliest expiry, counted from before the request.
	ends time.Time
	// unanswered is set if a transaction with this ID was not answered: it may
	// have been committed, or may still be.
	unanswered bool
}

// Acquire implements subnet.Registry. It retries while etcd is unreachable.
func (r *Registry) Acquire(ctx context.Context, c subnet.Claim) (subnet.Lease, error) {
	if err := c.Check(); err != nil {
		return subnet.Lease{}, fmt.Errorf("claim of node %q: %w", c.Node, err)
	}
	if c.TTL <= 0 {
		c.TTL = DefaultTTL
	}
	done, err := r.keyLock.Take(ctx)
	if err != nil {
		return subnet.Lease{}, err
	}
	defer done()
	r.mu.Lock()
	r.ttl = c.TTL
	r.mu.Unlock()

	var g grant
	var pause subnet.Backoff
	away := r.outage("node", c.Node)
	for {
		l, err := r.tryAcquire(ctx, c, &g)
		if err == nil {
			away.Over()
			if g.id != l.ID {
				r.revoke(g.id)
			}
			r.setHeld(l)
			r.copy.Allow()
			return l, nil
		}
		again := !permanent(err)
		if again && !errors.Is(err, errRace) {
			away.Failed("cannot acquire a lease; retrying", r.Explain(ctx, err))
		}
		if again && pause.Wait(ctx, 0) == nil {
			continue
		}
		if !g.unanswered { // else our lease may use it; the next start will find out
			r.revoke(g.id)
		}
		return subnet.Lease{}, fmt.Errorf("acquire a lease: %w", err)
	}
}

// tryAcquire is one attempt: list, choose, write.
func (r *Registry) tryAcquire(ctx context.Context, c subnet.Claim, g *grant) (subnet.Lease, error) {
	marks, err := r.marks(ctx)
	if err != nil {
		return subnet.Lease{}, err
	}
	resp, err := r.listAll(ctx)
	if err != nil {
		return subnet.Lease{}, err
	}
	var entries []subnet.Entry
	for _, kv := range resp.Responses[1].GetResponseRange().Kvs {
		entries = append(entries, r.entry(kv))
	}
	revision := resp.Header.Revision
	r.mu.Lock()
	r.listed = &listing{resp, time.Now()}
	r.mu.Unlock()
	saved := r.savedID()
	occupancy := subnet.Occupied(entries)
	occupancy.Mine = func(l subnet.Lease) bool { return l.ID != 0 && (l.ID == saved || l.ID == g.id) }
	choice, err := r.choose(ctx, c, occupancy, quarantined(marks, entries, c.Node))
	if err != nil {
		return subnet.Lease{}, err
	}
	if choice.Keep == nil || len(choice.Drop) > 0 {
		r.Forget() // this may end the saved lease, even if the answer is lost
	}
	if choice.Keep == nil {
		// The unanswered transaction has not been committed. Revoke its lease so
		// that it never can be; then another subnet may be tried.
		if g.unanswered {
			if err := r.revokeNow(ctx, g.id); err != nil {
				return subnet.Lease{}, err
			}
			*g = grant{}
		}
		if err := r.ensureGranted(ctx, c.Node, c.TTL, g); err != nil {
			return subnet.Lease{}, err
		}
		choice.Lease.ID, choice.Lease.Expires = g.id, g.ends
		return r.write(ctx, choice, revision, g)
	}

	keep := *choice.Keep
	if keep.ID != 0 { // else it never expires
		ends, whole, err := r.timeToLive(ctx, keep.ID)
		if err != nil {
			return subnet.Lease{}, err
		}
		choice.Lease.Expires = ends
		if ends.IsZero() || whole != time.Duration(seconds(c.TTL))*time.Second || keep.Node != c.Node {
			if err := r.ensureGranted(ctx, c.Node, c.TTL, g); err != nil {
				return subnet.Lease{}, err
			}
			choice.Lease.ID, choice.Lease.Expires = g.id, g.ends
		} else {
			r.saveID(c.Node, keep.ID)
		}
	}
	before, err := keep.Value()
	if err != nil {
		return subnet.Lease{}, err
	}
	after, err := choice.Lease.Value()
	if err != nil {
		return subnet.Lease{}, err
	}
	if slices.Equal(before, after) && choice.Lease.ID == keep.ID && len(choice.Drop) == 0 {
		return choice.Lease, nil
	}
	l, err := r.write(ctx, choice, revision, g)
	if err == nil && keep.ID != l.ID && keep.Node == c.Node {
		r.revoke(keep.ID) // flannel's etcd lease is left to expire
	}
	return l, err
}

// TakenBy describes the lease or reservation that another node has on one of the
// subnets; empty if there is none. It retries while etcd is unreachable.
func (r *Registry) TakenBy(ctx context.Context, node string, publics []netip.Addr, subnets []netip.Prefix) (string, error) {
	var pause subnet.Backoff
	away := r.outage("node", node)
	for {
		entries, _, err := r.entries(ctx)
		if err == nil {
			away.Over()
			return r.takenBy(entries, node, publics, subnets), nil
		}
		if permanent(err) || ctx.Err() != nil {
			return "", err
		}
		away.Failed("cannot read which node holds our subnet; retrying", r.Explain(ctx, err))
		if err := pause.Wait(ctx, 0); err != nil {
			return "", err
		}
	}
}

func (r *Registry) takenBy(entries []subnet.Entry, node string, publics []netip.Addr, subnets []netip.Prefix) string {
	saved := r.savedID()
	for _, e := range entries {
		taken, err := subnet.ParseKey(e.Key)
		if err != nil || !slices.ContainsFunc(taken, func(p netip.Prefix) bool { return slices.ContainsFunc(subnets, p.Overlaps) }) {
			continue
		}
		l, err := e.Lease()
		switch {
		case e.ID != 0 && e.ID == saved:
		case err != nil:
			return fmt.Sprintf("the malformed entry %s (%v) now holds it", e.Key, err)
		case l.Node == node:
		case l.Node == "" && slices.ContainsFunc(publics, func(a netip.Addr) bool { return slices.Contains(l.Publics(), a) }):
		case l.Reserved:
			return fmt.Sprintf("an administrator reserved %s", l)
		default:
			return l.String() + " now holds it"
		}
	}
	return ""
}

// write commits the choice, which is based on the list at revision listed, and
// checks the entries that were written between the two.
func (r *Registry) write(ctx context.Context, choice subnet.Choice, listed int64, g *grant) (subnet.Lease, error) {
	l := choice.Lease
	value, err := l.Value()
	if err != nil {
		return subnet.Lease{}, err
	}
	key := r.subnetsDir() + l.Key()
	var ifs []clientv3.Cmp
	if choice.Keep != nil {
		ifs = append(ifs, clientv3.Compare(clientv3.ModRevision(key), "=", choice.Keep.ModRevision))
	} else {
		ifs = r.stillFree(l, listed, len(choice.Drop) > 0)
	}
	var then []clientv3.Op
	for _, drop := range choice.Drop {
		old := r.subnetsDir() + drop.Key()
		ifs = append(ifs, clientv3.Compare(clientv3.ModRevision(old), "=", drop.ModRevision))
		then = append(then, clientv3.OpDelete(old))
	}
	put := clientv3.OpPut(key, string(value), clientv3.WithLease(clientv3.LeaseID(l.ID)))
	since := clientv3.OpGet(r.subnetsDir(), clientv3.WithPrefix(), clientv3.WithMinModRev(listed+1))
	then = append(then, put, since)

	rctx, cancel := r.request(ctx)
	defer cancel()
	resp, err := r.client.Txn(rctx).If(ifs...).Then(then...).Commit()
	if err != nil {
		if l.ID == g.id {
			g.unanswered = true
		}
		if expired(err) {
			*g = grant{}
		}
		return subnet.Lease{}, fmt.Errorf("write lease %s: %w", l, err)
	}
	if !resp.Succeeded {
		return subnet.Lease{}, fmt.Errorf("lease %s: %w", l, errRace)
	}
	l.ModRevision = resp.Header.Revision
	if choice.Keep == nil {
		l.CreateRevision = resp.Header.Revision
	}
	for _, kv := range resp.Responses[len(resp.Responses)-1].GetResponseRange().Kvs {
		if err := r.conflictsWithOlder(l, r.entry(kv)); err != nil {
			r.undo(ctx, choice, l)
			return subnet.Lease{}, err
		}
	}
	return l, nil
}

// stillFree returns the conditions under which the lease's subnets are free. All keys of
// one IPv4 subnet, dual stack or not, have a common prefix, so one range comparison
// suffices. The IPv6 part is at the end of the key, where no range finds it, and a
// replaced key of our own is in that range: then require that nothing under subnets/ was
// written since the list.
func (r *Registry) stillFree(l subnet.Lease, listed int64, replacing bool) []clientv3.Cmp {
	if len(l.Endpoints) == 1 && l.Endpoints[0].Subnet.Addr().Is4() && !replacing {
		key := clientv3.CreateRevision(r.subnetsDir() + l.Key())
		return []clientv3.Cmp{clientv3.Compare(key, "=", 0).WithPrefix()}
	}
	all := clientv3.ModRevision(r.subnetsDir())
	return []clientv3.Cmp{
		clientv3.Compare(all, "<", listed+1).WithPrefix(),
		clientv3.Compare(clientv3.CreateRevision(r.subnetsDir()+l.Key()), "=", 0),
	}
}

// conflictsWithOlder returns an error if the other entry is older than our lease and
// conflicts with it.
func (r *Registry) conflictsWithOlder(l subnet.Lease, e subnet.Entry) error {
	if e.CreateRevision >= l.CreateRevision || e.Key == l.Key() {
		return nil
	}
	other, err := e.Lease()
	if err != nil {
		return nil // malformed: it conflicts with no lease
	}
	if l.Overlaps(other) {
		return fmt.Errorf("%s overlaps %s: %w", l, other, errRace)
	}
	return l.Rival(other)
}

// undo deletes a lease that lost a race, unless it was written since. If that
// fails, the lease expires.
func (r *Registry) undo(ctx context.Context, choice subnet.Choice, l subnet.Lease) {
	if choice.Keep != nil {
		return // it was ours before; the next attempt decides
	}
	rctx, cancel := r.request(context.WithoutCancel(ctx))
	defer cancel()
	key := r.subnetsDir() + l.Key()
	_, err := r.client.Txn(rctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", l.ModRevision)).
		Then(clientv3.OpDelete(key)).Commit()
	if err != nil {
		r.log.Warn("a lease that lost a race could not be deleted", "subnet", l.Key(), "error", err)
	}
}

// ensureGranted ensures that g holds an etcd lease whose ID is saved.
func (r *Registry) ensureGranted(ctx context.Context, node string, ttl time.Duration, g *grant) error {
	if g.id != 0 {
		return nil
	}
	rctx, cancel := r.request(ctx)
	defer cancel()
	asked := time.Now()
	resp, err := r.client.Grant(rctx, seconds(ttl))
	if err != nil {
		return fmt.Errorf("grant an etcd lease: %w", err)
	}
	*g = grant{id: int64(resp.ID), ends: asked.Add(time.Duration(resp.TTL) * time.Second)}
	r.saveID(node, g.id)
	return nil
}

// timeToLive returns when an etcd lease expires, counted from before the request
// so that it is never too late, and its granted lifetime. The expiry is zero if
// etcd does not know the lease.
func (r *Registry) timeToLive(ctx context.Context, id int64) (ends time.Time, whole time.Duration, err error) {
	rctx, cancel := r.request(ctx)
	defer cancel()
	asked := time.Now()
	resp, err := r.client.TimeToLive(rctx, clientv3.LeaseID(id))
	switch {
	case expired(err):
		return time.Time{}, 0, nil
	case err != nil:
		return time.Time{}, 0, fmt.Errorf("ask for the etcd lease's time to live: %w", err)
	case resp.TTL <= 0:
		return time.Time{}, 0, nil
	}
	return asked.Add(time.Duration(resp.TTL) * time.Second), time.Duration(resp.GrantedTTL) * time.Second, nil
}

// revokeNow revokes an etcd lease; it returns nil once the lease does not exist.
func (r *Registry) revokeNow(ctx context.Context, id int64) error {
	rctx, cancel := r.request(ctx)
	defer cancel()
	if _, err := r.client.Revoke(rctx, clientv3.LeaseID(id)); err != nil && !expired(err) {
		return fmt.Errorf("revoke the etcd lease of an unanswered write: %w", err)
	}
	return nil
}

// revoke revokes an etcd lease, best effort: otherwise it expires.
func (r *Registry) revoke(id int64) {
	if id == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, _ = r.client.Revoke(ctx, clientv3.LeaseID(id))
}

func seconds(ttl time.Duration) int64 {
	return int64((ttl + time.Second - 1) / time.Second)
}
